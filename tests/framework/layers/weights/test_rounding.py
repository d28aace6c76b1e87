"""Stochastic rounding, and the noise it is done with."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthotrain.layers.weights import rounding
from orthotrain.layers.weights.bf16_weight import pack_bf16
from orthotrain.layers.weights.nf4_and_int8 import pack_int8, pack_nf4
from orthotrain.layers.weights.rounding import LEVELS, Noise, stochastic_round


@settings(max_examples=100, deadline=None)
@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100),
    st.integers(0, 99),
)
def test_rounds_to_a_neighbor_and_keeps_what_is_exact(value, seed):
    x = torch.tensor([value], dtype=torch.float32)
    rounded = stochastic_round(x, Noise(seed)).float()
    assert (rounded - x).abs() <= 2.0**-7 * x.abs() + 1e-38
    exact = x.bfloat16()
    assert torch.equal(stochastic_round(exact.float(), Noise(seed)), exact)


def test_stochastic_rounding_is_unbiased():
    x = torch.full((200, 1000), 1.001)
    mean = stochastic_round(x, Noise(0)).double().mean()
    # an ulp is 2^-7 here; the standard error of the mean is under 2^-7 / 2 / sqrt(200000)
    assert abs(mean - 1.001) < 5 * 2.0**-8 / 200_000**0.5
    assert x.bfloat16().double().mean() == 1.0


def test_infinities_and_nan_pass():
    x = torch.tensor([float("inf"), -float("inf"), float("nan")])
    rounded = stochastic_round(x, Noise(0))
    assert rounded[0] == float("inf") and rounded[1] == -float("inf") and rounded[2].isnan()


def hashed(seed, row, column):
    """The noise of one element, in Python's own integers."""

    def mix(x):
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
        return ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF

    word = rounding.derive_seed(*seed)
    return mix(mix(row ^ (word & 0xFFFFFFFF)) ^ mix(column ^ ((word >> 31) & 0xFFFFFFFF))) >> 16


def test_noise_is_the_hash_of_its_place():
    noise = Noise("layer", 3).draw((5, 70_000), "cpu")  # more than one part of the computation
    assert noise.dtype == torch.int32
    for row, column in ((0, 0), (0, 1), (1, 0), (4, 69_999), (3, 12_345)):
        assert int(noise[row, column]) == hashed(("layer", 3), row, column)
    assert torch.equal(Noise("layer", 3).below(2).draw((3, 70_000), "cpu"), noise[2:])
    assert torch.equal(
        Noise("layer", 3).draw((5, 7, 10_000), "cpu"), Noise("layer", 3).draw((35, 10_000), "cpu").view(5, 7, -1)
    )


def test_noise_is_uniform_and_independent_of_its_neighbors_and_of_other_counts():
    shape, bound = (1024, 1024), 5.0
    noise = [(Noise("layer", count).draw(shape, "cpu").double() + 0.5) / LEVELS - 0.5 for count in (1, 2)]
    count = noise[0].numel()
    counts = torch.histc(noise[0], 64, -0.5, 0.5)
    expected = count / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 63) < bound * (2 * 63) ** 0.5
    pairs = [(noise[0], noise[1])]
    for rows, columns in ((0, 1), (1, 0), (1, 1), (0, 2), (7, 0), (0, 512), (512, 0)):
        pairs.append((noise[0][rows:, columns:], noise[0][: shape[0] - rows, : shape[1] - columns]))
    for one, other in pairs:
        # a mean of products of variance 1 / 144
        assert abs(float((one * other).mean())) < bound / 12 / one.numel() ** 0.5


@pytest.mark.parametrize("noise", [None, Noise(1)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize(
    "pack",
    [
        lambda weight, noise: pack_int8(weight, 32, noise),
        lambda weight, noise: pack_nf4(weight, 64, False, noise),
        lambda weight, noise: pack_nf4(weight, 64, True, noise),
        lambda weight, noise: pack_bf16(weight, False, noise),
        lambda weight, noise: pack_bf16(weight, True, noise),
    ],
    ids=["int8", "nf4", "nf4 double", "bf16", "residual"],
)
def test_packing_in_parts_gives_the_same_bits(monkeypatch, pack, noise):
    weight = torch.randn(37, 96)  # a group of 64 ends with every second row only
    whole = pack(weight, noise)
    monkeypatch.setitem(rounding.PACKED, "cpu", 500)
    parts = pack(weight, noise)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
