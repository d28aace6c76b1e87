"""Pretrain a prior-data fitted network for causal effects with POET, and compare it with regressions on unseen graphs.

    .venv/bin/python examples/prior_fitted_network/train.py
    .venv/bin/python examples/prior_fitted_network/train.py --method adamw    # the same network, every weight trained

The network reads a table of observed units and predicts outcomes of others under an intervention; see README.md.
"""

import argparse
import functools
import time

import lightning as L
import torch
from causal_prior import COVARIATES, CausalPrior, draw_batch
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LinearRegression
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from orthotrain.console.filtered_messages import hide_lightning
from orthotrain.modules import BaseModule, Optimization, PoetLayers, PoetModule
from orthotrain.schedules import CosineWithWarmup


class Block(nn.Module):
    """A pre-norm transformer block in which every row attends to the context rows only.

    Args:
        width: Features of a row.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, rows: Tensor, context: int) -> Tensor:
        """Map rows ``(B, N + M, width)``, of which the first N are context, to rows."""
        normed = self.norms[0](rows)
        query = self.query(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(normed[:, :context]).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        rows = rows + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return rows + self.mlp(self.norms[1](rows))


class CausalNetwork(nn.Module):
    """Predicts the mean outcome of query rows; rows are a set, so there are no positions.

    Args:
        width: Features of a row.
        depth: Transformer blocks.
        heads: Attention heads.
    """

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embed_context = nn.Linear(COVARIATES + 2, width)
        self.embed_query = nn.Linear(COVARIATES + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    def forward(self, context: Tensor, queries: Tensor) -> Tensor:
        """Map context ``(B, N, 5)`` and queries ``(B, M, 4)`` to outcomes ``(B, M)``."""
        count = context.shape[1]
        rows = torch.cat([self.embed_context(context), self.embed_query(queries)], 1)
        for block in self.blocks:
            rows = block(rows, count)
        return self.head(self.norm(rows[:, count:]))[..., 0]


class HuberError:
    """The Huber loss: squared for errors below two standard deviations, absolute beyond.

    A squared loss everywhere has its minimum at the mean of the outcome over all models that fit the context, weighted
    by prior and likelihood. But a few graphs have outcomes far outside the observed range and would dominate the
    gradient.
    """

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean over all queries, outcomes in units of their deviation in the context."""
        return F.huber_loss(self(batch["context"], batch["queries"]), batch["outcomes"], delta=2.0)


class PoetCausal(HuberError, PoetModule):
    """Rotates the hidden layers."""


class AdamWCausal(HuberError, BaseModule):
    """Trains every weight."""


def build(method: str, lr: float, hidden_lr: float) -> BaseModule:
    """Return a fresh network in its module; AdamW has a second rate for hidden matrices, as POET for its rotations."""
    network = CausalNetwork()
    schedule = functools.partial(CosineWithWarmup, warmup_steps=50)
    if method == "poet":
        layers = PoetLayers(block_size=32, exclude=["head", "embed_*"], parameterization="cayley")
        return PoetCausal(network, layers, merge_every=200, optimization=Optimization(
            lr=lr, rotation_lr=hidden_lr, scheduler=schedule))  # fmt: skip
    hidden = {f"{name}.weight": hidden_lr for name, layer in network.blocks.named_modules(prefix="blocks")
              if isinstance(layer, nn.Linear)}  # fmt: skip
    return AdamWCausal(network, Optimization(lr=lr, lr_overrides=hidden, scheduler=schedule))


