"""Caches that another user has built, or that lie on a disk that cannot be written."""

import errno
import os
import pickle
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

from orthotrain.data import TextData
from orthotrain.data.sources import CACHE_MARK
from orthotrain.errors import ConfigurationError

NOBODY = 65534


@pytest.fixture
def place():
    """A folder that every user can reach, with one that every user may write to."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def data_of(corpus, cache, **given):
    return TextData(source=str(corpus), cache_dir=str(cache), vocab_size=300, sequence_length=64, batch_size=4, **given)


def as_another_user(act, uid=NOBODY):
    """Call ``act`` in a child process without rights; return its result, or the line of its error."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)  # a lock that is waited for
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
            try:
                result = act()
            except ConfigurationError as error:
                result = str(error)
            os.write(write, pickle.dumps(result))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert said, "the child process has died"
    return pickle.loads(said)


def set_up(corpus, cache, **given):
    def act():
        data = data_of(corpus, cache, **given)
        data.setup("fit")
        return (
            data.tokenizer_fingerprint,
            data._cache("train").metadata.tokens,
            len(next(iter(data.train_dataloader()))["labels"]),
        )

    return act


@pytest.fixture
def built(place):
    """A corpus and its finished caches, which belong to another user, and a second corpus without any."""
    for name in ("corpus", "other"):
        (place / name).mkdir()
        for number in range(40):
            (place / name / f"{number}.txt").write_text(f"{name} has some words, a few more of them: {number} " * 40)
    expected = set_up(place / "corpus", place / "cache")()
    for path in place.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield place, expected
    for path in place.rglob("*"):
        path.chmod(0o755)


def listing(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_finished_caches_of_another_user_are_read(built):
    place, expected = built
    before = listing(place)
    (folder,) = (place / "cache").iterdir()
    with FileLock(folder / CACHE_MARK):  # whoever holds it: finished caches need no lock
        assert as_another_user(set_up(place / "corpus", place / "cache")) == expected
    for mark in folder.glob(CACHE_MARK):  # a copy need not have it
        folder.chmod(0o755)
        mark.unlink()
        folder.chmod(0o555)
    assert as_another_user(set_up(place / "corpus", place / "cache")) == expected
    assert {path for path in listing(place) if path.name != CACHE_MARK} == {p for p in before if p.name != CACHE_MARK}


@pytest.mark.parametrize("lacking", ["train.tokens", "tokenizer.json", "everything", "the right to read"])
def test_unfinished_caches_of_another_user_are_one_line(built, lacking):
    place, _ = built
    (folder,) = (place / "cache").iterdir()
    source = "corpus"
    if lacking == "everything":
        source, folder = "other", place / "cache" / "tmp"
    elif lacking == "the right to read":
        folder.chmod(0o000)
    else:
        folder.chmod(0o755)
        (folder / lacking).unlink()
        folder.chmod(0o555)
    line = as_another_user(set_up(place / source, place / "cache"))
    assert isinstance(line, str) and "\n" not in line
    assert str(folder) in line and "Permission denied" in line and "--data.cache_dir" in line, line


@pytest.mark.parametrize("size", [1 << 10, 5 << 10, 20 << 10])
def test_a_full_disk_leaves_no_part_of_a_cache(corpus, tmp_path, size):
    """The tokenizer does not fit, or the header, or the tokens, in the buffer or behind it; then all is built."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as info:
            data_of(corpus, tmp_path).setup("fit")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (folder,) = tmp_path.iterdir()
    assert info.value.errno == errno.EFBIG and Path(info.value.filename).parent == folder
    assert {path.name for path in folder.iterdir()} <= {CACHE_MARK, "tokenizer.json", "val.tokens", "test.tokens"}
    data_of(corpus, tmp_path).setup("fit")
