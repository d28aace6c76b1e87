"""Refuses to train or evaluate on packed rows a network in which the rows of a sequence see each other."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from orthotrain.callbacks.first_batch import FirstBatchCheck, tried_logits, two_rows
from orthotrain.errors import ConfigurationError

_TOKENS = 6


class PackingCheck(FirstBatchCheck):
    """Check a network, before its first batch of packed rows: the logits of a row must not depend on its place.

    A short row is passed before and behind another row, in evaluation mode and without gradients. In front it is as if
    alone, because the network is causal; behind it must get the same logits, whatever the other row is. The network's
    buffers and the generators of random numbers are restored. Batches without packed rows pass.
    """

    def applies(self, module: Any, batch: Any) -> bool:
        """Tell whether the module predicts the next tokens of packed rows."""
        return module.has_next_token_loss and _is_packed(batch)

    def shared(self, batch: Any) -> Any:
        """Return the tokens of a batch."""
        return batch["input_ids"]

    def try_network(self, trainer: L.Trainer, module: Any, batch: Any) -> None:
        """Refuse a network in which a row depends on the other rows of its sequence.

        Raises:
            ConfigurationError: Naming the network and the way out.
        """
        row, other = two_rows(module.model, batch, 2 * _TOKENS)
        name = type(module.model).__name__
        try:
            with trainer.precision_plugin.forward_context():
                apart = _rows_are_apart(module, row[:, :_TOKENS], row[:, _TOKENS:], other[:, _TOKENS:])
        except (ConfigurationError, torch.OutOfMemoryError):
            raise
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"packing: {name} takes no packed rows ({type(error).__name__}: {str(error).splitlines()[0][:100]}); "
                "set packing to false"
            ) from error
        if not apart:
            raise ConfigurationError(
                f"packing: a row gets other logits in {name} behind another row of its sequence, because the network "
                "ignores the attention mask or the positions of packed rows; set packing to false"
            )


def _is_packed(batch: Any) -> bool:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return isinstance(mask, Tensor) and mask.ndim == 4 and "position_ids" in batch


def _rows_are_apart(module: Any, first: Tensor, second: Tensor, other: Tensor) -> bool:
    """Tell whether a row gets the same logits alone and behind other rows; each row is ``(1, T)`` tokens."""

    def front(*rows: Tensor) -> Tensor:
        return _logits(module, rows)[:, : first.shape[1]].float()

    def back(*rows: Tensor) -> Tensor:
        return _logits(module, rows)[:, -first.shape[1] :].float()

    ahead, behind = front(first, second), back(second, first)
    scale, eps = ahead.abs().max(), torch.finfo(_logits(module, [first]).dtype).eps
    # Experts round by all tokens, and a network may keep a state between two passes: the first row shows both.
    noise = 4 * (front(first, other) - ahead).abs().max()
    seen = (back(other, first) - behind).abs().max()
    moved = (behind - ahead).abs().max()  # by positions that go on from the row before; rounding depends on places too
    fine = eps if eps > 1e-4 else 1e-5
    return bool(seen <= fine * scale + noise) and bool(moved <= max(1e-3, 8 * eps) * scale + noise)


def _logits(module: Any, rows: Sequence[Tensor]) -> Tensor:
    """Return the logits ``(1, T, V)`` of packed rows, each ``(1, T_i)``."""
    tokens = torch.cat(tuple(rows), 1)
    row = torch.cat([torch.full_like(tokens[0, : r.shape[1]], number) for number, r in enumerate(rows)])
    positions = torch.cat([torch.arange(r.shape[1], device=tokens.device) for r in rows])
    mask = (row[:, None] == row).tril()
    batch = {"input_ids": tokens, "position_ids": positions[None], "attention_mask": mask[None, None]}
    return tried_logits(module, batch)
