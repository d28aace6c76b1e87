"""One grid of properties over every registered parameterization."""

import math
from inspect import isabstract

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import orthotrain.plugins
from orthotrain.kernels.skew import skew
from orthotrain.plugins import Cayley, CayleyNeumann, Exponential, create

# not known(): that would take in, and require a definition of, whatever package is installed beside this one
EVERY = [Cayley(), CayleyNeumann(), Exponential()] + [CayleyNeumann(order) for order in (1, 2, 3, 5, 6)]
BLOCK_SIZES = [2, 3, 5, 8, 16, 31, 64, 128, 256]
NORMS = [0.01, 0.1, 0.3]
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}

every = pytest.mark.parametrize("parameterization", EVERY, ids=repr)
every_size = pytest.mark.parametrize("block_size", BLOCK_SIZES)
every_norm = pytest.mark.parametrize("norm", NORMS)


def textbook(parameterization, q):
    """D straight from the definition. A new parameterization states its own here: KeyError until it does."""
    identity = torch.eye(q.shape[-1], dtype=q.dtype)

    def neumann(q):
        powers = [torch.linalg.matrix_power(q, i) for i in range(parameterization.order + 1)]
        return (identity + q) @ sum(powers) - identity

    def series(q):
        # torch.linalg.matrix_exp is no reference: at small norms it is off by up to a few thousand fp64 eps.
        terms = [2 * q]
        while len(terms) < 20:  # 0.8^21 / 21! < 1e-21
            terms.append(terms[-1] @ (2 * q) / (len(terms) + 1))
        return sum(reversed(terms))

    definitions = {
        Cayley: lambda q: (identity + q) @ torch.linalg.inv(identity - q) - identity,
        CayleyNeumann: neumann,
        Exponential: series,
    }
    return definitions[type(parameterization)](q)


def defect(parameterization, norm):
    """Bound of the entries of R^T R - I in exact arithmetic, as the docstring of the class states it."""
    if not isinstance(parameterization, CayleyNeumann):
        return 0.0
    power = norm ** (parameterization.order + 1)
    return power**2 if parameterization.order % 2 == 0 else power * (2 + power)


def relative(actual, expected):
    return (torch.linalg.norm(actual.double() - expected) / torch.linalg.norm(expected)).item()


def test_the_grid_holds_every_parameterization_of_the_package():
    built_in = {cls for cls in vars(orthotrain.plugins).values() if isinstance(cls, type) and not isabstract(cls)}
    assert {type(parameterization) for parameterization in EVERY} == built_in


