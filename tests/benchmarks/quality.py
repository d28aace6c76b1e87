"""Bits per byte of POET and its rivals at 20 tokens for each parameter: same network, text, start, sweep and seeds.

    .venv/bin/python tests/benchmarks/quality.py --group optimal    # trains what is missing, for many hours
    .venv/bin/python tests/benchmarks/quality.py --table            # prints what there is

Every finished run is a file in runs/quality and a row of tests/benchmarks/results/quality.json, and is not repeated. A
run that was stopped goes on from its last checkpoint. Two processes may work side by side. All runs see each text once
and are evaluated on the whole validation split; the runs of the full length also on the test split, once.

The grid halves: the settings of a round are chosen from the results of the round before, by rules that are the same for
each method (quality_grid.py).
"""

import argparse
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import quality_grid
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from quality_corpus import versions, write
from quality_methods import VOCABULARY, Setting, described, module_of

from orthotrain.callbacks.throughput import Throughput
from orthotrain.data import TextData
from orthotrain.errors import TrainingDiverged
from orthotrain.models import CausalLM

FOLDER = Path("runs/quality")
OUT = Path("tests/benchmarks/results/quality.json")
BATCH, LENGTH, TOKENS = 16, 256, 20
SOURCES = {"train": "source", "val": "val_source", "test": "test_source"}
Run = tuple[str, Setting, int, int]
"""Network, setting, share of the full length (8: an eighth), seed."""


def steps_of(network: str, share: int) -> int:
    """Return the optimizer steps of a run: 20 tokens for each parameter, over the share."""
    parameters = sum(p.numel() for p in CausalLM(described(network))().parameters())
    return parameters * TOKENS // (BATCH * LENGTH) // share


def name_of(run: Run) -> str:
    """Return the name of a run."""
    network, setting, share, seed = run
    return f"{network} 1/{share} {setting.name} seed {seed}"


def path_of(run: Run) -> Path:
    """Return the file of a finished run."""
    return FOLDER / ("".join(c if c.isalnum() or c in ".=-" else "_" for c in name_of(run)) + ".json")


def result_of(run: Run) -> dict[str, Any] | None:
    """Return the numbers of a finished run."""
    path = path_of(run)
    return json.loads(path.read_text()) if path.exists() else None


def described_run(run: Run) -> dict[str, Any]:
    """Return what makes a run, as plain values."""
    network, setting, share, seed = run
    return {"network": network, "setting": asdict(setting), "share": share, "seed": seed}


def run_of(row: dict[str, Any]) -> Run:
    """Return the run of a row of results."""
    given = row["setting"]
    setting = Setting(**{**given, "options": tuple((name, value) for name, value in given["options"])})
    return row["network"], setting, row["share"], row["seed"]


