"""A token cache cut into windows of equal length, and the beginnings of its documents as prompts."""

import numpy as np
import torch

from orthotrain.data.corpus.token_cache import TokenCache
from orthotrain.data.loaders import BatchDataset

_SCANNED_TOKENS = 1 << 20


def as_batch(windows: np.ndarray) -> dict[str, torch.Tensor]:
    """Split windows of T+1 tokens, shape ``(..., T + 1)``, into inputs and the tokens that follow them.

    Returns:
        ``input_ids`` and ``labels``, both int64 of shape ``(..., T)``; ``labels[t]`` follows ``input_ids[t]``.
    """
    tokens = torch.from_numpy(windows.astype(np.int64))
    return {"input_ids": tokens[..., :-1].contiguous(), "labels": tokens[..., 1:].contiguous()}


class TokenWindows(BatchDataset):
    """Windows of a token cache. Neighbors share one token, so that every token but the first is a label once.

    Args:
        cache: The tokens.
        sequence_length: T, the length of ``input_ids``.
    """

    def __init__(self, cache: TokenCache, sequence_length: int) -> None:
        self.cache = cache
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return max(0, len(self.cache.tokens) - 1) // self.sequence_length

    def __getitem__(self, index: int | list[int]) -> dict[str, torch.Tensor]:
        """Return one window, shape ``(T,)``, or a batch of windows, shape ``(B, T)``, for a list."""
        starts = np.asarray(index)[..., None] * self.sequence_length
        return as_batch(self.cache.tokens[starts + np.arange(self.sequence_length + 1)])


def document_beginnings(cache: TokenCache, end_of_text: int, documents: int = 8, tokens: int = 32) -> list[list[int]]:
    """Return the first tokens of the first documents of a split.

    Args:
        cache: The tokens of the split.
        end_of_text: The token that closes a document.
        documents: Most documents.
        tokens: Most tokens of each document.
    """
    head = cache.tokens[:_SCANNED_TOKENS]
    ends = np.flatnonzero(head == end_of_text).tolist() or [len(head)]
    starts = [0, *(end + 1 for end in ends)]
    spans = [(start, min(end, start + tokens)) for start, end in zip(starts, ends, strict=False) if end > start]
    return [head[start:end].tolist() for start, end in spans[:documents]]
