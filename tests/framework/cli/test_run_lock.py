"""Two runs in one folder: the second is refused, whatever happens to the first."""

import errno
import fcntl
import json
import os
import runpy
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from orthotrain.cli.main import main
from orthotrain.cli.run_lock import LOCK_NAME, holding
from orthotrain.errors import ConfigurationError

RANKS = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "ranks.py"))


class Holder:
    """Another process that holds folders; ``worker`` lets it fork a process that outlives it."""

    def __init__(self, *folders, worker=False):
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                with holding(folders):
                    if worker and os.fork() == 0:
                        time.sleep(5)
                        os._exit(0)
                    os.write(write, b"x")
                    time.sleep(60)
            finally:
                os._exit(1)
        assert os.read(read, 1) == b"x"
        os.close(read), os.close(write)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def take(*folders):
    with holding(folders):
        return [(folder / LOCK_NAME).exists() for folder in folders]


def test_the_second_is_told_who_the_first_is(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bin/orthotrain", "fit", "-c", "a b.yaml"])
    with Holder(tmp_path / "run"):
        pass  # killed: its lock is gone, its file lies there
    assert (tmp_path / "run" / LOCK_NAME).exists()
    assert take(tmp_path / "run") == [True]
    with Holder(tmp_path / "run") as first:
        with pytest.raises(ConfigurationError) as info:
            take(tmp_path / "run")
        line = str(info.value)
        assert f"another run writes to '{tmp_path / 'run'}': process {first.pid} on {os.uname().nodename}" in line
        assert (
            f"since {time.strftime('%Y-')}" in line
            and ": orthotrain fit -c 'a b.yaml'" in line
            and "--run_folder" in line
        )
    assert take(tmp_path / "run") == [True]
    assert list((tmp_path / "run").iterdir()) == []


def test_one_folder_of_several_is_enough(tmp_path):
    """Runs in different folders with one folder of checkpoints; what the second had locked is free again."""
    one, two, shared = tmp_path / "one", tmp_path / "two", tmp_path / "shared"
    (tmp_path / "link").symlink_to(shared)
    with Holder(one, shared):
        with pytest.raises(ConfigurationError, match=f"another run writes to '{shared}'"):
            take(two, tmp_path / "link")
        with Holder(two):
            pass


def test_a_worker_of_a_killed_run_holds_nothing(tmp_path):
    with Holder(tmp_path, worker=True):
        pass
    assert take(tmp_path) == [True]


def test_one_process_runs_again_and_within(tmp_path):
    for _ in range(2):
        with holding([tmp_path]), holding([tmp_path, tmp_path / "more"]):
            assert (tmp_path / LOCK_NAME).exists()
    assert not (tmp_path / LOCK_NAME).exists() and not (tmp_path / "more" / LOCK_NAME).exists()
    with pytest.raises(ZeroDivisionError), holding([tmp_path]):
        raise ZeroDivisionError
    with Holder(tmp_path):
        pass


def test_the_first_ends_while_the_second_opens_its_file(tmp_path, monkeypatch):
    """The file that was opened has been removed: its lock would keep nobody out."""
    original, calls = fcntl.lockf, []

    def late(descriptor, how):
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / LOCK_NAME).unlink()
        return original(descriptor, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    with holding([tmp_path]):
        assert len(calls) == 2 and (tmp_path / LOCK_NAME).read_text().startswith('{"process": ')


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, number):
    def refuse(descriptor, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match="has no locks: make sure that no other run writes there"):
        assert take(tmp_path) == [False]


def test_a_folder_that_is_removed_meanwhile_and_one_that_lies_elsewhere(tmp_path):
    with holding([tmp_path / "run", "s3://bucket/run", Path("s3://bucket/run")]):
        (tmp_path / "run" / LOCK_NAME).unlink()
        (tmp_path / "run").rmdir()
    assert list(tmp_path.iterdir()) == [] and not Path("s3:").exists()


@pytest.mark.parametrize("text", [b"", b"[1]", b"{}", b"\xff\x00", b'{"process": "\x1b[2J", "host": 1}', b"[" * 4000])
def test_a_lock_file_that_says_nonsense(tmp_path, text):
    with Holder(tmp_path):
        (tmp_path / LOCK_NAME).write_bytes(text)
        with pytest.raises(ConfigurationError, match="another run writes to") as info:
            take(tmp_path)
    assert str(info.value).isprintable() and len(str(info.value)) < 1000


def test_a_fit_is_refused_before_it_writes_and_an_evaluation_is_not(small_config, tmp_path, capsys):
    arguments = ["-c", "pretrain/poet_quickstart.yaml", "-c", str(small_config)]
    run = tmp_path / "run"
    main(["fit", *arguments, "--trainer.max_steps", "2"])
    assert not list(run.rglob(".*"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    for held, extra in ((run, []), (run / "checkpoints", ["--trainer.logger", "false"])):
        with Holder(held), ExitStack() as stack:
            stop = stack.enter_context(pytest.raises(SystemExit))
            main(["fit", *arguments, *extra, "--ckpt_path", "last"])
        assert stop.value.code == 2 and f"another run writes to '{held}'" in capsys.readouterr().err
        for path in run.rglob(LOCK_NAME):
            path.unlink()
        assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    logger = json.dumps({"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "other"}})
    with Holder(run / "checkpoints"):
        main(["validate", *arguments, "--trainer.logger", logger, "--ckpt_path", str(run / "checkpoints/last.ckpt")])
    assert before.items() <= {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}.items()
