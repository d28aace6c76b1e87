"""Loaders: the position that a checkpoint saves, and evaluation on several ranks."""

from itertools import islice

import numpy as np
import pytest
import torch

from orthotrain.data.corpus.token_cache import TokenCache, TokenCacheWriter
from orthotrain.data.corpus.token_windows import TokenWindows
from orthotrain.data.instructions.packing import PackedRows
from orthotrain.data.instructions.padding import PaddedRows
from orthotrain.data.loaders import Loading, ShuffledLoader, eval_loader, train_loader
from orthotrain.data.sampling import TrainSampler
from orthotrain.errors import ConfigurationError

PAD = 1


@pytest.fixture
def cache(tmp_path):
    with TokenCacheWriter(tmp_path / "x.tokens", 1 << 20) as writer:
        writer.append(list(range(1000)), 1000)
        writer.commit("t", "s")
    return TokenCache.open(tmp_path / "x.tokens")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_from_its_state_without_a_trainer(cache, workers):
    def loader():
        windows = TokenWindows(cache, 9)
        sampler = TrainSampler(len(windows), 5, 0, 1, seed=0)
        return ShuffledLoader(windows, batch_size=None, sampler=sampler, num_workers=workers)

    whole = [batch["input_ids"] for batch in loader()]
    first, again = loader(), loader()
    assert first.state_dict()["batches"] == 0
    iterator = iter(first)
    for _ in range(4):
        next(iterator)
    state = first.state_dict()
    assert all(type(value) is int for name, value in state.items() if name != "data")
    again.load_state_dict(state)
    assert again.state_dict() == state, "a checkpoint before the first batch keeps the place"
    assert len(again) == len(whole)
    rest = [batch["input_ids"] for batch in again]
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[4:], strict=True))
    assert len(list(again)) == len(whole), "the next epoch is whole"


def test_a_place_inside_an_epoch_of_another_order_is_refused(cache):
    def loader(batch_size, length=9):
        windows = TokenWindows(cache, length)
        sampler = TrainSampler(len(windows), batch_size, 0, 1, seed=0)
        return ShuffledLoader(windows, batch_size=None, sampler=sampler)

    state = loader(5).state_dict() | {"batches": 3}
    with pytest.raises(
        ConfigurationError, match=r"3 batches into epoch 0 with batch_size 5; this run has batch_size 4"
    ):
        loader(4).load_state_dict(state)
    with pytest.raises(ConfigurationError, match="samples 111; this run has samples 99"):
        loader(5, length=10).load_state_dict(state)
    loader(4).load_state_dict(state | {"batches": 111 // 5})  # the end of the epoch: nothing left to be exact about


def sequences(loader):
    return [batch["input_ids"].tolist() for batch in loader]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_resumes_mid_epoch(make_rows, packed, workers):
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
def test_evaluation_sees_every_row_once(make_rows, packed, ranks):
    rows = make_rows([7, 3, 11, 5, 2, 9, 4, 10, 8])
    order = rows.lengths.argsort(kind="stable")
    dataset = PackedRows(rows, 12, PAD) if packed else PaddedRows(rows, PAD, order)
    loaders = [eval_loader(dataset, Loading(2, rank, ranks)) for rank in range(ranks)]
    batches = [list(loader) for loader in loaders]
    assert len({len(share) for share in batches}) == 1
    counted = sum(int((batch["labels"] >= 0).sum()) for share in batches for batch in share)
    assert counted == sum(int((rows.inputs_and_labels(row)[1] >= 0).sum()) for row in range(len(rows)))


def test_evaluation_begins_with_rows_of_all_lengths(make_rows):
    rows = make_rows(np.random.default_rng(0).integers(5, 100, 400))
    dataset = PaddedRows(rows, PAD, rows.lengths.argsort(kind="stable"))
    first = [batch["attention_mask"] for batch in islice(eval_loader(dataset, Loading(4, seed=7)), 16)]
    assert sum(int(mask.sum()) for mask in first) / 64 == pytest.approx(rows.lengths.mean(), rel=0.1)
    assert all(mask.float().mean() > 0.9 for mask in first), "a batch holds rows of similar length"
    assert not torch.equal(first[0], next(iter(eval_loader(dataset, Loading(4, seed=8))))["attention_mask"])
