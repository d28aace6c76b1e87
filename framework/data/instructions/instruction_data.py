"""`InstructionData`: the finetuning data of a run, from rows of instructions to batches that train the responses."""

from typing import Any

from lightning import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from orthotrain.data.corpus.readers import Document
from orthotrain.data.corpus.tokenizing import Splitter
from orthotrain.data.identity import DataIdentity, check_data_state, check_sizes
from orthotrain.data.instructions.chat import load_instruction_tokenizer
from orthotrain.data.instructions.docstrings import STDLIB_DOCSTRINGS
from orthotrain.data.instructions.encoding import OnTooLong, encode_rows
from orthotrain.data.instructions.layouts import LayoutName, Limit, make_layout
from orthotrain.data.instructions.loaders import Loading, eval_loader, train_loader
from orthotrain.data.instructions.packing import PackedRows
from orthotrain.data.instructions.padding import PaddedRows
from orthotrain.data.instructions.prompts import choose_rows, generation_batch
from orthotrain.data.instructions.rows import Columns, Example
from orthotrain.data.instructions.sources import count_rows, read_examples
from orthotrain.data.instructions.token_rows import TokenRows
from orthotrain.data.module import BuiltFromArguments
from orthotrain.data.sampling import EpochProgress, ResumableLoader
from orthotrain.data.tokenizers import fingerprint, tokenizer_difference, tokenizer_state, tokens_in
from orthotrain.devices.host_reads import is_ones, mark_ones, read_waits
from orthotrain.errors import ConfigurationError

_STAGE_SPLITS = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": (),
    None: ("train", "val"),
}

_DECIDES_CONTENT = (
    *("source", "val_source", "prompt_column", "response_column", "messages_column", "prompt_template", "layout"),
    *("max_length", "max_response_length", "on_too_long", "packing", "val_fraction", "seed"),
)


