"""Validation bits per byte of POET and its baselines at equal tokens: same network, data, schedule and seeds.

    .venv/bin/python tests/benchmarks/quality.py [--group NAME ...] [--seeds 0 1 2] [--steps 200] [--table]
    .venv/bin/python tests/benchmarks/quality.py --group long --steps 400


A LLaMA of 5.7M parameters on the Python standard library. Every finished run is a file in runs/quality and is not
repeated, nor is one that the committed results hold: the grid can be stopped and gone on with. The table and
tests/benchmarks/results/quality.json (quality_N.json for another number N of steps) hold mean and spread over the seeds
that have been run; `--table` only reads. A seed draws initial values and permutations; the sequences and their order
are the same in all runs. All runs are evaluated on the first 32 of the 78 batches of the validation split, in the order
of the corpus. The group `long` holds periods that no run of 200 steps sees the end of: it takes 400 or more.
"""

import argparse
import json
import math
import platform
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from orthotrain.data import TextData
from orthotrain.errors import TrainingDiverged
from orthotrain.layers import StepwiseLinear
from orthotrain.models import CausalLM
from orthotrain.modules import BaseModule, LoraLayers, LoraModule, Optimization, PoetLayers, PoetModule
from orthotrain.optimizers import GaLore, LieOptimizer
from orthotrain.plugins import CayleyNeumann
from orthotrain.schedules import CosineWithWarmup, WarmupStableDecay

CONFIG = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
HIDDEN = "*layers*proj*"
BATCH, LENGTH, EVALUATED = 8, 256, 32


def optimization(
    lr: float = 4e-3,
    warmup: int = 20,
    betas: tuple[float, float] = (0.9, 0.95),
    decay_fraction: float | None = None,
    **options: Any,
) -> Optimization:
    """Return the recipe that all runs share: AdamW, weight decay 0.01, warm-up, cosine to 1% (or a line at the end)."""
    schedule: Any = partial(CosineWithWarmup, warmup_steps=warmup)
    if decay_fraction is not None:
        schedule = partial(WarmupStableDecay, warmup_steps=warmup, decay_fraction=decay_fraction)
    build = partial(torch.optim.AdamW, betas=betas, foreach=True)
    return Optimization(lr=lr, weight_decay=0.01, optimizer=build, scheduler=schedule, **options)


def adamw(hidden: float, lr: float = 4e-3, **recipe: Any) -> BaseModule:
    """Return AdamW on everything; hidden matrices have a rate of their own."""
    return BaseModule(CausalLM(CONFIG), optimization(lr, lr_overrides={HIDDEN: hidden}, **recipe))


def muon(hidden: float, lr: float = 4e-3, **recipe: Any) -> BaseModule:
    """Return Muon on hidden matrices, AdamW on the rest."""
    build = partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw", weight_decay=0.01)
    options = {"lr_overrides": {HIDDEN: hidden}, "optimizer_overrides": {HIDDEN: build}, **recipe}
    return BaseModule(CausalLM(CONFIG), optimization(lr, **options))


def galore(hidden: float, rank: int = 64) -> BaseModule:
    """Return GaLore on hidden matrices, AdamW on the rest."""
    build = partial(GaLore, rank=rank, update_proj_gap=50, scale=1.0, betas=(0.9, 0.95))
    options = {"lr_overrides": {HIDDEN: hidden}, "optimizer_overrides": {HIDDEN: build}}
    return BaseModule(CausalLM(CONFIG), optimization(**options))


def lora(lr: float, rank: int = 64, merge_every: int | None = None) -> LoraModule:
    """Return LoRA pretraining; with merges ReLoRA."""
    return LoraModule(CausalLM(CONFIG), LoraLayers(rank=rank), merge_every, optimization(rotation_lr=lr))


SINGLE = {"permutation_group": 1}
"""Permutations of single features, unless a run says otherwise: so were most of the committed results made."""


