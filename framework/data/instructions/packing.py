"""Several rows in one sequence: which rows share a sequence, and the masks that keep the rows apart."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import default_collate

from orthotrain.data.instructions.token_rows import IGNORED, TokenRows
from orthotrain.data.loaders import BatchDataset


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Distribute rows over sequences by best-fit decreasing.

    The rows are taken from the longest to the shortest; each goes to the sequence in which it leaves the least room.

    Args:
        lengths: Length of each row, at most ``capacity``.
        capacity: Length of a sequence.

    Returns:
        The rows of each sequence; every row once.

    Example:
        >>> pack([5, 3, 2, 6], capacity=8)
        [[3, 2], [0, 1]]
    """
    packs: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set if by_room[r] is not empty
    for row in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[row])
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, number = capacity, len(packs)
            packs.append([])
        packs[number].append(row)
        if room > length:
            by_room[room - length].append(number)
            rooms |= 1 << (room - length)
    return packs


def block_causal_mask(segments: torch.Tensor) -> torch.Tensor:
    """Return a mask that lets a token see itself and the tokens before it in its own segment.

    Args:
        segments: Number of the segment of each token, shape ``(..., T)``.

    Returns:
        Bool, shape ``(..., T, T)``: query by key, True if attention is allowed.
    """
    same = segments[..., :, None] == segments[..., None, :]
    return same & torch.ones_like(same).tril()


class PackedRows(BatchDataset):
    """Sequences of static length made of whole rows; packed once, so that all epochs have the same length.

    A sequence is ``input_ids``, ``labels`` and ``position_ids`` of shape ``(T,)``, positions beginning at 0 in each
    row, and ``attention_mask``, bool of shape ``(1, T, T)``. transformers gives the batched mask to scaled-dot-product
    attention unchanged. Padding is a segment of its own, so that each query has a key.

    Args:
        rows: The rows.
        sequence_length: T; no row is longer.
        pad_token: The token that fills the end of a sequence.
    """

    def __init__(self, rows: TokenRows, sequence_length: int, pad_token: int) -> None:
        self.rows, self.sequence_length, self.pad_token = rows, sequence_length, pad_token
        self.packs = pack(rows.lengths, sequence_length)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int | list[int]) -> dict[str, torch.Tensor]:
        """Return one sequence, or a batch of sequences for a list."""
        return self._sequence(index) if isinstance(index, int) else default_collate([*map(self._sequence, index)])

    def _sequence(self, index: int) -> dict[str, torch.Tensor]:
        length = self.sequence_length
        sequence = {
            "input_ids": torch.full((length,), self.pad_token),
            "labels": torch.full((length,), IGNORED),
            "position_ids": torch.zeros(length, dtype=torch.int64),
        }
        segments = torch.zeros(length, dtype=torch.int64)
        start = 0
        for segment, row in enumerate(self.packs[index], start=1):
            inputs, labels = self.rows.inputs_and_labels(row)
            span = slice(start, start + len(inputs))
            sequence["input_ids"][span] = torch.from_numpy(inputs)
            sequence["labels"][span] = torch.from_numpy(labels)
            sequence["position_ids"][span] = torch.arange(len(inputs))
            segments[span] = segment
            start = span.stop
        sequence["position_ids"][start:] = torch.arange(length - start)
        return {**sequence, "attention_mask": block_causal_mask(segments)[None]}
