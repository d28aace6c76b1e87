"""Launches of the chain kernels: which tiles, how many programs, how much scratch memory.

Blocks of up to ``FUSED`` rows take one launch for the whole chain, larger ones one launch a step. Tile sizes are fixed
tables, not tuned at run time, so that a run is reproducible.
"""

import functools
import struct

import torch
import triton
from torch import Tensor

from orthotrain.kernels.chain.kernels import ROW, chain_step_kernel, fused_chain_kernel
from orthotrain.kernels.chain.program import FUSED, Chain, Step

SCRATCH_BYTES = 2**28
"""Limit of the scratch memory of a chain on large blocks, which are taken in groups that fit into it."""

FUSED_TILES = {
    16: {"K_TILE": 16, "num_warps": 2, "num_stages": 3},
    32: {"K_TILE": 32, "num_warps": 2, "num_stages": 3},
    64: {"K_TILE": 32, "num_warps": 8, "num_stages": 3},
}
PROGRAMS_PER_MULTIPROCESSOR = {16: 16, 32: 8, 64: 2}
"""By ``TILE``. A chain has 4 to 9 matrices, so all programs take 9 to 39 MB, which fit in the L2 cache of an H100."""

STEP_TILES = {
    64: {"K_TILE": 32, "num_warps": 4, "num_stages": 3},
    128: {"K_TILE": 32, "num_warps": 8, "num_stages": 3},
}

EXACT = "tf32x3"
"""How fp32 factors are multiplied unless torch is told to round them to TF32: 21 bits or more are kept."""


