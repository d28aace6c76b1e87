"""A network in which packed rows see each other is refused; another one is left as it was."""

import lightning as L
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BartConfig, Lfm2Config, LlamaConfig, MixtralConfig

from orthotrain.callbacks import PackingCheck
from orthotrain.data.instructions.packing import block_causal_mask
from orthotrain.errors import ConfigurationError
from orthotrain.modules.base import BaseModule

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
TOKENS = torch.arange(1, 33).view(2, 16)
PACKED = {
    "input_ids": TOKENS,
    "labels": TOKENS,
    "position_ids": torch.arange(16).where(torch.arange(16) < 9, torch.arange(16) - 9).repeat(2, 1),
    "attention_mask": block_causal_mask(torch.arange(16) < 9)[None, None].repeat(2, 1, 1, 1),
}
SEEN = {
    "convolution": Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
    "positions": BartConfig(
        vocab_size=64, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, is_decoder=True
    ),
}
APART = {
    "sdpa": LlamaConfig(**SIZES),
    "eager": LlamaConfig(**SIZES, attn_implementation="eager"),
    "experts": MixtralConfig(**SIZES, num_local_experts=4),
}


class Sum(nn.Module):
    """Causal, and ignores the mask; takes one mask for all heads, ``(B, T, T)``, if ``strict``."""

    def __init__(self, strict):
        super().__init__()
        self.strict, self.embed, self.head = strict, nn.Embedding(64, 8), nn.Linear(8, 64)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids, attention_mask, position_ids):
        self.calls += 1
        if self.strict and attention_mask.ndim == 4:
            raise ValueError("a mask of 4 dimensions\nand more")
        return self.head(self.embed(input_ids).cumsum(1))


def check(network, batch=PACKED):
    network = network if isinstance(network, nn.Module) else AutoModelForCausalLM.from_config(network)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    PackingCheck().check(trainer, BaseModule(network), batch)
    return network


@pytest.mark.parametrize("kind", SEEN)
def test_rows_that_see_each_other_are_refused(kind):
    with pytest.raises(ConfigurationError, match=r"packing: a row gets other logits .* set packing to false"):
        check(SEEN[kind])


@pytest.mark.parametrize("kind", APART)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_apart_pass(kind, dtype):
    check(AutoModelForCausalLM.from_config(APART[kind]).to(dtype))


def test_a_network_of_the_user_is_left_as_it_was():
    network = Sum(strict=False)
    with pytest.raises(ConfigurationError, match="a row gets other logits in Sum"):
        check(network)
    assert not network.calls and network.training
    with pytest.raises(ConfigurationError, match=r"Sum takes no packed rows \(ValueError: a mask of 4 dimensions\);"):
        check(Sum(strict=True))
    check(network, {**PACKED, "attention_mask": torch.ones(2, 16)})  # rows apart
