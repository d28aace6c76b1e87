"""Prompts to answer and the responses to compare answers with."""

from orthotrain.data.instructions.generation_batches import choose_rows, generation_batch
from orthotrain.data.instructions.token_rows import TokenRows

PAD = 1


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
