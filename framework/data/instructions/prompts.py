"""Prompts to answer and the answers to compare with: what generation metrics are computed on."""

from typing import Any

import numpy as np
import torch

from orthotrain.data.instructions.padding import pad
from orthotrain.data.instructions.token_rows import TokenRows


def generation_batch(rows: TokenRows, chosen: list[int], pad_token: int) -> dict[str, Any]:
    """Prompts of one width: padded on the left where generation goes on at their end, on the right for an encoder.

    Args:
        rows: The rows.
        chosen: Which of them.
        pad_token: What fills the rest.

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
    """At most ``samples`` rows with a whole prompt, evenly spread over a split."""
    whole = np.flatnonzero(rows.prompt_lengths)
    places = np.linspace(0, max(len(whole) - 1, 0), min(samples, len(whole)), dtype=np.int64)
    return whole[np.unique(places)].tolist()