def poet(
    lr: float = 2e-3,
    merge_every: int = 100,
    max_generator_norm: float | None = None,
    recipe: dict[str, Any] | None = None,
    **layers: Any,
) -> PoetModule:
    """Return POET with exact Cayley and blocks of 64 unless told otherwise."""
    settings = PoetLayers(**{"block_size": 64, "parameterization": "cayley", **SINGLE, **layers})
    rates = optimization(rotation_lr=lr, **(recipe or {}))
    return PoetModule(
        CausalLM(CONFIG), settings, merge_every, max_generator_norm=max_generator_norm, optimization=rates
    )


def stepwise(
    angle: float = 0.015,
    resample: int = 50,
    gain: float = 1.0,
    rest: float = 4e-3,
    recipe: dict[str, Any] | None = None,
    **options: Any,
) -> PoetModule:
    """Return step-wise POET: b=64, orthogonalised momentum, alternating sides, permutations kept for 50 steps."""
    layers = {name: options.pop(name) for name in PoetLayers.__dataclass_fields__ if name in options}
    settings = PoetLayers(
        **{"block_size": 64, "parameterization": CayleyNeumann(2), **SINGLE, **layers}, stepwise=True, gain=gain
    )
    build = partial(LieOptimizer, **options)
    rates = optimization(rest, rotation_lr=angle, rotation_optimizer=build, **(recipe or {}))
    return PoetModule(CausalLM(CONFIG), settings, 1, resample_every=resample, optimization=rates)


def with_diagonal(**options: Any) -> PoetModule:
    """Return step-wise POET with a trained factor for each output of a layer, which no option of ours is."""
    module = stepwise(**options)
    wrap = module.wrap

    def scaled(layer: StepwiseLinear, arguments: Any, y: torch.Tensor) -> torch.Tensor:
        return y * layer.factors.to(y.dtype)

    def wrapped(model: torch.nn.Module) -> None:
        wrap(model)
        for layer in model.modules():
            if isinstance(layer, StepwiseLinear):
                layer.factors = torch.nn.Parameter(torch.ones(layer.out_features))
                layer.register_forward_hook(scaled)

    module.wrap = wrapped
    return module


CHANGES: dict[str, dict[str, Any]] = {
    "no warm-up": {"warmup": 0},
    "warm-up 60": {"warmup": 60},
    "betas 0.9, 0.99": {"betas": (0.9, 0.99)},
    "betas 0.9, 0.999": {"betas": (0.9, 0.999)},
    "betas 0.8, 0.95": {"betas": (0.8, 0.95)},
    "embeddings and head 2e-3": {"lr": 2e-3},
    "embeddings and head 8e-3": {"lr": 8e-3},
}
"""What may move a run besides its own rate, one at a time from the best AdamW and POET."""

GROUPED = {"permutation_group": 8}
WIDE = {"angle": 0.02, "block_size": 256, "init": "uniform", **GROUPED}
"""The best step-wise run, whose changes the group `scale` holds."""
LONG = 400
SERIES = CayleyNeumann(4)

