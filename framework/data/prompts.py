"""Prompts to answer and the answers to compare with: what generation metrics are computed on."""

from typing import Any

import numpy as np
import torch

from orthotrain.data.token_rows import TokenRows


def generation_batch(rows: TokenRows, chosen: list[int], pad_token: int) -> dict[str, Any]:
    """Prompts padded on the left, so that all of them end where generation begins.

    Args:
        rows: The rows.
        chosen: Which of them.
        pad_token: What fills the beginning.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 of shape ``(B, T)``, and ``references``, a list of B strings.
    """
    prompts = [rows.prompt(row) for row in chosen]
    shape = len(prompts), max(map(len, prompts))
    tokens, mask = torch.full(shape, pad_token), torch.zeros(shape, dtype=torch.int64)
    for place, prompt in enumerate(prompts):
        tokens[place, shape[1] - len(prompt) :] = torch.tensor(prompt)
        mask[place, shape[1] - len(prompt) :] = 1
    return {"input_ids": tokens, "attention_mask": mask, "references": [rows.references[row] for row in chosen]}


def choose_rows(rows: TokenRows, samples: int) -> list[int]:
    """At most ``samples`` rows with a whole prompt, evenly spread over a split."""
    whole = np.flatnonzero(rows.prompt_lengths)
    places = np.linspace(0, max(len(whole) - 1, 0), min(samples, len(whole)), dtype=np.int64)
    return whole[np.unique(places)].tolist()
