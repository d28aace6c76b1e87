"""The bound of ||Q||_2 against the decomposition, and how tight it is."""

import itertools

import pytest
import torch
from torch import nn

from orthotrain.kernels.skew import skew
from orthotrain.layers import PoetLinear
from orthotrain.layers import spectrum as module
from orthotrain.layers.spectrum import largest_bounds, spectral_bound, spread


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


ROLES = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.mark.parametrize("blocks", [4, 7, 8, 32])
@pytest.mark.parametrize("count", [4, 7, 8, 28])
def test_chosen_layers_are_spread_over_depth_and_roles(blocks, count):
    """Also where the number of layers of a block divides the distance of evenly spread layers."""
    names = [f"model.layers.{block}.{role}" for block in range(blocks) for role in ROLES]
    chosen = spread(names, count)
    assert len(set(chosen)) == count and sorted(chosen, key=names.index) == chosen
    places = [name.split(".", 3) for name in chosen]
    by_role = {role: sum(place[3] == role for place in places) for role in ROLES}
    assert max(by_role.values()) - min(by_role.values()) <= 1
    depths = sorted(int(place[2]) for place in places)
    assert depths[0] == 0 and depths[-1] == blocks - 1
    assert max(b - a for a, b in itertools.pairwise(depths)) <= -(-blocks // (count - 1)) + 1


def test_as_many_layers_are_chosen_as_there_are():
    names = ["stem", *(f"blocks.{k}.fc1" for k in range(3)), "pooler"]
    assert spread(names, 9) == spread(names, 5) == names and spread(names, 0) == spread([], 3) == []
    assert len(set(spread(names, 4))) == 4
