import pytest
import torch
from transformers import PreTrainedTokenizerFast

from orthotrain.data.corpus.sources import open_corpus
from orthotrain.data.corpus.streaming import StreamLoader, TokenStream
from orthotrain.data.splits import PositionSplitter, Splitter
from orthotrain.data.tokenizers import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(corpus) -> PreTrainedTokenizerFast:

    return train_tokenizer((document.text for document in open_corpus(str(corpus)).documents()), 300)


def stream(corpus, tokenizer, **options):
    return TokenStream(open_corpus(str(corpus)), Splitter(0, 0.2, 0.2), tokenizer, 32, 3, **options)


def test_a_stream_packs_the_train_documents_in_order(corpus, tokenizer):
    batches = [batch for batch, _ in stream(corpus, tokenizer)]
    assert {tuple(batch["input_ids"].shape) for batch in batches} == {(3, 32)}
    tokens = torch.cat([batch["input_ids"].flatten() for batch in batches])
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    assert torch.equal(tokens[1:], labels[:-1])
    split = Splitter(0, 0.2, 0.2)
    kept = [document.text for document in open_corpus(str(corpus)).documents() if split(document.key) == "train"]
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


def test_a_stream_of_one_document_leaves_out_its_held_out_part_and_resumes(tmp_path, corpus, tokenizer):
    text = "".join(path.read_text() for path in sorted(corpus.rglob("*.txt")))
    (tmp_path / "x.txt").write_text(text)
    source, cut = open_corpus(str(tmp_path / "x.txt")), [len(text) // 2, len(text) // 2 + 5000]
    splitter = PositionSplitter((cut[0], cut[1], cut[1]), rest="train")
    parts = [(split, part.text) for split, part in splitter.split(source.documents())]
    assert [split for split, _ in parts] == ["train", "val", "train"] and "".join(part for _, part in parts) == text
    items = list(TokenStream(source, splitter, tokenizer, 32, 3))
    tokens = torch.cat([batch["input_ids"].flatten() for batch, _ in items]).tolist()
    whole = [token for part in (0, 2) for token in [*tokenizer.encode(parts[part][1]), tokenizer.eos_token_id]]
    assert tokens == whole[: len(tokens)] and len(whole) - len(tokens) <= 3 * 32
    for number in (0, len(items) // 2 + 2, len(items) - 2):
        again = TokenStream(source, splitter, tokenizer, 32, 3)
        again.start = items[number][1]
        assert torch.equal(next(iter(again))[0]["labels"], items[number + 1][0]["labels"])
