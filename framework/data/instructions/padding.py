"""Rows and prompts padded to the longest row of their batch."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from orthotrain.data.instructions.token_rows import IGNORED, TokenRows
from orthotrain.data.loaders import BatchDataset
from orthotrain.data.sampling import LengthGroupedSampler


def pad(rows: Sequence[torch.Tensor], value: int, side: Literal["left", "right"] = "right") -> torch.Tensor:
    """Return rows of shape ``(length,)`` as one tensor ``(B, longest)``, filled up with ``value`` on one side."""
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


class PaddedRows(BatchDataset):
    """Rows padded on the right to the longest row of their batch.

    A batch is ``input_ids``, ``labels`` and ``attention_mask`` (1 on tokens, 0 on padding), int64 of shape ``(B, T)``;
    for an encoder-decoder the labels are as wide as the longest response. Training batches hold rows of similar length.

    Args:
        rows: The rows.
        pad_token: The token that fills the end of a row; never a label and never attended to.
        order: The row of each index; by default the rows' own order.
    """

    def __init__(self, rows: TokenRows, pad_token: int, order: np.ndarray | None = None) -> None:
        self.rows, self.pad_token = rows, pad_token
        self.order = np.arange(len(rows)) if order is None else order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int | list[int]) -> dict[str, torch.Tensor]:
        """Return the batch of these rows; a batch of one row for a single index."""
        pairs = [self.rows.inputs_and_labels(row) for row in self.order[np.atleast_1d(index)].tolist()]
        inputs, labels = zip(*(map(torch.from_numpy, pair) for pair in pairs), strict=True)
        return {
            "input_ids": pad(inputs, self.pad_token),
            "labels": pad(labels, IGNORED),
            "attention_mask": pad([torch.ones_like(row) for row in inputs], 0),
        }

    def train_sampler(self, *arguments: int) -> LengthGroupedSampler:
        """Return the sampler of batches of similar length."""
        return LengthGroupedSampler(self.rows.lengths[self.order], *arguments)


def generation_batch(rows: TokenRows, chosen: list[int], pad_token: int) -> dict[str, Any]:
    """Return the prompts of some rows, padded on the left for a decoder and on the right for an encoder.

    Args:
        rows: All rows.
        chosen: Indices of the rows of the batch.
        pad_token: The token that fills up shorter prompts.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 of shape ``(B, T)``, and ``references``, a list of B strings.
    """
    prompts = [torch.tensor(rows.prompt(row)) for row in chosen]
    return {
        "input_ids": pad(prompts, pad_token, rows.prompt_padding),
        "attention_mask": pad([torch.ones_like(prompt) for prompt in prompts], 0, rows.prompt_padding),
        "references": [rows.references[row] for row in chosen],
    }


def choose_rows(rows: TokenRows, samples: int) -> list[int]:
    """Return indices of at most ``samples`` rows whose prompt was not truncated, evenly spread over a split."""
    whole = np.flatnonzero(rows.prompt_lengths)
    positions = np.linspace(0, max(len(whole) - 1, 0), min(samples, len(whole)), dtype=np.int64)
    return whole[np.unique(positions)].tolist()
