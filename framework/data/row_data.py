"""The part of a data module whose rows are tokenized into memory, at once for all splits of a source."""

from abc import abstractmethod
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from orthotrain.data.base import BaseData
from orthotrain.data.stdlib_files import PYTHON_STDLIB
from orthotrain.data.tokenizers import number_of_tokens
from orthotrain.errors import ConfigurationError


class Rows(Protocol):
    """The tokenized rows of a split."""

    def digest(self) -> str:
        """Return a digest of their content."""


AnyRows = TypeVar("AnyRows", bound=Rows)


class RowData(BaseData, Generic[AnyRows]):
    """A data module of rows, with the tokenizer of a pretrained model and the sources ``source``, ``val_source``, ...

    Attributes:
        _rows: Split -> its rows, of the splits that were read.
    """

    built_in: ClassVar[str]
    """The source that comes with Python: functions of the files of ``python-stdlib``."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[str, AnyRows] = {}

    def _check_tokenizer(self, kind: str) -> None:
        """Refuse a data module without a tokenizer; ``kind`` says whose data need it."""
        if not (tokenizer := self.hparams["tokenizer"]):
            raise ConfigurationError(
                f"tokenizer {tokenizer!r}: {kind} data needs the tokenizer of the model; give its folder, its Hugging "
                "Face name or the .ckpt of its run"
            )

    @property
    def vocab_size(self) -> int | None:
        """Rows that the model's embedding must have at least; ``None`` before the tokenizer is loaded."""
        return None if self._tokenizer is None else number_of_tokens(self._tokenizer)

    @abstractmethod
    def _read(self, source: Any, splits: tuple[str, ...]) -> None:
        """Read a source, and put the rows of its splits into ``_rows``."""

    def _split_rows(self, split: str) -> AnyRows:
        """Return the rows of a split. The first call reads and tokenizes all splits of the same source."""
        if split not in self._rows:
            given = self.hparams
            if split == "test" or (split == "val" and given["val_source"] is not None):
                self._read(given[f"{split}_source"], (split,))
            else:
                self._warn_of_seen_files()
                self._read(given["source"], ("train", "val") if given["val_source"] is None else ("train",))
        return self._rows[split]

    def _warn_of_seen_files(self) -> None:
        """Warn if the model has been pretrained on files of built-in rows that are held out here."""
        given, before = self.hparams, getattr(self.tokenizer, "data_settings", {})
        own, pretrained = (
            source if isinstance(source, list) else [source] for source in (given["source"], before.get("source"))
        )
        if self.built_in not in own or PYTHON_STDLIB not in pretrained or given["val_source"] is not None:
            return
        shares = (before.get(f"{split}_fraction") for split in ("val", "test") if not before.get(f"{split}_source"))
        held_out = sum(share for share in shares if isinstance(share, float))
        if given["val_fraction"] and (given["seed"] != before.get("seed") or given["val_fraction"] > held_out):
            rank_zero_warn(
                f"source {self.built_in!r}: the model was pretrained on files of its validation rows; set seed "
                f"{before.get('seed')!s:.20} and a val_fraction of at most {held_out:g}, as its pretraining held out"
            )

    def digests(self) -> dict[str, str]:
        """Return a digest of the rows of the train and of the validation split."""
        return {split: self._split_rows(split).digest() for split in ("train", "val") if self._has(split)}