@torch.no_grad()
def network_predictions(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return outcomes and effects of the queries, ``(B, M)`` each."""
    units = batch["queries"][..., :-1]
    zero, one = (network(batch["context"], F.pad(units, (0, 1), value=float(t))) for t in (0, 1))
    return torch.where(batch["queries"][..., -1] == 1, one, zero), one - zero


def regression_predictions(make: type, options: dict, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Fit one regression of the outcome on covariates and treatment to every context, and predict the same queries."""
    outcomes, effects = [], []
    for context, queries in zip(batch["context"].numpy(), batch["queries"], strict=True):
        fitted = make(**options).fit(context[:, :-1], context[:, -1])
        units = queries[:, :-1]
        zero, one = (torch.tensor(fitted.predict(F.pad(units, (0, 1), value=float(t)).numpy())) for t in (0, 1))
        outcomes.append(torch.where(queries[:, -1] == 1, one, zero))
        effects.append(one - zero)
    return torch.stack(outcomes).float(), torch.stack(effects).float()


def errors(predicted: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, float]:
    """Return two errors, each for the graphs with and without hidden confounding.

    ``outcome``: mean squared error over the variance of the true outcomes, the median over graphs. ``effect``: absolute
    error of the average effect in deviations of the observed outcome, the mean over graphs.
    """
    outcomes, effects = predicted
    spread = batch["outcomes"].var(1).clamp_min(1e-2)
    outcome = (outcomes - batch["outcomes"]).square().mean(1) / spread
    effect = (effects.mean(1) - batch["effects"].mean(1)).abs()
    found = {}
    for name, chosen in (("free", ~batch["confounded"]), ("confounded", batch["confounded"])):
        found |= {f"outcome_{name}": outcome[chosen].median().item(), f"effect_{name}": effect[chosen].mean().item()}
    return found


def table(network: nn.Module, graphs: int, context: int, queries: int, method: str) -> dict[str, dict[str, float]]:
    """Print the errors of the network and of the regressions on graphs that were not trained on."""
    batch = draw_batch(20 * graphs, context, queries, torch.Generator().manual_seed(2**31))
    kinds = [batch["confounded"] == kind for kind in (False, True)]
    chosen = torch.cat([kind.nonzero()[:graphs, 0] for kind in kinds])
    batch = {name: values[chosen] for name, values in batch.items()}
    mean = torch.zeros_like(batch["outcomes"])  # outcomes are scaled: 0 is the observed mean
    results = {
        "observed mean": errors((mean, mean), batch),
        "linear regression": errors(regression_predictions(LinearRegression, {}, batch), batch),
        "random forest": errors(regression_predictions(
            RandomForestRegressor, {"n_estimators": 50, "min_samples_leaf": 3, "random_state": 0}, batch), batch),
        f"network ({method})": errors(network_predictions(network.eval(), batch), batch),
    }  # fmt: skip
    print(f"\nunseen graphs: {graphs} with a hidden cause of both treatment and outcome, {graphs} without; "
          f"{context} observed units, {queries} interventions each\n")  # fmt: skip
    print(f"{'':<20}{'outcome: error / variance':>28}{'average effect: |error|':>28}")
    print(f"{'':<20}{'unconfounded':>16}{'confounded':>12}{'unconfounded':>16}{'confounded':>12}")
    for name, one in results.items():
        cells = [one[f"{what}_{kind}"] for what in ("outcome", "effect") for kind in ("free", "confounded")]
        print(f"{name:<20}{cells[0]:>16.3f}{cells[1]:>12.3f}{cells[2]:>16.3f}{cells[3]:>12.3f}")
    return results


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Pretrain and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["poet", "adamw"], default="poet")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--hidden-lr", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--graphs", type=int, default=300, help="unseen graphs of each kind")
    parser.add_argument("--fast", action="store_true", help="60 steps, 10 graphs of each kind")
    chosen = parser.parse_args(arguments)
    hide_lightning()
    steps, graphs = (60, 10) if chosen.fast else (chosen.steps, chosen.graphs)
    L.seed_everything(0, verbose=False)
    module = build(chosen.method, chosen.lr, chosen.hidden_lr)
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", gradient_clip_val=1.0, logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    start = time.perf_counter()
    trainer.fit(module, DataLoader(CausalPrior(16, 64, 32, seed=0), batch_size=None))
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    seconds = time.perf_counter() - start
    print(f"{chosen.method}: {trained:,} parameters trained, {steps} steps of 16 graphs in {seconds:.0f} s")
    return table(module, graphs, 64, 32, chosen.method)


if __name__ == "__main__":
    main()
