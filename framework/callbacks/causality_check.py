"""Refuses to train or evaluate on the next token a network that sees this token, such as an encoder."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from orthotrain.callbacks.first_batch import FirstBatchCheck, tried_logits, two_rows
from orthotrain.errors import ConfigurationError
from orthotrain.models.network_checks import shifts_labels

_TOKENS = 8


class CausalityCheck(FirstBatchCheck):
    """Check a network, before its first batch: a change of later tokens must not change the logits at earlier tokens.

    Two passes of one short row are compared, in evaluation mode and without gradients. The network's buffers and the
    generators of random numbers are restored. A module is checked if it is trained by the next-token loss, or by the
    own loss of a causal language model of transformers. A network that takes other inputs than tokens passes.

    Args:
        enabled: Whether to check. False is for a network that sees later tokens only where no label counts, such as a
            prefix language model whose labels are -100 in the prefix. Every module attaches this callback unless the
            trainer has one.
    """

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.checked = not enabled

    def applies(self, module: Any, batch: Any) -> bool:
        """Tell whether the module predicts the next tokens of the batch."""
        return (module.has_next_token_loss or _has_shifting_loss(module)) and _has_tokens(batch)

    def try_network(self, trainer: L.Trainer, module: Any, batch: Any) -> None:
        """Refuse a network whose logits depend on later tokens.

        Raises:
            ConfigurationError: Naming the network and the way out.
        """
        if _leaks(trainer, module, batch) and _predicts_next(batch, 0 if _has_shifting_loss(module) else 1):
            raise ConfigurationError(
                f"{type(module.model).__name__} sees the tokens that it is to predict: later tokens change its logits "
                f"at earlier tokens; {_advice(module.model)}; or, if no label counts there, add "
                "orthotrain.callbacks.CausalityCheck with enabled: false to trainer.callbacks"
            )


def leaks_future(logits: Callable[[Tensor], Tensor], row: Tensor, other: Tensor, kept: int) -> bool:
    """Tell whether logits at the first tokens depend on later tokens.

    Args:
        logits: Takes tokens ``(B, T)`` and returns logits ``(B, T, V)``.
        row: Tokens ``(1, T)``.
        other: The same tokens with other ones from position ``kept`` on.
        kept: Number of equal tokens.
    """

    def early(tokens: Tensor) -> Tensor:
        return logits(tokens)[:1, :kept].float()

    first = early(row)
    change = (early(other) - first).abs().max()
    if not change > 1e-5 * first.abs().max():
        return False
    # Experts compute groups of tokens, of which rounding and capacity depend on all tokens. A network may also keep a
    # state between two passes. Neither is a view of the future: compare with the same row, alone and beside other rows,
    # each of which is one token many times and fills one expert.
    beside = [torch.cat([row, row[:, [place] * row.shape[1]]]) for place in range(kept)]
    noise = max((early(again) - first).abs().max() for again in (row, *beside))
    return bool(change > 4 * noise)


def _leaks(trainer: L.Trainer, module: Any, batch: Any) -> bool:
    """Call the network with a few tokens alone or, if that raises an error, with whole rows like those of the batch."""
    tensors = {name: value for name, value in batch.items() if name != "labels" and isinstance(value, Tensor)}
    length = batch["input_ids"].shape[1]
    ways: list[tuple[dict[str, Tensor], int, AbstractContextManager]] = [
        ({}, min(_TOKENS, length), nullcontext()),  # autocast would round small changes away
        (tensors, length, trainer.precision_plugin.forward_context()),
    ]
    for inputs, tokens, context in ways:
        row, other = two_rows(module.model, batch["input_ids"], tokens)
        try:
            with context:
                return leaks_future(partial(_logits, module, inputs), row, other, tokens // 2)
        except Exception:
            continue  # the network takes other inputs
    return False


def _logits(module: Any, inputs: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Return the logits of tokens ``(B, T)``; the other inputs are those of the first row of a batch."""
    rows = {name: value[:1].repeat(len(tokens), *[1] * (value.ndim - 1)) for name, value in inputs.items()}
    return tried_logits(module, {**rows, "input_ids": tokens})


def _has_shifting_loss(module: Any) -> bool:
    return getattr(module, "objective", None) == "model" and shifts_labels(module.model)


def _has_tokens(batch: Any) -> bool:
    if not isinstance(batch, Mapping):
        return False
    tokens, labels = batch.get("input_ids"), batch.get("labels")
    return (
        isinstance(tokens, Tensor)
        and isinstance(labels, Tensor)
        and tokens.ndim == 2
        and tokens.shape[1] > 1
        and tokens.shape == labels.shape
    )


def _predicts_next(batch: dict[str, Tensor], shift: int) -> bool:
    """Tell whether the labels are the inputs ``shift`` tokens later, and not, for example, those that were masked."""
    length = batch["input_ids"].shape[1] - shift
    labels, tokens = batch["labels"][:, :length], batch["input_ids"][:, shift:]
    counted = labels != -100
    return not counted.any() or bool((labels == tokens)[counted].float().mean() > 0.5)


def _advice(network: nn.Module) -> str:
    if getattr(getattr(network, "config", None), "is_decoder", None) is False:
        return "set is_decoder: true in config of CausalLM, or in options of PretrainedModel"
    return "take a causal language model, or override loss for another objective"
