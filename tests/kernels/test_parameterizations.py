"""The operators behind the parameterizations: their contracts with torch, what they save, and empty batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.library import opcheck

from orthotrain.kernels.block_batches import solve_blocks
from orthotrain.kernels.cayley import cayley
from orthotrain.kernels.cayley_neumann import cayley_neumann, naive
from orthotrain.kernels.exponential import exponential
from orthotrain.kernels.exponential.cpu import squarings
from orthotrain.kernels.skew import skew


def neumann(order):
    """Cayley-Neumann of a skew matrix: of the generators above its diagonal."""

    def op(q):
        rows, columns = torch.triu_indices(q.shape[-1], q.shape[-1], 1, device=q.device)
        return cayley_neumann(q[:, rows, columns], q.shape[-1], order)

    return op


OPS = {
    "cayley": cayley,
    "exponential": exponential,
    **{f"cayley_neumann_{order}": neumann(order) for order in (1, 2, 3, 4, 7)},
}
every = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def random_skew(blocks, block_size, dtype=torch.float32, scale=0.1):
    width = block_size * (block_size - 1) // 2
    return skew(torch.randn(blocks, width, dtype=dtype) * scale, block_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", [0, 3])
def test_opcheck(dtype, blocks):
    ops = torch.ops.orthotrain_v2
    q = random_skew(blocks, 4, dtype).requires_grad_()
    grad = torch.randn(blocks, 4, 4, dtype=dtype)
    opcheck(ops.skew, (torch.randn(blocks, 6, dtype=dtype, requires_grad=True), 4))
    opcheck(ops.skew_backward, (grad,))
    for order in (1, 4):
        generators = torch.randn(blocks, 6, dtype=dtype, requires_grad=True)
        opcheck(ops.cayley_neumann, (generators, 4, order, dtype))
        opcheck(ops.cayley_neumann_backward, (grad, generators.detach(), order))
    for name in ("cayley", "exponential"):
        opcheck(getattr(ops, name), (q,))
        opcheck(getattr(ops, f"{name}_backward"), (grad, q.detach()))


@given(blocks=st.integers(0, 4), block_size=st.integers(1, 20), dtype=st.sampled_from([torch.float64, torch.bfloat16]))
@settings(max_examples=50, deadline=None)
def test_skew_is_antisymmetric_and_row_major(blocks, block_size, dtype):
    width = block_size * (block_size - 1) // 2
    generators = torch.randn(blocks, width, dtype=dtype)
    q = skew(generators, block_size)
    assert torch.equal(q.mT, -q)
    for block, row in zip(q, generators, strict=True):
        above = [block[i, j] for i in range(block_size) for j in range(i + 1, block_size)]
        assert above == list(row)


@pytest.mark.parametrize("shape", [(10,), (2, 9), (2, 3, 10), (2, 11)])
def test_skew_refuses_generators_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"do not fit block_size=5: .* 10 generators"):
        skew(torch.zeros(shape), 5)


def test_cayley_neumann_refuses_order_zero():
    with pytest.raises(ValueError, match="order must be at least 1, got 0"):
        cayley_neumann(torch.zeros(1, 1), 2, 0)


@pytest.mark.parametrize("order", [1, 4])
def test_cayley_neumann_equals_its_definition_and_saves_only_generators(order):
    generators = (0.1 * torch.randn(2, 10, dtype=torch.float64)).requires_grad_()
    d = cayley_neumann(generators, 5, order)
    torch.testing.assert_close(d, naive.cayley_neumann(generators, 5, order), rtol=1e-13, atol=1e-15)
    assert gradcheck(lambda g: cayley_neumann(g, 5, order), (generators,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        cayley_neumann(generators, 5, order)
    assert [x.shape for x in saved] == [generators.shape]
    with pytest.raises(ValueError, match="do not fit block_size=4"):
        cayley_neumann(generators, 4, order)


@pytest.mark.parametrize("norm", [1e-3, 0.1, 0.4])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("block_size", [16, 128, 150])
def test_a_rounded_result_is_off_by_little_more_than_its_rounding(block_size, order, norm):
    generators = torch.randn(3, block_size * (block_size - 1) // 2)
    generators *= norm / float(torch.linalg.matrix_norm(skew(generators, block_size), 2).max())
    generators.requires_grad_()
    exact = generators.detach().double().requires_grad_()
    grad = torch.randn(3, block_size, block_size).bfloat16()
    found = cayley_neumann(generators, block_size, order, torch.bfloat16)
    expected = cayley_neumann(exact, block_size, order)
    assert found.dtype == torch.bfloat16
    rounding = (expected.bfloat16() - expected).norm()
    assert (found - expected).norm() <= 1.5 * rounding
    (found_grad,) = torch.autograd.grad(found, generators, grad)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    assert found_grad.dtype == torch.float32
    # a few roundings to bf16 of what the powers beyond the first add
    assert (found_grad - expected_grad).norm() <= (1e-6 + 2**-7 * norm) * expected_grad.norm()
    assert not cayley_neumann(0 * generators, block_size, order, torch.bfloat16).any()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_only_results_in_bf16_are_made_of_rounded_products(dtype, limit):
    """Blocks of 128 are the smallest that use them."""
    generators = (0.01 * torch.randn(1, 128 * 127 // 2, dtype=torch.float64)).to(dtype).requires_grad_()
    exact = generators.detach().double().requires_grad_()
    results = []
    for d, leaf in ((cayley_neumann(generators, 128, 2), generators), (naive.cayley_neumann(exact, 128, 2), exact)):
        results.append((d.detach(), *torch.autograd.grad(d.square().sum(), leaf)))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype and (found - expected).norm() <= limit * expected.norm()


@every
def test_gradient_holds_for_any_matrix(op):
    # The gradient with respect to Q as a free matrix, not only along skew directions.
    assert gradcheck(op, ((torch.randn(2, 4, 4, dtype=torch.float64) * 0.2).requires_grad_(),))


@every
def test_strided_operands(op):
    # Autograd passes broadcast gradients of stride 0, and a caller may pass a transposed Q.
    q = random_skew(2, 6, torch.float64)
    strided, dense = q.mT.requires_grad_(), q.mT.contiguous().requires_grad_()
    op(strided).sum().backward()
    grad = torch.ones(2, 6, 6, dtype=torch.float64)
    op(dense).backward(grad)
    torch.testing.assert_close(strided.grad, dense.grad, rtol=0, atol=1e-15 * 36)


@pytest.mark.parametrize("op", [cayley, exponential])
def test_one_tensor_is_saved_for_backward(op):
    saved = []
    q = random_skew(2, 6).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        displacement = op(q)
    assert [tensor.data_ptr() for tensor in saved] == [(displacement if op is cayley else q).data_ptr()]


def test_skew_saves_nothing():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        skew(torch.randn(2, 6, requires_grad=True), 4)
    assert saved == []


@every
def test_no_blocks(op):
    generators = torch.zeros(0, 6, requires_grad=True)
    displacement = op(skew(generators, 4))
    displacement.sum().backward()
    assert displacement.shape == (0, 4, 4)
    assert generators.grad.shape == (0, 6)


@every
def test_a_meta_tensor_gives_a_meta_displacement(op):
    displacement = op(skew(torch.empty(3, 6, device="meta"), 4))
    assert displacement.device.type == "meta"
    assert displacement.shape == (3, 4, 4)


@every
def test_small_rotations_keep_their_digits(op):
    q = random_skew(2, 8, scale=1e-6)
    # To first order D = 2Q: forming R in fp32 first would leave D an absolute error of 6e-8, a tenth of its size.
    torch.testing.assert_close(op(q), 2 * q, rtol=0, atol=1e-4 * q.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm", [0.5, 1.5708, 3.0])
def test_exponential_is_exact_up_to_norm_three(dtype, norm):
    q = random_skew(2, 16, torch.float64)
    q = (q * (norm / torch.linalg.matrix_norm(q, ord=2).view(-1, 1, 1))).to(dtype)
    # iQ is Hermitian: its eigenvalues w turn into those of D without any series.
    angles, vectors = torch.linalg.eigh(1j * q.double())
    expected = (vectors @ torch.diag_embed(torch.expm1(-2j * angles)) @ vectors.mH).real
    error = torch.linalg.matrix_norm(exponential(q).double() - expected, ord=2).max().item()
    eps = torch.finfo(dtype).eps
    # Truncation, below eps relative to ||2Q||, and one rounding for each squaring, doubled by those that follow.
    assert error < (2 * norm + 2 ** squarings(dtype)) * eps
    assert error < 40 * eps


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("blocks", "block_size"), [(3, 128), (3, 160), (2, 256)])
def test_cayley_solves_wide_blocks_with_any_number_of_threads(threads, blocks, block_size):
    """A batch of wide systems fails, or is wrong by 1%, in torch 2.13 on a CPU with two threads."""
    torch.set_num_threads(threads)
    q = random_skew(blocks, block_size, scale=0.01)
    for _ in range(3):
        d = cayley(q)
        assert (d - torch.bmm(d, q) - 2 * q).abs().max() < 1e-5
        system, right = torch.eye(block_size) + q, torch.randn_like(q)
        assert (torch.bmm(system, solve_blocks(system, right)) - right).abs().max() < 1e-4
