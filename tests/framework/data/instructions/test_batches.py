"""Batches: what padding and packing hold, what the model sees of them, and their order over epochs and ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from orthotrain.data.instructions.chat import EncodedExample
from orthotrain.data.instructions.loaders import Loading, eval_loader, train_loader
from orthotrain.data.instructions.packing import PackedRows, block_causal_mask, pack
from orthotrain.data.instructions.padding import LengthGroupedSampler, PaddedRows
from orthotrain.data.instructions.prompts import choose_rows, generation_batch
from orthotrain.data.instructions.token_rows import TokenRows

PAD = 1


def make_rows(lengths, vocabulary=64):
    """Rows of random tokens whose last third is the response; each begins with its own number."""
    generator, rows = np.random.default_rng(0), TokenRows()
    for number, length in enumerate(lengths):
        tokens = generator.integers(2, vocabulary, length + 1).tolist()
        tokens[0] = 2 + number % (vocabulary - 2)
        prompt = max(1, 2 * length // 3)
        rows.append(
            EncodedExample(tokens, [False] * prompt + [True] * (length + 1 - prompt), prompt), f"answer {number}"
        )
    return rows


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
def test_the_model_sees_a_packed_row_as_if_it_were_alone(use_cache):
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


def test_the_model_sees_a_padded_row_as_if_it_were_alone():
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


def random_lengths(count):
    return np.random.default_rng(1).integers(5, 200, count)


def test_length_grouping_pads_little():
    lengths = random_lengths(1000)
    batches = list(LengthGroupedSampler(lengths, 8, 0, 1, seed=0))
    held = sum(lengths[rows].sum() for rows in batches)
    padded = sum(8 * lengths[rows].max() for rows in batches)
    assert held / padded > 0.95
    shuffled = np.random.default_rng(2).permutation(lengths)[: 8 * len(batches)].reshape(-1, 8)
    assert shuffled.sum() / (8 * shuffled.max(1).sum()) < 0.7


def test_length_grouping_is_deterministic_by_seed_and_epoch():
    def order(seed, epoch):
        sampler = LengthGroupedSampler(random_lengths(100), 4, 0, 1, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert sorted(row for rows in order(0, 1) for row in rows) == list(range(100))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_what_one_rank_sees_with_accumulation(ranks):
    lengths = random_lengths(24 * ranks)
    alone = list(LengthGroupedSampler(lengths, 4, 0, 1, seed=0))
    shares = [list(LengthGroupedSampler(lengths, 4, rank, ranks, seed=0)) for rank in range(ranks)]
    assert [rows for step in zip(*shares, strict=True) for rows in step] == alone


def test_an_epoch_drops_only_what_fills_no_batch():
    shares = [list(LengthGroupedSampler(random_lengths(29), 4, rank, 2, seed=0)) for rank in range(2)]
    assert [len(share) for share in shares] == [3, 3]
    assert len({row for share in shares for rows in share for row in rows}) == 24


def sequences(loader):
    return [batch["input_ids"].tolist() for batch in loader]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_resumes_mid_epoch(packed, workers):
    rows = make_rows(np.random.default_rng(3).integers(2, 20, 50))
    dataset = PackedRows(rows, 20, PAD) if packed else PaddedRows(rows, PAD)
    loading = Loading(batch_size=4, num_workers=workers, seed=5)
    whole = sequences(train_loader(dataset, loading))
    first = train_loader(dataset, loading)
    iterator = iter(first)
    begun = [next(iterator)["input_ids"].tolist() for _ in range(3)]
    state = first.state_dict()
    second = train_loader(dataset, loading)
    second.load_state_dict(state)
    assert len(second) == len(whole)
    assert begun + sequences(second) == whole


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_sees_every_row_once(packed, ranks):
    rows = make_rows([7, 3, 11, 5, 2, 9, 4, 10, 8])
    order = rows.lengths.argsort(kind="stable")
    dataset = PackedRows(rows, 12, PAD) if packed else PaddedRows(rows, PAD, order)
    loaders = [eval_loader(dataset, Loading(2, rank, ranks)) for rank in range(ranks)]
    batches = [list(loader) for loader in loaders]
    assert len({len(share) for share in batches}) == 1
    counted = sum(int((batch["labels"] >= 0).sum()) for share in batches for batch in share)
    assert counted == sum(int((rows.inputs_and_labels(row)[1] >= 0).sum()) for row in range(len(rows)))


def test_prompts_end_together():
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
