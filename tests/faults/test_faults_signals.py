"""Signals at any moment of the real command, from exec to exit, and runs that end between two checkpoints.

``make test`` tries a few moments, ``make faults`` 50 moments for each signal.
"""

import contextlib
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from orthotrain.checkpoints.reading import check_checkpoint, read_checkpoint

HARNESS = runpy.run_path(str(Path(__file__).parent / "harness.py"))
STEPS, LONG = HARNESS["STEPS"], HARNESS["LONG"]
COMMAND = Path(sys.executable).with_name("orthotrain")
DURATIONS = []


def start(run, *extra):
    """Start the command of a run by itself, as a shell does; its steps and its log have the usual paths."""
    config = Path(run.arguments[run.arguments.index("-c") + 1])
    document = yaml.safe_load(config.read_text())
    noted = {"class_path": "noted_steps.NotedSteps", "init_args": {"path": f"{run.folder}.progress.0"}}
    document["trainer"]["callbacks"].insert(0, noted)
    signalled = config.with_suffix(".signals.yaml")
    signalled.write_text(yaml.safe_dump(document))
    arguments = [str(signalled) if part == str(config) else part for part in run.arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    with open(f"{run.folder}.log.0", "a") as log:
        return subprocess.Popen([COMMAND, *arguments, *extra], stdout=log, stderr=log, env=environment)


def duration(harness):
    """Seconds that the whole command takes; measured once."""
    if not DURATIONS:
        run, begun = harness.new_run(), time.monotonic()
        assert start(run).wait(120) == 0, run.log()
        DURATIONS.append(time.monotonic() - begun)
    return DURATIONS[0]


# start of the interpreter, import of libraries, building the network, steps, end of the process
MOMENTS = [("SIGTERM", 0.93), ("SIGINT", 0.3)]
if LONG:
    draws = [random.Random(number).uniform(0.0, 1.02) for number in range(50)]
    MOMENTS = [(name, moment) for name in ("SIGTERM", "SIGINT") for moment in draws]


@pytest.mark.parametrize(("name", "moment"), MOMENTS)
def test_a_signal_at_a_random_moment(harness, name, moment):
    harness.undisturbed()
    signum, seconds, run = getattr(signal, name), moment * duration(harness), harness.new_run()
    process = start(run)
    time.sleep(seconds)
    in_time = paused(process)
    process.send_signal(signum)
    process.send_signal(signal.SIGCONT)
    code, log = process.wait(180), run.log()
    if in_time or code != 0:  # otherwise the command ended before the signal was sent
        assert code in (128 + signum, -signum), (code, log)
    assert "Traceback" not in log or (not run.steps() and early(log)), log
    if run.steps():
        check_checkpoint(run.folder / "last.ckpt")
    harness.recover(f"{name} at a random moment from exec to exit", run, note=f"after {seconds:.2f} s", at_most=0)


def paused(process):
    """Pause a process; False if it has ended already, or is just returning its memory, where no signal can reach it."""
    process.send_signal(signal.SIGSTOP)
    while process.poll() is None:
        if Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return True
        time.sleep(0.001)
    return False


def early(log):
    """Whether Python itself was starting: the traceback of the KeyboardInterrupt has no line of the package."""
    return log.rstrip().endswith("KeyboardInterrupt") and "in main" not in log


def left_of(run):
    """The processes of a run that are still alive."""
    name = str(run.folder.with_suffix(".signals.yaml")).encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [path.parent.name] * (name in path.read_bytes())
    return found


@pytest.mark.skipif(not LONG, reason="ranks that agree in training are in test_faults.py")
@pytest.mark.parametrize(("seconds", "step"), [(1.0, 0), (3.0, 0), (5.0, 0), (0.0, 1), (0.0, 6), (0.0, 11)])
def test_sigterm_takes_the_ranks_along_that_the_command_has_started(harness, seconds, step):
    """Only the first of two ranks gets the signal, as from ``kill``; during training both save their state."""
    harness.undisturbed("DDP")
    run = harness.new_run("DDP")
    process = start(run)
    time.sleep(seconds)
    while step not in [0, *run.steps()]:
        time.sleep(0.01)
    assert process.poll() is None, run.log()
    process.send_signal(signal.SIGTERM)
    code, log = process.wait(180), run.log()
    assert code in (143, -signal.SIGTERM) and "Traceback" not in log, (code, log)
    end = time.monotonic() + 60
    while left_of(run) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left_of(run), log
    if run.steps():
        assert max(run.steps()) == read_checkpoint(run.folder / "last.ckpt")["global_step"]


@pytest.mark.skipif(
    not LONG, reason="tests/framework/console/test_termination.py has it in a process without a network"
)
def test_a_second_ctrl_c_ends_at_once(harness):
    run = harness.new_run()
    process = start(run)
    while not run.steps():
        time.sleep(0.01)
        assert process.poll() is None, run.log()
    process.send_signal(signal.SIGINT)
    while "again to end at once" not in run.log() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) in (130, -signal.SIGINT) and "Traceback" not in run.log(), run.log()
    for path in run.checkpoints():
        check_checkpoint(path)


ENDS = [("POET", 7)]
if LONG:
    ENDS = [(recipe, steps) for recipe in ("POET", "STEPWISE", "ADAPTER", "DDP") for steps in range(3, STEPS, 2)]


@pytest.mark.parametrize(("recipe", "steps"), ENDS)
def test_the_end_lies_between_two_checkpoints(harness, recipe, steps):
    """A run that ends early, and resumes later, reaches the weights of an uninterrupted run."""
    run = harness.new_run(recipe)
    whole = run.arguments
    run.arguments = [*whole, "--trainer.max_steps", str(steps)]
    assert run.fit() == [0] * run.recipe.ranks, run.log()
    newest = run.checkpoints()[-1]
    assert read_checkpoint(newest)["global_step"] == steps
    run.arguments = whole
    harness.recover("end of a run between two of its checkpoints", run, at_most=0)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


TRIALS = {
    "fast_dev_run": ["--trainer.fast_dev_run", "2"],
    "overfit_batches": ["--trainer.overfit_batches", "2", "--trainer.max_steps", "3"],
}


@pytest.mark.skipif(not LONG, reason="tests/framework/callbacks/test_run_files.py has it in one process")
@pytest.mark.parametrize("trial", TRIALS)
def test_a_trial_in_the_folder_of_an_earlier_run(harness, trial):
    run = harness.new_run()
    assert run.fit(fault=["kill", 7]) == [-9]
    root = Path(f"{run.folder}.root")
    before = contents(run.folder), contents(root)
    whole, run.arguments = run.arguments, [*run.arguments, *TRIALS[trial]]
    noted = Path(f"{run.folder}.progress.0")
    steps = noted.read_text()
    assert run.fit() == [0], run.log()
    noted.write_text(steps)
    assert (contents(run.folder), contents(root)) == before
    run.arguments = whole
    harness.recover(f"{trial} in the folder of an earlier run", run)
