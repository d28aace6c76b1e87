"""The files of the Python standard library as built-in data, and the split key that copies of a file share."""

import functools
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from orthotrain.data.near_duplicates import groups
from orthotrain.data.sources import files_in
from orthotrain.data.splits import ALWAYS_TRAIN

PYTHON_STDLIB = "python-stdlib"
"""The name of the files as a source of text."""
LARGE_GROUP = 0.02
"""Share of the text of a group that no split holds out: 77 tables of the codecs would be most of a validation split."""

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}


def stdlib_root() -> Path:
    """Return the folder of the Python standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_files() -> Iterator[tuple[Path, str]]:
    """Yield path and relative name of the modules of the Python standard library, without its tests."""
    for path, name in files_in(stdlib_root(), _SKIPPED, follow_links=False):
        if path.suffix == ".py" and path.is_file():
            yield path, name


def stdlib_texts() -> Iterator[tuple[str, str]]:
    """Yield relative name and text of each file; bytes that are not UTF-8 are replaced."""
    for path, name in stdlib_files():
        yield name, path.read_text(encoding="utf-8", errors="replace")


@functools.cache
def stdlib_split_keys() -> Mapping[str, str]:
    """Return name of a file -> key of its split: one key for all files of a group of near-duplicates.

    All built-in sources use these keys, so that a file is on the same side in pretraining and in finetuning. The key
    is the name of the first file of the group, or `ALWAYS_TRAIN` if the group is large.
    """
    names, sizes = list[str](), list[int]()

    def texts() -> Iterator[str]:
        for name, text in stdlib_texts():
            names.append(name)
            sizes.append(len(text))
            yield text

    first = groups(texts())
    share = np.bincount(first, weights=sizes) / sum(sizes)
    several = np.bincount(first) > 1
    keys = [ALWAYS_TRAIN if several[one] and share[one] > LARGE_GROUP else names[one] for one in first]
    return dict(zip(names, keys, strict=True))
