"""Chains of products: their slots are never overwritten while needed, and they have the products that they claim."""

import pytest
import torch

pytest.importorskip("triton")

from orthotrain.kernels.cayley import cpu as cayley_cpu
from orthotrain.kernels.cayley import triton as cayley
from orthotrain.kernels.cayley_neumann import triton as neumann
from orthotrain.kernels.chain.launch import wide_precision
from orthotrain.kernels.exponential import triton as exponential


def evaluate(chain, *inputs):
    """Run a chain in plain PyTorch, slot by slot."""
    slots = [x * chain.scale for x in inputs] + [None] * (chain.slots - chain.inputs)
    for step in chain.steps:
        terms = [coefficient * slots[slot] for slot, coefficient in step.terms]
        products = [step.factor * slots[left] @ slots[right] for left, right in step.products]
        slots[step.target] = torch.stack(terms + products).sum(0)
    return slots[chain.steps[-1].target]


@pytest.mark.parametrize("order", range(1, 9))
def test_cayley_neumann(order):
    q, grad = 0.2 * torch.randn(2, 2, 5, 5, dtype=torch.float64)
    forward, backward = neumann.forward_chain(order), neumann.backward_chain(order)
    q = q.requires_grad_()
    expected = 2 * sum(torch.linalg.matrix_power(q, i) for i in range(1, order + 1))
    expected = expected + torch.linalg.matrix_power(q, order + 1)
    torch.testing.assert_close(evaluate(forward, q), expected)
    (expected_grad,) = torch.autograd.grad(expected, q, grad)
    torch.testing.assert_close(evaluate(backward, q.detach().mT, grad), expected_grad)
    assert forward.products() == 1 + order // 2
    assert backward.products() == (2 if order == 1 else 2 + 3 * (order // 2))
    assert backward.slots <= 7


def test_exponential():
    # the chains are those of fp32, three squarings: exact to 1e-8 for ||Q|| up to 3
    q = 0.3 * torch.randn(2, 5, 5, dtype=torch.float64)
    q, grad = (q - q.mT).requires_grad_(), torch.randn(2, 5, 5, dtype=torch.float64)
    exact = torch.linalg.matrix_exp(2 * q) - torch.eye(5, dtype=torch.float64)
    (exact_grad,) = torch.autograd.grad(exact, q, grad)
    forward, backward = exponential.forward_chain(), exponential.backward_chain()
    torch.testing.assert_close(evaluate(forward, q), exact, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(evaluate(backward, q.mT, grad), exact_grad, rtol=1e-7, atol=1e-7)
    assert (forward.products(), backward.products()) == (7, 20)


def test_cayley_gradient():
    displacement, grad = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    chain = cayley.backward_chain()
    expected = cayley_cpu.cayley_backward(grad, displacement)
    torch.testing.assert_close(evaluate(chain, displacement.mT, grad), expected)
    assert chain.products() == 2


@pytest.fixture
def settings():
    """Both ways of torch to set the precision of products, as they were afterwards."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = before


def test_products_have_the_precision_that_torch_was_set_to(settings):
    for word, expected in (("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32"), ("highest", "tf32x3")):
        torch.set_float32_matmul_precision(word)
        assert wide_precision() == expected
    for word, expected in (("tf32", "tf32"), ("ieee", "tf32x3")):
        settings.fp32_precision = word
        assert wide_precision() == expected
