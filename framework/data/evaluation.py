"""Held-out text: every window once, shared evenly by the ranks, and the beginnings of documents to continue."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from torch.utils.data import DistributedSampler

from orthotrain.data.corpus.token_cache import TokenCache
from orthotrain.errors import ConfigurationError

_SCANNED_TOKENS = 1 << 20


class EvalBatches(DistributedSampler):
    """Lists of windows for one of several ranks: all windows once, in order, the same number of batches on each rank.

    PyTorch's own sampler repeats windows to make ranks equal, which biases a metric; unequal batch counts would hang
    collectives. Here the last round shares what is left evenly, with up to one window more than ``batch_size`` in a
    batch where the rest alone would leave a rank without any.

    Args:
        windows: Number of windows.
        batch_size: Windows of one batch on one rank.
        rank: This rank.
        world_size: Number of ranks.
    """

    def __init__(self, windows: int, batch_size: int, rank: int, world_size: int) -> None:
        super().__init__(range(windows), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        if windows < world_size:
            raise ConfigurationError(f"{windows} windows cannot be shared by {world_size} ranks; use fewer devices")
        full, rest = divmod(windows, batch_size * world_size)
        if full and rest < world_size:
            full, rest = full - 1, rest + batch_size * world_size
        edges = [number * batch_size for number in range(full * world_size)]
        edges += [windows - rest + rest * number // world_size for number in range(world_size + 1)]
        batches = [list(range(start, end)) for start, end in pairwise(edges)]
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        return iter(self.batches)


def document_beginnings(cache: TokenCache, end_of_text: int, documents: int = 8, tokens: int = 32) -> list[list[int]]:
    """The first tokens of the first documents of a split.

    Args:
        cache: The split.
        end_of_text: The token that closes a document.
        documents: At most so many.
        tokens: At most so many of each.
    """
    head = cache.tokens[:_SCANNED_TOKENS]
    ends = np.flatnonzero(head == end_of_text).tolist() or [len(head)]
    starts = [0, *(end + 1 for end in ends)]
    spans = [(start, min(end, start + tokens)) for start, end in zip(starts, ends, strict=False) if end > start]
    return [head[start:end].tolist() for start, end in spans[:documents]]
