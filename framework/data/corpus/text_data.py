"""`TextData`: the pretraining data of a run, from a source of text to batches of packed tokens."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from orthotrain.data.corpus.cache_folder import folder_name, prepare_folder
from orthotrain.data.corpus.sources import open_corpus
from orthotrain.data.corpus.streaming import StreamLoader, TokenStream
from orthotrain.data.corpus.token_cache import TokenCache
from orthotrain.data.corpus.tokenizing import SPLITS, Splitter
from orthotrain.data.evaluation import EvalBatches, document_beginnings
from orthotrain.data.identity import DataIdentity, check_data_state, check_sizes
from orthotrain.data.instructions.encoding import most_characters
from orthotrain.data.module import BuiltFromArguments
from orthotrain.data.sampling import EpochProgress, ResumableLoader, TokenWindows, TrainSampler
from orthotrain.data.tokenizer_use import encoding_with
from orthotrain.data.tokenizers import check_vocabulary_size, fingerprint, tokenizer_difference, tokenizer_state
from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import local_path

STREAM_HEAD_BYTES = 64 << 20
"""How much of a stream is read to train the tokenizer and to set validation and test documents aside."""

_STAGE_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": (), None: SPLITS}
_DECIDES_CONTENT = (
    *("text_column", "streaming", "tokenizer", "vocab_size"),
    *("val_fraction", "test_fraction", "seed", "limit_bytes"),
)


class TextData(BuiltFromArguments, LightningDataModule):
    """Text for pretraining: tokenized once into memory-mapped caches, cut into windows, in a resumable order.

    A batch is ``{"input_ids", "labels"}``, both int64 of shape ``(batch_size, sequence_length)``, where ``labels[t]``
    is the token after ``input_ids[t]``. Documents are joined by the end-of-text token and assigned to train, val or
    test as wholes, by a hash of their name (rows: of their text) and the seed.

    Args:
        source: ``python-stdlib`` (the standard library's own sources), a file, folder or glob of .txt .md .py .jsonl
            .json .parquet (.gz), a Hugging Face dataset ``org/name[:config]``, or a list of these.
        text_column: Key of the text in rows of jsonl, json, parquet and Hugging Face datasets.
        streaming: Train from the stream of documents in the source's order instead of a cache of all of it. The
            tokenizer, validation and test then come from the first 64 MiB. At most one worker.
        tokenizer: A tokenizer.json, a folder with one, or a Hugging Face name; by default a byte-level BPE is trained
            on the train split.
        vocab_size: Rows of the model's embedding: the size to train, or at least the size of the given tokenizer.
        sequence_length: Tokens of one training sequence.
        batch_size: Sequences of one batch on one device.
        val_fraction: Share of documents for validation; 0 for none.
        test_fraction: Share of documents for the test; 0 for none.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        cache_dir: Folder of the token caches; by default $ORTHOTRAIN_CACHE, else ~/.cache/orthotrain.
        seed: Seed of the split and of the order of the sequences.
        limit_bytes: Read at most about this much text from the source; by default all of it.
        predict_prompts: Texts to continue in ``predict``; by default the beginnings of held-out documents.
        allow_changed: Whether a run that is resumed may go on with other training data, or another tokenizer, than the
            checkpoint's; what differs is then said in a line.

    Raises:
        ConfigurationError: An argument that cannot work; sources and tokenizers are checked when data is prepared.
    """

    def __init__(
        self,
        source: str | list[str] = "python-stdlib",
        text_column: str = "text",
        streaming: bool = False,
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        sequence_length: int = 256,
        batch_size: int = 16,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        num_workers: int = 0,
        cache_dir: str | None = None,
        seed: int = 0,
        limit_bytes: int | None = None,
        predict_prompts: list[str] | None = None,
        allow_changed: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self._splitter = Splitter(seed, val_fraction, test_fraction)
        self._check_arguments()
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self._caches: dict[str, TokenCache] = {}
        self._restored: dict[str, Any] = {}

    @property
    def _given(self) -> Any:
        """The constructor's arguments."""
        return self.hparams

    def _check_arguments(self) -> None:
        given = self._given
        if given.tokenizer is None:
            check_vocabulary_size(self.vocab_size)
        for name, least in (("sequence_length", 1), ("batch_size", 1), ("num_workers", 0), ("limit_bytes", 1)):
            if given[name] is not None and given[name] < least:
                raise ConfigurationError(f"{name} {given[name]}: must be at least {least}")
        check_sizes(self.batch_size, self.sequence_length, given.num_workers)
        for name in ("val_fraction", "test_fraction"):
            if not 0 <= given[name] < 1:
                raise ConfigurationError(f"{name} {given[name]}: must be at least 0 and below 1")
        if given.val_fraction + given.test_fraction >= 1:
            raise ConfigurationError(
                f"val_fraction {given.val_fraction} and test_fraction {given.test_fraction}: together they must stay "
                "below 1, the rest is the train split"
            )
        if given.streaming and given.num_workers > 1:
            raise ConfigurationError(f"num_workers {given.num_workers}: a streamed source is read by one; set 0 or 1")

    @property
    def cache_folder(self) -> Path:
        """Folder of this corpus: one for each combination of the settings that decide its content."""
        given = self._given
        sources = [given.source] if isinstance(given.source, str) else given.source
        root = given.cache_dir or os.environ.get("ORTHOTRAIN_CACHE") or "~/.cache/orthotrain"
        return local_path(root, "cache_dir") / folder_name(sources, {name: given[name] for name in _DECIDES_CONTENT})

    def prepare_data(self) -> None:
        """Train the tokenizer and write the token caches, unless they are there and made from the same inputs."""
        given = self._given
        limit = given.limit_bytes
        if given.streaming:
            limit = min(limit or STREAM_HEAD_BYTES, STREAM_HEAD_BYTES)
        corpus = open_corpus(given.source, given.text_column, given.streaming, limit)
        self._tokenizer = prepare_folder(self.cache_folder, corpus, self._splitter, given.tokenizer, self.vocab_size)
        self._caches.clear()

    def setup(self, stage: str | None = None) -> None:
        """Open the caches that a stage needs, preparing them first where `prepare_data` did not run.

        Args:
            stage: ``fit``, ``validate``, ``test``, ``predict``, or ``None`` for all.

        Raises:
            ConfigurationError: A split that is needed is too short, or a cache is damaged.
        """
        if self._tokenizer is None:
            self.prepare_data()
        self._compare_tokenizers()
        if stage in ("validate", "test") and not self._has(name := "val" if stage == "validate" else "test"):
            raise ConfigurationError(f"{name}_fraction 0: there is no {name} split; set {name}_fraction above 0")
        for split in _STAGE_SPLITS[stage]:
            if self._has(split):
                self._check_length(split)

    def _has(self, split: str) -> bool:
        return split == "train" or self._given[f"{split}_fraction"] > 0

    def _check_length(self, split: str) -> None:
        windows = len(self._windows(split))
        needed = self.batch_size * self._world_size if split == "train" else 1
        if windows < needed:
            remedy = "lower batch_size" if split == "train" else f"raise {split}_fraction"
            raise ConfigurationError(
                f"the {split} split has {self._cache(split).metadata.tokens} tokens, enough for {windows} sequences of "
                f"sequence_length {self.sequence_length}, but needs {needed}: give more text, lower sequence_length or "
                f"{remedy}"
            )

    def _cache(self, split: str) -> TokenCache:
        if split not in self._caches:
            self._caches[split] = TokenCache.open(self.cache_folder / f"{split}.tokens")
        return self._caches[split]

    def _windows(self, split: str) -> TokenWindows:
        return TokenWindows(self._cache(split), self.sequence_length)

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, once data is prepared."""
        if self._tokenizer is None:
            raise RuntimeError("TextData has no tokenizer yet: call prepare_data() or setup() first")
        return self._tokenizer

    @property
    def tokenizer_fingerprint(self) -> str:
        """Sha256 of the tokenizer's canonical JSON."""
        return fingerprint(self.tokenizer)

    @property
    def train_tokens(self) -> int | None:
        """Tokens of the train split; ``None`` for a stream, whose end is not known."""
        return None if self._given.streaming else self._cache("train").metadata.tokens

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of a split's text over its tokens (for a stream: of its first 64 MiB).

        Bits per byte are the mean loss in nats over ``ln(2) * bytes_per_token(split)``.

        Args:
            split: ``train``, ``val`` or ``test``.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
        metadata = self._cache(split).metadata
        return metadata.text_bytes / max(metadata.tokens, 1)

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        """Batches of static shape in the order of (seed, epoch); see `TrainSampler` and `TokenStream`."""
        given, rank, ranks = self._given, self._rank, self._world_size
        loader: ResumableLoader | StreamLoader
        if given.streaming:
            corpus = open_corpus(given.source, given.text_column, True, given.limit_bytes)
            stream = TokenStream(
                corpus, self._splitter, self.tokenizer, self.sequence_length, self.batch_size, rank, ranks
            )
            loader = StreamLoader(stream, num_workers=given.num_workers, pin_memory=torch.cuda.is_available())
        else:
            windows = self._windows("train")
            sampler = TrainSampler(len(windows), self.batch_size, rank, ranks, given.seed)
            loader = ResumableLoader(windows, sampler=sampler, drop_last=True, **self._loader_options)
        loader.identity = self._identity
        if self.trainer is not None:
            loader.progress = EpochProgress(self.trainer)
        return loader

    @property
    def _identity(self) -> DataIdentity:
        """What training reads; of a stream, its beginning."""
        given, metadata = self._given, self._cache("train").metadata
        settings = {name: given[name] for name in ("source", *_DECIDES_CONTENT) if name != "tokenizer"}
        settings["tokenizer"] = self.tokenizer_fingerprint[:12]
        return DataIdentity(metadata.content, f"{metadata.tokens:,} tokens", settings, given.allow_changed)

    @property
    def _loader_options(self) -> dict[str, Any]:
        workers = self._given.num_workers
        return {
            "batch_size": self.batch_size,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def val_dataloader(self) -> DataLoader | list:
        """Every window of the val split once, in order; nothing where ``val_fraction`` is 0."""
        return self._eval_loader("val") if self._has("val") else []

    def test_dataloader(self) -> DataLoader | list:
        """Every window of the test split once, in order; nothing where ``test_fraction`` is 0."""
        return self._eval_loader("test") if self._has("test") else []

    def _eval_loader(self, split: str) -> DataLoader:
        windows, options = self._windows(split), self._loader_options
        if self.trainer is not None and self.trainer.world_size > 1 and not self.trainer.overfit_batches:  # type: ignore[attr-defined]
            batches = EvalBatches(len(windows), self.batch_size, self._rank, self._world_size)
            return DataLoader(windows, sampler=batches, **options | {"batch_size": None})
        return DataLoader(windows, **options)

    def predict_dataloader(self) -> DataLoader:
        """One prompt a batch, ``{"input_ids"}`` of shape ``(1, length)``: texts to continue."""
        texts = self._given.predict_prompts
        if texts:
            most = most_characters(self.sequence_length)
            for number, text in enumerate(texts, start=1):
                if len(text) > most:
                    raise ConfigurationError(
                        f"predict_prompts: prompt {number} has {len(text):,} characters, far more than sequence_length "
                        f"{self.sequence_length} tokens; give at most {most:,}"
                    )
            with encoding_with(self.tokenizer):
                prompts = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
            if [] in prompts:
                raise ConfigurationError(f"predict_prompts: prompt {prompts.index([]) + 1} is empty; give it some text")
        else:  # without held-out text the train split must do
            split = next(name for name in ("test", "val", "train") if self._has(name))
            prompts = document_beginnings(self._cache(split), self.tokenizer.eos_token_id)
        return DataLoader([{"input_ids": torch.tensor(prompt)} for prompt in prompts], batch_size=1)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """The tokenizer and the settings as plain values; `tokenizer_from_state` reads the tokenizer back."""
        return {**tokenizer_state(self.tokenizer), "vocab_size": self.vocab_size, "settings": dict(self.hparams)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the checkpoint's tokenizer with this run's.

        Raises:
            ConfigurationError: The two differ, so the model's embedding would mean other tokens.
        """
        self._restored = check_data_state(state_dict)
        if self._tokenizer is not None:
            self._compare_tokenizers()

    def _compare_tokenizers(self) -> None:
        if not self._restored:
            return
        if difference := tokenizer_difference(self._restored, self.tokenizer, self.vocab_size):
            DataIdentity("", "", allow_changed=self._given.allow_changed).refuse(difference)
