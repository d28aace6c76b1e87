"""A run that dies in whatever way goes on to the weights of the run that nothing happened to.

``make test`` injects each fault once, ``make faults`` (ORTHOTRAIN_FAULTS=20) as often as it says at random moments, and
prints the table of the README.
"""

import os
import runpy
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from orthotrain.checkpoint import check_checkpoint
from orthotrain.errors import ConfigurationError

HARNESS = runpy.run_path(str(Path(__file__).parent / "harness.py"))
EVERY, STEPS = HARNESS["EVERY"], HARNESS["STEPS"]
TIMES = int(os.environ.get("ORTHOTRAIN_FAULTS", "1"))
LONG = TIMES > 1


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    corpus = folder / "corpus"
    corpus.mkdir()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-b]*.py")):
        (corpus / f"{path.stem}.txt").write_text(path.read_text(encoding="utf-8")[:8000], encoding="utf-8")
    harness = HARNESS["Harness"](folder, corpus)
    yield harness
    print("\n" + harness.table())


@pytest.mark.parametrize("number", range(TIMES))
def test_killed_at_a_random_moment(harness, number):
    harness.undisturbed()
    step, seconds = HARNESS["random_moment"](f"kill {number}")
    run = harness.new_run()
    harness.kill_after(run, step, seconds)
    harness.recover("SIGKILL at a random moment", run, note=f"{seconds:.2f} s after step {step}")


@pytest.mark.parametrize("save", [1, 5] if not LONG else range(1, 13))
def test_killed_while_a_checkpoint_is_written(harness, save):
    run = harness.new_run()
    assert harness.run(run, fault=["save", save]) == [-9]
    assert list(run.glob(".*.partial")), "the half-written file has another name than a checkpoint"
    harness.recover("SIGKILL while a checkpoint is written", run)


@pytest.mark.parametrize("layer", [9] if not LONG else range(1, 22))
def test_killed_while_a_merge_runs(harness, layer):
    run = harness.new_run()  # seven layers: the ninth call is in the middle of the second merge
    assert harness.run(run, fault=["merge", layer]) == [-9]
    harness.recover("SIGKILL while a merge runs", run)


@pytest.mark.parametrize("step", [5] if not LONG else range(1, STEPS))
def test_one_rank_of_two_is_killed(harness, step):
    run = harness.new_run()
    processes = harness.start(run, 2, fault=["kill", step, step % 2])
    processes[step % 2].join(90)
    assert processes[step % 2].exitcode == -9
    codes = HARNESS["RANKS"]["wait"](processes)  # the other one dies of it, and of nothing else
    assert all(codes), codes
    harness.recover("SIGKILL of one rank of two", run, ranks=2)


@pytest.mark.parametrize(
    ("ranks", "step"), [(1, 4), (2, 7)] if not LONG else [(r, s) for r in (1, 2) for s in range(1, 11)]
)
def test_terminated(harness, ranks, step):
    """SIGTERM reaches one rank, in the middle of a step: that step is finished and saved, nothing is lost."""
    run = harness.new_run()
    codes = harness.run(run, ranks, fault=["terminate", step, ranks - 1])
    assert codes == [143] * ranks, harness.log(run)
    assert f"SIGTERM: step {step + 1} is saved as" in harness.log(run)
    assert harness.steps(run)[-1] == step + 1
    harness.recover("SIGTERM, to one rank of one or two", run, ranks)
    assert harness.outcomes[-1].lost == 0


def test_a_full_disk(harness):
    harness.undisturbed()
    size = max(path.stat().st_size for path in harness.folder.glob("run1/*.ckpt"))
    run = harness.new_run()
    mounted = HARNESS["small_disk"](run, int(3.5 * size))  # two of the best, the last, and half of the next
    try:
        codes = harness.run(run, **({} if mounted else {"fault": ["limit", size // 2]}))
        assert codes == [2]
        reason = "No space left on device" if mounted else "File too large"
        assert f"cannot be written ({reason}); the older ones are intact" in harness.log(run)
        for path in run.glob("*"):
            assert path.suffix == ".ckpt"
            check_checkpoint(path)
        if mounted:
            subprocess.run(["mount", "-o", f"remount,size={9 * size}", str(run)], check=True)
        harness.recover("disk full while saving (a small tmpfs)", run, note="tmpfs" if mounted else "RLIMIT_FSIZE")
    finally:
        if mounted:
            subprocess.run(["umount", str(run)], check=True)


DAMAGED = "the two newest checkpoints damaged (a bit flipped, truncated, empty)"


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, truncate] if not LONG else [flip, truncate, empty], ids=lambda f: f.__name__)
def test_the_newest_checkpoint_is_damaged(harness, damage):
    run = harness.new_run()
    assert harness.run(run, fault=["kill", 7, 0]) == [-9]
    newest = sorted(run.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for path in newest[-2:]:  # the last and its twin by the name of its step
        times = path.stat()
        damage(path)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(ConfigurationError, match="cannot be read"):
            check_checkpoint(path)
    lost = harness.steps(run)[-1]
    codes = harness.run(run, resume=True)
    assert codes == [0], harness.log(run)
    log = harness.log(run)
    for path in newest[-2:]:
        assert f"skipped: checkpoint '{path}' cannot be read" in log.replace("\n", " ")
    assert f"going on from {newest[-3]}" in log
    found = HARNESS["read_checkpoint"](run / "last.ckpt")["state_dict"]
    recovered = all((found[name] == tensor).all() for name, tensor in harness.undisturbed().items())
    steps = len(harness.steps(run)) - STEPS
    harness.outcomes.append(HARNESS["Outcome"](DAMAGED, recovered, steps, damage.__name__))
    assert recovered and steps <= lost - 4


def test_all_checkpoints_are_damaged(harness):
    run = harness.new_run()
    for name in ("step=2.ckpt", "last.ckpt"):
        (run / name).write_bytes(b"PK\x03\x04 not much")
    assert harness.run(run, resume=True) == [2]
    assert "no checkpoint is whole" in harness.log(run) and "step=2.ckpt" in harness.log(run)


def test_a_source_file_disappears(harness):
    """Training goes on from the cache; a resumed run that cannot find its text says so, and goes on when it is back."""
    corpus = harness.folder / "other" / "corpus"
    shutil.copytree(harness.corpus, corpus)
    run = harness.new_run()
    cache = str(corpus.parent / "cache")
    assert harness.run(run, corpus=corpus, fault=["remove", 5, 0], remove=[str(corpus), cache]) == [-9]
    assert harness.run(run, resume=True, corpus=corpus) == [2]
    assert f"orthotrain: error: source '{corpus}': no such file or folder" in harness.log(run)
    os.rename(f"{corpus}.gone", corpus)  # the cache stays away and is built again
    harness.recover("data files disappear", run, corpus=corpus)


def test_a_nan_in_a_batch(harness):
    run = harness.new_run()
    codes = harness.run(run, fault=["nan", 6, 0])
    assert codes == [1] and "training diverged at optimizer step 6" in harness.log(run)
    for path in run.glob("*.ckpt"):
        check_checkpoint(path)
    harness.recover("NaN in a batch", run)
