"""The fault harness: break a real run in a chosen way, resume it, and compare with the run that nothing happened to."""

import random
import runpy
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from orthotrain.checkpoint import check_checkpoint, read_checkpoint
from orthotrain.resume import newest_good_checkpoint

HERE = Path(__file__).parent
RANKS = runpy.run_path(str(HERE / "ranks.py"))
STEPS, EVERY = 12, 2


@dataclass
class Outcome:
    """One fault: what it was, whether the run recovered, and the optimizer steps that were taken twice."""

    fault: str
    recovered: bool
    lost: int
    note: str = ""


class Harness:
    """Runs of one small model on one small corpus, each in a folder of its own."""

    def __init__(self, folder, corpus):
        self.folder, self.corpus = folder, corpus
        self.outcomes: list[Outcome] = []
        self.whole = {}
        self.runs = 0

    def arguments(self, run, ranks, corpus=None):
        network = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        checkpoints = {"dirpath": str(run), "every_n_train_steps": EVERY, "save_top_k": 2, "save_last": True}
        checkpoints |= {"monitor": "step", "mode": "max", "enable_version_counter": False}
        config = {
            "seed_everything": 0,
            "trainer": {
                "max_steps": STEPS, "accumulate_grad_batches": 2 // ranks, "logger": False, "limit_val_batches": 0,
                "enable_progress_bar": False, "enable_model_summary": False, "gradient_clip_val": 1.0,
                "default_root_dir": f"{run}.root", "callbacks": [
                    {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints}],
            },
            "model": {"class_path": "PoetModule", "init_args": {
                "merge_every": 3, "layers": {"block_size": 8}, "model": {"class_path": "CausalLM", "init_args": {
                    "config": {**network, "num_attention_heads": 2, "max_position_embeddings": 64}}}}},
            "data": {"class_path": "TextData", "init_args": {
                "source": str(corpus or self.corpus), "vocab_size": 320, "sequence_length": 32, "batch_size": 4,
                "val_fraction": 0.0, "test_fraction": 0.0, "cache_dir": str((corpus or self.corpus).parent / "cache")}},
        }  # fmt: skip
        path = run.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(config))
        placement = ["-c", "trainer/cpu.yaml"]
        if ranks > 1:
            placement = ["-c", "trainer/ddp.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", str(ranks)]
        return ["fit", "-c", str(path), *placement]

    def new_run(self):
        self.runs += 1
        run = self.folder / f"run{self.runs}"
        run.mkdir()
        return run

    def start(self, run, ranks=1, resume=False, corpus=None, **job):
        arguments = [*self.arguments(run, ranks, corpus), *(["--ckpt_path", "last"] if resume else [])]
        job = {"arguments": arguments, "progress": str(run) + ".progress", **job}
        return RANKS["start"](HERE / "command.py", job, ranks, log=run.with_suffix(".log"))

    def run(self, run, ranks=1, patience=90, **given):
        return RANKS["wait"](self.start(run, ranks, **given), patience)

    def log(self, run):
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{run.name}.log.*")))

    def steps(self, run):
        path = Path(f"{run}.progress.0")
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def undisturbed(self, ranks=1):
        """The last checkpoint of a run that nothing happens to; made once for each number of ranks."""
        if ranks not in self.whole:
            if not self.whole:  # the server from which processes are forked takes seconds to start
                RANKS["wait"](RANKS["start"](HERE / "command.py", {"arguments": ["plugins"]}, log=self.folder / "warm"))
            run = self.new_run()
            assert self.run(run, ranks) == [0] * ranks, self.log(run)
            self.whole[ranks] = read_checkpoint(run / "last.ckpt")["state_dict"]
        return self.whole[ranks]

    def recover(self, fault, run, ranks=1, note="", corpus=None):
        """Resume with --ckpt_path last, compare with the undisturbed run, and note the outcome."""
        before = max(self.steps(run), default=0)
        codes = self.run(run, ranks, resume=True, corpus=corpus)
        assert codes == [0] * ranks, f"{fault}: {codes} {self.log(run)[-3000:]}"
        files = list(run.iterdir())
        assert all(path.suffix == ".ckpt" for path in files), f"{fault}: {files}"
        for path in files:
            check_checkpoint(path)
        # a run that dies between its last two files has all it needs, and nothing left to do
        newest, _ = newest_good_checkpoint([run])
        found, expected = read_checkpoint(newest), self.undisturbed(ranks)
        assert found["global_step"] == STEPS
        recovered = all(torch.equal(expected[name], found["state_dict"][name]) for name in expected)
        taken = self.steps(run)
        assert set(taken) == set(range(1, STEPS + 1))
        lost = len(taken) - STEPS
        self.outcomes.append(Outcome(fault, recovered, lost, note))
        assert recovered, f"{fault}: the resumed run ended with other weights"
        # what is repeated lies behind the last checkpoint
        assert lost <= EVERY, f"{fault}: {lost} steps were repeated, {before} had been reached"

    def kill_after(self, run, step, seconds, ranks=1):
        """Kill all ranks some time after they have noted a step (0 for the start of the process)."""
        processes = self.start(run, ranks)
        while step and step not in self.steps(run):
            time.sleep(0.002)
        time.sleep(seconds)
        for process in processes:
            process.kill()
        return RANKS["wait"](processes)

    def table(self):
        """The outcomes as the README shows them."""
        names = list(dict.fromkeys(outcome.fault for outcome in self.outcomes))
        lines = ["| fault | injected | recovered | most steps lost |", "|-|-|-|-|"]
        for name in names:
            mine = [outcome for outcome in self.outcomes if outcome.fault == name]
            recovered, lost = sum(outcome.recovered for outcome in mine), max(outcome.lost for outcome in mine)
            lines.append(f"| {name} | {len(mine)} | {recovered} | {lost} |")
        return "\n".join(lines)


def small_disk(folder, size):
    """Mount a tmpfs of ``size`` bytes on a folder; tell whether that is permitted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return bool(shutil.which("mount")) and subprocess.run(command, capture_output=True).returncode == 0


def random_moment(seed):
    """A step, and seconds after it: steps and checkpoints take some tens of milliseconds each."""
    generator = random.Random(seed)
    return generator.randrange(STEPS), generator.uniform(0.0, 0.2)
