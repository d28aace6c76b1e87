"""Exact Cayley displacement by products only: a Newton iteration that stops on its own residual; see README.md.

The forward serves blocks of up to 64 rows, which one program computes as a whole; the backward serves every size.
"""

import functools

import torch
import triton
from torch import Tensor
from triton import language as tl

from orthotrain.kernels.chain.kernels import add_product, copy_input, input_tile, square_tile
from orthotrain.kernels.chain.launch import fused_programs, fused_tiling, run_chain
from orthotrain.kernels.chain.program import FIRST, SECOND, Chain, ChainBuilder

SLOTS = tl.constexpr(4)
"""Matrices that a program keeps: Q, Q^2, the inverse Y of I - Q^2, and its residual."""

PRECISION = "tf32x3"
"""Used at every matmul setting: in TF32 the residual would not fall to the bound at which the iteration stops."""


@triton.jit
def _cayley_forward_kernel(
    skew,
    out,
    scratch,
    blocks,
    size: tl.constexpr,
    TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PACK: tl.constexpr = TILE // size
    q = scratch + tl.program_id(0).to(tl.int64) * (SLOTS * TILE * TILE)
    square, y, residual = q + TILE * TILE, q + 2 * TILE * TILE, q + 3 * TILE * TILE
    identity = tl.where(tl.arange(0, TILE)[:, None] == tl.arange(0, TILE)[None, :], 1.0, 0.0)
    zero = tl.zeros((TILE, TILE), tl.float32)
    for group in range(tl.program_id(0), tl.cdiv(blocks, PACK), tl.num_programs(0)):
        copy_input(skew, q, group * PACK, blocks, 1.0, size, TILE, False, False)
        tl.debug_barrier()
        s = add_product(zero, q, q, TILE, K_TILE, PRECISION)
        tl.store(square_tile(square, TILE), s)
        # Y_0 = c I leaves I - N Y_0 a norm of at most bound / (2 + bound); Y_1 needs no product
        bound = tl.max(tl.sum(tl.abs(s), axis=1))
        c = 2 / (2 + bound)
        tl.store(square_tile(y, TILE), (2 * c - c * c) * identity + c * c * s)
        error, iteration = bound, 0
        while (error > 2.0**-12) & (iteration < 40):
            tl.debug_barrier()
            current = tl.load(square_tile(y, TILE))
            e = add_product(identity - current, square, y, TILE, K_TILE, PRECISION)
            error = tl.sqrt(tl.sum(e * e))
            tl.store(square_tile(residual, TILE), e)
            tl.debug_barrier()
            current = add_product(current, y, residual, TILE, K_TILE, PRECISION)
            tl.debug_barrier()
            tl.store(square_tile(y, TILE), current)
            iteration += 1
        tl.store(square_tile(residual, TILE), 2 * (tl.load(square_tile(q, TILE)) + s))
        tl.debug_barrier()
        target, inside = input_tile(out, group * PACK, blocks, size, TILE)
        d = add_product(zero, residual, y, TILE, K_TILE, PRECISION)
        tl.store(target, d.to(out.dtype.element_ty), mask=inside)
        tl.debug_barrier()


@functools.cache
def backward_chain() -> Chain:
    """Return 2H + H D^T with H = G + D^T G / 2, for D^T and G = dL/dD as inputs."""
    chain, d, grad = ChainBuilder(inputs=2), FIRST, SECOND
    half = chain.step((d, grad), terms=[(grad, 1)], factor=0.5)
    chain.step((half, d), terms=[(half, 2)])
    return chain.build()


def cayley_forward(skew: Tensor) -> Tensor:
    """Return D = 2Q (I - Q)^-1, shape ``(n, b, b)``, b up to 64, from skew-symmetric Q of the same shape and dtype."""
    out = torch.empty_like(skew, memory_format=torch.contiguous_format)
    if out.numel():
        blocks, size, _ = skew.shape
        tiling = fused_tiling(size)
        programs = fused_programs(blocks, tiling, skew.device)
        scratch = torch.empty(programs * SLOTS.value * tiling["TILE"] ** 2, dtype=torch.float32, device=skew.device)
        _cayley_forward_kernel[(programs,)](skew.contiguous(), out, scratch, blocks, PRECISION=PRECISION, **tiling)
    return out


def cayley_backward(grad: Tensor, displacement: Tensor) -> Tensor:
    """Return dL/dQ = 2 S^T (dL/dD) S^T with S = (I - Q)^-1 = I + D/2, from D and dL/dD of shape ``(n, b, b)``."""
    return run_chain(backward_chain(), displacement, grad)
