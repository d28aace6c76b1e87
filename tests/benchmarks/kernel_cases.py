"""What kernels.py measures: the layers that are compared, the clock, the floors, and the check that comes first."""

import contextlib
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from orthotrain.kernels.backend import use_backend
from orthotrain.kernels.block_rotate import block_rotate
from orthotrain.kernels.dequant import dequant_int8
from orthotrain.kernels.fold import fold
from orthotrain.layers import OftLinear, PoetLinear
from orthotrain.layers.displacement_pool import DisplacementPool

Run = Callable[[], Any]

LIMITS = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}
"""Relative error (Frobenius) that rounding explains: 2 to 4 roundings of a sum."""

CHECKED = [(300, 1000, 4), (1000, 700, 32), (513, 640, 64), (257, 1000, 100), (300, 1100, 256), (260, 2100, 1024)]
"""(N, d, b); in most of them the blocks leave a rest."""


def turned(module: nn.Module, scale: float = 0.01) -> nn.Module:
    """Give rotations generators that are not zero, so that no product is one with zeros."""
    for name, parameter in module.named_parameters():
        if "generators" in name or "oft_R" in name or "lora_B" in name:
            nn.init.normal_(parameter, std=scale)
    return module


def poet(linear: nn.Linear, block_size: int, centre: str) -> nn.Module:
    """Wrap a copy of ``linear``."""
    return turned(PoetLinear.from_linear(linear, block_size, centre=centre))


def cpu_contenders(linear: nn.Linear, block_size: int) -> dict[str, nn.Module]:
    """Return what is compared on the CPU: a trained layer, PoetLinear by centre, and the two products of a frozen one.

    ``pooled`` is ``auto`` as a trained network runs it: with the displacements of all its rotations in one batch.
    """
    frozen = nn.Linear(linear.in_features, linear.out_features, bias=False, dtype=linear.weight.dtype)
    pooled = poet(linear, block_size, "auto")
    DisplacementPool(pooled)
    centres = {centre: poet(linear, block_size, centre) for centre in ("input", "weight", "auto")}
    return {"linear": linear, "frozen": frozen.requires_grad_(False), **centres, "pooled": pooled}


def peft_layer(linear: nn.Linear, config: Any) -> nn.Module:
    """Wrap a copy of ``linear`` by PEFT."""
    import peft

    copy = nn.Linear(linear.in_features, linear.out_features, bias=False, device=linear.weight.device)
    copy.weight = nn.Parameter(linear.weight.detach().clone())
    network = nn.Sequential(OrderedDict(linear=copy))
    return turned(peft.get_peft_model(network, config).to(linear.weight.device, linear.weight.dtype))


def plain_layers(linear: nn.Linear) -> dict[str, tuple[nn.Module, str]]:
    """Return the contenders without blocks: layer and choice of kernels by name."""
    layers: dict[str, tuple[nn.Module, str]] = {"nn.Linear": (linear, "auto")}
    try:
        import peft
    except ImportError:
        return layers
    return layers | {"PEFT LoRA": (peft_layer(linear, peft.LoraConfig(r=16, target_modules=["linear"])), "auto")}


def block_layers(linear: nn.Linear, block_size: int) -> dict[str, tuple[nn.Module, str]]:
    """Return the contenders with blocks."""
    frozen = nn.Linear(linear.in_features, linear.out_features, bias=False, device=linear.weight.device)
    frozen.weight = nn.Parameter(linear.weight.detach().clone())
    layers = {
        "POET input": (poet(linear, block_size, "input"), "auto"),
        "POET weight": (poet(linear, block_size, "weight"), "auto"),
        "POET plain": (poet(linear, block_size, "auto"), "reference"),
    }
    if linear.in_features % block_size == 0:
        layers["OFT"] = (turned(OftLinear.from_linear(frozen, block_size)), "auto")
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


def ceilings(device: torch.device) -> tuple[float, float]:
    """Return measured bytes a second of a large copy and bf16 FLOPs a second of a large product."""
    source, size = torch.empty(2**29, dtype=torch.bfloat16, device=device), 8192
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    runs = {"copy": lambda: target.copy_(source), "product": lambda: left @ right}
    ms = interleaved(runs, device, rounds=10)
    return 2 * source.numel() * 2 / (1e-3 * ms["copy"]), 2 * size**3 / (1e-3 * ms["product"])


def floors(rows: int, width: int, block_size: int) -> dict[str, tuple[int, int]]:
    """Return least bytes and FLOPs in 16 bits of a rotation and of its backward pass."""
    elements, flops = 2 * rows * width, 2 * rows * width * block_size
    blocks = 2 * width * block_size
    return {"forward": (2 * elements + blocks, flops), "backward": (3 * elements + 2 * blocks, 2 * flops)}


def errors(shape: tuple[int, int, int], dtype: torch.dtype, permuted: bool, device: torch.device) -> dict[str, float]:
    """Return the error of every result against fp64, relative to its norm; a repeated run must give the same bits."""
    rows, width, size = shape
    n, m = width // size, rows // size
    generator = torch.Generator(device).manual_seed(rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    x, grad = draw(rows, width), draw(rows, width)
    d_in, d_out = draw(n, size, size) / size**0.5, draw(m, size, size) / size**0.5
    orders = [torch.randperm(k, generator=generator, device=device) if permuted else None for k in (rows, width)]

    def results(choice: str, kind: torch.dtype) -> list[Tensor]:
        x_, d_in_, d_out_ = (t.to(kind).requires_grad_() for t in (x, d_in, d_out))
        with use_backend(choice):
            y = block_rotate(x_, d_in_, orders[1], orders[1])
            rotated = torch.autograd.grad(y, (x_, d_in_), grad.to(kind))
            w = fold(x_.detach(), d_out_, d_in_, *orders)
            return [y.detach(), *rotated, w.detach(), *torch.autograd.grad(w, (d_out_, d_in_), grad.to(kind))]

    names = ("y", "dx", "dD", "fold", "fold dD_out", "fold dD_in")
    found, again, exact = results("triton", dtype), results("triton", dtype), results("reference", torch.float64)
    error = {k: relative(f, e) for k, f, e in zip(names, found, exact, strict=True)}
    error["repeat"] = 0.0 if all(map(torch.equal, found, again)) else float("inf")
    return error | {"int8": int8_error(dtype, device)}


def int8_error(dtype: torch.dtype, device: torch.device) -> float:
    """Return the error of unpacking int8, likewise."""
    codes = torch.randint(-127, 128, (300, 512), dtype=torch.int8, device=device)
    scales = torch.rand(300, 2, device=device)
    with use_backend("triton"):
        found = dequant_int8(codes, scales, dtype)
    return relative(found, codes.double() * scales.double().repeat_interleave(256, dim=1))


def relative(found: Tensor, exact: Tensor) -> float:
    """Return ``||found - exact|| / ||exact||``; infinite where anything is not a number."""
    value = float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))
    return value if value == value else float("inf")
