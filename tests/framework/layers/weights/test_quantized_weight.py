import copy
import io

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from orthotrain.errors import ConfigurationError
from orthotrain.layers import Int8Weight, Nf4Weight, OftLinear, PoetLinear
from orthotrain.layers.protocols import count_numbers
from orthotrain.layers.weights.bitsandbytes_linear import adopt_bitsandbytes
from orthotrain.layers.weights.rounding import Noise

FORMATS = {
    "nf4": Nf4Weight,
    "nf4 single": lambda weight: Nf4Weight(weight, double_quantization=False),
    "int8": lambda weight: Int8Weight(weight, group_size=32),
}
DTYPES = [torch.float32, torch.bfloat16]


def random_weight(out_features=48, in_features=64, dtype=torch.float32, seed=0):
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=FORMATS)
def build(request):
    return FORMATS[request.param]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_reloads_bit_for_bit_after_use(build, dtype, training):
    weight = build(random_weight(dtype=dtype)).train(training)
    x = torch.randn(3, 64, dtype=dtype)
    before = weight.matmul(x)
    buffer = io.BytesIO()
    torch.save(weight.state_dict(), buffer)
    buffer.seek(0)
    fresh = build(random_weight(dtype=dtype, seed=1)).train(not training)
    assert not torch.equal(fresh.matmul(x), before)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh.matmul(x), before)
    assert torch.equal(fresh.dequantize(torch.float32), weight.dequantize(torch.float32))


def test_state_is_plain_tensors_without_gradient(build):
    weight = build(random_weight())
    assert all(not p.requires_grad for p in weight.parameters())
    assert {p.dtype for p in weight.parameters()} <= {torch.uint8, torch.int8, torch.float32}
    assert set(weight.state_dict()) == {name for name, _ in weight.named_parameters()}


@pytest.mark.parametrize("cast", [torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double])
def test_casting_keeps_the_statistics(build, cast):
    weight = build(random_weight())
    exact = weight.dequantize()
    cast(weight)
    compute = cast(torch.nn.Linear(1, 1)).weight.dtype
    assert weight.dequantize().dtype == compute
    assert torch.equal(weight.dequantize(), exact.to(compute))
    assert torch.equal(weight.float().dequantize(), exact)


def test_deepcopy_is_independent(build):
    weight = build(random_weight())
    twin = copy.deepcopy(weight)
    before = weight.dequantize()
    assert torch.equal(twin.dequantize(), before)
    twin.assign_(random_weight(seed=1))
    assert torch.equal(weight.dequantize(), before)
    assert not torch.equal(twin.dequantize(), before)


def test_moves_between_devices_keep_the_shapes(build):
    weight = build(random_weight()).to("meta")
    assert {p.device.type for p in weight.parameters()} == {"meta"}
    assert weight.dequantize().shape == (48, 64)
    built = build(random_weight().to("meta"))
    assert {n: (p.shape, p.dtype) for n, p in built.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in weight.named_parameters()
    }
    # a meta weight must not spoil what the next one is packed with
    assert build(random_weight()).relative_error(random_weight()) < 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_equals_that_of_the_dequantised_weight(build, dtype):
    weight = build(random_weight(dtype=dtype))
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    bias = torch.randn(48, dtype=dtype, requires_grad=True)
    dense = weight.dequantize()
    expected = F.linear(x, dense, bias)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, bias), grad)
    actual = weight.matmul(x, bias)
    assert torch.equal(actual, expected)
    grad_x, grad_bias = torch.autograd.grad(actual, (x, bias), grad)
    torch.testing.assert_close(grad_x, wanted[0])
    torch.testing.assert_close(grad_bias, wanted[1])
    torch.testing.assert_close(weight.matmul(x), F.linear(x, dense))


def test_backward_keeps_only_packed_tensors(build):
    weight, saved = build(random_weight()), []
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        weight.matmul(x)
    stored = {p.data_ptr() for p in weight.parameters()}
    assert saved and {t.data_ptr() for t in saved} <= stored


