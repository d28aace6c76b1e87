import math

import pytest
import torch

from orthotrain.plugins import Exponential


@pytest.mark.parametrize("norm", [0.5, 1.5, 3.0])
def test_is_orthogonal_to_rounding_up_to_norm_three(norm, orthogonality_defect):
    defect = orthogonality_defect(Exponential().displacement(torch.tensor([[norm]]), 2).double())
    assert defect < 32 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("angle", [0.1, math.pi / 4, math.pi / 2])
def test_one_generator_turns_by_twice_its_value(angle):
    displacement = Exponential().displacement(torch.tensor([[angle]], dtype=torch.float64), 2)[0]
    cosine, sine = math.cos(2 * angle) - 1, math.sin(2 * angle)
    expected = torch.tensor([[cosine, sine], [-sine, cosine]], dtype=torch.float64)
    torch.testing.assert_close(displacement, expected, rtol=0, atol=2e-15)
