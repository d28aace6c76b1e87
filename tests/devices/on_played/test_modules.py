"""Every kind of module on a played device: built there, trained, merged and loaded, with the bits of the CPU."""

import pytest
import torch
from torch import nn

from orthotrain.layers.mergeable import mergeable_layers
from orthotrain.modules import LoraLayers, LoraModule, OftLayers, OftModule, PoetLayers, PoetModule

POET = {
    "blocks": {"block_size": 8},
    "fraction": {"fraction": 0.5},
    "one side": {"block_size": 8, "sides": "in"},
    "aligned": {"block_size": 8, "aligned": "out"},
    "mem": {"block_size": 8, "activation_mode": "mem"},
    "by input": {"block_size": 8, "centre": "input"},
    "by weight": {"block_size": 8, "centre": "weight"},
    "bf16": {"block_size": 8, "storage": "bf16"},
    "residual": {"block_size": 8, "storage": "residual"},
    "int8": {"block_size": 8, "storage": "int8", "group_size": 16, "anchor_every": 2},
    "nf4": {"block_size": 8, "storage": "nf4"},
    "trained scale": {"block_size": 8, "trained_scale": True},
    "exponential": {"block_size": 8, "parameterization": "exponential"},
    "cayley": {"block_size": 8, "parameterization": "cayley"},
    **{init: {"block_size": 8, "init": init} for init in ("uniform", "xavier", "standard", "keep")},
    "stepwise": {"block_size": 8, "stepwise": True},
    "stepwise residual": {"block_size": 8, "stepwise": True, "storage": "residual"},
}
OFT = {
    "dense": {"block_size": 8},
    "nf4": {"block_size": 8, "quantization": "nf4"},
    "int8": {"block_size": 8, "quantization": "int8", "group_size": 16},
    "shared": {"block_size": 8, "block_share": True},
    "dropout": {"block_size": 8, "block_dropout": 0.5},
    "fp32 rotation": {"block_size": 8, "rotation_dtype": "float32"},
}
CASES = {
    **{f"POET, {name}": (PoetModule, PoetLayers, settings) for name, settings in POET.items()},
    **{f"OFT, {name}": (OftModule, OftLayers, settings) for name, settings in OFT.items()},
    "LoRA": (LoraModule, LoraLayers, {"rank": 4}),
}

ROUNDED = ("POET, by weight", "POET, int8", "POET, nf4")
"""On the CPU the route by weight sums its products in parts, and a decomposition reads another layout."""


class Network(nn.Module):
    """A language model of operations that have one kernel each: attention has several, chosen by device."""

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.norm, self.lm_head = nn.Embedding(96, 32), nn.LayerNorm(32), nn.Linear(32, 96)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32, bias=False)

    def forward(self, input_ids):
        hidden = self.embed_tokens(input_ids)
        return self.lm_head(self.norm(hidden + self.down(torch.tanh(self.up(hidden)))))


def train(module, batches, wrap, raw):
    """Three steps of gradient descent, with what is merged merged after each; return losses and the state."""
    losses = []
    for batch in batches:
        loss = module.loss({name: wrap(value) for name, value in batch.items()})
        loss.backward()
        losses.append(raw(loss.detach()).clone())
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.05 * parameter.grad)
                    parameter.grad = None
        if not isinstance(module, OftModule):
            for _, layer in mergeable_layers(module):
                layer.merge_()
    return losses, {name: raw(value).clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("case", CASES)
def test_a_module_trains_there_as_on_the_cpu(played, case):
    module, layers, settings = CASES[case]
    ids = torch.randint(0, 96, (3, 2, 13), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": rows[:, :-1], "labels": rows[:, 1:]} for rows in ids]

    def build():
        period = {"merge_every": 1} if module is PoetModule else {}
        return module(Network, layers(**settings), **period)

    torch.manual_seed(0)
    here = build()
    here.configure_model()
    torch.manual_seed(0)
    there = build()
    with played.Mode(), torch.device("played"):
        there.configure_model()
    assert {p.device.type for p in there.parameters()} == {"played"}
    torch.manual_seed(2)
    expected, expected_state = train(here, batches, lambda value: value, played.raw)
    torch.manual_seed(2)
    with played.Mode():
        losses, state = train(there, batches, played.batch, played.raw)
    bound = {"rtol": 1e-5, "atol": 1e-6} if case in ROUNDED else {"rtol": 0, "atol": 0}
    torch.testing.assert_close([*losses, *state.values()], [*expected, *expected_state.values()], **bound)
