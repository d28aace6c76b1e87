"""Stage 3: layers against a trained nn.Linear in bf16: forward and backward, eager and replayed as a CUDA graph."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpu import contenders
from gpu.contenders import LORA_RANK, OFT_BLOCK, POET_BLOCK, Make, side_by_side
from gpu.device import Gpu
from gpu.measuring import interleaved, peak_mib
from gpu.record import Case
from orthotrain.kernels.dispatch import use_backend

SHAPES = ((4096, 4096), (14336, 4096))
TOKENS = (2048, 16384)
BESIDE = 4
"""Layers whose displacements one pool computes. Their results are divided by this number."""


class Contender(NamedTuple):
    """A layer that is compared: how it is made, how many copies are measured together, which kernels it takes."""

    make: Make
    count: int = 1
    kernels: str = "auto"


class Shape(NamedTuple):
    """Output and input width, tokens."""

    d_out: int
    d_in: int
    tokens: int

    @property
    def name(self) -> str:
        """How cases call it."""
        return f"{self.d_out}x{self.d_in} N={self.tokens}"


def all_contenders(machine: Gpu) -> dict[str, Contender]:
    """Return the layers by name, those that matter most first."""
    size, small, rank = machine.pick((POET_BLOCK, OFT_BLOCK, LORA_RANK), (16, 8, 2))

    def poet(**settings: Any) -> Make:
        return lambda linear: contenders.poet(linear, size, **settings)

    def stepwise(**settings: Any) -> Make:
        return lambda linear: contenders.stepwise(linear, size, **settings)

    def oft(**settings: Any) -> Make:
        return lambda linear: contenders.oft(linear, small, **settings)

    return {
        "POET": Contender(poet()),
        "step-wise": Contender(stepwise(storage="residual")),
        "OFT": Contender(oft()),
        "frozen": Contender(contenders.frozen_copy),
        "PEFT OFT": Contender(lambda linear: contenders.peft_oft(linear, small)),
        "LoRA": Contender(lambda linear: contenders.peft_lora(linear, rank)),
        "POET mem": Contender(poet(activation_mode="mem")),
        "POET pooled": Contender(side_by_side(poet(), BESIDE), BESIDE),
        "POET int8": Contender(poet(storage="int8")),
        "POET nf4": Contender(poet(storage="nf4")),
        "OFT int8": Contender(oft(storage="int8")),
        "OFT nf4": Contender(oft(storage="nf4")),
        "POET by input": Contender(poet(route="input")),
        "POET by weight": Contender(poet(route="weight")),
        "step-wise by input": Contender(stepwise(storage="residual", route="input")),
        "step-wise by weight": Contender(stepwise(storage="residual", route="weight")),
        "POET reference": Contender(poet(), kernels="reference"),
    }


FIRST = 6
"""This many contenders are measured for every shape before the other contenders."""


def cases(machine: Gpu) -> Iterator[Case]:
    """Yield the contenders by shape, eager and replayed; the most telling cases first."""
    with contextlib.suppress(ImportError):  # without PEFT its cases are errors, and the other cases run
        import peft  # noqa: F401  (now, so that no case takes the time of the import)
    chosen = list(all_contenders(machine).items())
    shapes = [Shape(*shape, tokens) for shape in SHAPES for tokens in TOKENS]
    for some in (chosen[:FIRST], chosen[FIRST:]):
        for shape in shapes:
            for name, contender in some:
                yield Case(f"{shape.name} {name}", partial(compared, machine, shape, contender, eager))
            for name, contender in some:
                yield Case(f"{shape.name} {name}, replayed", partial(compared, machine, shape, contender, replayed))
    for name, contender in chosen:
        yield Case(f"{shapes[0].name} {name}, launches", partial(launched, machine, shapes[0], contender))


class Both:
    """A forward and backward pass. It drops the gradients first, because a capture must allocate them.

    Args:
        layer: What is measured.
        x: Its input, which gets a gradient.
        grads: Gradients of its outputs.
    """

    def __init__(self, layer: nn.Module, x: Tensor, grads: tuple[Tensor, ...]) -> None:
        self.layer, self.x, self.grads = layer, x, grads
        self.trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def drop(self) -> None:
        """Drop the gradients of an earlier pass."""
        self.x.grad = None
        for parameter in self.trained:
            parameter.grad = None

    def __call__(self) -> None:
        """Run both passes."""
        self.drop()
        y = self.layer(self.x)
        torch.autograd.backward(y if isinstance(y, tuple) else (y,), self.grads)


Measure = Callable[[Gpu, dict[str, Both]], dict[str, Any]]


def compared(machine: Gpu, shape: Shape, contender: Contender, measure: Measure) -> dict[str, Any]:
    """Return the times of a contender and of a trained nn.Linear, in turns, and their ratio."""
    runs = made(machine, shape, contender)
    with machine.kernels(), use_backend(machine.pick(contender.kernels, "triton")):
        measured = measure(machine, runs)
    own, linear = (
        {key: value / contender.count for key, value in measured[name].items()} for name in ("own", "linear")
    )
    return {**own, **{f"linear_{key}": value for key, value in linear.items()}, "ratio": own["ms"] / linear["ms"]}


def eager(machine: Gpu, runs: dict[str, Both]) -> dict[str, Any]:
    """Return times as layers run by themselves, and how far a pass raises the memory in use."""
    times: dict[str, dict[str, float]] = interleaved(machine, runs)
    for run in runs.values():
        run.drop()
    for name, run in runs.items():
        times[name]["peak_mib"] = peak_mib(machine, run, run.drop)
    return times


def replayed(machine: Gpu, runs: dict[str, Both]) -> dict[str, Any]:
    """Return times of the replay of CUDA graphs."""
    return interleaved(machine, {name: machine.captured(run) for name, run in runs.items()})


def launched(machine: Gpu, shape: Shape, contender: Contender) -> dict[str, Any]:
    """Return how many kernels one forward and backward pass starts, by layer, beside those of nn.Linear."""
    runs = made(machine, shape, contender)
    with machine.kernels(), use_backend(machine.pick(contender.kernels, "triton")):
        for run in runs.values():
            run()
        own, linear = (machine.launches(runs[name]) for name in ("own", "linear"))
    return {"launches": own / contender.count, "linear_launches": linear / contender.count}


def made(machine: Gpu, shape: Shape, contender: Contender) -> dict[str, Both]:
    """Return a forward and backward pass of a contender, and of as many trained linear layers."""
    torch.manual_seed(0)
    d_out, d_in, tokens = machine.pick(tuple(shape), (shape.d_out // 64, shape.d_in // 64, shape.tokens // 256))
    options = {"device": machine.device, "dtype": torch.bfloat16}
    linear = nn.Linear(d_in, d_out, bias=False, **options)
    own, plain = contender.make(linear), linear
    if contender.count > 1:
        plain = side_by_side(copy.deepcopy, contender.count)(linear)
    x = torch.randn(tokens, d_in, **options, requires_grad=True)
    grads = (torch.randn(tokens, d_out, **options),) * contender.count
    return {"own": Both(own, x, grads), "linear": Both(plain, x, grads)}
