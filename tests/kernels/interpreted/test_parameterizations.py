"""cayley_neumann, exponential and cayley by the Triton kernels, against their definitions in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthotrain.kernels.cayley import cayley
from orthotrain.kernels.cayley import naive as cayley_naive
from orthotrain.kernels.cayley_neumann import cayley_neumann, naive
from orthotrain.kernels.chain import launch as chain_launch
from orthotrain.kernels.exponential import exponential
from orthotrain.kernels.exponential import naive as exponential_naive
from orthotrain.kernels.skew.cpu import skew_forward


def upper(q):
    """The generators of skew matrices: what is above their diagonals."""
    rows, columns = torch.triu_indices(q.shape[-1], q.shape[-1], 1)
    return q[:, rows, columns]


OPS = {
    "cayley": (cayley, cayley_naive.cayley),
    "exponential": (exponential, exponential_naive.exponential),
    **{
        f"cayley_neumann_{order}": (
            lambda q, order=order: cayley_neumann(upper(q), q.shape[-1], order),
            lambda q, order=order: naive.cayley_neumann(upper(q), q.shape[-1], order),
        )
        for order in (1, 2, 3, 4, 5)
    },
}
every = pytest.mark.parametrize("name", OPS)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}
"""Relative error in the Frobenius norm: a few roundings of fp32, one or two of fp16."""


def random_skew(blocks, block_size, norm=0.5):
    """Skew blocks in fp64, each of the given spectral norm."""
    q = skew_forward(torch.randn(blocks, block_size * (block_size - 1) // 2, dtype=torch.float64), block_size)
    return q * (norm / torch.linalg.matrix_norm(q, ord=2).clamp_min(1e-9))[:, None, None]


def check(name, q, grad, tolerance):
    """Value and gradient within a relative error of the definition in fp64, whose gradient autograd derives."""
    op, reference = OPS[name]
    q = q.detach().requires_grad_()
    exact = q.detach().double().requires_grad_()
    found, expected = op(q), reference(exact)
    (found_grad,) = torch.autograd.grad(found, q, grad)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    assert found.dtype == found_grad.dtype == q.dtype
    for got, want in ((found, expected), (found_grad, expected_grad)):
        assert (got.double() - want).norm() <= tolerance * want.norm(), name


@given(
    name=st.sampled_from(list(OPS)),
    blocks=st.integers(0, 5),
    block_size=st.integers(1, 20),
    norm=st.sampled_from([0.01, 0.3, 1.0]),
    dtype=st.sampled_from(list(TOLERANCE)),
    layout=st.sampled_from(["contiguous", "expanded", "transposed"]),
)
@settings(max_examples=20, deadline=None)
def test_values_and_gradients(name, blocks, block_size, norm, dtype, layout):
    q = random_skew(blocks, block_size, norm).to(dtype)
    grad = torch.randn(blocks, block_size, block_size).to(dtype)
    if layout == "expanded":
        # constant along rows; were all entries equal, the skew part would cancel to nothing but rounding
        grad = torch.randn(block_size, 1).to(dtype).expand(q.shape)
    elif layout == "transposed":
        q, grad = q.mT, grad.mT
    check(name, q, grad, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("name", "block_size"), [("cayley", 64), ("exponential", 64), ("cayley_neumann_4", 64), ("cayley_neumann_4", 50)]
)
def test_larger_tiles(name, block_size):
    check(name, random_skew(3, block_size).float(), torch.randn(3, block_size, block_size), 1e-6)


@pytest.mark.parametrize("name", ["exponential", "cayley_neumann_1", "cayley_neumann_3"])
def test_a_launch_for_every_step(name, monkeypatch):
    # memory for one block only, so that several blocks are several groups
    monkeypatch.setattr(chain_launch, "SCRATCH_BYTES", 1)
    check(name, random_skew(2, 65).float(), torch.randn(2, 65, 65), 1e-6)


@pytest.mark.parametrize("block_size", [150, 256], ids=["tiles of 64, cut off", "tiles of 128"])
def test_several_tiles(block_size):
    check("cayley_neumann_2", random_skew(1, block_size).float(), torch.randn(1, block_size, block_size), 1e-6)


def test_exponential_gradient_is_that_of_any_matrix():
    # the derivative with respect to Q as a free matrix, not only along skew directions
    check("exponential", torch.randn(2, 12, 12) * 0.1, torch.randn(2, 12, 12), 1e-6)


@given(blocks=st.integers(0, 9), block_size=st.integers(2, 20), order=st.integers(1, 4), expanded=st.booleans())
@settings(max_examples=10, deadline=None)
def test_from_generators(blocks, block_size, order, expanded):
    check_generators(blocks, block_size, order, expanded)


@pytest.mark.parametrize("block_size", [64, 65])
def test_from_generators_of_larger_blocks(block_size):
    check_generators(2, block_size, 2, expanded=False)


@pytest.mark.parametrize("block_size", [24, 72])
def test_from_generators_to_another_dtype(block_size):
    generators = (torch.randn(3, block_size * (block_size - 1) // 2) / (2 * block_size)).requires_grad_()
    exact = generators.detach().double().requires_grad_()
    grad = torch.randn(3, block_size, block_size).bfloat16()
    found = cayley_neumann(generators, block_size, 4, torch.bfloat16)
    expected = naive.cayley_neumann(exact, block_size, 4)
    (found_grad,) = torch.autograd.grad(found, generators, grad)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    assert found.dtype == torch.bfloat16 and (found - expected).norm() <= 2**-8 * expected.norm()
    assert found_grad.dtype == torch.float32
    assert (found_grad - expected_grad).norm() <= 1e-4 * expected_grad.norm()


def check_generators(blocks, block_size, order, expanded):
    generators = (torch.randn(blocks, block_size * (block_size - 1) // 2) / (2 * block_size)).requires_grad_()
    exact = generators.detach().double().requires_grad_()
    grad = torch.randn(block_size, block_size).expand(blocks, -1, -1)
    grad = grad if expanded else grad.contiguous()
    found = cayley_neumann(generators, block_size, order)
    expected = naive.cayley_neumann(exact, block_size, order)
    (found_grad,) = torch.autograd.grad(found, generators, grad)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert (found_grad - expected_grad).norm() <= 1e-6 * expected_grad.norm()


@every
def test_zero_is_exactly_zero(name):
    assert torch.equal(OPS[name][0](torch.zeros(3, 6, 6)), torch.zeros(3, 6, 6))


@pytest.mark.parametrize("norm", [2.0, 5.0, 10.0])
def test_cayley_holds_at_large_norms(norm):
    """The iteration starts from a bound of every block, so it converges at every norm; 1e-7 ||Q||^2 is lost."""
    q = random_skew(2, 24, norm)
    found, exact = cayley(q.float()).double(), cayley_naive.cayley(q)
    assert (found - exact).norm() <= 5e-7 * norm * exact.norm()


def test_cayley_refuses_blocks_that_its_kernel_does_not_take():
    with pytest.raises(
        ValueError, match="cayley: kernels=triton, but its kernel takes blocks of up to 64 rows, not 65"
    ):
        cayley(torch.zeros(1, 65, 65))


@pytest.mark.parametrize("name", ["cayley", "exponential", "cayley_neumann_4"])
def test_compiles_as_one_graph_and_passes_opcheck(name):
    op = OPS[name][0]
    q = random_skew(2, 4).float().requires_grad_()
    if name.startswith("cayley_neumann"):
        arguments = (upper(q).detach().requires_grad_(), 4, 4, torch.float32)
    else:
        arguments = (q,)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(q).square().sum(), q)
    (expected,) = torch.autograd.grad(op(q).square().sum(), q)
    assert torch.equal(found, expected)
    torch.library.opcheck(getattr(torch.ops.orthotrain_v2, name.rstrip("_12345")), arguments)
