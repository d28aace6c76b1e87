"""What kernels.py measures: the layers that are compared, and the clock."""

import contextlib
import copy
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from orthotrain.kernels.backend import use_backend
from orthotrain.layers import OftLinear, PoetLinear
from orthotrain.layers.displacement_pool import DisplacementPool

Run = Callable[[], Any]


def turned(module: nn.Module, scale: float = 0.01) -> nn.Module:
    """Give rotations generators that are not zero, so that no product is one with zeros."""
    for name, parameter in module.named_parameters():
        if "generators" in name or "oft_R" in name or "lora_B" in name:
            nn.init.normal_(parameter, std=scale)
    return module


def poet(linear: nn.Linear, block_size: int, centre: str, activation_mode: str = "fast") -> nn.Module:
    """Wrap a copy of ``linear``."""
    return turned(PoetLinear.from_linear(linear, block_size, centre=centre, activation_mode=activation_mode))


def frozen_copy(linear: nn.Linear) -> nn.Linear:
    """Return a layer of its own with the values of ``linear``, not trained."""
    return copy.deepcopy(linear).requires_grad_(False)


def cpu_contenders(linear: nn.Linear, block_size: int) -> dict[str, nn.Module]:
    """Return what is compared on the CPU: a trained layer, PoetLinear by centre, and the two products of a frozen one.

    ``pooled`` is ``auto`` as a trained network runs it: with the displacements of all its rotations in one batch.
    """
    pooled = poet(linear, block_size, "auto")
    DisplacementPool(pooled)
    centres = {centre: poet(linear, block_size, centre) for centre in ("input", "weight", "auto")}
    return {"linear": linear, "frozen": frozen_copy(linear), **centres, "pooled": pooled}


def peft_layer(linear: nn.Linear, config: Any) -> nn.Module:
    """Wrap a copy of ``linear`` by PEFT."""
    import peft

    network = nn.Sequential(OrderedDict(linear=frozen_copy(linear)))
    return turned(peft.get_peft_model(network, config).to(linear.weight.device, linear.weight.dtype))


def plain_layers(linear: nn.Linear) -> dict[str, tuple[nn.Module, str]]:
    """Return the contenders without blocks: layer and choice of kernels by name."""
    layers: dict[str, tuple[nn.Module, str]] = {"nn.Linear": (linear, "auto"), "frozen": (frozen_copy(linear), "auto")}
    try:
        import peft
    except ImportError:
        return layers
    return layers | {"PEFT LoRA": (peft_layer(linear, peft.LoraConfig(r=16, target_modules=["linear"])), "auto")}


def block_layers(linear: nn.Linear, block_size: int) -> dict[str, tuple[nn.Module, str]]:
    """Return the contenders with blocks."""
    layers = {
        "POET auto": (poet(linear, block_size, "auto"), "auto"),
        "POET mem": (poet(linear, block_size, "auto", "mem"), "auto"),
        "POET input": (poet(linear, block_size, "input"), "auto"),
        "POET weight": (poet(linear, block_size, "weight"), "auto"),
        "POET plain": (poet(linear, block_size, "auto"), "reference"),
    }
    if linear.in_features % block_size == 0:
        layers["OFT"] = (turned(OftLinear.from_linear(frozen_copy(linear), block_size)), "auto")
        try:
            import peft
        except ImportError:
            return layers
        config = peft.OFTConfig(
            oft_block_size=block_size,
            target_modules=["linear"],
            use_cayley_neumann=True,
            num_cayley_neumann_terms=6,
        )
        layers["PEFT OFT"] = (peft_layer(linear, config), "auto")
    return layers


def passes(module: nn.Module, x: Tensor, grad: Tensor, choice: str) -> tuple[Run, Run]:
    """Return a forward pass, and a forward and backward pass that leaves no gradients."""

    def forward() -> None:
        with use_backend(choice):
            module(x)

    def both() -> None:
        with use_backend(choice):
            module(x).backward(grad)
        x.grad = None
        for parameter in module.parameters():
            parameter.grad = None

    return forward, both


def interleaved(runs: dict[str, Run], device: torch.device, rounds: int, repeat: int = 1) -> dict[str, float]:
    """Return median milliseconds of each run; rounds take turns, so that a slow moment meets them all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            elapsed = timed(run, device, repeat)
            if turn >= 2:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def timed(run: Run, device: torch.device, repeat: int) -> float:
    """Return milliseconds of one run; on a GPU by its own events, ``repeat`` runs in a row to keep it fed.

    One CPU thread is timed by its own clock, which stands still while other work has its core.
    """
    if device.type != "cuda":
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        for _ in range(repeat):
            run()
        return 1e3 * (clock() - start) / repeat
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    for _ in range(repeat):
        run()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / repeat


def peak_mib(run: Run, device: torch.device) -> float:
    """Return how far one run raises the memory in use, in MiB; 0 where nothing counts it."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@contextlib.contextmanager
def permutation_route(route: str) -> Iterator[None]:
    """Make kernels gather by themselves (``fused``) or in passes; anything else leaves the choice to them."""
    from orthotrain.kernels.block_rotate import permutation

    before = permutation.FEWEST_ROWS
    permutation.FEWEST_ROWS = {"fused": 2**62, "passes": 1}.get(route, before)
    try:
        yield
    finally:
        permutation.FEWEST_ROWS = before
