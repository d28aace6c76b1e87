"""Stage 4: operations against the floors of bandwidth and FLOPs, and the costs that ``route: auto`` chooses by."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from gpu import floors
from gpu.device import Gpu
from gpu.measuring import interleaved
from gpu.record import Case
from orthotrain.cli.calibrate import GPU_SHAPES, calibrate
from orthotrain.kernels.permutations import GROUPS


def cases(machine: Gpu) -> Iterator[Case]:
    """Yield the ceilings, rotations of one shape, all operations, calibrate, and the other rotations."""
    yield Case("ceilings", lambda: floors.ceilings(machine))
    yield Case("clocks after the ceilings", lambda: {"clocks": machine.clocks()})
    yield from rotations(machine, 2048, 4096)
    for name, make in floors.operations(machine):
        yield Case(name, lambda make=make: timed(machine, make))  # type: ignore[misc]
    yield from rotations(machine, 16384, 4096)
    yield Case("calibrate", lambda: calibrated(machine), 15.0)
    yield from rotations(machine, 16384, 14336)


def rotations(machine: Gpu, tokens: int, width: int) -> Iterator[Case]:
    """Yield the rotations of a shape in the natural order and by every route of a permutation."""
    for size in (256, 32, 64):
        for route in ("natural", "groups", "fused", "passes"):
            group = {"natural": None, "groups": GROUPS[0]}.get(route, 1)

            def run(size: int = size, route: str = route, group: int | None = group) -> dict[str, Any]:
                with permutation_route(route):
                    return timed(machine, lambda: floors.rotation(machine, tokens, width, size, group))

            yield Case(f"rotation {tokens}x{width} b={size} {route}", run)


def timed(machine: Gpu, make: Callable[[], floors.Passes]) -> dict[str, Any]:
    """Return microseconds, least bytes and FLOPs of each pass of an operation."""
    with machine.kernels():
        passes = make()
        found = interleaved(machine, {part: one.run for part, one in passes.items()}, rounds=6, repeat=5)
    return {
        part: {"us": 1e3 * found[part]["ms"], "moved": one.moved, "flops": one.flops, "products": one.products}
        for part, one in passes.items()
    }


@contextlib.contextmanager
def permutation_route(route: str) -> Iterator[None]:
    """Make kernels gather by themselves (``fused``) or in passes; anything else leaves the choice to them."""
    from orthotrain.kernels.block_rotate import permute_columns

    before = permute_columns.FEWEST_ROWS
    permute_columns.FEWEST_ROWS = {"fused": 2**62, "passes": 1}.get(route, before)
    try:
        yield
    finally:
        permute_columns.FEWEST_ROWS = before


def calibrated(machine: Gpu) -> dict[str, Any]:
    """Return the entry of this card for the table of costs, and the largest relative error of its predictions."""
    from orthotrain.cli.calibrate import predicted
    from orthotrain.layers.poet.cost_tables import Costs

    shapes = machine.pick(GPU_SHAPES, [(8, 64, 16), (16, 32, 16), (16, 64, 8)])
    with machine.kernels():
        entry, parts = calibrate(machine.device, shapes, rounds=machine.pick(3, 1))
    errors = {
        key: max(abs(predicted(Costs(**entry[key]), part) / part.nanoseconds - 1) for part in found)
        for key, found in parts.items()
    }
    return {"entry": entry, "errors": errors}
