"""`InstructionData`: the finetuning data of a run, from rows of instructions to batches that train the responses."""

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from orthotrain.data.data_fingerprint import DataFingerprint
from orthotrain.data.instructions.examples import Columns, Example
from orthotrain.data.instructions.layouts import LayoutName, Limit, make_layout
from orthotrain.data.instructions.packing import PackedRows
from orthotrain.data.instructions.padding import PaddedRows, choose_rows, generation_batch
from orthotrain.data.instructions.row_faults import RowFaults
from orthotrain.data.instructions.sources import count_rows, read_examples
from orthotrain.data.instructions.stdlib_docstrings import STDLIB_DOCSTRINGS
from orthotrain.data.instructions.token_rows import TokenRows
from orthotrain.data.instructions.tokenizing import OnTooLong, tokenize_rows
from orthotrain.data.row_data import RowData
from orthotrain.data.splits import Splitter
from orthotrain.data.tokenizer_state import load_model_tokenizer
from orthotrain.devices.host_reads import is_ones, mark_ones, read_waits
from orthotrain.errors import ConfigurationError, check_choice

_DECIDES_CONTENT = (
    *("source", "val_source", "prompt_column", "response_column", "messages_column", "prompt_template", "layout"),
    *("max_length", "max_response_length", "on_too_long", "packing", "val_fraction", "seed", "ignored_keys"),
)