def run_chain(chain: Chain, first: Tensor, second: Tensor | None = None, *, precision: str | None = None) -> Tensor:
    """Run a chain on every block of a batch.

    Args:
        chain: The steps; computed in fp32 and rounded once.
        first: First input ``(n, b, b)``; a chain of two inputs reads every block of it transposed.
        second: Second input of the same shape, for a chain of two inputs.
        precision: Of the products, None for :func:`wide_precision`.

    Returns:
        The result ``(n, b, b)`` in the dtype of ``first``.
    """
    out = torch.empty_like(first, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    second = first if second is None else second
    precision = precision or wide_precision()
    if out.shape[-1] <= FUSED:
        _run_fused(chain, first, second, out, out.shape[-1], precision, generators=False)
    else:
        _run_steps(chain, first, second, out, precision)
    return out


def run_chain_on_generators(
    chain: Chain, generators: Tensor, size: int, grad: Tensor | None = None, *, precision: str | None = None
) -> Tensor:
    """Run a chain on skew blocks of up to ``FUSED`` rows given by their generators, in one launch.

    Args:
        chain: The steps; computed in fp32 and rounded once.
        generators: Upper triangles ``(n, size (size - 1) / 2)`` of the skew blocks Q.
        size: Rows of a block.
        grad: Second input ``(n, size, size)`` of a backward chain, which reads Q^T.
        precision: Of the products, None for :func:`wide_precision`.

    Returns:
        The result ``(n, size, size)``; for a backward chain its contraction to generators, upper minus mirrored lower.
    """
    out = generators.new_empty(generators.shape if grad is not None else (len(generators), size, size))
    if out.numel():
        second = generators if grad is None else grad
        _run_fused(chain, generators, second, out, size, precision or wide_precision(), generators=True)
    return out


def precision_for(given: torch.dtype, result: torch.dtype) -> str:
    """Return the precision of products whose ``result`` is rounded to a dtype: TF32 has the digits of fp16."""
    return "tf32" if result.itemsize < given.itemsize and given == torch.float32 else wide_precision()


def wide_precision() -> str:
    """Return the precision of products that the global matmul setting of torch asks for.

    Both ``torch.set_float32_matmul_precision`` and ``torch.backends.fp32_precision`` write the value that is read here.
    ``torch.get_float32_matmul_precision`` raises an error once ``torch.backends.fp32_precision`` was set.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else EXACT


def fused_tiling(size: int) -> dict[str, int]:
    """Return the constants of a launch whose programs compute whole blocks of ``size`` rows."""
    tile = max(16, triton.next_power_of_2(size))
    return {"size": size, "TILE": tile, **FUSED_TILES[tile]}


def fused_programs(blocks: int, tiling: dict[str, int], device: torch.device) -> int:
    """Return how many programs share ``blocks`` blocks."""
    groups = triton.cdiv(blocks, tiling["TILE"] // tiling["size"])
    # the interpreter has no processors; two make its programs take several groups each
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
    return min(groups, max(2, processors * PROGRAMS_PER_MULTIPROCESSOR[tiling["TILE"]]))


def _run_fused(
    chain: Chain, first: Tensor, second: Tensor, out: Tensor, size: int, precision: str, *, generators: bool
) -> None:
    blocks = out.shape[0]
    tiling = fused_tiling(size)
    programs = fused_programs(blocks, tiling, out.device)
    scratch = torch.empty(programs * chain.slots * tiling["TILE"] ** 2, dtype=torch.float32, device=out.device)
    fused_chain_kernel[(programs,)](
        first.contiguous(),
        second.contiguous(),
        out,
        scratch,
        _table(chain, out.device),
        len(chain.steps),
        chain.slots,
        chain.scale,
        blocks,
        INPUTS=chain.inputs,
        GENERATORS=generators,
        PRECISION=precision,
        **tiling,
    )


@functools.lru_cache(maxsize=256)
def _table(chain: Chain, device: torch.device) -> Tensor:
    """Return the steps as the words that the fused kernel reads, ``(steps, ROW)``."""
    return torch.tensor([_words(step) for step in chain.steps], dtype=torch.int32, device=device)


def _words(step: Step) -> list[int]:
    row = [step.target, _bits(step.factor), len(step.products), len(step.terms), *([0] * (ROW.value - 4))]
    row[4 : 4 + 2 * len(step.products)] = [slot for pair in step.products for slot in pair]
    row[8 : 8 + 2 * len(step.terms)] = [word for slot, value in step.terms for word in (slot, _bits(value))]
    return row


def _bits(value: float) -> int:
    """Return the bit pattern of an fp32 number as an integer."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


def _run_steps(chain: Chain, first: Tensor, second: Tensor, out: Tensor, precision: str) -> None:
    blocks, size = out.shape[0], out.shape[-1]
    slots = chain.slots - chain.inputs
    group = min(blocks, max(1, SCRATCH_BYTES // (4 * size * size * slots)))
    scratch = torch.empty(slots, group, size, size, dtype=torch.float32, device=out.device)
    for start in range(0, blocks, group):
        part = slice(start, min(start + group, blocks))
        inputs = (first[part].mT, second[part]) if chain.inputs == 2 else (first[part],)
        matrices = [*(_prepared(x, chain.scale) for x in inputs), *scratch[:, : part.stop - start]]
        for step in chain.steps[:-1]:
            _run_step(step, matrices, matrices[step.target], precision)
        _run_step(chain.steps[-1], matrices, out[part], precision)


def _prepared(x: Tensor, scale: float) -> Tensor:
    x = x.to(torch.float32).contiguous()
    return x if scale == 1 else x * scale


def _run_step(step: Step, matrices: list[Tensor], out: Tensor, precision: str) -> None:
    blocks, size, _ = out.shape
    factors = [matrices[slot] for pair in step.products for slot in pair]
    terms = [matrices[slot] for slot, _ in step.terms]
    coefficients = [value for _, value in step.terms]
    tiling = step_tiling(size)
    chain_step_kernel[(blocks * triton.cdiv(size, tiling["TILE"]) ** 2,)](
        out,
        *(factors + [out] * (4 - len(factors))),
        *(terms + [out] * (3 - len(terms))),
        step.factor,
        *(coefficients + [0.0] * (3 - len(terms))),
        PRODUCTS=len(step.products),
        TERMS=len(terms),
        PRECISION=precision,
        **tiling,
    )


def step_tiling(size: int) -> dict[str, int]:
    """Return the constants of a launch of one step: tiles of 128 where they fit, as their masks spill registers."""
    tile = 64 if size % 128 else 128
    return {"size": size, "TILE": tile, **STEP_TILES[tile]}
