"""The POET layer's invariants: wrapping, merging and unwrapping change no output; both routes are one function."""

import copy
import itertools

import pytest
import torch
from torch import nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers import PoetLinear
from orthotrain.layers.poet.route_costs import ROUTES, choose_route
from orthotrain.layers.protocols import Foldable, Stepwise
from orthotrain.layers.spectrum import singular_values

SHAPES = [(24, 24), (40, 24), (24, 40), (37, 23)]
MODES = list(itertools.product(["input", "weight"], ["fast", "mem"]))


def make(shape=(24, 40), bias=True, dtype=torch.float32, **kwargs):
    linear = nn.Linear(*shape, bias=bias, dtype=dtype)
    return linear, PoetLinear.from_linear(linear, 8, seed=5, **kwargs)


def ulp_bound(reference, weight, x):
    """One rounding of every weight entry to bf16, seen at the output."""
    return 2.0**-8 * (x.abs().double() @ weight.abs().double().T) + 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("route", "mode"), MODES)
def test_wrap_merge_unwrap_keep_the_function(shape, bias, route, mode, randomize):
    linear, layer = make(shape, bias, route=route, activation_mode=mode)
    x = torch.randn(3, 5, shape[0])
    scale = linear(x).abs().max()
    assert (layer(x) - linear(x)).abs().max() <= 1e-6 * scale
    randomize(layer)
    before = layer(x)
    assert (before - linear(x)).abs().max() > 0.01 * scale
    assert (layer.unwrap()(x) - before).abs().max() <= 1e-5 * scale
    orders = layer.rotation_in.permutation.clone(), layer.rotation_out.permutation.clone()
    layer.merge_()
    assert (layer(x) - before).abs().max() <= 1e-5 * scale
    assert not any(p.any() for p in layer.rotation_parameters())
    assert not torch.equal(layer.rotation_in.permutation, orders[0])
    assert not torch.equal(layer.rotation_out.permutation, orders[1])


@pytest.mark.parametrize("storage", ["dense", "bf16"])
def test_bias_and_permutations_of_a_merge_change_no_bit(storage, randomize):
    """The bias is added after the rotations; without a rotation only the order of rows and columns changes."""
    linear, layer = make(storage=storage)
    bias, weight = linear.bias.detach().clone(), layer._effective_weight()
    for _ in range(3):
        layer.merge_()
    assert torch.equal(layer._effective_weight(), weight)
    randomize(layer)
    layer.merge_()
    assert not torch.equal(layer._effective_weight(), weight) and torch.equal(layer.bias, bias)


@pytest.mark.parametrize(("route", "mode"), MODES)
def test_bf16_merge_is_within_one_rounding_of_the_weight(route, mode, randomize):
    linear, layer = make((48, 40), dtype=torch.bfloat16, route=route, activation_mode=mode)
    x = torch.randn(16, 48, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), linear(x), rtol=2.0**-7, atol=2.0**-7)
    randomize(layer)
    exact = layer._effective_weight()
    layer.merge_()
    stored = layer.unwrap().weight
    assert stored.dtype == torch.bfloat16
    assert ((stored.float() - exact).abs() <= 2.0**-7 * exact.abs() + 1e-30).all()
    error = (layer(x).double() - (x.double() @ exact.double().T + layer.bias.double())).abs()
    assert (error <= 4 * ulp_bound(exact, exact, x) + 2.0**-7).all()


def test_all_modes_have_the_gradients_of_the_dense_definition(randomize):
    linear = nn.Linear(37, 23, dtype=torch.float64)
    x = torch.randn(6, 37, dtype=torch.float64)
    probe = torch.randn(6, 23, dtype=torch.float64)
    results = []
    for route, mode in MODES:
        layer = PoetLinear.from_linear(copy.deepcopy(linear), 8, route=route, activation_mode=mode).double()
        randomize(layer)
        inputs = x.clone().requires_grad_()
        (layer(inputs) * probe).sum().backward()
        results.append([inputs.grad, layer.bias.grad, *(p.grad for p in layer.rotation_parameters())])
    # the definition: y = rot_out(rot_in(x) W^T) + b with dense matrices and autograd
    layer = randomize(PoetLinear.from_linear(copy.deepcopy(linear), 8).double())
    inputs = x.clone().requires_grad_()
    natural = torch.empty_like(linear.weight)
    natural[layer.rotation_out.permutation[:, None], layer.rotation_in.permutation] = layer.weight.dequantize()

    def rotate(rotation, width):
        full = torch.eye(width, dtype=torch.float64)
        covered = rotation.permutation[: rotation.blocks * rotation.block_size]
        return full.index_put((covered[:, None], covered), torch.block_diag(*rotation.displacement()), accumulate=True)

    y = inputs @ rotate(layer.rotation_in, 37) @ natural.T @ rotate(layer.rotation_out, 23) + layer.bias
    (y * probe).sum().backward()
    expected = [inputs.grad, layer.bias.grad, *(p.grad for p in layer.rotation_parameters())]
    for result in results:
        for got, want in zip(result, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("route", "mode"), MODES)
def test_compiles_without_graph_breaks(route, mode, randomize):
    _, layer = make((37, 23), route=route, activation_mode=mode)
    randomize(layer)
    x = torch.randn(5, 37)
    expected = torch.autograd.grad(layer(x).square().sum(), layer.rotation_parameters())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x).square().sum(), layer.rotation_parameters())
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiles_with_inductor(randomize):
    _, layer = make((37, 23), route="input", dtype=torch.bfloat16)
    randomize(layer)
    x = torch.randn(5, 37, dtype=torch.bfloat16)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=2.0**-6, atol=2.0**-6)