GROUPS: dict[str, dict[str, partial]] = {
    "baselines": {
        **{f"AdamW, hidden lr {lr:g}": partial(adamw, lr) for lr in (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3)},
        "AdamW, one lr 2e-3": partial(adamw, 2e-3, 2e-3),
        **{f"Muon, hidden lr {lr:g}": partial(muon, lr) for lr in (2.5e-3, 5e-3, 1e-2, 2e-2)},
        **{f"GaLore r=64, hidden lr {lr:g}": partial(galore, lr) for lr in (2.5e-4, 5e-4, 1e-3, 4e-3)},
        **{f"LoRA r=64, lr {lr:g}": partial(lora, lr) for lr in (2.5e-4, 5e-4, 1e-3, 4e-3)},
        **{
            f"ReLoRA r=64, lr {lr}, every 50": partial(lora, float(lr), merge_every=50)
            for lr in ("5e-4", "1e-3", "4e-3")
        },
    },
    "poet": {
        **{f"POET-BS b=64, lr {lr:g}": partial(poet, lr) for lr in (1e-3, 2e-3, 4e-3, 8e-3)},
        **{f"POET-BS b=128, lr {lr:g}": partial(poet, lr, block_size=128) for lr in (1e-3, 2e-3)},
        **{f"POET-BS b=256, lr {lr:g}": partial(poet, lr, block_size=256) for lr in (5e-4, 1e-3)},
        **{f"POET-FS 1/2, lr {lr:g}": partial(poet, lr, fraction=0.5) for lr in (1e-3, 2e-3)},
    },
    "period": {f"POET-BS b=64, T_m={t}": partial(poet, merge_every=t) for t in (25, 50, 200)},
    "order": {
        f"POET-BS b=64, Cayley-Neumann order {k}": partial(poet, parameterization=CayleyNeumann(k))
        for k in (1, 2, 3, 4, 5)
    },
    "parameterization": {"POET-BS b=64, exponential": partial(poet, parameterization="exponential")},
    "init": {
        f"POET-BS b=64, init {scheme}": partial(poet, init=scheme) for scheme in ("uniform", "xavier", "standard")
    },
    "groups of 8 features permuted": {
        "POET-BS b=64, lr 0.002, groups of 8": partial(poet, 2e-3, **GROUPED),
        "step-wise b=64, angle 0.024, groups of 8": partial(stepwise, 0.024, **GROUPED),
        "step-wise b=256, angle 0.02, uniform spectrum, groups of 8": partial(
            stepwise, 0.02, block_size=256, init="uniform", **GROUPED
        ),
    },
    "guard": {
        "POET-BS b=64, rotations off": partial(poet, 0.0, 200),
        "POET-BS b=64, lr 1.6e-2, T_m=200, order 4": partial(poet, 1.6e-2, 200, parameterization=SERIES),
        **{
            f"the same, folded early beyond {norm:g}": partial(poet, 1.6e-2, 200, norm, parameterization=SERIES)
            for norm in (0.2, 0.3, 0.5)
        },
        "POET-BS b=64, lr 1.6e-2, T_m=200, exact Cayley": partial(poet, 1.6e-2, 200),
    },
    "recipe": {
        **{f"AdamW, hidden lr 2.5e-4, {what}": partial(adamw, 2.5e-4, **change) for what, change in CHANGES.items()},
        **{f"POET-BS b=64, lr 2e-3, {what}": partial(poet, recipe=change) for what, change in CHANGES.items()},
        **{f"Muon, hidden lr 0.01, embeddings and head {lr:g}": partial(muon, 1e-2, lr) for lr in (2e-3, 8e-3)},
    },
    "long": {
        **{f"POET-BS b=64, lr 2e-3, T_m={t}": partial(poet, merge_every=t) for t in (100, 200, 400)},
        "AdamW, hidden lr 2.5e-4": partial(adamw, 2.5e-4),
        **{f"Muon, hidden lr 0.01, the rest {lr:g}": partial(muon, 1e-2, lr) for lr in (4e-3, 8e-3)},
        **{
            f"step-wise b=256, the rest {lr:g}{what}": partial(stepwise, rest=lr, **WIDE, **change)
            for lr in (4e-3, 8e-3)
            for what, change in (("", {}), (", trained scale", {"trained_scale": True}))
        },
    },
    "scale": {
        **{
            f"step-wise b=256, the rest {lr:g}, trained scale": partial(stepwise, rest=lr, **WIDE, trained_scale=True)
            for lr in (4e-3, 8e-3)
        },
        "step-wise b=256, a trained factor for each output": partial(with_diagonal, **WIDE),
        "step-wise b=256, resampled every 200": partial(stepwise, resample=200, **WIDE),
        "step-wise b=256, the last 40% linear to 0": partial(stepwise, **WIDE, recipe={"decay_fraction": 0.4}),
        "step-wise b=256, linear to 0": partial(stepwise, **WIDE, recipe={"decay_fraction": 1.0}),
        "step-wise b=256, the rest 0.008, trained scale, the last 40% linear to 0": partial(
            stepwise, rest=8e-3, **WIDE, trained_scale=True, recipe={"decay_fraction": 0.4}
        ),
        **{
            f"Muon, hidden lr 0.01, the rest {lr:g}, the last 40% linear to 0": partial(
                muon, 1e-2, lr, decay_fraction=0.4
            )
            for lr in (4e-3, 8e-3)
        },
        "POET-BS b=64, lr 2e-3, trained scale": partial(poet, trained_scale=True, **GROUPED),
    },
    "stepwise": {
        **{f"step-wise b=64, angle {a:g}": partial(stepwise, a) for a in (0.01, 0.015, 0.024, 0.04)},
        **{f"step-wise b={b}, angle 0.015": partial(stepwise, block_size=b) for b in (32, 128, 256)},
        **{
            f"step-wise b={b}, angle {a:g}": partial(stepwise, a, block_size=b)
            for b in (128, 256)
            for a in (0.02, 0.024, 0.04)
        },
        **{
            f"step-wise b=128, angle 0.024, gain {g:g}": partial(stepwise, 0.024, block_size=128, gain=g)
            for g in (0.5, 0.7, 2.0)
        },
        "step-wise b=128, angle 0.024, gain 0.5 into the residual stream": partial(
            stepwise, 0.024, block_size=128, overrides={"*o_proj": {"gain": 0.5}, "*down_proj": {"gain": 0.5}}
        ),
        "step-wise b=128, angle 0.024, resampled every 200": partial(stepwise, 0.024, 200, block_size=128),
        "step-wise, one block a side, angle 0.024": partial(stepwise, 0.024, fraction=1.0),
        "step-wise b=64, resampled every 25": partial(stepwise, resample=25),
        "step-wise b=64, resampled every 200": partial(stepwise, resample=200),
        "step-wise b=64, both sides each step": partial(stepwise, 0.0075, alternate=False),
        "step-wise b=64, no Nesterov": partial(stepwise, nesterov=False),
        "step-wise b=64, direction adam": partial(stepwise, direction="adam"),
        "step-wise b=64, direction sign": partial(stepwise, direction="sign"),
        "step-wise b=64, uniform spectrum": partial(stepwise, init="uniform"),
        "step-wise b=128, angle 0.024, uniform spectrum": partial(stepwise, 0.024, block_size=128, init="uniform"),
        "step-wise b=256, angle 0.02, uniform spectrum": partial(stepwise, 0.02, block_size=256, init="uniform"),
        **{
            f"step-wise b=256, angle 0.02, uniform spectrum, gain {g:g}": partial(
                stepwise, 0.02, block_size=256, init="uniform", gain=g
            )
            for g in (0.7, 1.4)
        },
        **{
            f"step-wise b=256, angle 0.02, uniform spectrum, the rest {lr:g}": partial(
                stepwise, 0.02, block_size=256, init="uniform", rest=lr
            )
            for lr in (2e-3, 8e-3)
        },
    },
}
RUNS = {name: (group, build) for group, runs in GROUPS.items() for name, build in runs.items()}


