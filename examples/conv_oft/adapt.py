"""Adapt a convolutional network from the digits 0 to 4 to the digits 5 to 9 by rotating its channels.

    .venv/bin/python examples/conv_oft/adapt.py           # five sets of 20 images a class, three methods
    .venv/bin/python examples/conv_oft/adapt.py --sweep   # the sweep that chose the learning rates

The network is trained on the digits 0 to 4. Then it gets a new head and a few images of each of 5 to 9, and trains the
head alone, everything, or the head and OFT's rotations of the channels before every convolution.
"""

import argparse
import copy
import statistics
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from orthotrain.console.filtered_messages import hide_lightning
from orthotrain.layers import OftConv2d, OftSettings, unwrap_mergeables
from orthotrain.modules import BaseModule, Optimization

HEAD_LR = 3e-3
"""Learning rate of the head beside rotations."""

RATES = {"head": 1e-2, "full": 3e-3, "oft": 1e-2}
"""Learning rate of the parameters that each method trains (full: all of them), the best of the sweep."""

LRS = {"head": (1e-3, 3e-3, 1e-2, 3e-2), "full": (3e-4, 1e-3, 3e-3, 1e-2), "oft": (3e-3, 1e-2, 3e-2, 1e-1)}


class Network(nn.Module):
    """Three convolutions of 3 x 3, and a head.

    Args:
        width: Channels of the second and third convolution; the first has half as many.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, width // 2, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(width // 2, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        )
        self.head = nn.Linear(4 * width, 5)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, 1, 8, 8)`` to logits ``(B, 5)``."""
        return self.head(self.body(images))


class Finetuning(BaseModule):
    """A classifier that trains a part of its parameters.

    Args:
        network: The pretrained network.
        method: ``full``, ``head``, or ``oft``.
        lr: Learning rate: of the rotations for ``oft``, else of all that is trained.
        block_size: Channels that one rotation mixes.
    """

    def __init__(self, network: Network, method: str, lr: float, block_size: int = 16) -> None:
        super().__init__(network, Optimization(lr=HEAD_LR if method == "oft" else lr, rotation_lr=lr))
        self.method, self.block_size = method, block_size

    def wrap(self, model: nn.Module) -> None:
        """Freeze the body unless it is trained in full; put rotations before convolutions of several channels."""
        if self.method == "full":
            return
        model.body.requires_grad_(False)
        if self.method == "oft":
            for index, layer in enumerate(model.body):
                if isinstance(layer, nn.Conv2d) and layer.in_channels > 1:
                    model.body[index] = OftConv2d.from_settings(layer, OftSettings(self.block_size, "cayley"))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])


def digits(classes: range) -> TensorDataset:
    """Return the images of some classes, pixels about 0, and labels that count from 0, in a fixed random order."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16 - 0.5, torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order[torch.isin(labels[order], torch.tensor(classes))]
    return TensorDataset(images[order], labels[order] - classes.start)


def split(data: TensorDataset, shots: int, seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Return ``shots`` images of each class, drawn with a seed, and the rest."""
    images, labels = data.tensors
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[labels[order] == label][:shots] for label in range(5)])
    rest = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, chosen, False)
    return TensorDataset(images[chosen], labels[chosen]), TensorDataset(images[rest], labels[rest])


def train(network: Network, method: str, lr: float, data: TensorDataset, steps: int, seed: int) -> int:
    """Train in place, leave a plain network behind, and return how many parameters were trained."""
    L.seed_everything(seed, verbose=False)
    module = Finetuning(network, method, lr)
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=64, shuffle=True))
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    unwrap_mergeables(network)
    return trained


@torch.no_grad()
def accuracy(network: Network, data: TensorDataset) -> float:
    """Return the share of images that are recognized."""
    images, labels = data.tensors
    return (network.eval()(images).argmax(1) == labels).float().mean().item()


def kernels(network: Network) -> list[Tensor]:
    """Return the filters of every convolution behind the first, one a row."""
    return [layer.weight.detach().flatten(1) for layer in network.body if isinstance(layer, nn.Conv2d)][1:]


