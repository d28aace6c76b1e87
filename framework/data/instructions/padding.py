"""Rows of similar length in one padded batch, in a deterministic order that ranks share and that resumes."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from orthotrain.data.instructions.token_rows import IGNORED, TokenRows
from orthotrain.data.sampling import TrainSampler

POOL_BATCHES = 64
"""How many batches are sorted together: more pads less, fewer shuffles better."""


def pad(rows: Sequence[torch.Tensor], value: int, side: Literal["left", "right"] = "right") -> torch.Tensor:
    """Return rows of shape ``(length,)`` as one ``(B, longest)``, filled up with ``value`` on a side."""
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


class PaddedRows(Dataset):
    """Rows padded on the right to the longest of their batch.

    A batch is ``input_ids``, ``labels`` and ``attention_mask`` (1 on tokens, 0 on padding), int64 of shape ``(B, T)``;
    for an encoder-decoder the labels are as wide as the longest response.

    Args:
        rows: The rows.
        pad_token: What fills the end of a row; never a label and never attended to.
        order: Which row an index means; by default the rows' own order.
    """

    def __init__(self, rows: TokenRows, pad_token: int, order: np.ndarray | None = None) -> None:
        self.rows, self.pad_token = rows, pad_token
        self.order = np.arange(len(rows)) if order is None else order

    def __len__(self) -> int:
        return len(self.order)

    @property
    def lengths(self) -> np.ndarray:
        """Length of the row behind each index."""
        return self.rows.lengths[self.order]

    def __getitem__(self, index: int | list[int]) -> dict[str, torch.Tensor]:
        """The batch of these rows; a batch of one for a single index."""
        pairs = [self.rows.inputs_and_labels(row) for row in self.order[np.atleast_1d(index)].tolist()]
        inputs, labels = zip(*(map(torch.from_numpy, pair) for pair in pairs), strict=True)
        return {
            "input_ids": pad(inputs, self.pad_token),
            "labels": pad(labels, IGNORED),
            "attention_mask": pad([torch.ones_like(row) for row in inputs], 0),
        }

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """What a loader that batches by itself asks for."""
        return self[indices]


class LengthGroupedSampler(TrainSampler):
    """Lists of rows of similar length, in an order drawn from (seed, epoch), every rank taking each R-th list.

    An epoch's permutation is cut into pools of 64 batches, each pool sorted by length and cut into batches, and the
    batches of all pools shuffled. As in `TrainSampler`, R ranks and one rank that accumulates R batches see the same
    rows in each optimizer step, and an epoch drops what does not fill a batch on every rank.

    Args:
        lengths: Length of each row.
        batch_size: Rows of one batch on one rank.
        rank: This rank.
        world_size: R, the number of ranks.
        seed: Seed of the order.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        super().__init__(len(lengths), batch_size, rank, world_size, seed)
        self.lengths = torch.from_numpy(lengths)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        digest = hashlib.sha256(f"lengths {self.seed} {self.epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        order = torch.randperm(self.windows, generator=generator)
        order = order[: self.batches * self.batch_size * self.num_replicas]
        pools = order.split(POOL_BATCHES * self.batch_size)
        batches = torch.cat([pool[self.lengths[pool].argsort(stable=True)] for pool in pools]).view(-1, self.batch_size)
        turns = torch.randperm(len(batches), generator=generator)
        return iter(batches[turns][self.rank :: self.num_replicas][self.first_batch :].tolist())
