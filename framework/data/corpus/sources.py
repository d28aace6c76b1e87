"""Sources of text: the Python standard library, local files, Hugging Face datasets; as one stream of documents."""

import contextlib
import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthotrain.data.corpus.readers import SUFFIXES, Document, is_readable, read_documents, row_documents
from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import check_regular_file, local_path

PYTHON_STDLIB = "python-stdlib"
CACHE_MARK = ".orthotrain.lock"
"""The file that marks a folder of token caches."""
MOST_FOLDERS = 200_000
"""How many folders ``**`` may search, each counted as often as links lead to it."""

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
        return repr([(os.fsencode(name), stat.st_size, stat.st_mtime_ns) for name, stat in stats])

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
    path = local_path(name, "source")
    return os.path.abspath(path) if path.exists() or glob.has_magic(name) else name


def _open(name: str, text_column: str, streaming: bool) -> Files | HubDataset:
    path = local_path(name, "source")
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
    for path, name in files_in(root, _STDLIB_SKIPPED):
        if path.suffix == ".py" and path.is_file():
            yield path, name


def files_in(root: Path, skipped: set[str]) -> Iterator[tuple[Path, str]]:
    """Yield path and relative name of every file in a folder, sorted; links to folders are not followed.

    Args:
        root: The folder.
        skipped: Names of folders to leave out.
    """
    for folder, folders, files in os.walk(root):
        if CACHE_MARK in files:  # a cache inside its own source would feed on itself
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if name not in skipped)
        for file in sorted(files):
            path = Path(folder, file)
            yield path, path.relative_to(root).as_posix()


def _folder(root: Path) -> list[tuple[Path, str]]:
    entries = [(path, name) for path, name in files_in(root, {"__pycache__", ".git"}) if is_readable(path)]
    if not entries:
        raise ConfigurationError(f"source {str(root)!r}: the folder holds no file of a known format: {_FORMATS}")
    return entries


def _glob(pattern: str) -> list[tuple[Path, str]]:
    paths = [path for path in glob_files(pattern) if not (path.parent / CACHE_MARK).exists()]
    if not paths:
        raise ConfigurationError(f"source {pattern!r}: the glob matches no file (looked in {Path.cwd()})")
    root = _fixed_part(pattern)
    return [(_known_format(path), path.relative_to(root).as_posix()) for path in paths]


def glob_files(pattern: str) -> list[Path]:
    """Return the files that a glob matches, sorted; fifos, sockets and devices, which cannot be read, too.

    Raises:
        ConfigurationError: ``**`` is to search a folder in which links lead round in a circle.
    """
    if "**" in pattern:
        _check_links(_fixed_part(pattern))
    matches = map(Path, glob.glob(pattern, recursive=True))
    return sorted(path for path in matches if path.exists() and not path.is_dir())


def _fixed_part(pattern: str) -> Path:
    parts = Path(pattern).parts
    return Path(*parts[: next(index for index, part in enumerate(parts) if glob.has_magic(part))])


def _check_links(root: Path) -> None:
    """Walk as ``glob`` does, which follows links: through a circle it would go on for ever."""
    pending: list[tuple[Path, frozenset[Path]]] = [(root, frozenset())]
    seen = 0
    while pending:
        folder, above = pending.pop()
        real = folder.resolve()
        seen += 1
        if real in above or seen > MOST_FOLDERS:
            problem = "leads back to a folder above it" if real in above else f"is one of over {MOST_FOLDERS:,} folders"
            raise ConfigurationError(f"source: {str(folder)!r} {problem}; name the folders without '**'")
        with contextlib.suppress(OSError), os.scandir(folder) as entries:  # glob passes over what it cannot read
            pending += [(Path(entry.path), above | {real}) for entry in entries if entry.is_dir()]


def _known_format(path: Path) -> Path:
    if not is_readable(path):
        raise ConfigurationError(f"source {str(path)!r}: unknown format {path.suffix!r}; known: {_FORMATS}")
    check_regular_file(path, "source")
    return path
