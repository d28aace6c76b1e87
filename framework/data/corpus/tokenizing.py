"""From documents to token caches: train a tokenizer on a sample, and tokenize all splits in one pass."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import tee
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedTokenizerFast

from orthotrain.console.progress import Progress
from orthotrain.data.corpus.documents import Document
from orthotrain.data.corpus.sources import Corpus
from orthotrain.data.corpus.token_cache import TokenCacheWriter
from orthotrain.data.splits import SPLITS, PositionSplitter, Splitter
from orthotrain.data.tokenizer_checks import encoding_with
from orthotrain.data.tokenizers import fingerprint, train_tokenizer
from orthotrain.errors import ConfigurationError

AnySplitter = Splitter | PositionSplitter
TOKENIZER_SAMPLE_BYTES = 32 << 20
_CHUNK_CHARACTERS = 2 << 20


def learn_tokenizer(corpus: Corpus, splitter: AnySplitter, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer on at most 32 MiB of the train split, spread over the corpus if the size of it is known."""
    size = corpus.size()
    share = 1.0 if size is None else TOKENIZER_SAMPLE_BYTES / max(size, 1)

    def sample() -> Iterator[str]:
        taken = seen = 0
        for split, document in splitter.split(corpus.documents()):
            if split == "train":
                if taken <= share * seen:
                    yield document.text
                    taken += len(document.text)
                seen += len(document.text)
            if taken >= TOKENIZER_SAMPLE_BYTES:
                return

    total = None if size is None else min(size, TOKENIZER_SAMPLE_BYTES)
    if next(sample(), None) is None:
        raise ConfigurationError(
            f"source {corpus.description}: the train split holds no document; lower val_fraction and test_fraction, or "
            "give more documents"
        )
    read = 0
    # a thread watches `read`, because learning continues inside one call after the text was read
    with Progress("reading text", total, watch=lambda: read) as bar:

        def counted() -> Iterator[str]:
            nonlocal read
            for text in sample():
                yield text
                read += len(text)
            bar.turn(f"learning {vocab_size:,} tokens")

        return train_tokenizer(counted(), vocab_size)


def build_caches(
    corpus: Corpus,
    splitter: AnySplitter,
    held_out: Mapping[str, Corpus],
    tokenizer: PreTrainedTokenizerFast,
    vocab_size: int,
    folder: Path,
    source: str,
) -> None:
    """Tokenize every document once and write ``train.tokens``, ``val.tokens`` and ``test.tokens``.

    The memory holds one chunk of 2 MiB of text (or one row). It does not grow with the corpus.

    Args:
        corpus: The documents.
        splitter: Decides each document's split.
        held_out: Split -> documents that belong to this split, beside those of ``corpus``.
        tokenizer: Turns text into tokens; its end-of-text token closes each document.
        vocab_size: Decides the bytes of a token on disk.
        folder: Where the files go.
        source: The source fingerprint for the headers.
    """
    nulls, first_null = 0, ""

    def without_text(where: str) -> None:
        nonlocal nulls, first_null
        nulls, first_null = nulls + 1, first_null or where

    def documents() -> Iterator[tuple[str, Document]]:
        yield from splitter.split(corpus.documents(without_text))
        for split, part in held_out.items():
            yield from ((split, document) for document in part.documents(without_text))

    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(Progress("tokenizing", corpus.size()))
        paths = {split: folder / f"{split}.tokens" for split in SPLITS}
        writers = {name: stack.enter_context(TokenCacheWriter(path, vocab_size)) for name, path in paths.items()}
        splits, encoded = tee(documents())
        found = encode_documents((document for _, document in encoded), tokenizer)
        for (split, document), (_, tokens, text_bytes) in zip(splits, found, strict=True):
            writers[split].append(tokens, text_bytes, int(document.complete))
            bar.advance(text_bytes, tokens=len(tokens))
        for writer in writers.values():
            writer.commit(fingerprint(tokenizer), source)
    if nulls:
        rank_zero_info(f"{nulls:,} rows whose text is null are left out (the first: {first_null})")


def encode_documents(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, chunk_characters: int = _CHUNK_CHARACTERS
) -> Iterator[tuple[Document, list[int], int]]:
    """Tokenize documents in chunks; all cores work on a chunk.

    Yields:
        The document, its tokens (with the end-of-text token if the document is complete), its UTF-8 bytes.
    """
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= chunk_characters:
            yield from _encode_chunk(chunk, tokenizer)
            chunk, characters = [], 0
    yield from _encode_chunk(chunk, tokenizer)


def _encode_chunk(
    chunk: list[Document], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[Document, list[int], int]]:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # "<|endoftext|>" inside a document is text
    try:
        with encoding_with(tokenizer):
            encodings = backend.encode_batch_fast([document.text for document in chunk], add_special_tokens=False)
    finally:
        backend.encode_special_tokens = False
    for document, encoding in zip(chunk, encodings, strict=True):
        tokens = encoding.ids
        if document.complete:
            tokens.append(tokenizer.eos_token_id)
        yield document, tokens, len(document.text.encode())