def geometry(network: Network) -> tuple[list[Tensor], list[Tensor]]:
    """Return the norms of these filters, and the cosines between them."""
    filters = kernels(network)
    normalized = [F.normalize(weight) for weight in filters]
    return [weight.norm(dim=1) for weight in filters], [weight @ weight.T for weight in normalized]


def largest_change(before: list[Tensor], after: list[Tensor]) -> float:
    """Return the largest absolute difference."""
    return max((b - a).abs().max().item() for b, a in zip(before, after, strict=True))


def adapt(pretrained: Network, method: str, lr: float, shots: int, steps: int, seed: int) -> dict[str, Any]:
    """Adapt a copy to 5 .. 9 with a new head; measure it there, and its body under the old head on 0 .. 4."""
    few, held_out = split(digits(range(5, 10)), shots, seed)
    torch.manual_seed(seed)
    network = copy.deepcopy(pretrained)
    network.train().head = nn.Linear(network.head.in_features, 5)
    trained = train(network, method, lr, few, steps, seed)
    new = accuracy(network, held_out)
    network.head = pretrained.head
    norms, cosines = (
        largest_change(before, after) for before, after in zip(geometry(pretrained), geometry(network), strict=True)
    )
    old = accuracy(network, split(digits(range(5)), 100, 0)[1])
    weights = largest_change(kernels(pretrained), kernels(network))
    return {"trained": trained, "new": new, "old": old, "weights": weights, "norms": norms, "cosines": cosines}


def table(pretrained: Network, shots: int, steps: int, seeds: int) -> dict[str, list[dict]]:
    """Print one line for each method; return every run."""
    old = accuracy(pretrained, split(digits(range(5)), 100, 0)[1])
    print(f"before: accuracy {old:.3f} on held-out 0-4; {seeds} sets of {shots} images a class, {steps} steps\n")
    print(f"{'method':<8}{'trained':>8}  {'5-9: mean (least to most)':<27}{'0-4, old head':>14}"
          f"{'weights moved':>15}{'norms':>9}{'cosines':>9}")  # fmt: skip
    results = {}
    for method, lr in RATES.items():
        runs = results[method] = [adapt(pretrained, method, lr, shots, steps, seed) for seed in range(seeds)]
        new = [one["new"] for one in runs]
        cell = f"{statistics.mean(new):.3f} ({min(new):.3f} to {max(new):.3f})"
        kept = statistics.mean(one["old"] for one in runs)
        weights, norms, cosines = (max(one[name] for one in runs) for name in ("weights", "norms", "cosines"))
        left = f"{method:<8}{runs[0]['trained']:>8,}  {cell:<27}{kept:>14.3f}"
        print(f"{left}{weights:>15.1e}{norms:>9.1e}{cosines:>9.1e}", flush=True)
    return results


def sweep(pretrained: Network, shots: int, steps: int) -> None:
    """Print the accuracy at every learning rate, over three sets of images that the table does not use."""
    for method in RATES:
        for lr in LRS[method]:
            runs = [adapt(pretrained, method, lr, shots, steps, seed)["new"] for seed in (100, 101, 102)]
            print(f"{method:<8}lr {lr:<8g}accuracy {statistics.mean(runs):.4f}", flush=True)


def main(arguments: list[str] | None = None) -> dict[str, list[dict]] | None:
    """Pretrain, then run the table or the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="adapt at every learning rate")
    parser.add_argument("--shots", type=int, default=20, help="images of each new class")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--fast", action="store_true", help="one set, 40 steps")
    chosen = parser.parse_args(arguments)
    hide_lightning()
    steps, seeds = (40, 1) if chosen.fast else (chosen.steps, chosen.seeds)
    torch.manual_seed(0)
    pretrained = Network()
    train(pretrained, "full", 3e-3, split(digits(range(5)), 100, 0)[0], 2 * steps, 0)
    return sweep(pretrained, chosen.shots, steps) if chosen.sweep else table(pretrained, chosen.shots, steps, seeds)


if __name__ == "__main__":
    main()