def test_second_derivative_and_compile(build):
    weight = build(random_weight())
    x = torch.randn(3, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(weight.matmul(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    dense = weight.dequantize()
    (wanted,) = torch.autograd.grad(F.linear(x, dense).pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(wanted.sum(), x)[0])
    compiled = torch.compile(weight.matmul, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), weight.matmul(x))


def test_compute_dtype_rules(build):
    weight = build(random_weight()).to(torch.bfloat16)
    x = torch.randn(3, 64)
    assert weight.dequantize().dtype == torch.bfloat16
    assert torch.equal(weight.matmul(x), F.linear(x.bfloat16(), weight.dequantize()).float())
    plain = build(random_weight())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plain.matmul(x), F.linear(x, plain.dequantize()))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9), half=st.integers(1, 40), exponent=st.integers(-6, 6), group=st.sampled_from([32, 64, 256])
)
def test_nf4_error_is_bounded_at_every_shape_and_scale(rows, half, exponent, group):
    exact = random_weight(rows, 2 * half) * 10.0**exponent
    weight = Nf4Weight(exact, group_size=group, double_quantization=False)
    steps = torch.nn.functional.pad(exact.flatten(), (0, -exact.numel() % group)).view(-1, group)
    # the widest gap of the NF4 code is 0.304 of the largest magnitude
    bound = (steps.abs().amax(1, keepdim=True) * 0.1525).expand_as(steps).flatten()[: exact.numel()].view_as(exact)
    assert ((weight.dequantize() - exact).abs() <= bound).all()
    assert torch.equal(
        Nf4Weight(weight.dequantize(), group_size=group, double_quantization=False).dequantize(), weight.dequantize()
    )


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 4), group=st.sampled_from([2, 8, 20]), exponent=st.integers(-6, 6))
def test_int8_error_is_half_a_step(rows, groups, group, exponent):
    exact = random_weight(rows, groups * group) * 10.0**exponent
    weight = Int8Weight(exact, group_size=group)
    step = weight.scales.repeat_interleave(group, 1)
    assert ((weight.dequantize() - exact).abs() <= step * 0.5001).all()
    assert (weight.codes.view(rows, groups, group).abs().amax(-1) == 127).all()


def test_int8_rounds_stochastically_without_bias():
    exact = random_weight(8, 64)
    weight = Int8Weight(exact, group_size=32)
    step = weight.scales.repeat_interleave(32, 1)
    draws = []
    for count in range(400):
        weight.assign_(exact, Noise(count))
        assert ((weight.dequantize() - exact).abs() <= step * 1.001).all()
        draws.append(weight.dequantize())
    mean_error = (torch.stack(draws).mean(0) - exact) / step
    # standard deviation of a mean of 400 is at most 0.5 / 20; five of them
    assert mean_error.abs().max() < 0.125
    assert mean_error.mean().abs() < 0.01


def test_int8_zero_groups_stay_zero():
    exact = random_weight(4, 64)
    exact[1] = 0
    weight = Int8Weight(exact, group_size=32)
    assert torch.equal(weight.dequantize()[1], torch.zeros(64))
    weight.assign_(torch.zeros(4, 64), Noise(0))
    assert torch.equal(weight.dequantize(), torch.zeros(4, 64))


def test_relative_error_is_what_it_says(build):
    exact = random_weight()
    weight = build(exact)
    expected = (weight.dequantize() - exact).norm() / exact.norm()
    assert weight.relative_error(exact) == pytest.approx(float(expected), rel=1e-6)
    weight.assign_(weight.dequantize())
    assert weight.relative_error(weight.dequantize()) == 0


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_equals_bitsandbytes(nested, dtype):
    exact = random_weight(96, 256, dtype)
    packed, state = quantize_4bit(exact, blocksize=64, compress_statistics=nested, quant_type="nf4")
    ours = Nf4Weight(exact, double_quantization=nested)
    assert torch.equal(ours.dequantize(), dequantize_4bit(packed, state))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_takes_over_linear4bit_bit_for_bit(nested, storage):
    linear = bnb.nn.Linear4bit(64, 48, quant_type="nf4", compress_statistics=nested, quant_storage=storage).to("cpu")
    linear.compute_dtype = torch.bfloat16
    weight = adopt_bitsandbytes(linear)
    assert torch.equal(weight.dequantize(torch.float32), dequantize_4bit(linear.weight.data, linear.weight.quant_state))
    assert weight.compute_dtype == torch.bfloat16
    assert torch.equal(
        Nf4Weight.from_quant_state(linear.weight.data, linear.weight.quant_state).dequantize(),
        weight.dequantize(torch.float32),
    )


