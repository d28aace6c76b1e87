"""Whole layers on the device against the same layers in fp64: output, and the gradient of everything that has one."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpu.contenders import turned
from gpu.device import Gpu
from gpu.kernel_checks import relative
from gpu.record import Case
from orthotrain.kernels.dispatch import use_backend
from orthotrain.layers import OftLinear, PoetLinear, PoetSettings, StepwiseLinear
from orthotrain.layers.poet.route_costs import ROUTES
from orthotrain.plugins import CayleyNeumann

LIMITS = {torch.bfloat16: 1e-2, torch.float16: 3e-3, torch.float32: 2e-5}
"""Largest relative error (Frobenius). In fp16 a layer with a residual computes with its bf16 values alone."""


class Layer(NamedTuple):
    """A layer: how it is made of a linear one, its route, its shape. ``make`` gets a divisor of the block size too."""

    make: Callable[[nn.Linear, int], nn.Module]
    route: str | None = None
    d_in: int = 512
    d_out: int = 640
    tokens: int = 300


def poet(route: str | None = None, d_in: int = 512, d_out: int = 640, tokens: int = 300, **settings: Any) -> Layer:
    """Describe a POET layer with blocks of 64 unless told otherwise."""
    options = {"block_size": 64, "parameterization": "cayley_neumann", **settings}

    def make(linear: nn.Linear, smaller: int) -> nn.Module:
        return PoetLinear.from_linear(linear, **{**options, "block_size": options["block_size"] // smaller})

    return Layer(make, route, d_in, d_out, tokens)


def stepwise(d_in: int = 512, d_out: int = 640, **settings: Any) -> Layer:
    """Describe a step-wise POET layer."""
    options = {"parameterization": CayleyNeumann(2), **settings, "stepwise": True}

    def make(linear: nn.Linear, smaller: int) -> nn.Module:
        return StepwiseLinear.from_settings(linear, PoetSettings(64 // smaller, **options))

    return Layer(make, None, d_in, d_out)


def oft(**settings: Any) -> Layer:
    """Describe an OFT layer."""
    return Layer(lambda linear, smaller: OftLinear.from_linear(linear.requires_grad_(False), 32 // smaller, **settings))


LAYERS: dict[str, Layer] = {
    **{f"POET by {route}": poet(route) for route in ROUTES},
    **{f"POET {storage}": poet(storage=storage) for storage in ("bf16", "residual", "int8", "nf4")},
    **{f"POET permuted by {group}": poet(permutation_group=group) for group in (1, 2, 4)},
    **{f"POET with a tail by {route}": poet(route, 500, 628, fraction=0.3) for route in ROUTES},
    **{f"POET b=256 by {route}": poet(route, block_size=256, d_out=1024) for route in ROUTES},
    "POET b=256, few tokens": poet(block_size=256, d_out=1024, tokens=7),
    "POET in alone": poet(sides="in"),
    "POET out alone": poet(sides="out"),
    "POET aligned": poet(aligned="both"),
    "POET mem": poet(activation_mode="mem"),
    "POET exponential": poet(parameterization="exponential"),
    "POET cayley": poet(parameterization="cayley"),
    "POET trained scale": poet(trained_scale=True),
    "step-wise by input": stepwise(route="input"),
    "step-wise by weight": stepwise(route="weight"),
    "step-wise residual": stepwise(storage="residual"),
    "step-wise with a tail": stepwise(500, 628, fraction=0.3),
    "OFT": oft(),
    "OFT int8": oft(storage="int8"),
    "OFT nf4": oft(storage="nf4"),
    "OFT shared block": oft(block_share=True),
    "OFT rotated in fp32": oft(rotation_dtype="float32"),
}


COMPILED = ("POET by input", "POET by product", "step-wise by weight", "OFT")
"""Layers that are also compiled as one graph, in fp32: torch 2.11 lost all gradients there at a cast."""


def cases(machine: Gpu, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the checks of all layers in a dtype."""
    kind = str(dtype).removeprefix("torch.")
    for name, layer in LAYERS.items():
        yield Case(f"{name} {kind}", partial(compared, machine, layer, dtype))
    for name in COMPILED if dtype == torch.float32 else ():
        yield Case(f"compiled {name} {kind}", partial(compared, machine, LAYERS[name], dtype, True))


def compared(machine: Gpu, layer: Layer, dtype: torch.dtype, compiled: bool = False) -> dict[str, Any]:
    """Return the errors of a layer relative to itself in fp64, and whether they are within the limit.

    Args:
        machine: What computes.
        layer: Its description.
        dtype: In which it computes.
        compiled: Whether it is compiled, as one graph.
    """
    torch.manual_seed(0)
    rows, smaller, device, limit = machine.pick(layer.tokens, 5), machine.pick(1, 8), machine.device, LIMITS[dtype]
    d_in, d_out = layer.d_in // smaller, layer.d_out // smaller
    made = layer.make(nn.Linear(d_in, d_out).to(device, dtype), smaller)
    if isinstance(made, StepwiseLinear):  # has its gradient at the identity
        made = made.to(device)
    else:
        turned(made)
    if layer.route is not None:
        made._route = lambda x: layer.route  # type: ignore[assignment]
    exact = copy.deepcopy(made).double()
    x, grad = (torch.randn(rows, width, device=device).to(dtype) for width in (d_in, d_out))
    with use_backend(machine.pick("auto", "reference")):
        backend = machine.pick("inductor", "aot_eager")
        run = torch.compile(made, fullgraph=True, backend=backend) if compiled else made
        found = results(run, made, x, grad)
    with use_backend("reference"):
        wanted = results(exact, exact, x.double(), grad.double())
    errors = {name: relative(found[name], wanted[name]) for name in wanted}
    return {"errors": errors, "limit": limit, "right": all(error <= limit for error in errors.values())}


def results(run: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Return output and gradients of a layer by name; ``run`` computes it."""
    leaf = x.requires_grad_()
    trained = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    y = run(leaf)
    gradients = torch.autograd.grad(y, [leaf, *trained.values()], grad)
    return dict(zip(["y", "x", *trained], [y.detach(), *gradients], strict=True))
