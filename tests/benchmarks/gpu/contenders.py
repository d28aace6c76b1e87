"""The layers that are compared with a trained nn.Linear, on a GPU and on a CPU."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from orthotrain.layers import OftLinear, PoetLinear, PoetSettings, StepwiseLinear
from orthotrain.layers.rotation.displacement_pool import DisplacementPool
from orthotrain.plugins import CayleyNeumann

POET_BLOCK, OFT_BLOCK, LORA_RANK = 256, 32, 16
Make = Callable[[nn.Linear], nn.Module]


def turned(module: nn.Module, scale: float = 0.01) -> nn.Module:
    """Give rotations generators that are not zero, so that no product is one with zeros."""
    for name, parameter in module.named_parameters():
        if "generators" in name or "oft_R" in name or "lora_B" in name:
            nn.init.normal_(parameter, std=scale)
    return module


def frozen_copy(linear: nn.Linear) -> nn.Linear:
    """Return a layer of its own with the values of ``linear``, not trained."""
    return copy.deepcopy(linear).requires_grad_(False)


def poet(linear: nn.Linear, block_size: int, **settings: Any) -> nn.Module:
    """Wrap a copy of ``linear`` by POET."""
    return turned(PoetLinear.from_linear(linear, block_size, **settings))


def stepwise(linear: nn.Linear, block_size: int, **settings: Any) -> nn.Module:
    """Wrap a copy of ``linear`` by step-wise POET, which has its gradient at the identity."""
    described = PoetSettings(block_size, parameterization=CayleyNeumann(2), stepwise=True, **settings)
    return StepwiseLinear.from_settings(linear, described)


def oft(linear: nn.Linear, block_size: int, storage: Any = None) -> nn.Module:
    """Wrap a copy of ``linear`` by OFT."""
    return turned(OftLinear.from_linear(frozen_copy(linear), block_size, storage=storage))


def peft_oft(linear: nn.Linear, block_size: int) -> nn.Module:
    """Wrap a copy of ``linear`` by PEFT's OFT, with the series of the same order as its paper's code."""
    import peft

    series = {"use_cayley_neumann": True, "num_cayley_neumann_terms": 6}
    return _by_peft(linear, peft.OFTConfig(oft_block_size=block_size, target_modules=["linear"], **series))


def peft_lora(linear: nn.Linear, rank: int) -> nn.Module:
    """Wrap a copy of ``linear`` by PEFT's LoRA."""
    import peft

    return _by_peft(linear, peft.LoraConfig(r=rank, target_modules=["linear"]))


def _by_peft(linear: nn.Linear, config: Any) -> nn.Module:
    import peft

    network = nn.Sequential(OrderedDict(linear=frozen_copy(linear)))
    return turned(peft.get_peft_model(network, config).to(linear.weight.device, linear.weight.dtype))


class Side(nn.Module):
    """Several layers with the same input. One pool computes the displacements of all, as in a network.

    Args:
        layers: All of one shape.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        DisplacementPool(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of all layers for the same input."""
        return tuple(layer(x) for layer in self.layers)


def side_by_side(make: Make, count: int) -> Make:
    """Return what makes so many layers from one linear layer, each a copy of its own."""
    return lambda linear: Side(make(copy.deepcopy(linear)) for _ in range(count))
