"""Measures the costs of the parts of a POET layer on a device; ``route: auto`` chooses by these costs."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from orthotrain.console.progress import Progress
from orthotrain.errors import ConfigurationError
from orthotrain.files.atomic_writes import write_text
from orthotrain.kernels.block_rotate import block_rotate
from orthotrain.kernels.cayley_neumann import cayley_neumann
from orthotrain.kernels.fold import fold
from orthotrain.kernels.poet_linear import poet_linear, serves
from orthotrain.layers.poet.cost_tables import Costs, cached_costs, default_path, device_name
from orthotrain.layers.poet.poet_settings import PoetSettings

DTYPES = {"float32": torch.float32, "half": torch.bfloat16}

Shape = tuple[int, int, int]
CPU_SHAPES = [
    *((4096, 256, 64), (1024, 512, 32), (4096, 512, 64), (4096, 512, 256), (1024, 1024, 128)),
    *((4096, 1024, 128), (512, 2048, 64), (2048, 2048, 256), (512, 4096, 256), (256, 768, 64)),
]
GPU_SHAPES = [
    *((4096, 1024, 64), (16384, 1024, 256), (2048, 4096, 64), (2048, 4096, 256), (16384, 4096, 64)),
    *((16384, 4096, 256), (2048, 8192, 128), (8192, 2048, 128), (16384, 2048, 32), (512, 4096, 256)),
]
"""Tokens N, width d and block size b of square layers."""


class Part(NamedTuple):
    """A measured pass: its kind, how often each cost of :class:`Costs` enters, and its time."""

    kind: str
    shape: Shape
    features: tuple[float, ...]
    nanoseconds: float


def calibrate(
    device: torch.device, shapes: Sequence[Shape] | None = None, rounds: int = 5
) -> tuple[dict[str, Any], dict[str, list[Part]]]:
    """Measure every route and a plain layer, and fit the costs of their parts.

    Args:
        device: The device to measure.
        shapes: Tokens, width and block size of each case; the default cases take one to two minutes.
        rounds: Measurements of each case; the median counts.

    Returns:
        The entry of the device for a table of costs, and the measured passes by dtype.
    """
    shapes = shapes or (CPU_SHAPES if device.type == "cpu" else GPU_SHAPES)
    with Progress("measuring", len(DTYPES) * len(shapes) * (rounds + 1), "rounds") as bar:
        parts = {key: measure(shapes, device, dtype, rounds, bar.advance) for key, dtype in DTYPES.items()}
    threads = f", CPU threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    entry: dict[str, Any] = {
        "type": device.type,
        "name": device_name(device.type, device.index),
        "source": f"measured: {model_name(device)}{threads}, torch {torch.__version__}",
    }
    fitted = {key: vars(fit(found)) for key, found in parts.items()}
    # the table omits costs that were not measured
    return entry | {key: {n: c for n, c in costs.items() if c is not None} for key, costs in fitted.items()}, parts


def measure(
    shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype, rounds: int, advance: Callable[[], None]
) -> list[Part]:
    """Time a trained linear layer and every route of each shape, forward and backward, in turns.

    Args:
        shapes: See :func:`calibrate`.
        device: The device to measure.
        dtype: The dtype of the computation.
        rounds: See :func:`calibrate`.
        advance: Called between two rounds, so that its time is not measured.
    """
    found = []
    for shape in shapes:
        runs = passes(*shape, device, dtype)
        times: dict[str, list[float]] = {kind: [] for kind in runs}
        for turn in range(rounds + 1):
            for kind, run in runs.items():
                elapsed = _timed(run, device)
                if turn > 0:
                    times[kind].append(elapsed)
            advance()
        found += [Part(kind, shape, features(kind, *shape), statistics.median(times[kind])) for kind in runs]
    return found


def passes(
    tokens: int, width: int, block_size: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Return the passes to time by name; computing the displacements costs the same on every route and is left out."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x, weight, grad = draw(tokens, width).requires_grad_(), draw(width, width), draw(tokens, width)
    # generators of real rotations: the contraction inverts a rotation by transposing it
    generators = [0.01 * draw(width // block_size, block_size * (block_size - 1) // 2).float() for _ in range(2)]
    into, out = (cayley_neumann(g, block_size, 4).to(dtype).requires_grad_() for g in generators)
    group = PoetSettings(block_size=block_size).permuted_together(width, block_size)
    order, trained = torch.randperm(width // group, device=device), weight.clone().requires_grad_()

    def linear() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.linear(x, trained), (x, trained), grad)

    def input_centric() -> tuple[Tensor, ...]:
        y = F.linear(block_rotate(x, into, gather=order), weight)
        return torch.autograd.grad(block_rotate(y, out, scatter=order), (x, into, out), grad)

    def product() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.linear(x, fold(weight, out, into, order, order)), (x, into, out), grad)

    def contraction() -> tuple[Tensor, ...]:
        return torch.autograd.grad(poet_linear(x, weight, out, into, order, order), (x, into, out), grad)

    runs = {"linear": linear, "input": input_centric, "product": product}
    return runs | {"contraction": contraction} if serves(x) else runs


def features(kind: str, tokens: int, width: int, block_size: int) -> tuple[float, ...]:
    """Return how often each cost enters a pass, in the order of the fields of :class:`Costs`."""
    product, rotated, folded = tokens * width * width, 2 * tokens * width, width * width
    fold = (1, folded, 2 * folded * block_size)
    if kind == "input":
        return (2 * product, 2, rotated, rotated * block_size, *[0] * 6)
    if kind == "product":
        return (3 * product, 0, 0, 0, *fold, 0, 0, 0)
    if kind == "contraction":
        # the forward pass of the fold alone; inverting both rotations takes three products of their blocks
        undone = 6 * width * block_size**2
        return (2 * product + undone, 0, 0, 0, *(part / 3 for part in fold), 2, rotated, rotated * block_size)
    return (3 * product, *[0] * 9)


def fit(parts: Sequence[Part]) -> Costs:
    """Return the non-negative costs with the least relative error over the measured passes."""
    rows = torch.tensor([part.features for part in parts], dtype=torch.float64)
    times = torch.tensor([part.nanoseconds for part in parts], dtype=torch.float64)
    if not any(part.kind == "contraction" for part in parts):
        rows = rows[:, :7]
    return Costs(*non_negative_least_squares(rows / times[:, None], torch.ones_like(times)).tolist())


def predicted(costs: Costs, part: Part) -> float:
    """Return the nanoseconds that the costs predict for a pass."""
    return sum(count * (cost or 0) for count, cost in zip(part.features, vars(costs).values(), strict=True))


def non_negative_least_squares(matrix: Tensor, target: Tensor) -> Tensor:
    """Return ``x >= 0 (n,)`` with the least ``||A x - y||`` for ``A (m, n)`` and ``y (m,)``, where n is small.

    The solution is the least-squares solution over its non-zero coordinates, so every set of coordinates is tried.
    """
    count = matrix.shape[1]
    best, least = torch.zeros(count, dtype=matrix.dtype), float(target.norm())
    scale = matrix.norm(dim=0).clamp_min(torch.finfo(matrix.dtype).tiny)
    for choice in range(1, 2**count):
        kept = [k for k in range(count) if choice >> k & 1]
        some = torch.linalg.lstsq(matrix[:, kept] / scale[kept], target).solution
        error = float((matrix[:, kept] / scale[kept] @ some - target).norm())
        if error < least and bool((some >= 0).all()):
            best, least = torch.zeros_like(best), error
            best[kept] = some / scale[kept]
    return best


def comparison(entry: dict[str, Any], parts: dict[str, list[Part]]) -> str:
    """Return a table of the measured times and the times that the fitted costs predict."""
    lines = [f"{'pass, N/d/b':<28}{'dtype':<9}{'measured ms':>12}{'predicted ms':>13}"]
    for key, found in parts.items():
        costs = Costs(**entry[key])
        for part in found:
            name = f"{part.kind} {'/'.join(map(str, part.shape))}"
            lines.append(f"{name:<28}{key:<9}{part.nanoseconds / 1e6:>12.3f}{predicted(costs, part) / 1e6:>13.3f}")
    return "\n".join(lines)


def write_table(entry: dict[str, Any], path: Path | None = None) -> Path:
    """Write a table of the costs of one device, which layers read; return its path."""
    path = path or default_path()
    try:
        write_text(path, json.dumps({"unit": "ns", "devices": [entry]}, indent=1) + "\n")
    except OSError as error:
        raise ConfigurationError(f"table of costs {path} cannot be written: {error.strerror}") from error
    cached_costs.cache_clear()
    return path


def usable_device(name: str) -> torch.device:
    """Return the device with a name.

    Raises:
        ConfigurationError: If torch finds no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device=cuda: torch finds no GPU here; take --device cpu")
    return torch.device(name)


def model_name(device: torch.device) -> str:
    """Return the model name of a GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    # with one thread the time of the thread counts, without other work on the machine
    clock = time.thread_time_ns if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter_ns
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return float(clock() - start)
