"""Sources of text: the Python standard library, local files, Hugging Face datasets; as one stream of documents."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orthotrain.data.corpus.documents import SUFFIXES, Document, is_readable, read_documents, row_documents
from orthotrain.data.sources import SourceKind, location, with_columns
from orthotrain.data.stdlib_files import PYTHON_STDLIB, stdlib_files, stdlib_root, stdlib_split_keys

_TEXT = SourceKind(PYTHON_STDLIB, " ".join(SUFFIXES) + " (or .gz)", is_readable)


@dataclass(frozen=True)
class Files:
    """Local files, in an order that does not depend on the machine.

    Attributes:
        entries: Pairs of path and relative name.
        text_column: The key of the text in rows.
        split_keys: Returns relative name -> key of the split, for files that have another key than their name.
    """

    entries: tuple[tuple[Path, str], ...]
    text_column: str
    split_keys: Callable[[], Mapping[str, str]] = dict

    def documents(self, without_text: Callable[[str], None]) -> Iterator[Document]:
        """Yield the documents of all files; call ``without_text`` with the place of each row whose text is null."""
        keys = self.split_keys()
        for path, name in self.entries:
            for document in read_documents(path, name, self.text_column, without_text):
                yield replace(document, group=keys[name]) if name in keys else document

    def fingerprint(self) -> str:
        """Names, sizes and modification times: they show that a file has changed without reading the file."""
        stats = ((name, path.stat()) for path, name in self.entries)
        return repr([(os.fsencode(name), stat.st_size, stat.st_mtime_ns) for name, stat in stats])

    def size(self) -> int | None:
        """Bytes on disk."""
        return sum(path.stat().st_size for path, _ in self.entries)


@dataclass(frozen=True)
class HubDataset:
    """One split of a Hugging Face dataset.

    Attributes:
        name: ``org/name[:config][@split]``.
        text_column: The column of the text.
        streaming: Read rows over the network when they are needed, and do not download the dataset first.
    """

    name: str
    text_column: str
    streaming: bool

    def load(self) -> Any:
        """Return the object of ``datasets``; the first use downloads the dataset, unless it is streamed."""
        return _TEXT.load_dataset(self.name, self.streaming)

    def documents(self, without_text: Callable[[str], None]) -> Iterator[Document]:
        """Yield the text of each row; call ``without_text`` with the place of each row whose text is null."""
        rows = with_columns(self.load(), [self.text_column])
        return row_documents(enumerate(rows, start=1), self.text_column, f"dataset {self.name!r}", without_text)

    def fingerprint(self) -> str:
        """The name, and the fingerprint that ``datasets`` has for a dataset on disk."""
        return f"{self.name} {'' if self.streaming else getattr(self.load(), '_fingerprint', '')}"

    def size(self) -> int | None:
        """``None``: the size is unknown before the dataset is read."""
        return None


@dataclass(frozen=True)
class Corpus:
    """All sources of a run, in the order of the argument ``source``.

    Attributes:
        description: The sources as the user gave them, for messages.
        parts: The sources.
        limit_bytes: Stop after this many UTF-8 bytes of text; ``None`` reads everything.
    """

    description: str
    parts: tuple[Files | HubDataset, ...]
    limit_bytes: int | None = None

    def documents(self, without_text: Callable[[str], None] = lambda where: None) -> Iterator[Document]:
        """Yield the documents of all sources up to the limit; the last document is read to its end.

        Args:
            without_text: Called with the place of each row whose text is null; such a row is left out.
        """
        read, complete = 0, True
        for part in self.parts:
            for document in part.documents(without_text):
                if complete and self.limit_bytes is not None and read >= self.limit_bytes:
                    return
                yield document
                complete = document.complete
                read += len(document.text) if document.text.isascii() else len(document.text.encode())

    def fingerprint(self) -> str:
        """Sha256 of the fingerprints of the sources and of the limit: it changes if the text may have changed."""
        parts = [part.fingerprint() for part in self.parts]
        return hashlib.sha256(repr((parts, self.limit_bytes)).encode()).hexdigest()

    def size(self) -> int | None:
        """Bytes to read; ``None`` if a source does not know its size."""
        sizes = [part.size() for part in self.parts]
        known = None if None in sizes else sum(size for size in sizes if size is not None)
        if known is None or self.limit_bytes is None:
            return known
        return min(known, self.limit_bytes)


def open_corpus(
    source: str | list[str], text_column: str = "text", streaming: bool = False, limit_bytes: int | None = None
) -> Corpus:
    """Find the files and datasets that ``source`` names. Nothing is read yet.

    Args:
        source: ``python-stdlib``, a file, a folder, a glob, a Hugging Face dataset, or a list of these.
        text_column: The key of the text in rows.
        streaming: Stream Hugging Face datasets.
        limit_bytes: Read at most about this many bytes of text.

    Raises:
        ConfigurationError: A path that does not exist, a glob without a match, or an unknown format.
    """

    def open_source(name: str) -> Files | HubDataset:
        if name == PYTHON_STDLIB:
            return Files(tuple(stdlib_files()), text_column, stdlib_split_keys)
        files = _TEXT.find_files(name)
        return HubDataset(name, text_column, streaming) if files is None else Files(tuple(files), text_column)

    return Corpus(repr(source), tuple(map(open_source, _TEXT.names(source))), limit_bytes)


def source_location(name: str) -> str:
    """Return what a source means on this machine: an absolute path, or the name of a dataset."""
    return str(stdlib_root()) if name == PYTHON_STDLIB else location(name)
