"""`TextData`: the pretraining data of a run, from a source of text to batches of packed tokens."""

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from orthotrain.data.base import BaseData
from orthotrain.data.corpus.cache_folder import folder_name, prepare_folder
from orthotrain.data.corpus.sources import Corpus, open_corpus, source_location
from orthotrain.data.corpus.streaming import StreamLoader, TokenStream
from orthotrain.data.corpus.token_cache import TokenCache
from orthotrain.data.corpus.token_windows import TokenWindows, document_beginnings
from orthotrain.data.data_fingerprint import DataFingerprint
from orthotrain.data.loaders import ResumableLoader
from orthotrain.data.splits import SPLITS, Splitter, fitting_splitter
from orthotrain.data.token_bytes import token_bytes
from orthotrain.data.tokenizer_checks import encoding_with, max_characters
from orthotrain.data.tokenizers import check_vocabulary_size
from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import local_path

STREAM_HEAD_BYTES = 64 << 20
"""Bytes at the beginning of a stream from which the tokenizer, validation and test documents are taken."""

_DECIDES_CONTENT = (
    *("val_source", "test_source", "text_column", "streaming", "tokenizer", "vocab_size"),
    *("val_fraction", "test_fraction", "seed", "limit_bytes"),
)


def _list(source: str | list[str] | None) -> list[str]:
    return [source] if isinstance(source, str) else list(source or [])


