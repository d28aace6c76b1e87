"""The pool changes no number, and is out of the way wherever it cannot work."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from orthotrain.layers import BlockRotation, OftLinear, PoetLinear, replace_linears, unwrap_mergeables
from orthotrain.layers.rotation.displacement_pool import DisplacementPool, PooledDisplacements
from orthotrain.models import CausalLM


def network(**kwargs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.Linear(16, 8))
    replace_linears(net, ["*"], (), lambda linear: PoetLinear.from_linear(linear, 8, **kwargs))
    return net


def gradients(net, x):
    net.zero_grad()
    net(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["fast", "mem"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_without_it(mode, dtype, randomize):
    net, x = randomize(network(activation_mode=mode)).to(dtype), torch.randn(5, 16, dtype=dtype)
    alone_out, alone = net(x), gradients(net, x)
    DisplacementPool(net)
    assert torch.equal(net(x), alone_out)
    pooled = gradients(net, x)
    assert set(pooled) == set(alone)
    for name in alone:
        torch.testing.assert_close(pooled[name], alone[name], rtol=1e-5, atol=1e-6 * alone[name].abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"block_share": True}, {"block_dropout": 0.5}])
@pytest.mark.parametrize("std", [0.02, 0.3])  # close to orthogonal in Cayley-Neumann, and not
def test_oft_layers_of_a_pool_get_the_gradients_they_get_alone(dtype, options, std, randomize):
    net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.Linear(16, 8))
    replace_linears(net, ["*"], (), lambda linear: OftLinear.from_linear(linear, 8, **options))
    net, x = randomize(net, std).to(dtype), torch.randn(50, 16, dtype=dtype)

    def measured():
        torch.manual_seed(1)  # the dropped blocks
        out = net(x).detach()
        torch.manual_seed(1)
        return out, gradients(net, x)

    alone_out, alone = measured()
    DisplacementPool(net)
    out, pooled = measured()
    assert torch.equal(out, alone_out)
    bound = 2e-5 if dtype == torch.float32 else 2e-2
    for name, gradient in alone.items():
        assert float((pooled[name] - gradient).norm()) <= bound * float(gradient.norm())


def test_a_compiled_oft_layer_of_an_eager_network_sees_a_custom_op(randomize):
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))
    replace_linears(net, ["*"], (), lambda linear: OftLinear.from_linear(linear, 8))
    DisplacementPool(randomize(net, 0.02))
    x = torch.randn(50, 16)
    eager = gradients(net, x)
    net[0].compile(fullgraph=True, backend="aot_eager")
    for name, gradient in gradients(net, x).items():
        torch.testing.assert_close(gradient, eager[name], rtol=1e-4, atol=1e-4)


def test_oft_layers_of_a_pool_compute_on_shapes_alone():
    with FakeTensorMode():
        net = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))
        replace_linears(net, ["*"], (), lambda linear: OftLinear.from_linear(linear, 8))
        DisplacementPool(net)
        assert gradients(net, torch.randn(50, 16)).keys() == {f"{i}.rotation_in.generators" for i in range(2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_asks_first_without_gradients_takes_them_from_nobody(dtype, randomize):
    rotations = [BlockRotation(16, 8) for _ in range(2)]
    for rotation in rotations:
        randomize(rotation)
    displacements = PooledDisplacements(rotations)
    with torch.no_grad():
        displacements.part(0, dtype)
    displacements.part(1, dtype).float().sum().backward()
    assert rotations[1].generators.grad.any() and not rotations[0].generators.grad.any()


def test_is_computed_once_per_forward_and_dropped_after_it(randomize, monkeypatch):
    net = randomize(network())
    DisplacementPool(net)
    calls = []
    monkeypatch.setattr(PooledDisplacements, "__init__", count(PooledDisplacements.__init__, calls))
    net(torch.randn(3, 16))
    assert len(calls) == 1
    rotations = [m for m in net.modules() if isinstance(m, BlockRotation)]
    assert len(rotations) == 6 and all(rotation.pooled is None for rotation in rotations)
    with pytest.raises((ValueError, RuntimeError)):  # whichever route the layer takes on this machine
        net(torch.randn(3, 17))
    assert all(rotation.pooled is None for rotation in rotations)


def count(function, calls):
    def counted(*args):
        calls.append(args)
        function(*args)

    return counted


def test_layers_that_are_gone_cost_nothing(randomize, monkeypatch):
    net = randomize(network())
    DisplacementPool(net)
    expected = net(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)))
    unwrap_mergeables(net)
    calls = []
    monkeypatch.setattr(PooledDisplacements, "__init__", count(PooledDisplacements.__init__, calls))
    torch.testing.assert_close(net(torch.randn(3, 16, generator=torch.Generator().manual_seed(1))), expected)
    assert not calls


def test_layers_called_by_themselves_and_after_a_step_use_fresh_generators(randomize):
    net = randomize(network())
    DisplacementPool(net)
    x = torch.randn(3, 16)
    first = net[0](x)
    with torch.no_grad():
        net[0].rotation_in.generators.mul_(-1)
    assert not torch.equal(net[0](x), first)
    assert torch.equal(net[0](x), net[0](x))


def test_stays_out_of_the_way_of_activation_checkpointing(tiny_llama, randomize):
    def gradient(checkpointing):
        torch.manual_seed(0)
        net = CausalLM(tiny_llama)()
        replace_linears(net, ["*proj*"], (), lambda linear: PoetLinear.from_linear(linear, 8))
        DisplacementPool(randomize(net))
        if checkpointing:
            net.gradient_checkpointing_enable({"use_reentrant": False})
        net(torch.arange(12)[None]).logits.square().sum().backward()
        return net.model.layers[0].mlp.up_proj.rotation_in.generators.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-4, atol=1e-6)


def test_groups_rotations_by_dtype_and_device(randomize):
    net, x = randomize(network()), torch.randn(5, 16)
    net[2].double()  # casts its generators too
    to_double = net[2].register_forward_pre_hook(lambda _, inputs: inputs[0].double())
    net[3].register_forward_pre_hook(lambda _, inputs: inputs[0].float())
    expected = net(x)
    DisplacementPool(net)
    torch.testing.assert_close(net(x), expected)
    to_double.remove()
    # half of a network on another device, as device_map lays it out
    split = nn.ModuleList([network(), network().to("meta")])
    split.forward = lambda x: (split[0](x), split[1][0].rotation_in.pooled[0].part(0, None).device.type)
    DisplacementPool(split)
    here, device = split(x)
    torch.testing.assert_close(here, split[0](x))
    assert device == "meta"


def test_compiles_without_graph_breaks(randomize):
    net = randomize(network())
    DisplacementPool(net)
    x = torch.randn(5, 16)
    expected = net(x)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), expected)
