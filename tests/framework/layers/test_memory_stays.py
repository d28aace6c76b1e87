"""Merges and folds change parameters and buffers where they lie: captured graphs and FSDP2 know their memory."""

import pytest
import torch
from torch import nn

from orthotrain.layers import LoraLinear, OftConv2d, OftEmbedding, OftLinear, OftSettings, PoetLinear, StepwiseLinear
from orthotrain.layers.folding import fold_rotations, merge_rotations
from orthotrain.layers.poet.poet_settings import PoetSettings
from orthotrain.layers.weights.bf16_weight import Bf16Weight

STORAGES = ["dense", "bf16", "residual", "int8", "nf4"]


def linear(dtype=torch.float32):
    return nn.Linear(64, 32).to(dtype)


def poet(storage, dtype, stepwise=False):
    settings = PoetSettings(block_size=8, storage=storage, group_size=32 if storage in ("int8", "nf4") else None,
                            trained_scale=True, anchor_every=None if stepwise else 1, stepwise=stepwise)  # fmt: skip
    kind = StepwiseLinear if stepwise else PoetLinear
    return kind.from_settings(linear(dtype), settings)


LAYERS = {
    **{f"poet {storage}": lambda storage=storage: poet(storage, torch.float32) for storage in STORAGES},
    **{f"stepwise {storage}": lambda storage=storage: poet(storage, torch.float32, True) for storage in ("residual",)},
    "stepwise dense": lambda: poet("dense", torch.float32, True),
    "poet dense in bf16": lambda: poet("dense", torch.bfloat16),
    **{f"oft {q}": lambda q=q: OftLinear.from_linear(linear(), 8, storage=q) for q in (None, "int8", "nf4")},
    "oft convolution": lambda: OftConv2d.from_settings(nn.Conv2d(8, 4, 3), OftSettings(8)),
    "oft embedding": lambda: OftEmbedding.from_settings(nn.Embedding(16, 32), OftSettings(8)),
    "lora": lambda: LoraLinear.from_linear(linear(), 4),
}


def memory(layer):
    return {n: t.data_ptr() for kind in (layer.named_parameters(), layer.named_buffers()) for n, t in kind}


@pytest.mark.parametrize("name", LAYERS)
def test_no_parameter_or_buffer_moves(name, randomize):
    layer = randomize(LAYERS[name]())
    before, values = memory(layer), {n: t.clone() for n, t in layer.state_dict().items()}
    if hasattr(layer, "fold_"):
        fold_rotations({"layer": layer})
        assert memory(layer) == before, "after a fold"
        randomize(layer)
    merge_rotations({"layer": layer}, [])
    assert memory(layer) == before, "after a merge"
    if name != "lora":  # whose update is zero at the start
        frozen = [n for n, p in layer.named_parameters() if not p.requires_grad]
        assert any(not torch.equal(layer.state_dict()[n], values[n]) for n in frozen)


@pytest.mark.parametrize("residual", [False, True])
def test_a_merge_leaves_the_tensor_alone_that_a_weight_was_made_of(residual):
    given = torch.randn(8, 16).to(torch.bfloat16)
    before = given.clone()
    weight = Bf16Weight(given, residual=residual)
    weight.assign_(torch.zeros(8, 16))
    assert torch.equal(given, before) and not weight.values.any()
