"""Unfinished files and folders: names that nobody can guess, noted before they are made; nothing else is touched."""

import io
import os
import stat
from pathlib import Path

import pytest

from orthotrain.errors import ConfigurationError
from orthotrain.files.atomic_writes import (
    OLD_SUFFIX,
    discard,
    make_temporary_folder,
    open_temporary_file,
    open_to_append,
    publish,
    remove_folder,
    remove_leftovers,
    rename_to_temporary,
    write_atomically,
    write_text,
)
from orthotrain.files.journal import JOURNAL
from orthotrain.models.folder import new_folder

PLANTED = f"{JOURNAL}.0123456789abcdef"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(folder, text="x"):
    folder.mkdir(exist_ok=True)
    (folder / "inside").write_text(text)
    return folder


FOREIGN = (".last.ckpt.old", ".last.ckpt.partial", "notes.old", ".backup.old", "a.tmp", ".x.0123456789abcdef.partial",
           ".x.0123456789abcdef.old")  # fmt: skip


def test_what_is_not_noted_is_left_alone(tmp_path):
    """Files, folders and links of the names that this package gives to what is unfinished, or gave once."""
    (tmp_path / "elsewhere").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    for name in FOREIGN:
        fill(run / name)
        (run / f"{name}.link.old").symlink_to(tmp_path / "elsewhere")
    before = names(run)
    remove_leftovers(run)
    write_text(run / "last.ckpt", "new")
    publish(fill(make_temporary_folder(run / "step.ckpt")), run / "step.ckpt")
    assert names(run) == sorted([*before, "last.ckpt", "step.ckpt"])
    assert all((run / name / "inside").read_text() == "x" for name in FOREIGN)


def test_what_a_dead_process_noted_is_removed(tmp_path, killed):
    def writes():
        open_temporary_file(tmp_path / "a.ckpt").close()
        fill(make_temporary_folder(tmp_path / "b.ckpt"))
        rename_to_temporary(fill(tmp_path / "c.ckpt"))
        rename_to_temporary(fill(tmp_path / "d.ckpt", "older"), OLD_SUFFIX)
        rename_to_temporary(fill(tmp_path / "e.ckpt", "older"), OLD_SUFFIX)
        fill(tmp_path / "e.ckpt", "newer")

    killed(writes)
    assert len(names(tmp_path)) == 7
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["d.ckpt", "e.ckpt"], "the renamed folder has its own name again"
    assert (tmp_path / "d.ckpt" / "inside").read_text() == "older"
    assert (tmp_path / "e.ckpt" / "inside").read_text() == "newer"


def test_a_name_with_any_character_is_noted(tmp_path, killed):
    for name in ("a\nb.ckpt", "\udcff.ckpt", " .ckpt", ".partial"):
        killed(lambda name=name: open_temporary_file(tmp_path / name))
        assert len(names(tmp_path)) == 2
        remove_leftovers(tmp_path)
        assert names(tmp_path) == []


def test_links_in_the_place_of_what_is_noted_are_not_followed(tmp_path, killed):
    victim, run = fill(tmp_path / "victim"), tmp_path / "run"
    run.mkdir()
    for make in (lambda: make_temporary_folder(run / "a"), lambda: rename_to_temporary(fill(run / "b"), OLD_SUFFIX)):
        killed(make)
        (path,) = (path for path in run.iterdir() if path.suffix in (".partial", ".old") and not path.is_symlink())
        path.rename(tmp_path / "moved")
        path.symlink_to(victim)
        remove_leftovers(run)
        assert path.is_symlink() and names(victim) == ["inside"] and not (run / "b").exists()
        (tmp_path / "moved").rename(tmp_path / f"moved {path.name}")
    assert all(path.is_symlink() for path in run.iterdir()), "no journal is left"


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "folder", "fifo", "large"])
def test_a_journal_that_is_none_is_left_alone(tmp_path, kind):
    victim, run = tmp_path / "victim", tmp_path / "run"
    run.mkdir()
    own = run / ".x.0123456789abcdef.partial"
    own.write_text("kept")
    journal = run / PLANTED
    if kind in ("link", "hard link"):
        victim.write_bytes(os.fsencode(own.name))
    if kind in ("link", "dangling"):
        journal.symlink_to(victim)
    elif kind == "hard link":
        journal.hardlink_to(victim)
    elif kind == "folder":
        journal.mkdir()
    elif kind == "fifo":
        os.mkfifo(journal)
    else:
        with journal.open("wb") as file:
            file.write(os.fsencode(own.name) + b"\0")
            file.truncate(1 << 30)
    before = journal.lstat()
    for act in (remove_leftovers, lambda folder: write_text(folder / "x", "y"), remove_leftovers):
        act(run)
    assert names(run) == sorted([PLANTED, own.name, "x"])
    assert os.path.samestat(before, journal.lstat()) and journal.lstat().st_size == before.st_size
    assert not victim.exists() if "link" not in kind else victim.read_text() == own.name