class TextData(BaseData):
    """Text for pretraining: tokenized once into memory-mapped caches, cut into windows, in a resumable order.

    A batch is ``{"input_ids", "labels"}``, both int64 of shape ``(batch_size, sequence_length)``, where ``labels[t]``
    is the token after ``input_ids[t]``. Documents are joined by the end-of-text token and assigned to train, val or
    test as wholes, by a hash of their name (rows: of their text) and the seed. Near-duplicate files of
    ``python-stdlib`` are in one split, and so are their functions in finetuning (see `stdlib_split_keys`). If there are
    so few documents that a split would get none, the splits are contiguous parts of the text (see `PositionSplitter`).
    Training batches come in the order of seed and epoch (see `TrainSampler`), or in the order of the stream (see
    `TokenStream`).

    Args:
        source: ``python-stdlib`` (the standard library's own sources), a file, folder or glob of .txt .md .py .jsonl
            .json .parquet .arrow (.gz), a folder of ``save_to_disk``, a Hugging Face dataset
            ``org/name[:config][@split]``, or a list of these.
        val_source: Source of the validation text; by default a share of ``source``.
        test_source: Source of the test text; by default a share of ``source``.
        text_column: Key of the text in rows of jsonl, json, parquet and Hugging Face datasets.
        streaming: Train from the stream of documents in the order of the source, without a cache of all tokens. The
            tokenizer, validation and test then come from the first 64 MiB. At most one worker.
        tokenizer: A tokenizer.json, a folder with one, or a Hugging Face name; by default a byte-level BPE is trained
            on the train split.
        vocab_size: Rows of the model's embedding: the size to train, or at least the size of the given tokenizer.
        sequence_length: Tokens of one training sequence.
        batch_size: Sequences of one batch on one device.
        val_fraction: Share of ``source`` for validation; 0 for none.
        test_fraction: Share of ``source`` for the test; 0 for none.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        cache_dir: Folder of the token caches; by default $ORTHOTRAIN_CACHE, else ~/.cache/orthotrain.
        seed: Seed of the split and of the order of the sequences.
        limit_bytes: Read at most about this much text from ``source``; by default all of it.
        predict_prompts: Texts to continue in ``predict``; by default the beginnings of held-out documents.
        allow_changed: Whether a resumed run may continue with other training data, or another tokenizer, than the
            checkpoint's; a warning then names the difference.

    Raises:
        ConfigurationError: An argument cannot work; sources and tokenizers are checked when data is prepared.

    Example:
        >>> data = TextData("python-stdlib", vocab_size=1024, sequence_length=128, batch_size=8)
        >>> data.vocab_size, data.batch_size
        (1024, 8)
        >>> trainer.fit(module, data)  # doctest: +SKIP
    """

    def __init__(
        self,
        source: str | list[str] = "python-stdlib",
        val_source: str | list[str] | None = None,
        test_source: str | list[str] | None = None,
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
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        val_share, test_share = 0.0 if val_source else val_fraction, 0.0 if test_source else test_fraction
        self._splitter = Splitter(seed, val_share, test_share)
        self._caches: dict[str, TokenCache] = {}
        self._byte_tables: dict[str, tuple[torch.Tensor, float]] = {}
        if tokenizer is None:
            check_vocabulary_size(vocab_size)
        self._check_arguments("sequence_length", limit_bytes=1)
        if val_share + test_share >= 1:
            raise ConfigurationError(
                f"val_fraction {val_fraction} and test_fraction {test_fraction}: their sum must be below 1, because "
                "the rest is the train split"
            )
        if streaming and num_workers > 1:
            raise ConfigurationError(f"num_workers {num_workers}: one process reads a streamed source; set 0 or 1")

    @property
    def vocab_size(self) -> int:
        """Rows of the model's embedding."""
        return self.hparams["vocab_size"]

    @property
    def cache_folder(self) -> Path:
        """Folder of this corpus: one for each combination of the settings that decide its content."""
        given = self.hparams
        settings = {name: given[name] for name in _DECIDES_CONTENT}
        for name in ("val_source", "test_source"):
            settings[name] = [*map(source_location, _list(given[name]))]
        root = given["cache_dir"] or os.environ.get("ORTHOTRAIN_CACHE") or "~/.cache/orthotrain"
        return local_path(root, "cache_dir") / folder_name(_list(given["source"]), settings)

    def _corpus(self, limit_bytes: int | None, name: str = "source") -> Corpus:
        given = self.hparams
        return open_corpus(given[name], given["text_column"], given["streaming"], limit_bytes)

    @property
    def _cached_bytes(self) -> int | None:
        """How much of the source is cached: a stream is cached at its beginning only."""
        limit = self.hparams["limit_bytes"]
        return min(limit or STREAM_HEAD_BYTES, STREAM_HEAD_BYTES) if self.hparams["streaming"] else limit

    def prepare_data(self) -> None:
        """Train the tokenizer and write the token caches, unless they exist and were made from the same inputs."""
        self._tokenizer = self._load_tokenizer()

    def _load_tokenizer(self) -> PreTrainedTokenizerFast:
        given = self.hparams
        self._caches.clear()
        self._byte_tables.clear()
        head = STREAM_HEAD_BYTES if given["streaming"] else None
        sources = {split: f"{split}_source" for split in ("val", "test")}
        held_out = {split: self._corpus(head, name) for split, name in sources.items() if given[name] is not None}
        corpus, name, size = self._corpus(self._cached_bytes), given["tokenizer"], self.vocab_size
        return prepare_folder(self.cache_folder, corpus, self._splitter, held_out, name, size)

    def _cache(self, split: str) -> TokenCache:
        if split not in self._caches:
            self._caches[split] = TokenCache.open(self.cache_folder / f"{split}.tokens")
        return self._caches[split]

    def _dataset(self, split: str) -> TokenWindows:
        return TokenWindows(self._cache(split), self.sequence_length)

    def _amount(self, split: str) -> str:
        tokens = self._cache(split).metadata.tokens
        length = self.sequence_length
        return f"{tokens} tokens, enough for {len(self._dataset(split))} sequences of sequence_length {length}"

    def amounts(self) -> dict[str, dict[str, int]]:
        """Return documents and tokens of each split. The train split of a stream has no known size."""
        known = [split for split in SPLITS if self._has(split) and not (split == "train" and self.hparams["streaming"])]
        sizes = {split: self._cache(split).metadata for split in known}
        return {split: {"documents": size.documents, "tokens": size.tokens} for split, size in sizes.items()}

    def digests(self) -> dict[str, str]:
        """Return a digest of the tokens of the train and the validation split."""
        return {split: self._cache(split).metadata.content for split in ("train", "val") if self._has(split)}

    def sample_prompt(self) -> list[int]:
        """Return the beginning of a held-out document."""
        return next(iter(self._document_beginnings(tokens=16)), [])

    def text_bytes(self, labels: torch.Tensor, split: str) -> float:
        """Return the UTF-8 bytes of the text that labels stand for.

        Bits per byte are the sum of the losses in nats over ``ln(2)`` times these bytes. The bytes of each token come
        from the tokenizer. If the tokenizer changes the text, they are scaled to add up to the text of the split.

        Args:
            labels: Tokens, of any shape; -100 has no bytes.
            split: ``train``, ``val`` or ``test``.
        """
        if split not in self._byte_tables:
            cache, table = self._cache(split), token_bytes(self.tokenizer)
            self._byte_tables[split] = table, cache.metadata.text_bytes / max(1, cache.total(table.numpy()))
        table, scale = self._byte_tables[split]
        if table.device != labels.device:
            table = table.to(labels.device)
            self._byte_tables[split] = table, scale
        return int(table[labels[labels != -100]].sum()) * scale

    def _train_loader(self) -> ResumableLoader:
        given = self.hparams
        if not given["streaming"]:
            return super()._train_loader()
        corpus, share = self._corpus(given["limit_bytes"]), (self.batch_size, self._rank, self._world_size)
        head, rest = self._cached_bytes, None if given["limit_bytes"] == self._cached_bytes else "train"
        splitter = fitting_splitter(self._corpus(head).documents(), self._splitter, head, rest)
        stream = TokenStream(corpus, splitter, self.tokenizer, self.sequence_length, *share)
        return StreamLoader(stream, num_workers=given["num_workers"], pin_memory=torch.cuda.is_available())

    def _fingerprint(self) -> DataFingerprint:
        """Return the fingerprint of the train split; of a stream, the fingerprint of its beginning."""
        given, metadata = self.hparams, self._cache("train").metadata
        settings = {name: given[name] for name in ("source", *_DECIDES_CONTENT)}
        settings["tokenizer"] = self.tokenizer_fingerprint[:12]
        return DataFingerprint(metadata.content, f"{metadata.tokens:,} tokens", settings, given["allow_changed"])

    def predict_dataloader(self) -> DataLoader:
        """Return the loader of texts to continue, one in a batch: ``{"input_ids"}`` of shape ``(1, length)``."""
        if texts := self.hparams["predict_prompts"]:
            prompts = self._encode_prompts(texts)
        else:
            prompts = self._document_beginnings(tokens=32)
        return DataLoader([{"input_ids": torch.tensor(prompt)} for prompt in prompts], batch_size=1)  # type: ignore[arg-type]

    def _document_beginnings(self, tokens: int) -> list[list[int]]:
        # without held-out text, the train split has to serve
        split = next(name for name in ("test", "val", "train") if self._has(name))
        return document_beginnings(self._cache(split), self.tokenizer.eos_token_id, tokens=tokens)

    def _encode_prompts(self, texts: list[str]) -> list[list[int]]:
        most = max_characters(self.sequence_length)
        for number, text in enumerate(texts, start=1):
            if len(text) > most:
                raise ConfigurationError(
                    f"predict_prompts: prompt {number} has {len(text):,} characters, far more than sequence_length "
                    f"{self.sequence_length} tokens; give at most {most:,} characters"
                )
        with encoding_with(self.tokenizer):
            prompts: list[Any] = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        if [] in prompts:
            raise ConfigurationError(f"predict_prompts: prompt {prompts.index([]) + 1} is empty; give it some text")
        return prompts
