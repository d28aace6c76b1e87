import math

import pytest
import torch

from orthotrain.kernels.skew import skew
from orthotrain.plugins import Cayley, CayleyNeumann

# Norms at which the defect of each order is far above fp64 rounding and its leading term dominates.
EVEN_NORMS = {2: (0.02, 0.05), 4: (0.08, 0.15), 6: (0.15, 0.25)}
ODD_NORMS = {1: (0.001, 0.002), 3: (0.02, 0.04), 5: (0.05, 0.1), 7: (0.1, 0.2)}


def slope(order, norms, generators_of_norm, orthogonality_defect):
    low, high = (
        orthogonality_defect(CayleyNeumann(order).displacement(generators_of_norm(1, 16, norm), 16)) for norm in norms
    )
    return math.log(high / low) / math.log(norms[1] / norms[0])


@pytest.mark.parametrize("order", EVEN_NORMS)
def test_even_orders_err_by_the_power_2k_plus_2(order, generators_of_norm, orthogonality_defect):
    measured = slope(order, EVEN_NORMS[order], generators_of_norm, orthogonality_defect)
    assert measured == pytest.approx(2 * order + 2, abs=0.02)


@pytest.mark.parametrize("order", ODD_NORMS)
def test_odd_orders_err_by_the_power_k_plus_1(order, generators_of_norm, orthogonality_defect):
    measured = slope(order, ODD_NORMS[order], generators_of_norm, orthogonality_defect)
    assert measured == pytest.approx(order + 1, abs=0.02)


@pytest.mark.parametrize("order", range(1, 10))
@pytest.mark.parametrize("norm", [0.2, 0.5, 0.9, 1.0])
def test_the_eigenvalues_of_the_defect_are_those_of_the_docstring(order, norm, orthogonality_defect):
    # A block of size 2 has one angle, and R^T R is a multiple of the identity.
    displacement = CayleyNeumann(order).displacement(torch.tensor([[norm]], dtype=torch.float64), 2)
    power = norm ** (order + 1)
    eigenvalue = 1 + power**2 if order % 2 == 0 else (1 - (-1) ** ((order + 1) // 2) * power) ** 2
    assert orthogonality_defect(displacement) == pytest.approx(abs(eigenvalue - 1), rel=1e-9, abs=1e-14)


def test_higher_even_orders_approach_the_exact_transform(generators_of_norm):
    generators = generators_of_norm(2, 16, 0.3)
    exact = Cayley().displacement(generators, 16)
    for order in (2, 4, 8, 16):
        gap = torch.linalg.matrix_norm(CayleyNeumann(order).displacement(generators, 16) - exact, ord=2).max().item()
        # D_k - D = -(I + Q)(I - Q)^-1 Q^(k+1), whose first factor is orthogonal.
        assert gap == pytest.approx(0.3 ** (order + 1), rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("order", [0, -1, 2.0, "4", True, None])
def test_an_order_that_is_no_positive_integer_is_refused(order):
    with pytest.raises(ValueError, match="CayleyNeumann: order must be an integer of at least 1"):
        CayleyNeumann(order)


def test_a_positive_generator_turns_the_first_axis_towards_the_second():
    # Row vectors: e_1 R = e_1 + D[0], and D[0, 1] = +2 Q[0, 1] to first order.
    displacement = CayleyNeumann().displacement(torch.tensor([[1e-3]]), 2)[0]
    assert displacement[0, 1].item() == pytest.approx(2e-3, rel=1e-5)


@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_sign_and_terms_are_those_of_peft(order, generators_of_norm):
    oft = pytest.importorskip("peft.tuners.oft.layer")
    generators = generators_of_norm(3, 8, 0.3)
    theirs = oft.OFTRotationModule(3, generators.shape[1], 8, 24)
    rotation = theirs._cayley_batch(generators, 8, use_cayley_neumann=True, num_neumann_terms=order + 2)
    identity = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(
        identity + CayleyNeumann(order).displacement(generators, 8), rotation, rtol=0, atol=1e-14
    )
    exact = theirs._cayley_batch(generators, 8, use_cayley_neumann=False)
    torch.testing.assert_close(identity + Cayley().displacement(generators, 8), exact.mT, rtol=0, atol=1e-14)
    assert torch.equal(theirs._pytorch_skew_symmetric(generators, 8), skew(generators, 8))