class FirstBatches(TextData):
    """Text whose validation reads its first batches in the order of the corpus, as all committed runs did."""

    def val_dataloader(self) -> DataLoader:
        """Return the loader of the first `EVALUATED` batches."""
        batches = [list(range(BATCH * number, BATCH * (number + 1))) for number in range(EVALUATED)]
        return DataLoader(self._dataset("val"), batch_size=None, sampler=batches)


def train(build: partial, seed: int, steps: int) -> dict[str, Any]:
    """Train one run and return its numbers."""
    L.seed_everything(seed, verbose=False)
    module = build()
    if isinstance(module, PoetModule | LoraModule):
        module.seed = seed
    trainer = L.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=steps,
        gradient_clip_val=1.0,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = FirstBatches(vocab_size=CONFIG["vocab_size"], sequence_length=LENGTH, batch_size=BATCH)
    start = time.perf_counter()
    try:
        trainer.fit(module, datamodule=data)
    except TrainingDiverged as error:
        return {"bits_per_byte": math.inf, "stopped": str(error)}
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return {
        "bits_per_byte": metrics["val_bits_per_byte"],
        "loss": metrics["val_loss"],
        "trained": trained,
        "early_folds": metrics.get("early_folds", 0.0),
        "seconds": time.perf_counter() - start,
    }


