"""Signals are noted and not raised: what safe points, helpers and blocking calls make of them."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from orthotrain.console import termination
from orthotrain.console.progress import Progress
from orthotrain.console.termination import Ended, asked, check, give_back, hold, listen


@pytest.fixture(autouse=True)
def _listening():
    before = listen()
    assert set(before) == {signal.SIGTERM, signal.SIGINT}
    yield
    give_back(before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Swallows:
    """An object whose end is the place where a signal arrives; Python ignores what is raised there."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_raises_nothing_until_a_safe_point(signum):
    check()
    os.kill(os.getpid(), signum)
    os.kill(os.getpid(), signal.SIGTERM)  # the first one decides
    assert asked() == signum
    for safe_point in (check, Progress("step", 3).start, lambda: Progress("step", 3).advance()):
        with pytest.raises(Ended) as stop:
            safe_point()
        assert stop.value.code == 128 + signum


def test_a_signal_where_exceptions_are_swallowed_is_not_lost():
    Swallows()
    with pytest.raises(Ended):
        check()


def test_in_training_no_safe_point_ends_one_rank_alone():
    hold()
    Swallows()
    check()
    hold(False)
    with pytest.raises(Ended):
        check()


def test_outside_of_a_command_nothing_is_checked():
    os.kill(os.getpid(), signal.SIGTERM)
    give_back({signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler})
    check()
    assert not asked() and set(listen()) == {signal.SIGTERM, signal.SIGINT}
    check()


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored():
    give_back({signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.SIG_IGN})
    assert set(listen()) == {signal.SIGTERM}
    os.kill(os.getpid(), signal.SIGINT)
    check()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_code(act):
    """How a forked process ends that does something: its exit code, negative for a signal."""
    if (child := os.fork()) == 0:
        code = 99
        try:
            act()
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_helper_dies_of_sigterm_and_leaves_the_first_ctrl_c_to_its_parent():
    assert exit_code(lambda: os.kill(os.getpid(), signal.SIGTERM)) == -signal.SIGTERM
    assert exit_code(lambda: os.kill(os.getpid(), signal.SIGINT)) == 0
    assert exit_code(lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]) == -signal.SIGINT


def forked(act):
    """Let a forked process listen by itself."""

    def listens():
        give_back({signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler})
        listen()
        act()

    return exit_code(listens)


def test_a_second_ctrl_c_ends_the_process_at_once(capfd):
    assert forked(lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]) == 130
    assert capfd.readouterr().err.count("again to end at once") == 1


@pytest.mark.parametrize("held", [False, True])
def test_a_call_that_blocks_is_ended_where_nothing_can_be_lost(held, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(termination, "PATIENCE", 0.3)
    os.mkfifo(tmp_path / "pipe")

    def block():
        hold(held)
        os.kill(os.getpid(), signal.SIGTERM)
        if held:
            time.sleep(1.0)
        else:
            (tmp_path / "pipe").read_bytes()  # a call that the system goes on with after a signal

    assert forked(block) == (0 if held else 143)
    assert ("interrupted" in capfd.readouterr().err) == (not held)


def test_the_command_line_listens_before_it_imports_anything():
    """The libraries take seconds; until then Python's own handlers would print a traceback."""
    said = subprocess.run(
        [sys.executable, "-P", "-c", "import re, sys; before = set(sys.modules); import orthotrain.cli.main; "
         "print(sorted(set(sys.modules) - before))"], capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    imported = {name for name in eval(said) if not name.startswith("_")}
    ours = {"orthotrain", "orthotrain.cli", "orthotrain.cli.commands", "orthotrain.cli.main", "orthotrain.console"}
    ours |= {"orthotrain.console.streams", "orthotrain.console.termination"}
    assert imported <= ours | {"collections.abc", "contextlib", "signal", "types", "enum"}


EXIT = """
    import os, signal, sys
    from orthotrain.cli import main as cli

    def command(arguments):
        os.kill(os.getpid(), signal.{name}) if "{when}" == "in" else None
        {act}

    cli.COMMANDS["plugins"] = command
    sys.argv = ["orthotrain", "plugins"]
    try:
        cli.main()
    finally:
        os.kill(os.getpid(), signal.{name}) if "{when}" == "after" else None
"""
ACTS = {
    "done": "return",
    "failed": "raise RuntimeError('a worker has gone')",
    "refused": "raise cli_error()",
    "exit": "sys.exit(0)",
}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(("act", "when"), [*((act, "in") for act in ACTS), ("done", "after")])
def test_whatever_follows_the_exit_code_is_that_of_the_signal(name, act, when):
    act = ACTS[act].replace("cli_error()", "__import__('orthotrain.errors').errors.ConfigurationError('no such file')")
    script = textwrap.dedent(EXIT.format(name=name, act=act, when=when))
    run = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    signum = getattr(signal, name)
    assert run.returncode == (128 + signum if when == "in" else -signum)
    assert "Traceback" not in run.stderr and len(run.stderr.strip().splitlines()) <= 3, run.stderr
    assert "worker" not in act or "a worker has gone" in run.stderr
    assert "no such file" not in act or "orthotrain: error: no such file" in run.stderr


def test_a_wait_for_the_lock_of_a_cache_ends(tmp_path):
    from filelock import FileLock

    from orthotrain.data.corpus.cache_folder import _locked
    from orthotrain.data.sources import CACHE_MARK

    def wait():
        signal.signal(signal.SIGALRM, lambda *given: os.kill(os.getpid(), signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with _locked(tmp_path):
            pass

    with FileLock(tmp_path / CACHE_MARK):
        assert forked(wait) == 143
