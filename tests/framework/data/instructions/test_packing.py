"""Packed rows: every row once, and the network sees a row as if it were alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from orthotrain.data.instructions.packing import PackedRows, block_causal_mask, pack

PAD = 1


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=60))
def test_packing_holds_every_row_once_and_wastes_little(lengths):
    packs = pack(lengths, 32)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    fills = [sum(lengths[row] for row in rows) for rows in packs]
    assert max(fills) <= 32
    assert sum(fill <= 16 for fill in fills) <= 1, "two half-empty sequences would have fitted in one"


def test_masks_keep_segments_apart_and_causal():
    mask = block_causal_mask(torch.tensor([[1, 1, 2, 2, 2, 0]]))
    expected = torch.block_diag(*(torch.ones(n, n).tril() for n in (2, 3, 1))).bool()
    assert torch.equal(mask, expected[None])


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_model_sees_a_packed_row_as_if_it_were_alone(use_cache, make_rows):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, use_cache=use_cache, **sizes)
    model = LlamaForCausalLM(config).eval()
    assert model.config._attn_implementation == "sdpa"
    rows = make_rows([5, 9, 3, 7, 11, 2, 4])
    dataset = PackedRows(rows, 20, PAD)
    batch = dataset[list(range(len(dataset)))]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    with torch.no_grad():
        packed = model(**inputs).logits
        for number, members in enumerate(dataset.packs):
            start = 0
            for row in members:
                tokens, labels = map(torch.from_numpy, rows.inputs_and_labels(row))
                span = slice(start, start + len(tokens))
                alone = model(tokens[None]).logits[0]
                torch.testing.assert_close(packed[number, span], alone, rtol=1e-5, atol=1e-5)
                assert torch.equal(batch["labels"][number, span], labels)
                start = span.stop
            assert (batch["labels"][number, start:] == -100).all()
    assert packed.isfinite().all()
    with torch.no_grad():
        unseparated = model(batch["input_ids"]).logits
    assert (unseparated - packed).abs().max() > 1e-3, "the mask of this test must matter"