def restore(out: Path, folder: Path) -> None:
    """Write the files of runs that the committed results hold: a fresh clone goes on where the last one stopped."""
    if not out.exists():
        return
    document = json.loads(out.read_text())
    for row in document["results"]:
        for result in row["runs"]:
            path = folder / f"{slug(row['name'])}.s{result['seed']}.n{document['steps']}.json"
            if not path.exists():
                path.write_text(json.dumps(result))


def summarise(steps: int, folder: Path) -> list[dict[str, Any]]:
    """Return a row for each run that has a finished seed."""
    rows = []
    for name, (group, _) in RUNS.items():
        paths = sorted(folder.glob(f"{slug(name)}.s*.n{steps}.json"))
        seeds = [int(path.name.rsplit(".s", 1)[1].split(".")[0]) for path in paths]
        found = [{"seed": s, **json.loads(p.read_text())} for s, p in zip(seeds, paths, strict=True)]
        if not found:
            continue
        bits = [result["bits_per_byte"] for result in found]
        spread = statistics.stdev(bits) if len(bits) > 1 and all(map(math.isfinite, bits)) else None
        row = {"group": group, "name": name, "seeds": len(bits), "bits_per_byte": statistics.mean(bits)}
        rows.append({**row, "spread": spread, "runs": found})
    return rows


def slug(name: str) -> str:
    """Return a file name for a run."""
    return "".join(c if c.isalnum() or c in ".=-" else "_" for c in name)


def main() -> None:
    """Run what is missing, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", nargs="*", choices=list(GROUPS), default=[name for name in GROUPS if name != "long"])
    parser.add_argument("--only", nargs="*", help="names of runs, all of the groups by default")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="read what has been run and stop")
    options = parser.parse_args()
    if "long" in options.group and options.steps < LONG:
        parser.error(f"--steps {options.steps}: the periods of the group long need {LONG} or more")
    torch.set_num_threads(options.threads)
    folder = Path("runs/quality")
    folder.mkdir(parents=True, exist_ok=True)
    name = "quality.json" if options.steps == 200 else f"quality_{options.steps}.json"
    out = Path("tests/benchmarks/results") / name
    restore(out, folder)
    wanted = options.only or [name for name, (group, _) in RUNS.items() if group in options.group]
    for seed in options.seeds if not options.table else []:
        for name in wanted:
            path = folder / f"{slug(name)}.s{seed}.n{options.steps}.json"
            if not path.exists():
                result = train(RUNS[name][1], seed, options.steps)
                path.write_text(json.dumps(result))
                print(f"{name:<46} seed {seed}  {result['bits_per_byte']:.4f}", flush=True)
    rows = summarise(options.steps, folder)
    print(f"\n{'':<46}{'bits per byte':>14}{'spread':>9}{'seeds':>7}{'trained':>12}")
    for row in rows:
        spread = f"{row['spread']:.4f}" if row["spread"] is not None else "-"
        print(f"{row['name']:<46}{row['bits_per_byte']:>14.4f}{spread:>9}{row['seeds']:>7}"
              f"{row['runs'][0].get('trained', 0):>12,}")  # fmt: skip
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    tokens = options.steps * BATCH * LENGTH
    document = {"versions": versions, "steps": options.steps, "tokens": tokens, "results": rows}
    out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
