import math

import pytest
import torch

from orthotrain.plugins import Exponential


@pytest.mark.parametrize("norm", [5.0, 6.0, 8.0, 10.0])
def test_the_declared_error_holds_past_the_exact_range_in_fp32(norm, orthogonality_defect):
    declared = Exponential().orthogonality_error(norm)
    defect = orthogonality_defect(Exponential().displacement(torch.tensor([[norm]]), 2).double())
    assert declared > 1e-5
    # The bound adds up terms that alternate in sign: it may be an order of magnitude above the truth out here.
    assert declared / 16 < defect < declared + 32 * torch.finfo(torch.float32).eps


def test_the_declared_error_is_below_rounding_in_the_exact_range():
    assert Exponential().orthogonality_error(0.0) == 0
    assert Exponential().orthogonality_error(1.5) < torch.finfo(torch.float32).eps
    assert Exponential().orthogonality_error(3.0) < 4 * torch.finfo(torch.float32).eps


def test_a_diverged_norm_has_an_infinite_error():
    assert Exponential().orthogonality_error(1e6) == math.inf


@pytest.mark.parametrize("angle", [0.1, math.pi / 4, math.pi / 2])
def test_one_generator_turns_by_twice_its_value(angle):
    displacement = Exponential().displacement(torch.tensor([[angle]], dtype=torch.float64), 2)[0]
    cosine, sine = math.cos(2 * angle) - 1, math.sin(2 * angle)
    expected = torch.tensor([[cosine, sine], [-sine, cosine]], dtype=torch.float64)
    torch.testing.assert_close(displacement, expected, rtol=0, atol=2e-15)
