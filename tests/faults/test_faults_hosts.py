"""Faults that come from the machine and from other runs: no memory, a stopped rank, a full disk, a taken folder."""

import os
import re
import runpy
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

HARNESS = runpy.run_path(str(Path(__file__).parent / "harness.py"))
RANKS, STEPS, LONG = HARNESS["RANKS"], HARNESS["STEPS"], HARNESS["LONG"]
COMMAND = Path(__file__).parent / "command.py"


def one_line(log):
    """The only line with the error; there is no traceback."""
    (line,) = [line for line in log.splitlines() if line.startswith("orthotrain: error: ")]
    assert "Traceback" not in log and "Exception ignored" not in log, log
    return line


def command(folder, *arguments, patience=90, **job):
    """Run a command in its own process; return its exit code and its output."""
    log = folder / "command.log"
    for old in folder.glob("command.log.*"):
        old.unlink()
    processes = RANKS["start"](COMMAND, {"arguments": [*map(str, arguments)], **job}, log=log)
    codes = RANKS["wait"](processes, patience)
    return codes[0], (folder / "command.log.0").read_text()


WORKERS = [("POET", "worker", 5, 0)]
if LONG:
    WORKERS = [("POET", "worker", step, 0) for step in range(1, 10, 2)]
    WORKERS += [("POET", "validating worker", step, 0) for step in (3, 6)]
    WORKERS += [("DDP", "worker", step, step % 2) for step in (3, 6)] + [("DDP", "validating worker", 3, 1)]


@pytest.mark.parametrize(("recipe", "kind", "step", "rank"), WORKERS)
def test_a_data_loader_worker_is_killed(harness, recipe, kind, step, rank):
    run = harness.new_run(recipe)
    run.arguments += ["--data.num_workers", "1"]
    validating = kind != "worker"
    options = ["--data.val_fraction", "0.2", "--trainer.limit_val_batches", "2", "--trainer.val_check_interval", "3"]
    before = run.arguments
    run.arguments = [*before, *(options if validating else [])]
    codes = run.fit(fault=[kind, step, rank])
    assert codes == [1] * run.recipe.ranks, run.log()
    line = one_line(Path(f"{run.folder}.log.{rank}").read_text())
    assert re.search(r"data loader worker (with process id \d+ was killed \(SIGKILL\);|.*ended unexpectedly)", line)
    for other in set(range(run.recipe.ranks)) - {rank}:
        assert "the connection to another rank is lost" in one_line(Path(f"{run.folder}.log.{other}").read_text())
    if not validating:  # another split makes another run
        run.arguments = before
        harness.recover("SIGKILL of a data loader worker", run)
    else:
        harness.note("SIGKILL of a data loader worker while validating", True)


@pytest.mark.parametrize(("recipe", "step", "rank"), [("DDP", 5, 1)] + ([("DDP", 3, 0), ("SHARDED", 6, 1)] * LONG))
def test_a_rank_is_stopped(harness, recipe, step, rank):
    harness.undisturbed(recipe)
    run = harness.new_run(recipe)
    before = run.arguments
    run.arguments = [*before, "--trainer.strategy.init_args.timeout", "00:00:10"]
    processes = run.start(fault=["stop", step, rank])
    try:
        other = processes[1 - rank]
        other.join(90)
        assert other.exitcode == 1, run.log()
    finally:
        for process in processes:
            process.kill()
            process.join()
    line = one_line(Path(f"{run.folder}.log.{1 - rank}").read_text())
    assert "another rank has not answered within the time limit" in line
    run.arguments = before
    harness.recover("a rank stopped (SIGSTOP)", run)


def no_remains(folder, known=()):
    """The files of a folder without those with known names."""
    return sorted(path.name for path in folder.iterdir() if path.name not in {*known, "lost+found"})


EXPORTS = [("POET", "hf", 20 << 10)] + [("ADAPTER", "peft", 1 << 10)] * LONG


