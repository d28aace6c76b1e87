"""Padded rows: the network sees a row as if it were alone."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from orthotrain.data.instructions.padding import PaddedRows, choose_rows, generation_batch
from orthotrain.data.instructions.token_rows import TokenRows

PAD = 1


def test_the_model_sees_a_padded_row_as_if_it_were_alone(make_rows):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
    rows = make_rows([5, 9, 3])
    batch = PaddedRows(rows, PAD)[[0, 1, 2]]
    assert batch["input_ids"].shape == (3, 9)
    assert batch["attention_mask"].sum(1).tolist() == [5, 9, 3]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    with torch.no_grad():
        padded = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for row in range(3):
            tokens = torch.from_numpy(rows.inputs_and_labels(row)[0])
            torch.testing.assert_close(padded[row, : len(tokens)], model(tokens[None]).logits[0], rtol=1e-5, atol=1e-5)


def test_prompts_end_together(make_rows):
    rows = make_rows([6, 12, 9])
    batch = generation_batch(rows, [0, 1, 2], PAD)
    assert batch["references"] == ["answer 0", "answer 1", "answer 2"]
    assert batch["attention_mask"].sum(1).tolist() == [4, 8, 6]
    for place in range(3):
        prompt = batch["input_ids"][place][batch["attention_mask"][place].bool()]
        assert prompt.tolist() == rows.prompt(place)
        assert batch["attention_mask"][place].diff().min() >= 0
    assert choose_rows(rows, 2) == [0, 2]
    assert choose_rows(rows, 10) == [0, 1, 2]
    assert choose_rows(TokenRows(), 3) == []
