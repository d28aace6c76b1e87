"""Cayley-Neumann displacement by Triton kernels: the recurrence of README.md as chains of products.

One launch computes blocks of up to 64 rows from Q to D, and from Q and dL/dD to dL/dQ; larger blocks take a launch for
every step. Any block size is served, a power of two or not.
"""

import functools

import torch
from torch import Tensor

from orthotrain.kernels.chain.launch import precision_for, run_chain, run_chain_on_generators
from orthotrain.kernels.chain.program import FIRST, FUSED, SECOND, Chain, ChainBuilder
from orthotrain.kernels.skew import triton as skew


@functools.cache
def forward_chain(order: int) -> Chain:
    """Return D_k = 2(Q + Q^2) + Q^2 D_(k-2) from D_0 = Q or D_1 = 2Q + Q^2; ``1 + order // 2`` products."""
    chain, q = ChainBuilder(inputs=1), FIRST
    if order == 1:
        chain.step((q, q), terms=[(q, 2)])
        return chain.build()
    square = chain.step((q, q))
    value = chain.step(terms=[(q, 2), (square, 1)]) if order % 2 else q
    for _ in range(order // 2):
        value = chain.step((square, value), terms=[(q, 2), (square, 2)])
    return chain.build()


@functools.cache
def backward_chain(order: int) -> Chain:
    """Return the tangent of the recurrence, for Q^T and dL/dD as inputs; ``2 + 3 (order // 2)`` products."""
    chain, q, grad = ChainBuilder(inputs=2), FIRST, SECOND
    if order == 1:
        chain.step((q, grad), (grad, q), terms=[(grad, 2)])
        return chain.build()
    square = chain.step((q, q))
    square_tangent = chain.step((q, grad), (grad, q))
    value, tangent = q, grad
    if order % 2:
        value = chain.step(terms=[(q, 2), (square, 1)])
        tangent = chain.step(terms=[(grad, 2), (square_tangent, 1)])
    steps = order // 2
    for step in range(steps):
        products = (square, tangent), (square_tangent, value)
        tangent = chain.step(*products, terms=[(grad, 2), (square_tangent, 2)])
        if step < steps - 1:
            value = chain.step((square, value), terms=[(q, 2), (square, 2)])
    return chain.build()


def cayley_neumann_forward(generators: Tensor, block_size: int, order: int, dtype: torch.dtype) -> Tensor:
    """Return D, shape ``(n, b, b)`` in ``dtype``, from generators of shape ``(n, b(b-1)/2)``."""
    chain, precision = forward_chain(order), precision_for(generators.dtype, dtype)
    if block_size <= FUSED:
        return run_chain_on_generators(chain, generators, block_size, precision=precision).to(dtype)
    return run_chain(chain, skew.skew_forward(generators, block_size), precision=precision).to(dtype)


def cayley_neumann_backward(grad: Tensor, generators: Tensor, order: int) -> Tensor:
    """Return dL/dgenerators, shape ``(n, b(b-1)/2)``, from dL/dD, shape ``(n, b, b)``, and the generators."""
    block_size = grad.shape[-1]
    chain, precision = backward_chain(order), precision_for(generators.dtype, grad.dtype)
    grad = grad.to(generators.dtype)
    if block_size <= FUSED:
        return run_chain_on_generators(chain, generators, block_size, grad, precision=precision)
    q = skew.skew_forward(generators, block_size)
    return skew.skew_backward(run_chain(chain, q, grad, precision=precision))
