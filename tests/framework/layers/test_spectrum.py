"""The bound of ||Q||_2 against the decomposition, and how tight it is."""

import pytest
import torch
from torch import nn

from orthotrain.kernels.skew import skew
from orthotrain.layers import PoetLinear
from orthotrain.layers import spectrum as module
from orthotrain.layers.spectrum import largest_bounds, spectral_bound


def exact(generators, size):
    return torch.linalg.matrix_norm(skew(generators.double(), size), 2)


@pytest.mark.parametrize("size", [2, 3, 5, 8, 33, 64])
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e3])
def test_bounds_the_norm_and_is_within_its_factor(size, scale):
    generators = scale * torch.randn(6, size * (size - 1) // 2)
    bounds, norms = spectral_bound(generators).double(), exact(generators, size)
    assert (bounds >= norms * (1 - 1e-5)).all()
    assert (bounds <= norms * (size // 2) ** (1 / 8) * (1 + 1e-5)).all()


def test_is_several_times_tighter_than_the_norm_of_the_generators():
    generators = torch.randn(2, 128 * 127 // 2)
    bounds, norms = spectral_bound(generators), exact(generators, 128)
    assert (bounds < 1.4 * norms).all() and (generators.norm(dim=1) > 3.5 * norms).all()


def test_zero_is_zero():
    assert not spectral_bound(torch.zeros(3, 6)).any()


@pytest.mark.parametrize("together", [1, 1 << 24])
def test_each_layer_has_its_largest_block(monkeypatch, randomize, together):
    monkeypatch.setattr(module, "BATCH_NUMBERS", together)
    layers = {
        str(k): randomize(PoetLinear.from_linear(nn.Linear(24, 32), size), 0.1 * (k + 1))
        for k, size in enumerate((8, 4, 8, 6))
    }
    expected = [max(float(spectral_bound(p).max()) for p in layer.rotation_parameters()) for layer in layers.values()]
    torch.testing.assert_close(largest_bounds(layers), torch.tensor(expected))