class InstructionData(BuiltFromArguments, LightningDataModule):
    r"""Instructions and their responses for finetuning: the loss counts on responses only.

    A batch is ``input_ids``, ``labels`` and ``attention_mask``; ``labels[t]`` is the token after ``input_ids[t]``, or
    -100 where that belongs to no response. The end-of-text token of a response counts. Batches are padded and of rows
    of similar length (see `PaddedRows`, `LengthGroupedSampler`), or with ``packing`` several rows share a sequence of
    static length and cannot see each other (see `PackedRows`; the model's attention must be ``sdpa`` or ``eager``).
    Rows are tokenized into memory, about 5 bytes a token, once per process.

    For encoder-decoders set ``layout`` to ``seq2seq``: ``input_ids`` are then the prompt and ``labels`` the response,
    not shifted, as the networks of transformers expect them (`OftModule` with ``objective: model``).

    Args:
        tokenizer: The model's: a tokenizer.json, a folder with one, a Hugging Face name, or a .ckpt of orthotrain.
        source: ``python-stdlib-docstrings`` (functions of the standard library and their docstrings), a file, folder or
            glob of .jsonl .json (.gz) .parquet, a Hugging Face dataset ``org/name[:config][@split]``, or a list.
        val_source: Where validation rows come from; by default a share of ``source``.
        test_source: Where test rows come from; by default there are none.
        prompt_column: Key of a row's prompt.
        response_column: Key of a row's response.
        messages_column: Key of a row's chat messages, objects with role (system, user, assistant) and content.
        prompt_template: Text around a prompt, ``{prompt}`` standing for it; by default the tokenizer's chat template,
            or ``"{prompt}\n"`` where it has none. Chat messages always use the chat template. With layout ``seq2seq``
            the prompt alone by default.
        layout: ``causal``, prompt and response in one sequence, or ``seq2seq``, the one read and the other written.
        max_length: Most tokens of an input; with packing, the length of all inputs.
        max_response_length: Most tokens of a response in layout ``seq2seq``; by default as ``max_length``.
        on_too_long: Longer rows are dropped, truncated at the end, or an error; counted and logged.
        packing: Put several rows in one sequence.
        batch_size: Sequences of one batch on one device.
        val_fraction: Share of ``source`` for validation, by a hash of the content; 0 for none.
        generation_samples: Rows of `generation_batches` and of ``predict``.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        seed: Seed of the split and of the order of the rows.
        allow_changed: Whether a run that is resumed may go on with other training data, or another tokenizer, than the
            checkpoint's; what differs is then said in a line.

    Raises:
        ConfigurationError: An argument that cannot work; rows are checked in `setup`.
    """

    rows_used: int = 0
    """Rows of all splits set up so far."""
    rows_dropped: int = 0
    """Rows that were too long or spell a special token."""

    def __init__(
        self,
        tokenizer: str | None = None,
        source: str | list[str] = STDLIB_DOCSTRINGS,
        val_source: str | list[str] | None = None,
        test_source: str | list[str] | None = None,
        prompt_column: str = "prompt",
        response_column: str = "response",
        messages_column: str = "messages",
        prompt_template: str | None = None,
        layout: LayoutName = "causal",
        max_length: int = 512,
        max_response_length: int | None = None,
        on_too_long: OnTooLong = "drop",
        packing: bool = False,
        batch_size: int = 8,
        val_fraction: float = 0.05,
        generation_samples: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        allow_changed: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.layout = layout
        self.packing = packing
        self.max_length = max_length
        self.batch_size = batch_size
        self._check_arguments()
        self._layout = make_layout(layout, max_length, max_response_length, packing)
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self._rows: dict[str, TokenRows] = {}
        self._restored: dict[str, Any] = {}

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The most tokens of what a network reads and writes, and the arguments that set them."""
        return self._layout.limits

    @property
    def _given(self) -> Any:
        """The constructor's arguments."""
        return self.hparams

    def _check_arguments(self) -> None:
        given = self._given
        if not given.tokenizer:
            load_instruction_tokenizer(given.tokenizer)
        for name, least in (("max_length", 2), ("batch_size", 1), ("num_workers", 0), ("generation_samples", 1)):
            if given[name] < least:
                raise ConfigurationError(f"{name} {given[name]}: must be at least {least}")
        check_sizes(self.batch_size, self.max_length, given.num_workers)
        if not 0 <= given.val_fraction < 1:
            raise ConfigurationError(f"val_fraction {given.val_fraction}: must be at least 0 and below 1")
        if given.on_too_long not in ("drop", "truncate", "error"):
            raise ConfigurationError(f"on_too_long {given.on_too_long!r}: must be drop, truncate or error")

    def setup(self, stage: str | None = None) -> None:
        """Load the tokenizer and tokenize the rows that a stage needs.

        Args:
            stage: ``fit``, ``validate``, ``test``, ``predict``, or ``None`` for train and validation.

        Raises:
            ConfigurationError: A row or a tokenizer that cannot be used, or a split with too few rows.
        """
        if self._tokenizer is None:
            self._tokenizer = load_instruction_tokenizer(self._given.tokenizer)
        self._compare_tokenizers()
        splits = ("test" if self._has("test") else "val",) if stage == "predict" else _STAGE_SPLITS[stage]
        for split in splits:
            if self._has(split):
                self._check_size(split)
            elif stage is not None and stage != "fit":
                remedy = "test_source" if split == "test" else "val_source, or val_fraction above 0"
                raise ConfigurationError(f"{stage}: there is no {split} split; set {remedy}")

    def _has(self, split: str) -> bool:
        if split == "val":
            return self._given.val_source is not None or self._given.val_fraction > 0
        return split == "train" or self._given.test_source is not None

    def _check_size(self, split: str) -> None:
        dataset = self._dataset(split)
        needed = self.batch_size * self._world_size if split == "train" else self._world_size
        if len(dataset) < needed:
            what = f"sequences packed to max_length {self.max_length}" if self._given.packing else "rows"
            remedy = "lower batch_size" if split == "train" else f"raise {split}_fraction or give {split}_source"
            raise ConfigurationError(
                f"the {split} split has {len(dataset)} {what} but needs {needed}: give more rows or {remedy}"
            )

    def _split_rows(self, split: str) -> TokenRows:
        """The rows of a split; read and tokenized, with the splits of the same source, when first asked for."""
        if split not in self._rows:
            given = self._given
            if split == "test" or (split == "val" and given.val_source is not None):
                self._read(given[f"{split}_source"], (split,))
            else:
                self._read(given.source, ("train", "val") if given.val_source is None else ("train",))
        return self._rows[split]

    def _read(self, source: str | list[str], splits: tuple[str, ...]) -> None:
        given = self._given
        splitter = Splitter(given.seed, given.val_fraction, 0.0)

        def split_of(example: Example) -> str:
            return splits[0] if len(splits) == 1 else splitter(Document(None, example.key))

        columns = Columns(given.prompt_column, given.response_column, given.messages_column)
        encoder = self._layout.encoder(self.tokenizer, given.prompt_template)
        rank_zero_info(f"tokenizing the rows of {source!r}")
        examples, total = read_examples(source, columns), count_rows(source)
        rows, account = encode_rows(examples, encoder, split_of, self._layout, given.on_too_long, total)
        rank_zero_info(f"{source!r}: {account.line()}")
        self._rows |= {split: rows.get(split, self._layout.rows()) for split in splits}
        self.rows_used += account.used
        self.rows_dropped += account.dropped

    def _dataset(self, split: str) -> PackedRows | PaddedRows:
        rows, padding = self._split_rows(split), self.tokenizer.pad_token_id
        if self._given.packing:
            return PackedRows(rows, self.max_length, padding)
        return PaddedRows(rows, padding, None if split == "train" else rows.lengths.argsort(kind="stable"))

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, once set up."""
        if self._tokenizer is None:
            raise RuntimeError("InstructionData has no tokenizer yet: call setup() first")
        return self._tokenizer

    @property
    def vocab_size(self) -> int | None:
        """Rows that the model's embedding must have at least; ``None`` before the tokenizer is loaded."""
        return None if self._tokenizer is None else tokens_in(self._tokenizer)

    @property
    def tokenizer_fingerprint(self) -> str:
        """Sha256 of the tokenizer's canonical JSON."""
        return fingerprint(self.tokenizer)

    @property
    def _loading(self) -> Loading:
        given, trainer = self._given, self.trainer
        overfits = trainer is not None and bool(trainer.overfit_batches)  # type: ignore[attr-defined]
        return Loading(self.batch_size, self._rank, self._world_size, given.num_workers, given.seed, overfits)

    def train_dataloader(self) -> ResumableLoader:
        """Batches in the order of (seed, epoch), resuming mid-epoch; see `LengthGroupedSampler`, `TrainSampler`."""
        loader = train_loader(self._dataset("train"), self._loading)
        loader.identity = self._identity
        if self.trainer is not None:
            loader.progress = EpochProgress(self.trainer)
        return loader

    @property
    def _identity(self) -> DataIdentity:
        """What training reads."""
        given, rows = self._given, self._split_rows("train")
        settings = {name: given[name] for name in _DECIDES_CONTENT} | {"tokenizer": self.tokenizer_fingerprint[:12]}
        packed = f", packed to {self.max_length}" if given.packing else ""
        return DataIdentity(rows.digest() + packed, f"{len(rows):,} rows{packed}", settings, given.allow_changed)

    def val_dataloader(self) -> DataLoader | list:
        """Every validation row once, rows of similar length together; nothing where there is no such split."""
        return eval_loader(self._dataset("val"), self._loading) if self._has("val") else []

    def test_dataloader(self) -> DataLoader | list:
        """Every test row once, rows of similar length together; nothing where there is no ``test_source``."""
        return eval_loader(self._dataset("test"), self._loading) if self._has("test") else []

    def predict_dataloader(self) -> DataLoader:
        """The prompts of `generation_batches` one by one, of the test split where there is one, else of validation."""
        rows, pad_token = self._split_rows("test" if self._has("test") else "val"), self.tokenizer.pad_token_id
        chosen = choose_rows(rows, self._given.generation_samples)
        batches = [generation_batch(rows, [row], pad_token) for row in chosen]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def generation_batches(self, split: str = "val") -> list[dict[str, Any]]:
        """Prompts to answer and the answers to compare with, this rank's share of ``generation_samples`` rows.

        Args:
            split: ``val``, ``test`` or ``train``.

        Returns:
            Batches of ``input_ids`` and ``attention_mask``, int64 of shape ``(B, T)``, padded on the left (on the right
            for an encoder), and ``references``, a list of B strings; the same number of rows on each rank.

        Raises:
            ConfigurationError: There is no such split.
        """
        if not self._has(split):
            raise ConfigurationError(f"generation: there is no {split} split; set {split}_source")
        rows, ranks = self._split_rows(split), self._world_size
        chosen = choose_rows(rows, self._given.generation_samples)
        mine = chosen[: len(chosen) // ranks * ranks][self._rank :: ranks]
        starts, pad_token = range(0, len(mine), self.batch_size), self.tokenizer.pad_token_id
        return [generation_batch(rows, mine[start : start + self.batch_size], pad_token) for start in starts]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Look at the padding mask while it is on the host, if a later look would wait for the device."""
        assert self.trainer is not None
        self._without_padding = read_waits(self.trainer.strategy.root_device) and is_ones(batch.get("attention_mask"))
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Mark a padding mask without padding."""
        if self._without_padding:
            mark_ones(batch["attention_mask"])
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The tokenizer and the settings as plain values; `tokenizer_from_state` reads the tokenizer back."""
        sizes = {"vocab_size": tokens_in(self.tokenizer)}
        return {**tokenizer_state(self.tokenizer), **sizes, "settings": {**self.hparams, **sizes}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the checkpoint's tokenizer with this run's.

        Raises:
            ConfigurationError: The two differ, or their chat templates do.
        """
        self._restored = check_data_state(state_dict)
        if self._tokenizer is not None:
            self._compare_tokenizers()

    def _compare_tokenizers(self) -> None:
        if not self._restored:
            return
        difference = tokenizer_difference(self._restored, self.tokenizer, tokens_in(self.tokenizer))
        if not difference and self._restored.get("chat_template") != tokenizer_state(self.tokenizer)["chat_template"]:
            difference = (
                f"tokenizer {self._given.tokenizer!r}: its chat template differs from the checkpoint's; use the "
                "tokenizer that the run began with"
            )
        if difference:
            DataIdentity("", "", allow_changed=self._given.allow_changed).refuse(difference)
