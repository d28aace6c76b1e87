"""Training steps without a trainer: network and optimizer of a module, in a plain loop."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from orthotrain.layers import StepwiseLinear
from orthotrain.layers.folding import fold_rotations
from orthotrain.layers.protocols import mergeable_layers
from orthotrain.modules import BaseModule

Step = Callable[[], Tensor]


def step_of(module: BaseModule, batches: list[Any]) -> tuple[Step, torch.optim.Optimizer]:
    """Return one whole training step, which returns its loss without waiting for it, and its optimizer.

    Args:
        module: With its network built.
        batches: Taken in turns.
    """
    assert module.model is not None
    micro = getattr(module, "micro_step", None)  # of versions that can compile it; the loss itself where nothing is
    compute = module.loss if micro is None else partial(micro.loss, module)
    keeps_gradients = micro is not None and micro.keeps_gradients
    optimizer = module.optimization.build(module.optimization.groups(module.model))
    folded = {name: layer for name, layer in mergeable_layers(module) if isinstance(layer, StepwiseLinear)}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    coming = itertools.cycle(batches)
    module.train()

    def step() -> Tensor:
        loss = compute(next(coming))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not keeps_gradients)
        if folded:
            fold_rotations(folded)
        return loss.detach()

    return step, optimizer