def test_takes_over_linear8bit_to_the_last_bits():
    linear = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False).to("cpu")
    expected = int8_vectorwise_dequant(linear.weight.data, linear.weight.SCB)
    before = adopt_bitsandbytes(linear)
    linear(torch.randn(2, 64))
    for weight in (before, adopt_bitsandbytes(linear)):
        torch.testing.assert_close(weight.dequantize(torch.float32), expected, rtol=3e-7, atol=0)


def test_refuses_what_it_cannot_take_over():
    assert adopt_bitsandbytes(torch.nn.Linear(4, 4)) is None
    with pytest.raises(ConfigurationError, match="fp4"):
        adopt_bitsandbytes(bnb.nn.Linear4bit(64, 48).to("cpu"))
    with pytest.raises(ConfigurationError, match="not quantized yet"):
        adopt_bitsandbytes(bnb.nn.Linear4bit(64, 48, quant_type="nf4"))
    with pytest.raises(ConfigurationError, match="not quantized yet"):
        adopt_bitsandbytes(bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False))
    with pytest.raises(ConfigurationError, match="has_fp16_weights=False"):
        adopt_bitsandbytes(bnb.nn.Linear8bitLt(64, 48))
    linear = bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")
    linear.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ConfigurationError, match="repacked"):
        adopt_bitsandbytes(linear)


@pytest.mark.parametrize(
    ("width", "group"), [(4096, 256), (640, 128), (576, 64), (96, 32), (32, 32), (256, 256), (11008, 256)]
)
def test_int8_groups_by_default_are_the_largest_power_of_two_that_divides(width, group):
    assert Int8Weight(torch.zeros(2, width)).group_size == group


@pytest.mark.parametrize("width", [48, 100, 720])
def test_int8_has_no_default_where_groups_would_be_below_32(width):
    with pytest.raises(ConfigurationError, match=f"group_size=256 does not divide the {width} inputs.*near it"):
        Int8Weight(torch.zeros(2, width))
    assert Int8Weight(torch.zeros(2, width), group_size=4).group_size == 4


def test_a_merge_in_fp64_is_packed_by_nf4():
    layer = OftLinear.from_linear(torch.nn.Linear(64, 48), 8, storage="nf4").double()
    expected = layer.merged_weight()
    layer.merge_()
    assert layer.merged_weight().dtype == torch.float64
    assert layer.last_merge_error < 0.12
    torch.testing.assert_close(layer.merged_weight(), expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_nf4_names_the_dtype_it_cannot_take(dtype):
    with pytest.raises(ConfigurationError, match=str(dtype).removeprefix("torch.")):
        Nf4Weight(torch.zeros(4, 64, dtype=dtype))


def test_errors_name_what_would_work():
    with pytest.raises(ConfigurationError, match=r"group_size=256.*688 inputs.*172 and 344"):
        Int8Weight(torch.zeros(2, 688))
    with pytest.raises(ConfigurationError, match="int64"):
        Int8Weight(torch.zeros(2, 64, dtype=torch.int64), group_size=32)
    with pytest.raises(ConfigurationError, match="power of two"):
        Nf4Weight(torch.zeros(2, 64), group_size=48)
    with pytest.raises(ConfigurationError, match="25 inputs is odd"):
        Nf4Weight(torch.zeros(2, 25))


@pytest.mark.parametrize("storage", ["nf4", "int8", "residual", "bf16", "dense"])
def test_the_numbers_of_a_weight_are_counted_and_not_its_bytes(storage):
    layer = PoetLinear.from_linear(nn.Linear(64, 32), 16, storage=storage)
    trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert count_numbers(layer) == trained + 64 * 32 and count_numbers(layer, trained=False) == 64 * 32
    assert count_numbers(layer, trained=True) == trained
