import pytest
import torch
from torch.utils.data import DistributedSampler
from transformers import PreTrainedTokenizerFast

from orthotrain.data.corpus.sources import open_corpus
from orthotrain.data.corpus.streaming import StreamLoader, TokenStream
from orthotrain.data.corpus.token_cache import TokenCache, TokenCacheWriter
from orthotrain.data.corpus.tokenizing import Splitter
from orthotrain.data.evaluation import EvalBatches, document_beginnings
from orthotrain.data.sampling import ResumableLoader, TokenWindows, TrainSampler
from orthotrain.errors import ConfigurationError


@pytest.fixture
def cache(tmp_path):
    with TokenCacheWriter(tmp_path / "x.tokens", 1 << 20) as writer:
        writer.append(list(range(1000)), 1000)
        writer.commit("t", "s")
    return TokenCache.open(tmp_path / "x.tokens")


def test_labels_are_the_next_tokens_and_every_token_but_the_first_is_one_once(cache):
    windows = TokenWindows(cache, 7)
    assert len(windows) == 999 // 7
    batch = windows[list(range(len(windows)))]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["input_ids"] + 1)
    assert batch["labels"].flatten().tolist() == list(range(1, 1 + 7 * len(windows)))
    assert torch.equal(windows[3]["labels"], batch["labels"][3])


@pytest.mark.parametrize(("tokens", "windows"), [(0, 0), (1, 0), (10, 0), (11, 1), (20, 1), (21, 2)])
def test_a_window_needs_one_token_more_than_its_length(tmp_path, tokens, windows):
    with TokenCacheWriter(tmp_path / "x", 300) as writer:
        writer.append([1] * tokens, tokens)
        writer.commit("t", "s")
    assert len(TokenWindows(TokenCache.open(tmp_path / "x"), 10)) == windows


def order(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return list(sampler)


def test_the_order_is_a_permutation_of_seed_and_epoch():
    first = order(TrainSampler(100, 4, 0, 1, seed=3))
    assert sorted(first) == list(range(100))
    assert first == order(TrainSampler(100, 4, 0, 1, seed=3))
    assert first != order(TrainSampler(100, 4, 0, 1, seed=3), epoch=1)
    assert first != order(TrainSampler(100, 4, 0, 1, seed=4))
    assert order(TrainSampler(8, 2, 0, 1, seed=0)) == [0, 4, 5, 2, 1, 7, 6, 3], "on every machine"


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


def test_lightning_leaves_our_samplers_in_place():
    assert issubclass(TrainSampler, DistributedSampler) and issubclass(EvalBatches, DistributedSampler)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_sees_every_window_once_with_as_many_batches_on_every_rank(ranks, batch_size):
    for windows in range(ranks, 70):
        shares = [list(EvalBatches(windows, batch_size, rank, ranks)) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        rounds = [index for group in zip(*shares, strict=True) for batch in group for index in batch]
        assert rounds == list(range(windows))
        sizes = [len(batch) for share in shares for batch in share]
        assert min(sizes) >= 1 and max(sizes) <= batch_size + 1
    with pytest.raises(ConfigurationError, match="cannot be shared"):
        EvalBatches(ranks - 1, batch_size, 0, ranks)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_from_its_state_without_a_trainer(cache, workers):
    def loader():
        windows = TokenWindows(cache, 9)
        sampler = TrainSampler(len(windows), 5, 0, 1, seed=0)
        return ResumableLoader(windows, batch_size=5, sampler=sampler, drop_last=True, num_workers=workers)

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
        return ResumableLoader(windows, batch_size=batch_size, sampler=sampler, drop_last=True)

    state = loader(5).state_dict() | {"batches": 3}
    with pytest.raises(
        ConfigurationError, match=r"3 batches into epoch 0 with batch_size 5; this run has batch_size 4"
    ):
        loader(4).load_state_dict(state)
    with pytest.raises(ConfigurationError, match="windows 111; this run has windows 99"):
        loader(5, length=10).load_state_dict(state)
    loader(4).load_state_dict(state | {"batches": 111 // 5})  # the end of the epoch: nothing left to be exact about


def test_beginnings_of_documents(tmp_path):
    with TokenCacheWriter(tmp_path / "x", 300) as writer:
        writer.append([5, 6, 7, 0, 0, 8, 0, 9, 9], 9)
        writer.commit("t", "s")
    cache = TokenCache.open(tmp_path / "x")
    assert document_beginnings(cache, 0, tokens=2) == [[5, 6], [8]]
    assert document_beginnings(cache, 0, documents=1) == [[5, 6, 7]]
    assert document_beginnings(cache, 77, tokens=3) == [[5, 6, 7]]


@pytest.fixture(scope="module")
def tokenizer(corpus) -> PreTrainedTokenizerFast:
    from orthotrain.data.tokenizers import train_tokenizer

    return train_tokenizer((document.text for document in open_corpus(str(corpus)).documents()), 300)


def stream(corpus, tokenizer, **options):
    return TokenStream(open_corpus(str(corpus)), Splitter(0, 0.2, 0.0), tokenizer, 32, 3, **options)


def test_a_stream_packs_the_train_documents_in_order(corpus, tokenizer):
    batches = [batch for batch, _ in stream(corpus, tokenizer)]
    assert {tuple(batch["input_ids"].shape) for batch in batches} == {(3, 32)}
    tokens = torch.cat([batch["input_ids"].flatten() for batch in batches])
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    assert torch.equal(tokens[1:], labels[:-1])
    split = Splitter(0, 0.2, 0.0)
    kept = [document.text for document in open_corpus(str(corpus)).documents() if split(document) == "train"]
    whole = [token for text in kept for token in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    assert tokens.tolist() == whole[: len(tokens)] and len(whole) - len(tokens) <= 3 * 32


def test_a_stream_continues_from_every_position(corpus, tokenizer):
    items = list(stream(corpus, tokenizer))
    for number in (0, 1, len(items) // 2, len(items) - 2):
        again = stream(corpus, tokenizer)
        again.start = items[number][1]
        rest = list(again)
        assert [position for _, position in rest] == [position for _, position in items[number + 1 :]]
        assert torch.equal(rest[0][0]["labels"], items[number + 1][0]["labels"])


def test_ranks_of_a_stream_share_each_round(corpus, tokenizer):
    one = [batch["input_ids"] for batch, _ in stream(corpus, tokenizer)]
    two = [list(stream(corpus, tokenizer, rank=rank, world_size=2)) for rank in range(2)]
    assert [position for _, position in two[0]] == [position for _, position in two[1]]
    for step, (mine, other) in enumerate(zip(*two, strict=True)):
        together = {row.numpy().tobytes() for batch, _ in (mine, other) for row in batch["input_ids"]}
        assert together == {row.numpy().tobytes() for batch in one[2 * step : 2 * step + 2] for row in batch}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_loader_resumes(corpus, tokenizer, workers):
    whole = [batch["labels"] for batch in StreamLoader(stream(corpus, tokenizer), num_workers=workers)]
    first, again = (StreamLoader(stream(corpus, tokenizer), num_workers=workers) for _ in range(2))
    iterator = iter(first)
    for _ in range(3):
        next(iterator)
    again.load_state_dict(first.state_dict())
    assert all(torch.equal(batch["labels"], labels) for batch, labels in zip(again, whole[3:], strict=True))
    place = {name: value for name, value in again.state_dict().items() if name != "data"}
    assert place == {"batches": 0, "document": 0, "token": 0}
    assert torch.equal(next(iter(again))["labels"], whole[0]), "the next epoch starts at the beginning"