@pytest.mark.parametrize(("recipe", "format", "size"), EXPORTS)
def test_a_full_disk_while_exporting(harness, recipe, format, size):
    checkpoint, folder = harness.undisturbed(recipe), harness.new_folder()
    disk = folder / "disk"
    disk.mkdir()
    export = ["export", "--ckpt", checkpoint, "--out", disk / "out", "--format", format]
    mounted = LONG and HARNESS["small_disk"](disk, max(4096, size))
    try:
        job = {} if mounted else {"fault": ["limit", size], "progress": str(folder / "unused")}
        code, log = command(folder, *export, **job)
        reason = "No space left on device" if mounted else "File too large"
        assert code == 2 and one_line(log).endswith(f"'{disk / 'out'}' cannot be read or written: {reason}"), log
        assert list(disk.iterdir()) == []
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        code, log = command(folder, *export)
        assert code == 0 and [path.name for path in disk.iterdir()] == ["out"], log
        harness.note("disk full while exporting", True, "tmpfs" if mounted else "RLIMIT_FSIZE")
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("size", [2 << 10] + [16 << 10, 60 << 10] * LONG)
def test_a_full_disk_while_the_token_caches_are_written(harness, size):
    """No space for the tokenizer, or for the tokens, which are buffered: any of several writes may fail."""
    cache = harness.new_folder()
    run = harness.new_run()
    run.arguments += ["--data.cache_dir", str(cache)]
    mounted = LONG and HARNESS["small_disk"](cache, max(4096, size))
    try:
        codes = run.fit(**({} if mounted else {"fault": ["limit", size]}))
        reason = "No space left on device" if mounted else "File too large"
        assert codes == [2] and one_line(run.log()).endswith(f"cannot be read or written: {reason}"), run.log()
        (folder,) = cache.iterdir()
        whole = {"tokenizer.json", "train.tokens", "val.tokens", "test.tokens", ".orthotrain.lock"}
        assert {path.name for path in folder.iterdir()} <= whole
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=50m", str(cache)], check=True)
        harness.recover("disk full while the token caches are written", run)
    finally:
        if mounted:
            subprocess.run(["umount", str(cache)], check=True)


@pytest.mark.parametrize("recipe", ["POET"] + ["DDP", "ADAPTER"] * LONG)
def test_a_second_run_in_the_folder(harness, recipe):
    expected = HARNESS["trained"](harness.undisturbed(recipe))
    run = harness.new_run(recipe)
    processes = run.start(fault=["stop", 5, 0])  # a stopped run keeps its lock
    first = processes[0]
    try:
        stat = Path(f"/proc/{first.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.02)
        code, log = command(harness.new_folder(), *run.arguments[:3], "-c", "trainer/cpu.yaml", "--ckpt_path", "last")
        line = one_line(log)
        assert code == 2 and f"another run writes to '{run.folder}" in line, log
        assert f"process {first.pid} on " in line and "--run_folder" in line
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert RANKS["wait"](processes) == [0] * len(processes), run.log()
    step, found = HARNESS["trained"](run.checkpoints()[-1])
    assert (step, found.keys()) == (STEPS, expected[1].keys())
    assert all(torch.equal(found[name], expected[1][name]) for name in found)
    harness.note("a second run in the folder of one under way", True)


def test_weights_alone_are_no_checkpoint_to_go_on_from(harness):
    run = harness.new_run()
    config = Path(run.arguments[2])
    before = config.read_text()
    config.write_text(before.replace("save_top_k: 2", "save_top_k: 2\n      save_weights_only: true"))
    assert run.fit(fault=["kill", 7]) == [-9]
    assert run.fit(resume=True) == [2]
    line = one_line(run.log())
    assert "step=6.ckpt' has only weights (save_weights_only: true)" in line and "CheckpointModel" in line
    config.write_text(before)
    Path(f"{run.folder}.progress.0").unlink()
    assert run.fit(fault=["kill", 5]) == [-9]  # begins again, and saves complete checkpoints of steps 2 and 4
    for path in run.folder.glob("*step=6.ckpt"):
        os.utime(path)
    harness.recover("the newest checkpoint has only weights", run)
    assert "skipped: checkpoint" in run.log() and "--ckpt_path last is" in run.log()


KINDS = [("true", "false")] + [("false", "true")] * LONG


@pytest.mark.parametrize("kinds", KINDS)
def test_a_file_in_the_place_of_a_folder(harness, kinds):
    """FSDP2 with its other form of checkpoints in the same run folder: a save replaces the one of the same name."""
    run = harness.new_run("SHARDED")
    given = run.arguments[:-1]
    run.arguments = [*given, kinds[0]]
    assert run.fit(fault=["kill", 5, 1])[1] == -9
    assert (run.folder / "last.ckpt").is_dir() == (kinds[0] == "true")
    run.arguments = [*given, kinds[1]]
    assert run.fit(resume=True) == [0, 0], run.log()
    run.check_files()
    assert (run.folder / "last.ckpt").is_dir() == (kinds[-1] == "true")
    (_, found), (_, expected) = map(HARNESS["trained"], (run.folder / "last.ckpt", harness.undisturbed("SHARDED")))
    weights = [name for name in expected if name.startswith("/state_dict/")]  # other files have other names
    assert weights and all(torch.equal(found[name], expected[name]) for name in weights)
    harness.note("FSDP2 with one file in the place of a folder, or the other way round", True)
