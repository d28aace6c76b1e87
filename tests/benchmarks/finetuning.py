"""Finetuning SmolLM2-135M-Instruct with OFT, beside PEFT's OFT and LoRA: same rows, same steps, the best rate of each.

    make smollm2    # once: installs and converts the model
    .venv/bin/python tests/benchmarks/finetuning.py

The rows are functions of the standard library and their docstrings. Each method gets three learning rates for a short
run; its best rate, by the loss on the whole validation split, is run with three seeds. A seed draws the order of the
rows and the adapter. Finished runs are kept in runs/finetuning and in tests/benchmarks/results/finetuning.json, and are
not repeated.
"""

import json
import platform
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import peft
import torch
from torch import nn

from orthotrain.data import InstructionData
from orthotrain.models import PretrainedModel
from orthotrain.modules import OftLayers, OftModule, Optimization
from orthotrain.schedules import CosineWithWarmup

MODEL = "models/smollm2-135m-instruct"
OUT = Path("tests/benchmarks/results/finetuning.json")
SHORT, LONG, SEEDS = 40, 100, (0, 1, 2)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Run = tuple[str, float, int, int]
"""Method, learning rate, steps, seed."""


class PeftModule(OftModule):
    """OftModule's data, loss and metrics with an adapter of PEFT in place of our layers."""

    def __init__(self, config: peft.PeftConfig, model: Any, optimization: Optimization) -> None:
        super().__init__(model, optimization=optimization, max_new_tokens=0, max_generator_norm=None)
        self.adapter = config

    def wrap(self, model: nn.Module) -> None:
        """Freeze the network and put in the adapter."""
        peft.inject_adapter_in_model(self.adapter, model.requires_grad_(False))


def ours(storage: str | None, model: Any, optimization: Optimization) -> OftModule:
    """Return our OFT, with the weights as they are or quantized."""
    layers = OftLayers(block_size=32, **({"storage": storage} if storage else {}))
    return OftModule(model, layers, optimization, max_new_tokens=0)


METHODS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "OFT": (partial(ours, None), (8e-4, 2e-3, 4e-3)),
    "QOFT, NF4": (partial(ours, "nf4"), (8e-4, 2e-3, 4e-3)),
    "PEFT OFT": (
        lambda *given: PeftModule(
            peft.OFTConfig(
                oft_block_size=32, target_modules=LINEARS, use_cayley_neumann=True, num_cayley_neumann_terms=5
            ),
            *given,
        ),
        (8e-4, 2e-3, 4e-3),
    ),
    "PEFT LoRA r=16": (
        lambda *given: PeftModule(peft.LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS), *given),
        (2e-4, 5e-4, 1e-3),
    ),
}


def train(run: Run) -> dict[str, Any]:
    """Return the numbers of a run, before and after."""
    method, lr, steps, seed = run
    L.seed_everything(seed, verbose=False)
    schedule: Any = partial(CosineWithWarmup, warmup_steps=steps // 20)
    module = METHODS[method][0](PretrainedModel(MODEL), Optimization(lr=lr, weight_decay=0.0, scheduler=schedule))
    data = InstructionData(MODEL, max_length=256, batch_size=4, seed=0)
    common: dict[str, Any] = {"accelerator": "cpu", "precision": "bf16-mixed", "logger": False}
    common |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_steps=steps, limit_val_batches=0, gradient_clip_val=1.0, **common)
    start = time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - start
    found = L.Trainer(**common).validate(module, data, verbose=False)[0]
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    named = {"method": method, "lr": lr, "steps": steps, "seed": seed}
    return {**named, **found, "trained": trained, "seconds": seconds}


def finished(results: list[dict[str, Any]], run: Run) -> dict[str, Any]:
    """Return the numbers of a run, which is trained if they are not among the results."""
    for row in results:
        if (row["method"], row["lr"], row["steps"], row["seed"]) == run:
            return row
    row = train(run)
    results.append(row)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "peft": peft.__version__}
    OUT.write_text(json.dumps({"versions": versions, "results": results}, indent=1) + "\n")
    print(f"{row['val_loss']:.4f}  {row['val_token_accuracy']:.4f}  {row['seconds']:.0f} s  {run}", flush=True)
    return row


def main() -> None:
    """Run what is missing."""
    results = json.loads(OUT.read_text())["results"] if OUT.exists() else []
    for method, (_, rates) in METHODS.items():
        short = [finished(results, (method, lr, SHORT, 0)) for lr in rates]
        best = min(short, key=lambda row: row["val_loss"])["lr"]
        for seed in SEEDS:
            finished(results, (method, best, LONG, seed))


if __name__ == "__main__":
    main()
