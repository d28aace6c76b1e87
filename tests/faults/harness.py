"""The fault harness: break a real run in a chosen way, resume it, and compare it with an undisturbed run."""

import os
import random
import runpy
import shutil
import struct
import subprocess
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from orthotrain.checkpoints.reading import check_checkpoint, read_checkpoint
from orthotrain.checkpoints.resume import newest_good_checkpoint
from orthotrain.checkpoints.shards import REST, load_shards

HERE = Path(__file__).parent
RANKS = runpy.run_path(str(HERE / "ranks.py"))
RECIPES = runpy.run_path(str(HERE / "recipes.py"))
STEPS, EVERY = RECIPES["STEPS"], RECIPES["EVERY"]
TIMES = int(os.environ.get("ORTHOTRAIN_FAULTS", "1"))
LONG = TIMES > 1


@dataclass
class Outcome:
    """One fault: its description, whether the run recovered, and the optimizer steps that were taken twice."""

    fault: str
    recovered: bool
    lost: int
    note: str = ""


class Run:
    """One run of a recipe: a folder of checkpoints, and next to it the config, the log and the steps of each rank."""

    def __init__(self, folder, recipe, corpus, pretrained):
        self.folder, self.name, self.recipe = folder, recipe, RECIPES[recipe]
        self.folder.mkdir()
        path = folder.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(RECIPES["config"](self.recipe, folder, corpus, pretrained)))
        self.arguments = ["fit", "-c", str(path), *RECIPES["placement"](self.recipe)]

    def start(self, resume=False, **job):
        arguments = [*self.arguments, *(["--ckpt_path", "last"] if resume else [])]
        job = {"arguments": arguments, "progress": str(self.folder) + ".progress", **job}
        return RANKS["start"](HERE / "command.py", job, self.recipe.ranks, log=self.folder.with_suffix(".log"))

    def fit(self, patience=90, **given):
        """Run until the run or its processes end; return the exit codes of the processes."""
        return RANKS["wait"](self.start(**given), patience)

    def log(self):
        return "".join(path.read_text() for path in sorted(self.folder.parent.glob(f"{self.folder.name}.log.*")))

    def steps(self):
        path = Path(f"{self.folder}.progress.0")
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def checkpoints(self):
        """The checkpoints from the oldest to the newest."""
        return sorted(self.folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)

    def check_files(self):
        """Check that the folder holds complete checkpoints and nothing else."""
        for path in self.folder.iterdir():
            if path.suffix == ".ckpt":
                check_checkpoint(path)
            else:
                assert self.recipe.adapter and path.name.startswith("step-"), path
                names = sorted(file.name for file in path.iterdir())
                assert names == ["adapter.json", "adapter.safetensors", "resume.ckpt"], path
                check_checkpoint(path / "resume.ckpt")

    def kill_after(self, step, seconds, victim):
        """Kill one rank some time after a step was recorded, or all ranks (step 0) some time after their start.

        As torchrun does, the harness ends a rank that waits for a killed rank to form a group.
        """
        processes = self.start()
        while step and step not in self.steps():
            time.sleep(0.002)
        time.sleep(seconds)
        for process in [processes[victim]] if step else processes:
            process.kill()
        return RANKS["wait"](processes)


