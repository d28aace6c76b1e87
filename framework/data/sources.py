"""Sources of text: the Python standard library, local files, Hugging Face datasets; as one stream of documents."""

import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthotrain.data.readers import SUFFIXES, Document, is_readable, read_documents, row_documents
from orthotrain.errors import ConfigurationError

PYTHON_STDLIB = "python-stdlib"
CACHE_MARK = ".orthotrain.lock"
"""The file that marks a folder of token caches."""

_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_FORMATS = " ".join(SUFFIXES) + " (or .gz)"


@dataclass(frozen=True)
class Files:
    """Local files, in an order that does not depend on the machine.

    Attributes:
        entries: Pairs of path and relative name.
        text_column: The key of the text in rows.
    """

    entries: tuple[tuple[Path, str], ...]
    text_column: str

    def documents(self) -> Iterator[Document]:
        """Every document of every file."""
        for path, name in self.entries:
            yield from read_documents(path, name, self.text_column)

    def fingerprint(self) -> str:
        """Names, sizes and modification times: enough to see that a file changed without reading it."""
        stats = ((name, path.stat()) for path, name in self.entries)
        return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])

    def size(self) -> int | None:
        """Bytes on disk."""
        return sum(path.stat().st_size for path, _ in self.entries)


@dataclass(frozen=True)
class HubDataset:
    """The train split of a Hugging Face dataset.

    Attributes:
        name: ``org/name`` or ``org/name:config``.
        text_column: The column of the text.
        streaming: Read rows over the network as they are needed instead of downloading first.
    """

    name: str
    text_column: str
    streaming: bool

    def load(self) -> Any:
        """The ``datasets`` object; a download on first use unless streaming."""
        import datasets

        path, _, config = self.name.partition(":")
        try:
            return datasets.load_dataset(path, config or None, split="train", streaming=self.streaming)
        except Exception as error:  # the hub client raises many unrelated types; each is the same problem to the user
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigurationError(
                f"source {self.name!r}: no such file or folder, and it cannot be loaded as a Hugging Face dataset "
                f"({reason}); give {PYTHON_STDLIB!r}, a path, a glob or 'org/name[:config]'"
            ) from error

    def documents(self) -> Iterator[Document]:
        """Every row's text."""
        return row_documents(self.load(), self.text_column, f"dataset {self.name!r}")

    def fingerprint(self) -> str:
        """The dataset's own fingerprint where it is on disk, its name where it is streamed."""
        return f"{self.name} {'' if self.streaming else getattr(self.load(), '_fingerprint', '')}"

    def size(self) -> int | None:
        """Unknown before it is read."""
        return None


@dataclass(frozen=True)
class Corpus:
    """All sources of a run, in the order given.

    Attributes:
        description: The sources as the user gave them, for messages.
        parts: The sources.
        limit_bytes: Stop once this many UTF-8 bytes of text were read; ``None`` reads everything.
    """

    description: str
    parts: tuple[Files | HubDataset, ...]
    limit_bytes: int | None = None

    def documents(self) -> Iterator[Document]:
        """Every document of every part, up to the limit; a document that was begun is finished."""
        read, complete = 0, True
        for part in self.parts:
            for document in part.documents():
                if complete and self.limit_bytes is not None and read >= self.limit_bytes:
                    return
                yield document
                complete = document.complete
                read += len(document.text) if document.text.isascii() else len(document.text.encode())

    def fingerprint(self) -> str:
        """Sha256 over the parts' fingerprints and the limit: it changes when the text may have."""
        parts = [part.fingerprint() for part in self.parts]
        return hashlib.sha256(repr((parts, self.limit_bytes)).encode()).hexdigest()

    def size(self) -> int | None:
        """Bytes that will be read, as far as known."""
        sizes = [part.size() for part in self.parts]
        known = None if None in sizes else sum(size for size in sizes if size is not None)
        if known is None or self.limit_bytes is None:
            return known
        return min(known, self.limit_bytes)


def open_corpus(
    source: str | list[str], text_column: str = "text", streaming: bool = False, limit_bytes: int | None = None
) -> Corpus:
    """Find what ``source`` names.

    Args:
        source: ``python-stdlib``, a file, a folder, a glob, a Hugging Face dataset name, or a list of these.
        text_column: The key of the text in rows.
        streaming: Stream Hugging Face datasets.
        limit_bytes: Read at most about this much text.

    Returns:
        The corpus; nothing has been read yet.

    Raises:
        ConfigurationError: A path that does not exist, a glob without a match, a format that is not known.
    """
    names = [source] if isinstance(source, str) else list(source)
    if not names:
        raise ConfigurationError(f"source is an empty list; give {PYTHON_STDLIB!r}, a path, a glob or 'org/name'")
    return Corpus(repr(source), tuple(_open(name, text_column, streaming) for name in names), limit_bytes)


def location(name: str) -> str:
    """What a source's name means on this machine, wherever it is said: an absolute path, or the name of a dataset."""
    if name == PYTHON_STDLIB:
        return sysconfig.get_paths()["stdlib"]
    path = Path(name).expanduser()
    return os.path.abspath(path) if path.exists() or glob.has_magic(name) else name


def _open(name: str, text_column: str, streaming: bool) -> Files | HubDataset:
    path = Path(name).expanduser()
    if name == PYTHON_STDLIB:
        return Files(tuple(_standard_library()), text_column)
    if path.is_dir():
        return Files(tuple(_folder(path)), text_column)
    if path.exists():
        return Files(((_known_format(path), path.name),), text_column)
    if glob.has_magic(name):
        return Files(tuple(_glob(str(path))), text_column)
    if _HUB_NAME.fullmatch(name) and not is_readable(path):
        return HubDataset(name, text_column, streaming)
    raise ConfigurationError(
        f"source {name!r}: no such file or folder (looked in {Path.cwd()}); "
        f"give {PYTHON_STDLIB!r}, a path, a glob or a Hugging Face dataset 'org/name[:config]'"
    )


def _standard_library() -> Iterator[tuple[Path, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path, name in _walk(root, _STDLIB_SKIPPED):
        if path.suffix == ".py":
            yield path, name


def _walk(root: Path, skipped: set[str]) -> Iterator[tuple[Path, str]]:
    for folder, folders, files in os.walk(root):
        if CACHE_MARK in files:  # a cache inside its own source would feed on itself
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if name not in skipped)
        for file in sorted(files):
            path = Path(folder, file)
            yield path, path.relative_to(root).as_posix()


def _folder(root: Path) -> list[tuple[Path, str]]:
    entries = [(path, name) for path, name in _walk(root, {"__pycache__", ".git"}) if is_readable(path)]
    if not entries:
        raise ConfigurationError(f"source {str(root)!r}: the folder holds no file of a known format: {_FORMATS}")
    return entries


def _glob(pattern: str) -> list[tuple[Path, str]]:
    matches = (Path(match) for match in glob.glob(pattern, recursive=True))
    paths = sorted(path for path in matches if path.is_file() and not (path.parent / CACHE_MARK).exists())
    if not paths:
        raise ConfigurationError(f"source {pattern!r}: the glob matches no file (looked in {Path.cwd()})")
    parts = Path(pattern).parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    return [(_known_format(path), path.relative_to(root).as_posix()) for path in paths]


def _known_format(path: Path) -> Path:
    if not is_readable(path):
        raise ConfigurationError(f"source {str(path)!r}: unknown format {path.suffix!r}; known: {_FORMATS}")
    return path
