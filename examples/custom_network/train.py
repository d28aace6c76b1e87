"""Pretrain a network of your own with POET and with AdamW, on the same images, steps, schedule and seeds.

    .venv/bin/python examples/custom_network/train.py           # two networks, both methods, three seeds
    .venv/bin/python examples/custom_network/train.py --sweep   # the sweep that chose the learning rates

What a user writes stands between the two lines; the rest is data and a table.
"""

import argparse
import functools
import itertools
import statistics
import time
from typing import Any

import lightning as L
import torch
from networks import Perceptron, VisionTransformer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from orthotrain.console.filtered_messages import hide_lightning
from orthotrain.layers import mergeable_layers
from orthotrain.layers.spectrum import singular_values
from orthotrain.modules import BaseModule, Optimization, PoetLayers, PoetModule
from orthotrain.schedules import CosineWithWarmup

# ---------------------------------------------------------------------------------------------------------------------


class Classifying:
    """An objective and a metric, whatever the method that trains."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy."""
        images, labels = batch
        logits = self(images)
        if not self.training:
            self.accuracy(logits, labels)
        return F.cross_entropy(logits, labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy beside the loss."""
        super().validation_step(batch, batch_idx)
        self.log("val_accuracy", self.accuracy)


class PoetClassifier(Classifying, PoetModule):
    """Rotates the hidden layers; embedding, norms, biases and head are trained as usual."""


class AdamWClassifier(Classifying, BaseModule):
    """Trains every weight."""


def poet(network: nn.Module, lr: float, hidden_lr: float, seed: int) -> BaseModule:
    """Rotate every linear layer but the head in blocks of 32, and fold the rotations every 100 steps."""
    layers = PoetLayers(block_size=32, exclude=["head"], parameterization="cayley")
    rates = Optimization(lr=lr, rotation_lr=hidden_lr, scheduler=SCHEDULE)
    return PoetClassifier(network, layers, merge_every=100, optimization=rates, seed=seed)


# ---------------------------------------------------------------------------------------------------------------------

SCHEDULE = functools.partial(CosineWithWarmup, warmup_steps=20)
NETWORKS = {"perceptron": Perceptron, "transformer": VisionTransformer}
# (lr, hidden_lr) of each, the best of the sweep's grid
RATES = {
    ("perceptron", "poet"): (4e-3, 1e-2),
    ("perceptron", "adamw"): (6.4e-2, 3e-3),
    ("transformer", "poet"): (1.6e-2, 3e-4),
    ("transformer", "adamw"): (6.4e-2, 3e-4),
}
LRS, HIDDEN_LRS = (1e-3, 4e-3, 1.6e-2, 6.4e-2), (3e-4, 1e-3, 3e-3, 1e-2)


def adamw(network: nn.Module, lr: float, hidden_lr: float, seed: int) -> BaseModule:
    """Train every weight with AdamW; the hidden matrices have a rate of their own, as POET's rotations have."""
    hidden = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear) and name != "head"]
    overrides = {f"{name}.weight": hidden_lr for name in hidden}
    return AdamWClassifier(network, Optimization(lr=lr, lr_overrides=overrides, scheduler=SCHEDULE))


def digits() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Return 1197 images to train on, 300 to choose the rates by and 300 for the table; pixels about 0, deviation 1."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None]
    images, labels = (images - images.mean()) / images.std(), torch.tensor(data.target)[order]
    parts = zip(images.split([1197, 300, 300]), labels.split([1197, 300, 300]), strict=True)
    train, choice, table = (TensorDataset(*part) for part in parts)
    return train, choice, table


def spectrum(module: BaseModule) -> list[Tensor]:
    """Return the singular values of every rotated layer."""
    return [singular_values(layer.merged_weight()) for _, layer in mergeable_layers(module)]


def run(network: str, method: str, rates: tuple[float, float], seed: int, held_out: TensorDataset, steps: int) -> dict:
    """Train one network and return what it reaches on ``held_out``."""
    L.seed_everything(seed, verbose=False)
    module = {"poet": poet, "adamw": adamw}[method](NETWORKS[network](), *rates, seed)
    module.configure_model()
    before = spectrum(module)
    loader = DataLoader(digits()[0], batch_size=64, shuffle=True, drop_last=True)
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", gradient_clip_val=1.0, logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    start = time.perf_counter()
    trainer.fit(module, loader)
    seconds = time.perf_counter() - start
    (metrics,) = trainer.validate(module, DataLoader(held_out, batch_size=len(held_out)), verbose=False)
    drifts = [
        ((now - then).abs().max() / then.max()).item() for then, now in zip(before, spectrum(module), strict=True)
    ]
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return {**metrics, "seconds": seconds, "trained": trained, "drift": max(drifts, default=None)}


def sweep(steps: int) -> None:
    """Train every network with every method at every pair of rates, one seed that the table does not use."""
    choice = digits()[1]
    for network, method in RATES:
        results = {}
        for rates in itertools.product(LRS, HIDDEN_LRS):
            results[rates] = run(network, method, rates, 100, choice, steps)["val_loss"]
            print(
                f"{network:<13}{method:<7}lr {rates[0]:<7g}hidden {rates[1]:<7g}loss {results[rates]:.4f}", flush=True
            )
        print(f"{network:<12} {method:<6} best {min(results, key=results.__getitem__)}", flush=True)


def table(seeds: int, steps: int) -> dict[tuple[str, str], list[dict]]:
    """Print mean and range over the seeds; return every run."""
    held_out = digits()[2]
    results = {}
    print(f"{seeds} seeds, {steps} steps of 64 images, {len(held_out)} held-out images; mean (least to most)\n")
    print(f"{'network':<13}{'method':<8}{'trained':>9}  {'accuracy':<26}{'loss':<26}{'seconds':>7}  spectrum drift")
    for (network, method), rates in RATES.items():
        runs = [run(network, method, rates, seed, held_out, steps) for seed in range(seeds)]
        cells = []
        for name in ("val_accuracy", "val_loss"):
            values = [one[name] for one in runs]
            cells.append(f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
        seconds = statistics.mean(one["seconds"] for one in runs)
        drift = "" if runs[0]["drift"] is None else f"{max(one['drift'] for one in runs):.1e}"
        left = f"{network:<13}{method:<8}{runs[0]['trained']:>9,}  {cells[0]:<26}{cells[1]:<26}"
        print(f"{left}{seconds:>7.1f}  {drift}", flush=True)
        results[network, method] = runs
    return results


def main(arguments: list[str] | None = None) -> dict[tuple[str, str], list[dict]] | None:
    """Run the table, or the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="train over the grid of learning rates")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=360, help="20 epochs by default")
    parser.add_argument("--fast", action="store_true", help="one seed, 40 steps: does it run?")
    chosen = parser.parse_args(arguments)
    hide_lightning()
    seeds, steps = (1, 40) if chosen.fast else (chosen.seeds, chosen.steps)
    return sweep(steps) if chosen.sweep else table(seeds, steps)


if __name__ == "__main__":
    main()
