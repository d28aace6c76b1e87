"""Batches of prompts with the responses of the rows: generation metrics compare answers with these responses."""

from typing import Any

import numpy as np
import torch

from orthotrain.data.instructions.padding import pad
from orthotrain.data.instructions.token_rows import TokenRows


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
