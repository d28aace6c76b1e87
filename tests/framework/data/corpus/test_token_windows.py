import pytest
import torch

from orthotrain.data.corpus.token_cache import TokenCache, TokenCacheWriter
from orthotrain.data.corpus.token_windows import TokenWindows, document_beginnings


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


def test_beginnings_of_documents(tmp_path):
    with TokenCacheWriter(tmp_path / "x", 300) as writer:
        writer.append([5, 6, 7, 0, 0, 8, 0, 9, 9], 9)
        writer.commit("t", "s")
    cache = TokenCache.open(tmp_path / "x")
    assert document_beginnings(cache, 0, tokens=2) == [[5, 6], [8]]
    assert document_beginnings(cache, 0, documents=1) == [[5, 6, 7]]
    assert document_beginnings(cache, 77, tokens=3) == [[5, 6, 7]]