@pytest.mark.parametrize(
    "line", [b"../victim", b"/etc/passwd", b"victim", b".x.old", b"..", b"", b".a/.b.0123456789abcdef.old"]
)
def test_a_journal_names_nothing_else(tmp_path, line):
    run = fill(tmp_path / "run")
    fill(tmp_path / "victim")
    fill(run / "victim")
    fill(run / ".x.old")
    fill(run / ".y.0123456789abcdef.partial")
    (run / PLANTED).write_bytes(b".y.0123456\0" + line + b"\0.y.0123456789abcdef.partial\0\xff")
    remove_leftovers(run)
    assert not (run / PLANTED).exists() and not (run / ".y.0123456789abcdef.partial").exists()
    assert names(tmp_path / "victim") == names(run / "victim") == names(run / ".x.old") == ["inside"]


def test_files_and_folders_have_the_modes_of_others(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
        publish(fill(make_temporary_folder(tmp_path / "folder")), tmp_path / "folder")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


@pytest.mark.parametrize("there", [True, False])
def test_a_link_that_has_the_name_is_replaced_and_not_followed(tmp_path, there):
    victim, run = tmp_path / "victim", tmp_path / "run"
    run.mkdir()
    if there:
        fill(victim)
    (run / "file").symlink_to(victim / "inside" if there else victim)
    (run / "folder").symlink_to(victim)
    (run / "log").symlink_to(victim / "inside" if there else victim)
    write_text(run / "file", "new")
    publish(fill(make_temporary_folder(run / "folder"), "new"), run / "folder")
    assert (run / "file").read_text() == "new" and not (run / "file").is_symlink()
    assert (run / "folder" / "inside").read_text() == "new" and not (run / "folder").is_symlink()
    with pytest.raises(OSError, match="symbolic link"):
        open_to_append(run / "log")
    assert not victim.exists() if not there else (victim / "inside").read_text() == "x"
    assert names(run) == ["file", "folder", "log"]


def test_a_failure_leaves_nothing(tmp_path):
    def fails(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "x", fails)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as partial:
        (partial / "half").write_text("x")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_an_export_does_not_follow_links(tmp_path):
    """Neither to the name that it gives its unfinished folder, nor where the folder itself is a link."""
    victim = fill(tmp_path / "victim")
    (tmp_path / f".out.{os.getpid()}.partial").symlink_to(victim)
    with new_folder(tmp_path / "out") as partial:
        (partial / "config.json").write_text("{}")
    assert names(tmp_path / "out") == ["config.json"] and names(victim) == ["inside"]
    for target in (tmp_path / "nowhere", victim):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(target)
        with (
            pytest.raises(ConfigurationError, match="link' is a link: name the folder itself"),
            new_folder(tmp_path / "link"),
        ):
            pass
    with pytest.raises(ConfigurationError, match="NUL"), new_folder(tmp_path / "a\0b"):
        pass


def test_two_writers_of_one_process_keep_their_files(tmp_path):
    first, second = open_temporary_file(tmp_path / "x"), open_temporary_file(tmp_path / "x")
    assert first.name != second.name and isinstance(first, io.IOBase)
    first.close(), second.close()
    remove_leftovers(tmp_path)
    discard(Path(first.name))
    remove_leftovers(tmp_path)
    assert Path(second.name).exists()
    discard(Path(second.name))
    assert names(tmp_path) == []


def test_a_name_with_no_room_for_ours_is_refused_before_anything_is_made(tmp_path):
    for name in ("n" * 230, "\u00e9" * 115, "n" * 240, "n" * 255):
        target = tmp_path / "new" / name
        for act in (
            lambda path: write_text(path, "x"),
            make_temporary_folder,
            lambda path: new_folder(path).__enter__(),
        ):
            with pytest.raises(ConfigurationError, match=f"the name is {len(name.encode())} bytes long, and 229 is"):
                act(target)
    assert names(tmp_path) == []
    for name in ("n" * 229, "\u00e9" * 114):
        write_text(tmp_path / name, "x")
        publish(fill(make_temporary_folder(tmp_path / name)), tmp_path / name)
        remove_folder(tmp_path / name)
    assert names(tmp_path) == []