def train(run: Run, digests: dict[str, str]) -> dict[str, Any]:
    """Train a run, or go on with it, and return its numbers."""
    network, setting, share, seed = run
    steps, folder = steps_of(network, share), path_of(run).with_suffix("")
    L.seed_everything(seed, verbose=False)
    module = module_of(setting, network, steps, seed)
    clock = Throughput()
    trainer = L.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        callbacks=[clock, ModelCheckpoint(folder, save_last=True, every_n_train_steps=300, save_top_k=1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=100,
    )
    texts = {name: str(FOLDER / f"corpus/{split}.jsonl") for split, name in SOURCES.items()}
    data = TextData(**texts, vocab_size=VOCABULARY, sequence_length=LENGTH, batch_size=BATCH)
    last, start = folder / "last.ckpt", time.perf_counter()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.exists() else None)
    except TrainingDiverged as error:
        return {**described_run(run), "bits_per_byte": float("inf"), "stopped": str(error)}
    numbers = {"loss": trainer.callback_metrics["train_loss"], "tokens_per_second": clock.mean}
    evaluation = L.Trainer(accelerator="cpu", precision="bf16-mixed", logger=False, enable_progress_bar=False)
    numbers["bits_per_byte"] = evaluation.validate(module, data, verbose=False)[0]["val_bits_per_byte"]
    if share == 1:
        numbers["test_bits_per_byte"] = evaluation.test(module, data, verbose=False)[0]["test_bits_per_byte"]
    state = [v for s in trainer.optimizers[0].state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return {
        **described_run(run),
        **{name: float(value) for name, value in numbers.items()},
        "trained": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "state_bytes": sum(v.numel() * v.element_size() for v in state),
        "steps": steps,
        "seconds": time.perf_counter() - start,
        "text": digests,
    }


@contextmanager
def claimed(run: Run) -> Iterator[bool]:
    """Hold a run for this process; tell whether no other process holds it."""
    with path_of(run).with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False


def finish(runs: list[Run], digests: dict[str, str]) -> None:
    """Train the runs that have not ended, and wait for those of other processes."""
    while missing := [run for run in runs if result_of(run) is None]:
        worked = False
        for run in missing:
            with claimed(run) as mine:
                if mine and result_of(run) is None:
                    found = train(run, digests)
                    path_of(run).write_text(json.dumps(found))
                    shutil.rmtree(path_of(run).with_suffix(""), ignore_errors=True)
                    gather()
                    print(f"{found['bits_per_byte']:.4f}  {found.get('seconds', 0):.0f} s  {name_of(run)}", flush=True)
                    worked = True
        if not worked:
            time.sleep(20)


SMALL = "0.4M"


def score(setting: Setting, share: int) -> float | None:
    """Return the bits per byte of a finished run of the smaller network, seed 0."""
    return (result_of((SMALL, setting, share, 0)) or {}).get("bits_per_byte")


def of(settings: list[Setting], share: int, seed: int = 0) -> list[Run]:
    """Return runs of the smaller network."""
    return [(SMALL, setting, share, seed) for setting in settings]


def optimal() -> Iterator[list[Run]]:
    """Yield the rounds of the grid; each is chosen when the one before has ended."""
    for _ in range(quality_grid.FURTHER + 1):
        yield of(quality_grid.rates(score), 8)
    yield of(quality_grid.changes(score), 8)
    yield of(quality_grid.quarter(score), 4)
    yield of(quality_grid.half(score), 2)
    for seed in (0, 1, 2):
        yield of(quality_grid.full(score), 1, seed)


def improve() -> Iterator[list[Run]]:
    """Yield changes of step-wise POET."""
    yield of(quality_grid.improved(), 4)


GROUPS = {"optimal": optimal, "improve": improve}


def gather() -> None:
    """Write the numbers of all finished runs to the committed file."""
    rows = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    rows = [{"name": run_of(row)[1].name, **row} for row in rows]
    document = {"versions": {"torch": torch.__version__, **versions()}, "results": rows}
    partial = OUT.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(OUT)


def restore() -> None:
    """Make a file of each committed run, so that the grid goes on where the last one stopped."""
    for row in json.loads(OUT.read_text())["results"] if OUT.exists() else []:
        path = path_of(run_of(row))
        if not path.exists():
            path.write_text(json.dumps(row))


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", choices=list(GROUPS), default="optimal")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print what has been run and stop")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    FOLDER.mkdir(parents=True, exist_ok=True)
    restore()
    if not options.table:
        digests = write(FOLDER / "corpus")
        for runs in GROUPS[options.group]():
            finish(runs, digests)
    rows = [json.loads(path.read_text()) for path in FOLDER.glob("*.json")]
    for row in sorted(rows, key=lambda row: (row["network"], row["share"], row["bits_per_byte"])):
        test = f"{row['test_bits_per_byte']:8.4f}" if "test_bits_per_byte" in row else " " * 8
        print(f"{row['bits_per_byte']:.4f} {test}  {name_of(run_of(row))}")


if __name__ == "__main__":
    main()