@every
@every_size
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_zero_generators_give_exactly_zero(parameterization, block_size, dtype):
    generators = torch.zeros(2, block_size * (block_size - 1) // 2, dtype=dtype)
    displacement = parameterization.displacement(generators, block_size)
    assert displacement.shape == (2, block_size, block_size)
    assert displacement.dtype == dtype
    assert torch.equal(displacement, torch.zeros_like(displacement))


@every
@every_size
@every_norm
def test_orthogonality_within_the_bound(parameterization, block_size, norm, generators_of_norm, orthogonality_defect):
    displacement = parameterization.displacement(generators_of_norm(2, block_size, norm), block_size)
    # D carries a few roundings relative to its size 2||Q||; a row of D^T D sums b products of them.
    rounding = 8 * math.sqrt(block_size) * EPS[torch.float64] * norm
    assert orthogonality_defect(displacement) <= defect(parameterization, norm) * (1 + 1e-12) + rounding


@every
@every_size
@every_norm
def test_matches_the_definition(parameterization, block_size, norm, generators_of_norm):
    generators = generators_of_norm(2, block_size, norm)
    displacement = parameterization.displacement(generators, block_size)
    # Forming R and subtracting the identity costs the definition an absolute eps in each of b diagonal entries.
    rounding = 8 * math.sqrt(block_size) * EPS[torch.float64]
    assert (
        torch.linalg.matrix_norm(displacement - textbook(parameterization, skew(generators, block_size))).max()
        < rounding
    )


@every
@every_size
def test_first_order_term_is_twice_q(parameterization, block_size, generators_of_norm):
    for norm in (1e-3, 1e-6, 1e-9):
        generators = generators_of_norm(2, block_size, norm)
        q = skew(generators, block_size)
        rest = parameterization.displacement(generators, block_size) - 2 * q
        # The second-order term is between Q^2 (order 1) and 2Q^2; the higher ones are below a thousandth of it.
        assert torch.linalg.matrix_norm(rest, ord=2).max() <= 2.01 * norm**2 + 4 * EPS[torch.float64] * norm


@every
@given(seed=st.integers(0, 2**31), blocks=st.integers(0, 3), block_size=st.integers(1, 12), norm=st.floats(1e-6, 0.5))
@settings(max_examples=25, deadline=None)
def test_opposite_generators_give_the_transpose(parameterization, seed, blocks, block_size, norm):
    shape = (blocks, block_size * (block_size - 1) // 2)
    generators = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    generators = generators * (norm / max(1, block_size))
    forward, backward = (parameterization.displacement(g, block_size) for g in (generators, -generators))
    size = torch.linalg.matrix_norm(forward)
    assert torch.all(torch.linalg.matrix_norm(forward - backward.mT) <= 16 * EPS[torch.float64] * size)


@every
@pytest.mark.parametrize("block_size", [2, 3, 5])
def test_gradcheck(parameterization, block_size, generators_of_norm):
    generators = generators_of_norm(2, block_size, 0.4).requires_grad_()
    assert gradcheck(lambda g: parameterization.displacement(g, block_size), (generators,))


@every
@pytest.mark.parametrize("block_size", [8, 31, 64, 128])
@every_norm
def test_fp32_value_and_gradient_against_fp64_autograd(parameterization, block_size, norm, generators_of_norm):
    generators = generators_of_norm(2, block_size, norm).float().requires_grad_()
    weight = torch.randn(2, block_size, block_size, generator=torch.Generator().manual_seed(1))
    displacement = parameterization.displacement(generators, block_size)
    (displacement * weight).sum().backward()

    exact = generators.detach().double().requires_grad_()
    expected = textbook(parameterization, skew(exact, block_size))
    (expected * weight).sum().backward()
    # A chain of at most ten products and a handful of sums, each worth one rounding of its result in norm.
    assert relative(displacement, expected) < 4 * EPS[torch.float32]
    assert relative(generators.grad, exact.grad) < 4 * EPS[torch.float32]


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block_size", [3, 16, 64])
def test_half_precision_is_rounded_once(parameterization, dtype, block_size, generators_of_norm):
    generators = generators_of_norm(2, block_size, 0.3).to(dtype).requires_grad_()
    displacement = parameterization.displacement(generators, block_size)
    exact = textbook(parameterization, skew(generators.double(), block_size))
    # Half a unit in the last place of each entry, and the fp32 arithmetic before it.
    allowed = (
        EPS[dtype] / 2 * exact.abs() + 8 * EPS[torch.float32] * 0.6 + torch.finfo(dtype).smallest_normal * EPS[dtype]
    )
    assert displacement.dtype == dtype
    assert torch.all((displacement.double() - exact).abs() <= allowed)
    displacement.sum().backward()
    assert generators.grad.dtype == dtype
    assert generators.grad.isfinite().all()


@every
def test_autocast_changes_nothing(parameterization, generators_of_norm):
    plain, ambient = (generators_of_norm(2, 16, 0.3).float().requires_grad_() for _ in range(2))
    displacement = parameterization.displacement(plain, 16)
    displacement.square().sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = parameterization.displacement(ambient, 16)
        under_autocast.square().sum().backward()
    assert under_autocast.dtype == torch.float32
    assert torch.equal(displacement, under_autocast)
    assert torch.equal(plain.grad, ambient.grad)


@every
def test_compiled_without_a_graph_break_equals_eager(parameterization, generators_of_norm):
    eager, compiled = (generators_of_norm(3, 8, 0.2).float().requires_grad_() for _ in range(2))
    torch._dynamo.reset()
    expected = parameterization.displacement(eager, 8)
    actual = torch.compile(parameterization.displacement, fullgraph=True)(compiled, 8)
    assert torch.equal(actual, expected)
    for displacement in (actual, expected):
        displacement.square().sum().backward()
    assert torch.equal(compiled.grad, eager.grad)


@every
def test_misfit_generators_are_refused(parameterization):
    with pytest.raises(ValueError, match=r"\(2, 11\).*block_size=5.*10 generators"):
        parameterization.displacement(torch.zeros(2, 11), 5)


@every
def test_config_rebuilds_an_equal_object_and_the_docstring_introduces_it(parameterization):
    rebuilt = create(parameterization.config())
    assert rebuilt == parameterization
    assert hash(rebuilt) == hash(parameterization)
    assert repr(rebuilt) == repr(parameterization)
    assert sum(other == parameterization for other in EVERY) == 1
    first_line = type(parameterization).__doc__.splitlines()[0]
    assert 20 < len(first_line) < 110


@every
@pytest.mark.parametrize("block_size", [8, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_norm
def test_a_rounded_displacement_is_off_by_little_more_than_its_rounding(
    parameterization, block_size, dtype, norm, generators_of_norm
):
    generators = generators_of_norm(2, block_size, norm).float()
    displacement = parameterization.rounded_displacement(generators, block_size, dtype)
    expected = textbook(parameterization, skew(generators.double(), block_size))
    assert displacement.dtype == dtype
    assert relative(displacement, expected) <= 1.5 * relative(expected.to(dtype), expected)


def test_a_subclass_with_another_map_rounds_its_own():
    class Opposite(CayleyNeumann):
        """The rotation the other way round."""

        def displacement(self, generators, block_size):
            return super().displacement(-generators, block_size)

    generators = torch.randn(2, 28) / 20
    found = Opposite().rounded_displacement(generators, 8, torch.bfloat16)
    assert torch.equal(found, Opposite().displacement(generators, 8).bfloat16())


@pytest.mark.parametrize("error", [1e-3, 1e-5])
@pytest.mark.parametrize("parameterization", EVERY, ids=repr)
def test_singular_values_are_within_the_error_up_to_the_largest_norm(parameterization, error, generators_of_norm):
    limit = parameterization.largest_norm(error)
    norm = min(limit, 50.0)
    displacement = parameterization.displacement(generators_of_norm(3, 8, norm), 8)
    off = (torch.linalg.svdvals(torch.eye(8, dtype=torch.float64) + displacement) - 1).abs().max().item()
    assert off <= error * (1 + 1e-6)
    if isinstance(parameterization, CayleyNeumann):  # and the limit is not smaller than it must be
        assert off >= 0.99 * error
