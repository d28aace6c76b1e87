import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers import Mergeable, OftConv2d, OftLinear, OftSettings
from orthotrain.layers.oft import oft_layer


def turn_(layer, std=0.1):
    with torch.no_grad():
        layer.rotation_in.generators.normal_(std=std)
    return layer


@torch.no_grad()
def relative(actual, expected):
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@st.composite
def convolutions(draw):
    groups, dilation = draw(st.integers(1, 3)), (draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 3)))
    padding = draw(st.sampled_from(["valid", "same", 0, 1, (2, 1)]))
    stride = 1 if padding == "same" else draw(st.sampled_from([1, 2, (1, 3)]))
    return nn.Conv2d(
        groups * 2 * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
    )


@settings(max_examples=120, deadline=None)
@given(conv=convolutions(), batched=st.booleans(), channels_last=st.booleans(), share=st.booleans())
def test_identity_at_the_start_and_exact_merges_for_every_geometry(conv, batched, channels_last, share):
    x = torch.randn(2, conv.in_channels, 11, 9, dtype=conv.weight.dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    x = x if batched else x[0]
    try:
        expected = conv(x)
    except (RuntimeError, NotImplementedError):
        assume(False)
    layer = OftConv2d.from_settings(conv, OftSettings(2, block_share=share))
    assert torch.equal(layer(x), expected)
    before, plain = turn_(layer)(x), layer.unwrap()
    layer.merge_()
    tolerance = 1e-5 if x.dtype == torch.float32 else 2**-7
    assert relative(layer(x), before) < tolerance
    assert torch.equal(plain(x), layer(x))
    assert not layer.rotation_in.generators.any()
    # the wrapped one is untouched
    assert torch.equal(conv(x), expected)


def test_merged_weight_is_the_rotation_of_each_group():
    layer = turn_(OftConv2d.from_settings(nn.Conv2d(12, 6, 3, groups=2), OftSettings(3)))
    rotation = torch.block_diag(*(torch.eye(3) + layer.displacements()[0]))
    weight = layer.conv.weight
    for group in range(2):
        block = rotation[6 * group : 6 * group + 6, 6 * group : 6 * group + 6]
        expected = torch.einsum("ocij,kc->okij", weight[3 * group : 3 * group + 3], block)
        torch.testing.assert_close(layer.merged_weight()[3 * group : 3 * group + 3], expected)


def test_gradients_equal_those_of_the_effective_weight():
    layer = turn_(
        OftConv2d.from_settings(nn.Conv2d(8, 5, 3, padding=1, dilation=2, padding_mode="reflect"), OftSettings(4))
    )
    x = torch.randn(2, 8, 7, 7, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    actual = torch.autograd.grad(y, [x, layer.rotation_in.generators], grad)
    rotation = torch.block_diag(*(torch.eye(4) + layer.displacements()[0]))
    effective = torch.einsum("ocij,kc->okij", layer.conv.weight, rotation)
    plain = layer.unwrap()
    padded = torch.func.functional_call(plain, {"weight": effective, "bias": layer.conv.bias}, (x,))
    expected = torch.autograd.grad(padded, [x, layer.rotation_in.generators], grad)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_trains_only_the_generators_and_reloads():
    layer = turn_(OftConv2d.from_settings(nn.Conv2d(8, 5, 3), OftSettings(4)))
    assert isinstance(layer, Mergeable)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["rotation_in.generators"]
    twin = OftConv2d.from_settings(nn.Conv2d(8, 5, 3), OftSettings(4), train_bias=True)
    assert twin.conv.bias.requires_grad
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    layer.enabled = False
    assert torch.equal(layer(x), layer.conv(x))


@pytest.mark.parametrize("rotation_dtype", ["input", "float32"])
def test_follows_autocast(rotation_dtype):
    conv = nn.Conv2d(8, 5, 3)
    layer = OftConv2d.from_settings(conv, OftSettings(4, rotation_dtype=rotation_dtype))
    x = torch.randn(2, 8, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), conv(x))
        assert layer(x).dtype == torch.bfloat16


def test_block_size_must_fit_a_group():
    with pytest.raises(ConfigurationError, match=r"block_size=8 .*12 input channels of a group; near it: 6 and 12"):
        OftConv2d.from_settings(nn.Conv2d(24, 4, 3, groups=2), OftSettings(8))
    with pytest.raises(ConfigurationError, match="1 input channels of a group: no block_size from 2 up"):
        OftConv2d.from_settings(nn.Conv2d(8, 8, 3, groups=8), OftSettings(2))


def test_only_the_kernel_of_a_plain_convolution_is_turned():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    class Named(nn.Conv2d):
        pass

    hooked = nn.Conv2d(4, 4, 3)
    hooked.register_forward_pre_hook(lambda _, inputs: (inputs[0].relu(),))
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    refused = {Standardized(4, 4, 3): "is a Standardized", normed: "is a ParametrizedConv2d", hooked: "has the forward"}
    for conv, why in refused.items():
        with pytest.raises(ConfigurationError, match=f"the layer {why}"):
            OftConv2d.from_settings(conv, OftSettings(2))
    assert OftConv2d.from_settings(Named(4, 4, 3), OftSettings(2)).rotation.block_size == 2


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d])
def test_other_convolutions_are_refused_by_name(kind):
    conv = kind(4, 4, 3)
    with pytest.raises(ConfigurationError, match=f"{kind.__name__}"):
        OftConv2d.from_settings(conv, OftSettings(2))
    with pytest.raises(ConfigurationError, match="OftLinear wraps an nn.Linear, not a"):
        OftLinear.from_settings(conv, OftSettings(2))
    with pytest.raises(ConfigurationError, match=f"a {kind.__name__}"):
        oft_layer(conv, OftSettings(2))
