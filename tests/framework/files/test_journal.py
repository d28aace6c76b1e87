"""Processes that write to one folder: what a living one writes stays, and no name of a dead one is lost."""

import errno
import fcntl
import os
import re
from contextlib import suppress
from pathlib import Path

import pytest

from orthotrain.files import journal
from orthotrain.files.atomic_writes import (
    discard,
    make_temporary_folder,
    open_temporary_file,
    remove_leftovers,
    rename_to_temporary,
    write_text,
)
from orthotrain.files.journal import JOURNAL, OLD_SUFFIX


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def unfinished(folder):
    return [name for name in names(folder) if not name.startswith(JOURNAL)]


def noted(folder):
    """What all journals of a folder note; a journal may be removed meanwhile."""
    found = set()
    for path in folder.glob(f"{JOURNAL}.*"):
        with suppress(FileNotFoundError):
            found.update(os.fsdecode(path.read_bytes()).split("\0"))
    return found


def write_three(folder):
    (make_temporary_folder(folder / "merged") / "weights").write_text("half")
    open_temporary_file(folder / "tokens").close()
    (folder / "last.ckpt").write_text("older")
    rename_to_temporary(folder / "last.ckpt", OLD_SUFFIX)


def test_what_a_living_process_writes_stays_until_it_is_dead(tmp_path, forked, killed):
    first = forked(lambda: write_three(tmp_path))
    before = names(tmp_path)
    assert len(before) == 4 and len([name for name in before if re.fullmatch(rf"{JOURNAL}\.[0-9a-f]{{16}}", name)]) == 1
    for _ in range(2):  # the second time after this process has had a journal of its own
        remove_leftovers(tmp_path)
        assert names(tmp_path) == before
        write_text(tmp_path / "x", "y")
        (tmp_path / "x").unlink()
    killed(lambda: remove_leftovers(tmp_path))
    assert names(tmp_path) == before
    killed(first)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["last.ckpt"] and (tmp_path / "last.ckpt").read_text() == "older"


def test_a_forked_process_has_a_journal_of_its_own(tmp_path, forked, killed):
    """It neither writes to that of its parent, nor ends the lock of its parent, nor keeps the lock after it."""

    def as_worker():
        write_text(tmp_path / "y", "z")
        remove_leftovers(tmp_path)
        open_temporary_file(tmp_path / "y").close()
        assert len(list(tmp_path.glob(f"{JOURNAL}.*"))) == 2

    file = open_temporary_file(tmp_path / "x")
    file.close()
    killed(as_worker)
    for act in (remove_leftovers, lambda folder: killed(lambda: remove_leftovers(folder))):
        act(tmp_path)
        assert unfinished(tmp_path) == [Path(file.name).name, "y"]
    discard(Path(file.name))
    assert names(tmp_path) == ["y"]

    def parent():
        open_temporary_file(tmp_path / "x")
        if os.fork() == 0:  # a data worker, which outlives its parent
            os.close(stays[1])
            os.read(stays[0], 1)
            os._exit(0)

    stays = os.pipe()
    killed(parent)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["y"]
    os.close(stays[1]), os.close(stays[0])


def test_two_processes_lose_no_name(tmp_path, forked, killed):
    (tmp_path / "run").mkdir()

    def write_many():
        for _ in range(300):
            file = open_temporary_file(tmp_path / "run" / "x")
            file.close()
            assert Path(file.name).name in noted(tmp_path / "run")
            discard(Path(file.name))
        open_temporary_file(tmp_path / "run" / "x").close()
        (tmp_path / f"done.{os.getpid()}").touch()

    def both():
        if os.fork() == 0:
            write_many()
            os._exit(0)
        write_many()
        assert os.wait()[1] == 0

    killed(both)
    assert len(unfinished(tmp_path / "run")) == 2 == len(list(tmp_path.glob("done.*")))
    remove_leftovers(tmp_path / "run")
    assert names(tmp_path / "run") == []


def test_two_processes_that_also_clean_leave_each_other_alone(tmp_path, killed):
    def write_and_clean():
        for _ in range(100):
            file = open_temporary_file(tmp_path / "x")
            file.close()
            remove_leftovers(tmp_path)
            assert Path(file.name).exists()
            discard(Path(file.name))

    def both():
        if os.fork() == 0:
            write_and_clean()
            os._exit(0)
        write_and_clean()
        assert os.wait()[1] == 0

    killed(both)
    assert names(tmp_path) == []


def test_a_new_journal_that_another_process_took_for_a_dead_one_is_made_again(tmp_path, monkeypatch):
    lock, calls = fcntl.lockf, []

    def late(descriptor, flags):
        calls.append(descriptor)
        if len(calls) == 1:  # the other process has removed it
            next(tmp_path.glob(f"{JOURNAL}.*")).unlink()
        if len(calls) == 2:  # the other process has it
            raise OSError(errno.EAGAIN, "taken")
        return lock(descriptor, flags)

    monkeypatch.setattr(fcntl, "lockf", late)
    file = open_temporary_file(tmp_path / "x")
    file.close()
    assert len(calls) == 3 and len(names(tmp_path)) == 2
    discard(Path(file.name))
    assert names(tmp_path) == []


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch, killed):
    def none(descriptor, flags):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    killed(lambda: write_three(tmp_path))
    before = names(tmp_path)
    remove_leftovers(tmp_path)
    write_text(tmp_path / "x", "y")
    assert names(tmp_path) == sorted([*before, "x"])


@pytest.mark.parametrize("kind", ["full", "removed"])
def test_a_journal_that_is_full_or_gone_is_replaced(tmp_path, monkeypatch, killed, kind):
    def writes():
        monkeypatch.setattr(journal, "_MOST_BYTES", 100)
        for _ in range(50):
            open_temporary_file(tmp_path / "x").close()
            if kind == "removed":
                next(tmp_path.glob(f"{JOURNAL}.*")).unlink()
            for path in list(tmp_path.glob(".x.*"))[1:]:
                discard(path)
        write_text(tmp_path / "y", "z")

    killed(writes)
    assert len(names(tmp_path)) == 3, "one file, one journal, and y"
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["y"]


def test_what_cannot_be_made_leaves_no_journal(tmp_path):
    with pytest.raises(FileNotFoundError):
        rename_to_temporary(tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        open_temporary_file(tmp_path / "missing" / "x")
    remove_leftovers(tmp_path / "missing")
    assert names(tmp_path) == []
