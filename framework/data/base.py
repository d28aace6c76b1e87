"""The base of the data modules: arguments, splits, loaders, and the state in a checkpoint."""

from abc import ABC, abstractmethod
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from orthotrain.data.data_fingerprint import DataFingerprint
from orthotrain.data.loaders import BatchDataset, Loading, ResumableLoader, eval_loader, train_loader
from orthotrain.data.splits import SPLITS
from orthotrain.data.tokenizer_state import check_data_state, tokenizer_difference, tokenizer_state
from orthotrain.data.tokenizers import fingerprint
from orthotrain.errors import ConfigurationError

_MAX_BATCH_TOKENS, _MAX_WORKERS = 1 << 31, 1024


class BaseData(LightningDataModule, ABC):
    """A data module that tokenizes text, shares it between ranks, and resumes in the middle of an epoch.

    Subclasses give the tokenizer and a dataset for each split. They call ``save_hyperparameters`` in their constructor:
    a data module is built from its arguments alone, and a checkpoint only tells the position in the data.
    """

    batch_size: int
    """Samples of one batch on one device."""

    def __init__(self) -> None:
        super().__init__()
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self._restored: dict[str, Any] = {}

    @classmethod
    def load_from_checkpoint(cls, *arguments: Any, **options: Any) -> Any:
        """Refuse every call: Lightning's own method would build any class that the file names.

        Raises:
            ConfigurationError: Always; the message names the call that works.
        """
        raise ConfigurationError(
            f"{cls.__name__}.load_from_checkpoint: build the data module with its arguments, and give the checkpoint "
            "to trainer.fit(module, data, ckpt_path=file), which continues where the file stopped"
        )

    def _check_arguments(self, length: str, **least: int) -> None:
        """Refuse arguments that cannot work.

        Args:
            length: Name of the argument with the tokens of a sample.
            least: Name of an argument -> its smallest value.
        """
        given = self.hparams
        for name, smallest in {length: 1, "batch_size": 1, "num_workers": 0, **least}.items():
            if given[name] is not None and given[name] < smallest:
                raise ConfigurationError(f"{name} {given[name]}: must be at least {smallest}")
        for name in ("val_fraction", "test_fraction"):
            if not 0 <= given.get(name, 0) < 1:
                raise ConfigurationError(f"{name} {given[name]}: must be at least 0 and below 1")
        if given["batch_size"] * given[length] > _MAX_BATCH_TOKENS:
            raise ConfigurationError(
                f"batch_size {given['batch_size']} times {length} {given[length]}: a batch has at most "
                f"{_MAX_BATCH_TOKENS:,} tokens"
            )
        if given["num_workers"] > _MAX_WORKERS:
            raise ConfigurationError(f"num_workers {given['num_workers']}: must be at most {_MAX_WORKERS}")

    @property
    @abstractmethod
    def vocab_size(self) -> int | None:
        """Rows of the model's embedding; ``None`` if they are not known yet."""

    @abstractmethod
    def _load_tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer, once the data is prepared."""

    @abstractmethod
    def _dataset(self, split: str) -> BatchDataset:
        """Return the samples of a split."""

    @abstractmethod
    def _amount(self, split: str) -> str:
        """Return the size of a split, for messages."""

    @abstractmethod
    def _fingerprint(self) -> DataFingerprint:
        """Return the fingerprint of the training data."""

    def _predict_splits(self) -> tuple[str, ...]:
        """Return the splits that prediction needs."""
        return ()

    def setup(self, stage: str | None = None) -> None:
        """Load the tokenizer and the splits that a stage needs; prepare them if `prepare_data` did not run.

        Args:
            stage: ``fit``, ``validate``, ``test``, ``predict``, or ``None`` for all.

        Raises:
            ConfigurationError: A split is missing or too small, or its source cannot be used.
        """
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        self._compare_tokenizers()
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": self._predict_splits()}
        for split in SPLITS if stage is None else needed[stage]:
            if self._has(split):
                self._check_size(split)
            elif stage not in (None, "fit"):
                options = {f"{split}_source": "", f"{split}_fraction": " above 0"}
                remedies = [name + value for name, value in options.items() if name in self.hparams]
                raise ConfigurationError(f"{stage}: there is no {split} split; set {' or '.join(remedies)}")

    def _has(self, split: str) -> bool:
        given = self.hparams
        return split == "train" or bool(given.get(f"{split}_fraction")) or given.get(f"{split}_source") is not None

    def _check_size(self, split: str) -> None:
        needed = self._world_size * (self.batch_size if split == "train" else 1)
        if len(self._dataset(split)) < needed:
            remedies = [f"{split}_{name}" for name in ("fraction", "source") if f"{split}_{name}" in self.hparams]
            remedy = "lower batch_size" if split == "train" else f"set another {' or '.join(remedies)}"
            remedy += f" ({split}_fraction 0: no {split} split)" if f"{split}_fraction" in remedies else ""
            problem = f"the {split} split has {self._amount(split)}, but {needed} are needed"
            raise ConfigurationError(f"{problem}: give more data or {remedy}")

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, once the data is set up."""
        if self._tokenizer is None:
            raise RuntimeError(f"{type(self).__name__} has no tokenizer yet: call setup() first")
        return self._tokenizer

    @property
    def tokenizer_fingerprint(self) -> str:
        """Sha256 of the tokenizer's canonical JSON."""
        return fingerprint(self.tokenizer)

    @property
    def _loading(self) -> Loading:
        given, trainer = self.hparams, self.trainer
        overfits = trainer is not None and bool(trainer.overfit_batches)  # type: ignore[attr-defined]
        return Loading(self.batch_size, self._rank, self._world_size, given["num_workers"], given["seed"], overfits)

    def _train_loader(self) -> ResumableLoader:
        return train_loader(self._dataset("train"), self._loading)

    def amounts(self) -> dict[str, dict[str, int]]:
        """Return the size of each split that is set up: split -> unit -> number, for the summary of a run."""
        return {}

    def digests(self) -> dict[str, str]:
        """Return a digest of the content of the train and the validation split, for the summary of a run."""
        return {}

    def sample_prompt(self) -> list[int]:
        """Return tokens for a network to continue in the summary of a run; an empty list for no sample."""
        return []

    def train_dataloader(self) -> ResumableLoader:
        """Return the loader of training batches, which resumes in the middle of an epoch."""
        loader = self._train_loader()
        loader.fingerprint = self._fingerprint()
        loader.trainer = self.trainer
        return loader

    def val_dataloader(self) -> DataLoader | list:
        """Return the loader of every validation sample once; an empty list if there is no validation split."""
        return eval_loader(self._dataset("val"), self._loading) if self._has("val") else []

    def test_dataloader(self) -> DataLoader | list:
        """Return the loader of every test sample once; an empty list if there is no test split."""
        return eval_loader(self._dataset("test"), self._loading) if self._has("test") else []

    def state_dict(self) -> dict[str, Any]:
        """Return tokenizer and settings as plain values; `tokenizer_from_state` rebuilds the tokenizer."""
        size = {"vocab_size": self.vocab_size}
        return {**tokenizer_state(self.tokenizer), **size, "settings": {**self.hparams, **size}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the checkpoint's tokenizer with the tokenizer of this run.

        Raises:
            ConfigurationError: They differ, so the model's embedding would mean other tokens.
        """
        self._restored = check_data_state(state_dict)
        if self._tokenizer is not None:
            self._compare_tokenizers()

    def _compare_tokenizers(self) -> None:
        if self._restored and (difference := self._tokenizer_difference(self._restored)):
            DataFingerprint("", "", allow_changed=self.hparams["allow_changed"]).refuse(difference)

    def _tokenizer_difference(self, state: dict[str, Any]) -> str | None:
        return tokenizer_difference(state, self.tokenizer, {**self.hparams, "vocab_size": self.vocab_size})
