"""Random structural causal models with a treatment, interventions on it, and an endless stream of their datasets.

A model has six nodes in a random causal order: a hidden one U, covariates X1, X2, X3, a binary treatment T, and an
outcome Y after T. Each earlier node is a parent of a later one with probability 1/2. A node is a random mixture of a
line and a tanh of a random combination of its parents, plus Gaussian noise; T is 1 where twice that mixture exceeds
logistic noise. The intervention do(T = t) cuts the edges into T and keeps all else, the noise included.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

NODES = 6
COVARIATES = 3


@dataclass
class Models:
    """A batch of B models; nodes stand in causal order.

    Args:
        weights: ``(B, 6, 6)``; ``[:, k, j]`` is the weight of the edge from node j to node k, 0 for no edge.
        bend: ``(B, 6)``, from 0 for a line to 1 for a tanh.
        noise: ``(B, 6)``, standard deviations.
        covariates: ``(B, 3)``, positions of X1, X2, X3 in the causal order.
        treatment: ``(B,)``, position of T.
        outcome: ``(B,)``, position of Y.
        hidden: ``(B,)``, position of U.
    """

    weights: Tensor
    bend: Tensor
    noise: Tensor
    covariates: Tensor
    treatment: Tensor
    outcome: Tensor
    hidden: Tensor

    @classmethod
    def draw(cls, count: int, generator: torch.Generator) -> "Models":
        """Draw ``count`` models."""
        order = torch.rand(count, NODES, generator=generator).argsort(1)
        hidden, covariates, first, second = order[:, 0], order[:, 1:4], order[:, 4], order[:, 5]
        edges = torch.rand(count, NODES, NODES, generator=generator).lt(0.5).tril(-1)
        weights = edges * torch.randn(count, NODES, NODES, generator=generator)
        bend = torch.rand(count, NODES, generator=generator)
        noise = 0.2 + 0.8 * torch.rand(count, NODES, generator=generator)
        return cls(weights, bend, noise, covariates, torch.minimum(first, second), torch.maximum(first, second), hidden)

    def sample(self, noise: Tensor, treatment: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the nodes from standard noise ``(B, N, 6)``, under do(T = ``treatment (B, N)``) if that is given.

        Returns:
            Covariates ``(B, N, 3)``, treatments ``(B, N)`` and outcomes ``(B, N)``.
        """
        values = torch.zeros_like(noise)
        for node in range(NODES):
            total = (values * self.weights[:, None, node]).sum(-1)
            bend = self.bend[:, node, None]
            mean = (1 - bend) * total + bend * 2 * torch.tanh(total)
            natural = mean + self.noise[:, node, None] * noise[..., node]
            # the normal noise of a treatment, made uniform and then logistic
            uniform = torch.special.ndtr(noise[..., node]).clamp(1e-6, 1 - 1e-6)
            chosen = (2 * mean + torch.logit(uniform) > 0).float() if treatment is None else treatment
            values[..., node] = torch.where(self.treatment[:, None] == node, chosen, natural)
        return (
            values.gather(2, self.covariates[:, None].expand(-1, noise.shape[1], -1)),
            *(values.gather(2, position[:, None, None].expand(-1, noise.shape[1], -1))[..., 0]
              for position in (self.treatment, self.outcome)),
        )  # fmt: skip

    def confounded(self) -> Tensor:
        """Return for each model whether U is a parent of both treatment and outcome, ``(B,)``."""
        batch = torch.arange(len(self.hidden))
        into_treatment = self.weights[batch, self.treatment, self.hidden]
        return (into_treatment != 0) & (self.weights[batch, self.outcome, self.hidden] != 0)


def draw_batch(datasets: int, context: int, queries: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw models, observe ``context`` units of each, and intervene on ``queries`` others.

    The covariates of a query are those before the intervention, as a person who decides about it knows them. Outcomes
    are scaled so that the observed outcomes of their dataset have mean 0 and standard deviation 1.

    Returns:
        ``context (B, N, 5)``: covariates, treatment, outcome. ``queries (B, M, 4)``: covariates, treatment.
        ``outcomes (B, M)`` under these treatments. ``effects (B, M)``: Y under do(T = 1) less Y under do(T = 0) of
        the same unit. ``confounded (B,)``, see :meth:`Models.confounded`.
    """
    models = Models.draw(datasets, generator)
    noise = torch.randn(datasets, context + queries, NODES, generator=generator)
    covariates, treatment, outcome = models.sample(noise)
    observed, unseen = outcome[:, :context], noise[:, context:]
    mean, deviation = observed.mean(1, keepdim=True), observed.std(1, keepdim=True).clamp_min(1e-3)
    zero, one = (models.sample(unseen, torch.full(unseen.shape[:2], float(t)))[2] for t in (0, 1))
    given = torch.rand(datasets, queries, generator=generator).lt(0.5).float()
    rows = torch.cat([covariates, treatment[..., None]], -1)
    return {
        "context": torch.cat([rows[:, :context], ((observed - mean) / deviation)[..., None]], -1),
        "queries": torch.cat([covariates[:, context:], given[..., None]], -1),
        "outcomes": (torch.where(given == 1, one, zero) - mean) / deviation,
        "effects": (one - zero) / deviation,
        "confounded": models.confounded(),
    }


class CausalPrior(IterableDataset):
    """Endless batches; each has new models.

    Args:
        datasets: Datasets of a batch.
        context: Observed units of each.
        queries: Units to predict.
        seed: Seed of everything.
    """

    def __init__(self, datasets: int, context: int, queries: int, seed: int) -> None:
        self.datasets, self.context, self.queries, self.seed = datasets, context, queries, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield draw_batch(self.datasets, self.context, self.queries, generator)