class Harness:
    """Runs of one small model on one small corpus, each in its own folder."""

    def __init__(self, folder, corpus):
        self.folder, self.corpus = folder, corpus
        self.outcomes: list[Outcome] = []
        self.whole: dict = {}
        self.runs = 0

    def new_run(self, recipe="POET", corpus=None):
        pretrained = self.undisturbed("POET") if RECIPES[recipe].adapter else None
        self.runs += 1
        return Run(self.folder / f"run{self.runs}", recipe, corpus or self.corpus, pretrained)

    def undisturbed(self, recipe="POET"):
        """The last checkpoint of an undisturbed run; made once for each recipe."""
        if recipe not in self.whole:
            if not self.whole:  # the server from which processes are forked takes seconds to start
                RANKS["wait"](RANKS["start"](HERE / "command.py", {"arguments": ["plugins"]}, log=self.folder / "warm"))
            run = self.new_run(recipe)
            assert run.fit() == [0] * run.recipe.ranks, run.log()
            assert run.steps() == list(range(1, STEPS + 1))
            self.whole[recipe] = run.checkpoints()[-1]
        return self.whole[recipe]

    def recover(self, fault, run, note="", at_most=EVERY):
        """Resume with --ckpt_path last, compare with the undisturbed run, and record the outcome."""
        before = max(run.steps(), default=0)
        codes = run.fit(resume=True)
        assert codes == [0] * run.recipe.ranks, f"{fault}: {codes} {run.log()[-3000:]}"
        run.check_files()
        # a run that dies between its last two files has nothing left to do when it resumes
        newest, _ = newest_good_checkpoint([run.folder])
        step, found = trained(newest)
        last, expected = trained(self.undisturbed(run.name))
        assert step == last == STEPS
        recovered = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        name = run.recipe.name
        fault = f"{fault}, {name}" if name else fault
        taken = run.steps()
        assert set(taken) == set(range(1, STEPS + 1))
        lost = len(taken) - STEPS
        self.outcomes.append(Outcome(fault, recovered, lost, note))
        assert recovered, f"{fault}: the resumed run ended with other weights"
        # only steps after the last checkpoint may be repeated
        assert lost <= at_most, f"{fault}: {lost} steps were repeated, {before} had been reached"

    def note(self, fault, recovered, note=""):
        """Record the outcome of a fault after which no step is trained again."""
        self.outcomes.append(Outcome(fault, recovered, 0, note))

    def new_folder(self):
        """A new empty folder."""
        self.runs += 1
        folder = self.folder / f"folder{self.runs}"
        folder.mkdir()
        return folder

    def counts(self):
        """The outcomes by fault, as docs/pages/faults.md shows them."""
        found = {}
        for name in dict.fromkeys(outcome.fault for outcome in self.outcomes):
            mine = [outcome for outcome in self.outcomes if outcome.fault == name]
            recovered, lost = sum(outcome.recovered for outcome in mine), max(outcome.lost for outcome in mine)
            found[name] = {"injected": len(mine), "recovered": recovered, "most steps lost": lost}
        return found


def trained(path):
    """The step of a checkpoint, file or folder, and every tensor of the network and of the optimizers by its path."""
    if path.is_dir():
        check_checkpoint(path)
        held = {}
        load_shards(held, path)
        step = read_checkpoint(path / REST)["global_step"]
    else:
        checkpoint = read_checkpoint(path)
        step, held = checkpoint["global_step"], {key: checkpoint[key] for key in ("state_dict", "optimizer_states")}
    return step, dict(tensors_in(held))


def tensors_in(held, place=""):
    if isinstance(held, torch.Tensor):
        yield place, held
    elif isinstance(held, dict | list):
        for name, value in held.items() if isinstance(held, dict) else enumerate(held):
            yield from tensors_in(value, f"{place}/{name}")


def damages(act):
    """Let a function change a file, and restore the times of the file and its folder."""

    def damage(path):
        times = [(place, place.stat()) for place in (path.parent, path)]
        act(path)
        for place, found in times:
            if place.exists():
                os.utime(place, ns=(found.st_atime_ns, found.st_mtime_ns))

    damage.__name__ = act.__name__
    return damage


@damages
def flip(path):
    data = bytearray(path.read_bytes())
    place = len(data) // 2
    if zipfile.is_zipfile(path):  # not in the padding between two entries
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        header = largest.header_offset
        place = header + 30 + sum(struct.unpack_from("<HH", data, header + 26)) + largest.file_size // 2
    data[place] ^= 1
    path.write_bytes(data)


@damages
def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@damages
def empty(path):
    path.write_bytes(b"")


@damages
def remove(path):
    path.unlink()


def small_disk(folder, size):
    """Mount a tmpfs of ``size`` bytes on a folder; return whether this is permitted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return bool(shutil.which("mount")) and subprocess.run(command, capture_output=True).returncode == 0


def random_moment(seed):
    """A step, and seconds after it: steps and checkpoints take some tens of milliseconds each."""
    generator = random.Random(seed)
    return generator.randrange(STEPS), generator.uniform(0.0, 0.2)