class InstructionData(RowData[TokenRows]):
    r"""Instructions and their responses for finetuning: the loss counts on responses only.

    A batch is ``input_ids``, ``labels`` and ``attention_mask``; ``labels[t]`` is the token after ``input_ids[t]``, or
    -100 if this token belongs to no response. The end-of-text token of a response counts. A batch holds rows of
    similar length and is padded (see `PaddedRows`, `LengthGroupedSampler`). With ``packing``, several rows share a
    sequence of static length and cannot see each other (see `PackedRows`; the model's attention must be ``sdpa`` or
    ``eager``). Each process tokenizes the rows into memory once, about 5 bytes for a token.

    For encoder-decoders set ``layout`` to ``seq2seq``: ``input_ids`` are then the prompt and ``labels`` the response,
    not shifted, as the networks of transformers expect them (`OftModule` with ``objective: model``).

    Args:
        tokenizer: The tokenizer of the model: a tokenizer.json, a folder with one, a Hugging Face name, or a .ckpt.
        source: ``python-stdlib-docstrings`` (functions of the standard library and their docstrings), a file, folder or
            glob of .jsonl .json (.gz) .parquet .arrow, a folder of ``save_to_disk``, a Hugging Face dataset
            ``org/name[:config][@split]``, or a list.
        val_source: Source of the validation rows; by default a share of ``source``.
        test_source: Source of the test rows; by default there are no test rows.
        prompt_column: Key of a row's prompt.
        response_column: Key of a row's response.
        messages_column: Key of a row's chat messages, objects with role (system, developer, user, assistant, tool),
            content and the other keys that the chat template writes. Without these columns a row may also be ShareGPT's
            ``conversations``, ``prompt`` and ``completion``, or Alpaca's ``instruction``, ``input`` and ``output``.
            The row's ``tools`` and ``system`` belong to the conversation.
        prompt_template: Text around a prompt, which replaces ``{prompt}``; by default the tokenizer's chat template, or
            ``"{prompt}\n"`` if the tokenizer has no chat template. Chat messages always use the chat template. With
            layout ``seq2seq``, the default is the prompt alone.
        layout: ``causal``: prompt and response in one sequence. ``seq2seq``: an encoder reads the prompt, and a decoder
            writes the response.
        max_length: Most tokens of an input; with packing, the length of all inputs.
        max_response_length: Most tokens of a response in layout ``seq2seq``; by default ``max_length``.
        on_too_long: ``drop`` longer rows, ``truncate`` them at the end, or ``error``. A log line counts these rows.
        packing: Put several rows in one sequence.
        batch_size: Sequences of one batch on one device.
        val_fraction: Share of ``source`` for validation, by a hash of the content or the built-in file; 0 for none.
        generation_samples: Rows of `generation_batches` and of ``predict``.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        seed: Seed of the split and of the order of the rows.
        ignored_keys: Keys of rows and messages to leave out; a key that the chat template does not write is refused.
        allow_changed: Whether a resumed run may continue with other training data, or another tokenizer, than the
            checkpoint's; a warning then names the difference.

    Raises:
        ConfigurationError: An argument cannot work; rows are checked in `setup`.

    Example:
        >>> data = InstructionData("models/smollm2-135m-instruct", "rows.jsonl", max_length=256, packing=True)
        >>> data.limits
        (Limit(argument='max_length', tokens=256, unit='tokens'),)
        >>> trainer.fit(module, data)  # doctest: +SKIP
    """

    built_in = STDLIB_DOCSTRINGS
    rows_used: int = 0
    """Rows of all splits that were set up."""
    rows_dropped: int = 0
    """Rows that were too long, had an empty answer or contained a special token."""

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
        ignored_keys: list[str] | None = None,
        allow_changed: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.layout = layout
        self.packing = packing
        self.max_length = max_length
        self.batch_size = batch_size
        self._check_tokenizer("instruction")
        self._check_arguments("max_length", max_length=2, generation_samples=1)
        check_choice("on_too_long", on_too_long, OnTooLong)
        self._layout = make_layout(layout, max_length, max_response_length, packing)

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The most tokens that a network has to read and to write, with the arguments that set the limits."""
        return self._layout.limits

    def _load_tokenizer(self) -> PreTrainedTokenizerFast:
        return load_model_tokenizer(self.hparams["tokenizer"])

    def _predict_splits(self) -> tuple[str, ...]:
        return ("test" if self._has("test") else "val",)

    def _read(self, source: str | list[str], splits: tuple[str, ...]) -> None:
        given = self.hparams
        splitter = Splitter(given["seed"], given["val_fraction"])

        def split_of(example: Example) -> str:
            return splits[0] if len(splits) == 1 else splitter(example.key)

        names = {name: given[f"{name}_column"] for name in ("prompt", "response", "messages")}
        columns, faults = Columns(**names, ignored=tuple(given["ignored_keys"] or ())), RowFaults()
        encoder = self._layout.encoder(self.tokenizer, given["prompt_template"])
        rank_zero_info(f"tokenizing the rows of {source!r}")
        examples, total = read_examples(source, columns, faults), count_rows(source)
        rows, counts = tokenize_rows(examples, encoder, split_of, self._layout, given["on_too_long"], total, faults)
        rank_zero_info(f"{source!r}: {counts.summary()}")
        self._rows |= {split: rows.get(split, self._layout.rows()) for split in splits}
        self.rows_used += counts.used
        self.rows_dropped += counts.dropped

    def _dataset(self, split: str) -> PackedRows | PaddedRows:
        rows, padding = self._split_rows(split), self.tokenizer.pad_token_id
        if self.packing:
            return PackedRows(rows, self.max_length, padding)
        # sorted rows need little padding; overfit_batches reads the first rows, which would be the shortest
        is_sorted = split != "train" and not self._loading.overfits
        return PaddedRows(rows, padding, rows.lengths.argsort(kind="stable") if is_sorted else None)

    def _amount(self, split: str) -> str:
        unit = f"sequences packed to max_length {self.max_length}" if self.packing else "rows"
        return f"{len(self._dataset(split))} {unit}"

    def amounts(self) -> dict[str, dict[str, int]]:
        """Return rows and tokens of each split that was read."""
        return {name: {"rows": len(rows), "tokens": int(rows.lengths.sum())} for name, rows in self._rows.items()}

    def sample_prompt(self) -> list[int]:
        """Return a held-out prompt."""
        split = next(name for name in ("test", "val", "train") if self._has(name))
        chosen = choose_rows(self._split_rows(split), 1)
        return self._split_rows(split).prompt(chosen[0]) if chosen else []

    def _fingerprint(self) -> DataFingerprint:
        given, rows = self.hparams, self._split_rows("train")
        settings = {name: given[name] for name in _DECIDES_CONTENT} | {"tokenizer": self.tokenizer_fingerprint[:12]}
        packed = f", packed to {self.max_length}" if self.packing else ""
        return DataFingerprint(rows.digest() + packed, f"{len(rows):,} rows{packed}", settings, given["allow_changed"])

    def predict_dataloader(self) -> DataLoader:
        """Return the loader of the prompts of `generation_batches` one by one, of the test or the validation split."""
        (split,) = self._predict_splits()
        chosen = choose_rows(self._split_rows(split), self.hparams["generation_samples"])
        return DataLoader([self._generation_batch(split, [row]) for row in chosen], batch_size=None)  # type: ignore[arg-type]

    def generation_batches(self, split: str = "val") -> list[dict[str, Any]]:
        """Return prompts, and the responses to compare answers with: this rank's share of ``generation_samples`` rows.

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
        ranks = self._world_size
        chosen = choose_rows(self._split_rows(split), self.hparams["generation_samples"])
        mine = chosen[: len(chosen) // ranks * ranks][self._rank :: ranks]
        starts = range(0, len(mine), self.batch_size)
        return [self._generation_batch(split, mine[start : start + self.batch_size]) for start in starts]

    def _generation_batch(self, split: str, rows: list[int]) -> dict[str, Any]:
        return generation_batch(self._split_rows(split), rows, self.tokenizer.pad_token_id)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Read the padding mask while it is on the host, if a later read would wait for the device."""
        assert self.trainer is not None
        self._without_padding = read_waits(self.trainer.strategy.root_device) and is_ones(batch.get("attention_mask"))
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Mark a padding mask without padding."""
        if self._without_padding:
            mark_ones(batch["attention_mask"])
        return batch

    def _tokenizer_difference(self, state: dict[str, Any]) -> str | None:
        if difference := super()._tokenizer_difference(state):
            return difference
        if state.get("chat_template") == self.tokenizer.chat_template:
            return None
        return (
            f"tokenizer {self.hparams['tokenizer']!r}: its chat template differs from the checkpoint's; use the "
            "tokenizer with which the run began"
        )