@pytest.mark.parametrize(("route", "mode"), MODES)
def test_autocast_gives_bf16_like_nn_linear(route, mode):
    linear, layer = make(route=route, activation_mode=mode)
    x = torch.randn(4, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), linear(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2.0**-6, atol=2.0**-6)


def test_mem_mode_saves_only_its_input():
    x = torch.randn(64, 24, requires_grad=True)

    def saved(mode):
        _, layer = make(route="input", activation_mode=mode, bias=False)
        own = {p.data_ptr() for p in (*layer.parameters(), *layer.buffers())}
        sizes = {}

        def pack(tensor):
            if tensor.data_ptr() not in own:
                sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            assert layer(x).requires_grad
        return sum(size for size in sizes.values() if size >= 64 * 24)

    assert saved("mem") <= 64 * 24
    assert saved("fast") == 64 * 24 + 64 * 40


@pytest.mark.slow
def test_thousand_fp32_merges_keep_the_spectrum(randomize):
    _, layer = make((32, 24))
    start = torch.linalg.svdvals(layer.merged_weight().double())
    for _ in range(1000):
        randomize(layer, 0.02)
        layer.merge_()
    drift = (torch.linalg.svdvals(layer.merged_weight().double()) - start).abs() / start.max()
    assert drift.max() < 1e-4


@pytest.mark.slow
def test_thousand_bf16_merges_keep_the_spectrum(randomize):
    linear = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    layer = PoetLinear.from_linear(linear, 64, seed=5)
    start = torch.linalg.svdvals(layer.merged_weight().double())
    for _ in range(1000):
        randomize(layer, 0.02)
        layer.merge_()
    drift = (torch.linalg.svdvals(layer.merged_weight().double()) - start).abs() / start.max()
    assert drift.max() < 1e-2  # relative to the largest singular value


def test_merges_are_equal_for_equal_seeds_and_differ_otherwise(randomize):
    linear = nn.Linear(24, 40, dtype=torch.bfloat16)

    def merged(seed):
        layer = PoetLinear.from_linear(copy.deepcopy(linear), 8, seed=seed)
        for _ in range(3):
            randomize(layer)
            layer.merge_()
        return layer.state_dict()

    first, second, other = merged(1), merged(1), merged(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["rotation_in.permutation"], other["rotation_in.permutation"])


def test_state_dict_reloads_exactly(randomize):
    linear, layer = make((37, 23))
    randomize(layer).merge_()
    randomize(layer)
    fresh = PoetLinear.from_linear(nn.Linear(37, 23), 8, seed=5)
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(3, 37)
    assert torch.equal(fresh(x), layer(x))
    layer.merge_(), fresh.merge_()
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fold_keeps_function_and_permutations_and_is_the_same_on_every_rank(dtype, randomize):
    layers = []
    linear = nn.Linear(40, 24, dtype=dtype)
    for _ in range(2):
        layer = randomize(PoetLinear.from_linear(copy.deepcopy(linear), 8, seed=5))
        exact, orders = layer._effective_weight(), [r.permutation.clone() for _, r in layer.sides()]
        layer.fold_()
        assert (layer._effective_weight() - exact).norm() <= 2.0 ** (
            -20 if dtype == torch.float32 else -8
        ) * exact.norm()
        assert not any(p.any() for p in layer.rotation_parameters())
        assert all(torch.equal(r.permutation, order) for (_, r), order in zip(layer.sides(), orders, strict=True))
        assert (int(layer.fold_count), int(layer.merge_count)) == (1, 0)
        layer.fold_()
        layers.append(layer.state_dict())
    assert all(torch.equal(layers[0][name], layers[1][name]) for name in layers[0])
    assert isinstance(layer, Foldable) and not isinstance(layer, Stepwise)


def test_the_anchor_stays_fp32_when_the_module_becomes_bf16():
    _, layer = make(storage="int8", group_size=8)
    layer.merge_()
    before = layer.spectrum.clone()
    layer.to(torch.bfloat16)
    assert layer.spectrum.dtype == torch.float32 and torch.equal(layer.spectrum, before)
    layer.merge_()
    assert (singular_values(layer._effective_weight()) - before).abs().max() < 0.02 * before[0]


def test_generators_stay_fp32_when_the_module_becomes_bf16(randomize):
    _, layer = make()
    randomize(layer, 0.01)
    before = layer.rotation_in.generators.detach().clone()
    layer.to(torch.bfloat16)
    assert layer.weight.values.dtype == torch.bfloat16
    assert torch.equal(layer.rotation_in.generators, before)
    assert layer(torch.randn(2, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("block_size", [0, -4, 1, 25, 3.5, True])
def test_a_block_size_that_cannot_work_is_refused(block_size):
    with pytest.raises(ConfigurationError, match=rf"block_size={block_size}.*from 2 to 24"):
        PoetLinear.from_linear(nn.Linear(40, 24), block_size)


@pytest.mark.parametrize(("name", "value"), [("route", "middle"), ("activation_mode", "slow")])
def test_an_unknown_mode_is_refused(name, value):
    with pytest.raises(ConfigurationError, match=f"{name}='{value}': choose one of"):
        PoetLinear.from_linear(nn.Linear(8, 8), 4, **{name: value})


def test_auto_route_follows_the_shape():
    assert choose_route(ROUTES, tokens=4096, d_in=256, d_out=256, b_in=64, b_out=64) != "input"
    assert choose_route(ROUTES, tokens=512, d_in=4096, d_out=4096, b_in=256, b_out=256) == "input"
