"""The meaning of the name of a source: local files, a glob of files, or a Hugging Face dataset."""

import contextlib
import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthotrain.console.limited_process import first_line
from orthotrain.data.saved_datasets import saved_files
from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import check_regular_file, local_path

CACHE_MARK = ".orthotrain.lock"
"""The file that marks a folder of token caches."""
MAX_FOLDERS = 200_000
"""How many folders ``**`` may search. A folder counts once for each link that leads to it."""

_HUB_NAME = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%+-]+))?")


@dataclass(frozen=True)
class SourceKind:
    """A kind of data, and the sources that can hold it.

    Attributes:
        builtin: Name of the source that comes with Python.
        suffixes: Suffixes of the files, for messages.
        is_readable: Whether a file has one of these suffixes.
    """

    builtin: str
    suffixes: str
    is_readable: Callable[[Path], bool]

    @property
    def advice(self) -> str:
        """What the user can give, for messages."""
        return (
            f"give {self.builtin!r}, a file, folder or glob of {self.suffixes}, or a Hugging Face dataset "
            "'org/name[:config][@split]'"
        )

    def names(self, source: str | list[str]) -> list[str]:
        """Return a list of source names.

        Raises:
            ConfigurationError: The list is empty.
        """
        names = [source] if isinstance(source, str) else list(source)
        if not names:
            raise ConfigurationError(f"source is an empty list; {self.advice}")
        return names

    def find_files(self, name: str) -> list[tuple[Path, str]] | None:
        """Return the files that a name means, in an order that does not depend on the machine.

        Returns:
            Pairs of path and relative name; ``None`` if the name can only be a Hugging Face dataset.

        Raises:
            ConfigurationError: There is no such file, no file of a known format, or a file of another format.
        """
        path = local_path(name, "source")
        if path.is_dir():
            if (saved := saved_files(path)) is not None:
                return saved
            return self._files_of_folder(path, name)
        if path.exists():
            files = [(path, path.name)]
        elif _HUB_NAME.fullmatch(name) and not self.is_readable(path):
            return None
        elif not glob.has_magic(name):
            raise ConfigurationError(f"source {name!r}: no such file or folder (looked in {Path.cwd()}); {self.advice}")
        elif not (files := glob_files(str(path))):
            raise ConfigurationError(
                f"source {name!r}: the glob matches no file (looked in {Path.cwd()}); {self.advice}"
            )
        for file, _ in files:
            if not self.is_readable(file):
                raise ConfigurationError(
                    f"source {str(file)!r}: unknown format {file.suffix!r}; known: {self.suffixes}"
                )
            check_regular_file(file, "source")
        return files

    def _files_of_folder(self, path: Path, name: str) -> list[tuple[Path, str]]:
        files = []
        for file, relative in files_in(path, {"__pycache__", "__MACOSX"}):
            if self.is_readable(file):
                files.append((file, relative))
            elif not file.exists():  # maybe a folder of text that was moved
                raise ConfigurationError(f"source {name!r}: the link {str(file)!r} leads nowhere; mend it or remove it")
        if not files:
            raise ConfigurationError(
                f"source {name!r}: the folder holds no file of a known format: {self.suffixes} (names that begin "
                "with a dot are left out)"
            )
        return files

    def load_dataset(self, name: str, streaming: bool = False) -> Any:
        """Return the rows of a Hugging Face dataset, of its split ``train`` unless the name has another one.

        Args:
            name: ``org/name[:config][@split]``.
            streaming: Read rows over the network when they are needed, and do not download the dataset first.

        Raises:
            ConfigurationError: The dataset cannot be loaded.
        """
        import datasets

        match = _HUB_NAME.fullmatch(name)
        assert match is not None
        try:
            return datasets.load_dataset(
                match["path"], match["config"], split=match["split"] or "train", streaming=streaming
            )
        except Exception as error:  # the hub client raises errors of many unrelated classes
            raise ConfigurationError(
                f"source {name!r}: there is no such file or folder, and it cannot be loaded as a Hugging Face dataset "
                f"({first_line(error)}); {self.advice}"
            ) from error


def with_columns(dataset: Any, wanted: Sequence[str]) -> Any:
    """Return a dataset of ``datasets`` with only the wanted columns; with all, if it has none or does not know them."""
    columns = [name for name in dataset.column_names or [] if name in wanted]
    return dataset.select_columns(columns) if columns else dataset


def location(name: str) -> str:
    """Return an absolute path for a name of files, and any other name as it is."""
    path = local_path(name, "source")
    is_local = path.exists() or (glob.has_magic(name) and not _HUB_NAME.fullmatch(name))
    return os.path.abspath(path) if is_local else name


def files_in(root: Path, skipped: set[str], follow_links: bool = True) -> Iterator[tuple[Path, str]]:
    """Yield path and relative name of each file in a folder, sorted.

    Names that begin with a dot are left out: editors and other systems keep copies of files there. Each folder counts
    once, however many links lead to it; links to a folder above the root are left out.

    Args:
        root: The folder.
        skipped: Names of folders to leave out. Folders of token caches are left out too.
        follow_links: Whether links to folders are followed.

    Raises:
        ConfigurationError: A folder cannot be read, or there are more than `MAX_FOLDERS`.
    """

    def refuse(error: OSError) -> None:
        raise ConfigurationError(f"source: {error.filename!r} cannot be read ({error.strerror})")

    seen = {root.resolve(), *root.resolve().parents}
    for folder, folders, files in os.walk(root, followlinks=follow_links, onerror=refuse):
        if CACHE_MARK in files:  # a token cache inside its own source would become part of the source
            folders.clear()
            continue
        wanted = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        folders.clear()
        for name in wanted:
            if (real := Path(folder, name).resolve()) not in seen:
                seen.add(real)
                folders.append(name)
        if len(seen) > MAX_FOLDERS:
            raise ConfigurationError(
                f"source: {str(root)!r} has over {MAX_FOLDERS:,} folders; name the folders to read"
            )
        for file in sorted(name for name in files if not name.startswith(".")):
            path = Path(folder, file)
            yield path, path.relative_to(root).as_posix()


def glob_files(pattern: str) -> list[tuple[Path, str]]:
    """Return path and relative name of each file that a glob matches, sorted.

    Fifos, sockets and devices are returned too, so that they can be refused by name. Files of token caches are not.

    Raises:
        ConfigurationError: ``**`` would search folders in which links lead around in a circle.
    """
    parts = Path(pattern).parts
    root = Path(*parts[: next(index for index, part in enumerate(parts) if glob.has_magic(part))])
    if "**" in pattern:
        _check_links(root)
    paths = sorted(
        path for path in map(Path, glob.glob(pattern, recursive=True)) if path.exists() and not path.is_dir()
    )
    return [(path, path.relative_to(root).as_posix()) for path in paths if not (path.parent / CACHE_MARK).exists()]


def _check_links(root: Path) -> None:
    """Walk through folders as ``glob`` does: it follows links, and would not end if they lead around in a circle."""
    pending: list[tuple[Path, frozenset[Path]]] = [(root, frozenset())]
    seen = 0
    while pending:
        folder, above = pending.pop()
        real = folder.resolve()
        seen += 1
        if real in above or seen > MAX_FOLDERS:
            problem = "leads back to a folder above it" if real in above else f"is one of over {MAX_FOLDERS:,} folders"
            raise ConfigurationError(f"source: {str(folder)!r} {problem}; name the folders without '**'")
        with contextlib.suppress(OSError), os.scandir(folder) as entries:  # glob passes over folders it cannot read
            pending += [(Path(entry.path), above | {real}) for entry in entries if entry.is_dir()]
