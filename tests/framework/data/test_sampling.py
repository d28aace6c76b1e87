"""Samplers: the order of batches over epochs and ranks."""

import numpy as np
import pytest
from torch.utils.data import DistributedSampler

from orthotrain.data.sampling import EvalSampler, LengthGroupedSampler, TrainSampler
from orthotrain.errors import ConfigurationError


def order(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return [index for batch in sampler for index in batch]


def test_the_order_is_a_permutation_of_seed_and_epoch():
    first = order(TrainSampler(100, 4, 0, 1, seed=3))
    assert sorted(first) == list(range(100))
    assert first == order(TrainSampler(100, 4, 0, 1, seed=3))
    assert first != order(TrainSampler(100, 4, 0, 1, seed=3), epoch=1)
    assert first != order(TrainSampler(100, 4, 0, 1, seed=4))
    assert order(TrainSampler(8, 2, 0, 1, seed=0)) == [0, 4, 5, 2, 1, 7, 6, 3], "on every machine"
    assert [list(TrainSampler(8, 2, rank, 2, seed=0)) for rank in range(2)] == [[[0, 5], [1, 6]], [[4, 2], [7, 3]]]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_see_in_a_step_what_one_rank_sees_in_accumulated_batches(ranks):
    batch = 4
    one = order(TrainSampler(103, batch, 0, 1, seed=0))
    many = [order(TrainSampler(103, batch, rank, ranks, seed=0)) for rank in range(ranks)]
    steps = len(many[0]) // batch
    assert {len(mine) for mine in many} == {steps * batch} and steps == 103 // (batch * ranks)
    for step in range(steps):
        accumulated = one[step * batch * ranks : (step + 1) * batch * ranks]
        together = [index for mine in many for index in mine[step * batch : (step + 1) * batch]]
        assert sorted(accumulated) == sorted(together)


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
    lengths = np.array([5, 1, 8, 3, 9, 2, 7, 4])
    assert list(LengthGroupedSampler(lengths, 2, 0, 1, seed=0)) == [[1, 5], [3, 7], [2, 4], [0, 6]], "on every machine"
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


def test_lightning_leaves_our_samplers_in_place():
    for sampler in (TrainSampler(9, 2, 1, 3, seed=0), EvalSampler(9, 2, 1, 3)):
        assert isinstance(sampler, DistributedSampler) and (sampler.rank, sampler.num_replicas) == (1, 3)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_sees_every_window_once_with_as_many_batches_on_every_rank(ranks, batch_size):
    for windows in range(ranks, 70):
        shares = [list(EvalSampler(windows, batch_size, rank, ranks)) for rank in range(ranks)]
        assert {len(share) for share in shares} == {len(EvalSampler(windows, batch_size, 0, ranks))}
        assert sorted(index for share in shares for batch in share for index in batch) == list(range(windows))
        sizes = [len(batch) for share in shares for batch in share]
        some_would_have_none = 0 < windows % (batch_size * ranks) < ranks
        assert min(sizes) >= 1 and max(sizes) <= batch_size + some_would_have_none
    with pytest.raises(ConfigurationError, match="cannot be shared"):
        EvalSampler(ranks - 1, batch_size, 0, ranks)


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_first_batches_of_an_evaluation_are_a_fair_sample_of_rows_sorted_by_length(ranks):
    lengths = np.sort(np.random.default_rng(0).gamma(2.0, 40.0, 4003))
    for seed in range(4):
        shares = [list(EvalSampler(len(lengths), 4, rank, ranks, seed)) for rank in range(ranks)]
        assert shares[0] == list(EvalSampler(len(lengths), 4, 0, ranks, seed)), "the same in each epoch and run"
        for limit in (12, 16, 24, 100, 300):
            seen = [index for share in shares for batch in share[:limit] for index in batch]
            assert lengths[seen].mean() == pytest.approx(lengths.mean(), rel=0.1)
            assert np.median(lengths[seen]) == pytest.approx(np.median(lengths), rel=0.15)
    assert list(EvalSampler(400, 4, 0, 1, seed=0)) != list(EvalSampler(400, 4, 0, 1, seed=1))
    one = list(EvalSampler(400, 4, 0, 1))
    assert one == list(EvalSampler(400, 4, 0, 1, seed=0))
    assert [list(EvalSampler(9, 2, rank, 2)) for rank in range(2)] == [[[4, 5], [6, 7, 8]], [[0, 1], [2, 3]]]
    two = [list(EvalSampler(400, 4, rank, 2)) for rank in range(2)]
    assert [batch for pair in zip(*two, strict=True) for batch in pair] == one, "ranks share the batches of one rank"
