"""The folder of a prepared corpus: a tokenizer and three token caches, built by one of several processes."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedTokenizerFast

from orthotrain.console.progress import waiting
from orthotrain.console.termination import check
from orthotrain.data.corpus.sources import Corpus, source_location
from orthotrain.data.corpus.token_cache import VERSION, CorruptCacheError, TokenCache
from orthotrain.data.corpus.tokenizing import build_caches, learn_tokenizer
from orthotrain.data.sources import CACHE_MARK
from orthotrain.data.splits import SPLITS, Splitter, fitting_splitter
from orthotrain.data.tokenizers import fingerprint, load_tokenizer, load_trained_tokenizer
from orthotrain.errors import ConfigurationError
from orthotrain.files.atomic_writes import remove_leftovers, write_text

_READING = 3
"""Version of the reading: it changes when the same files give other text, or another text in a split."""


def folder_name(sources: list[str], settings: dict[str, Any]) -> str:
    """Return the name of a prepared corpus: readable, and different for each combination of sources and settings.

    Args:
        sources: The sources as the user gave them.
        settings: Plain values.
    """
    key = json.dumps([[source_location(name) for name in sources], settings, VERSION, _READING], sort_keys=True)
    label = re.sub(r"[^\w.-]+", "-", " ".join(sources))[:40].strip("-.")
    return f"{label}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def prepare_folder(
    folder: Path,
    corpus: Corpus,
    splitter: Splitter,
    held_out: Mapping[str, Corpus],
    tokenizer_name: str | None,
    vocab_size: int,
) -> PreTrainedTokenizerFast:
    """Build the caches of a corpus in a folder, unless the folder holds caches of the same inputs.

    Several processes may start at once: one process builds the caches, and the others wait for it. Finished caches are
    only read: their folder may belong to another user, or lie on a disk that cannot be written.

    Args:
        folder: The folder of the files.
        corpus: The documents.
        splitter: Decides each document's split, unless a split would get no document (see `fitting_splitter`).
        held_out: Split -> documents of this split, beside those of ``corpus``.
        tokenizer_name: A tokenizer to load; ``None`` trains a tokenizer.
        vocab_size: Rows of the model's embedding.

    Returns:
        The tokenizer of the caches.

    Raises:
        CorruptCacheError: A file in the folder is truncated or altered.
        ConfigurationError: The source or the tokenizer cannot be used.
    """
    parts = {name: part.fingerprint() for name, part in held_out.items()}
    source = hashlib.sha256(repr((corpus.fingerprint(), parts)).encode()).hexdigest()
    # finished caches are read without a lock: their folder may belong to another user
    if (finished := _finished_tokenizer(folder, source, tokenizer_name, vocab_size)) is not None:
        return finished
    with _locked(folder):
        if (finished := _finished_tokenizer(folder, source, tokenizer_name, vocab_size)) is not None:
            return finished  # another process has built the caches in the meantime
        rank_zero_info(f"building the token caches in {folder}")
        remove_leftovers(folder)  # of a build that was killed: this process holds the lock, so no build is running
        if next(corpus.documents(), None) is None:
            raise ConfigurationError(f"source {corpus.description}: no text in it; give files or rows that hold text")
        chosen = fitting_splitter(corpus.documents(), splitter, corpus.limit_bytes)
        if chosen is not splitter:
            rank_zero_info(
                f"source {corpus.description}: too few documents for a split by document; train, validation and test "
                "are contiguous parts of the text"
            )
        if tokenizer_name is None:
            tokenizer = learn_tokenizer(corpus, chosen, vocab_size)
            write_text(folder / "tokenizer.json", tokenizer.backend_tokenizer.to_str(pretty=True))
        else:
            tokenizer = load_tokenizer(tokenizer_name, vocab_size)
        build_caches(corpus, chosen, held_out, tokenizer, vocab_size, folder, source)
        check()
        return tokenizer


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / CACHE_MARK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            rank_zero_info(f"waiting for another process that is building the token caches in {folder}")
            with waiting("waiting for the token caches"):
                while not lock.is_locked:
                    check()
                    with contextlib.suppress(Timeout):
                        lock.acquire(timeout=1)
    except OSError as error:
        raise _unusable(f"{folder} has no finished token caches of this text and cannot be written", error) from error
    try:
        yield
    finally:
        lock.release()


def _unusable(problem: str, error: OSError) -> ConfigurationError:
    reason = error.strerror or str(error)
    return ConfigurationError(f"{problem} ({reason}): name another folder by --data.cache_dir or $ORTHOTRAIN_CACHE")


def _finished_tokenizer(folder: Path, source: str, name: str | None, vocab_size: int) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer of a folder with whole caches of this source; None if the caches have to be built."""
    trained = folder / "tokenizer.json"
    try:
        if name is not None:
            tokenizer = load_tokenizer(name, vocab_size)
        elif trained.exists():
            tokenizer = _load_trained(trained)
        else:
            return None
        caches = [folder / f"{split}.tokens" for split in SPLITS]
        if not all(cache.exists() for cache in caches):
            return None
        inputs, found = (fingerprint(tokenizer), source), map(TokenCache.read_metadata, caches)
        same = all((metadata.tokenizer_fingerprint, metadata.source_fingerprint) == inputs for metadata in found)
        return tokenizer if same else None
    except PermissionError as error:
        raise _unusable(f"the token caches in {folder} cannot be read", error) from error


def _load_trained(path: Path) -> PreTrainedTokenizerFast:
    try:
        return load_trained_tokenizer(path)
    except ConfigurationError as error:
        raise CorruptCacheError(f"{error}; delete it and it will be rebuilt") from error
