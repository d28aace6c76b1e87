"""What the data asks of a network of transformers: positions, attention masks, and how it reads its labels."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from orthotrain.errors import ConfigurationError

_MASKED = ("sdpa", "eager")


def check_positions(limits: Iterable[Any], network: nn.Module) -> None:
    """Refuse rows that may be longer than a network has positions for.

    Args:
        limits: What the data limits, each with ``argument`` and ``tokens``.
        network: Any network; one whose config has no ``max_position_embeddings`` takes any length.

    Raises:
        ConfigurationError: Naming the argument, its value and the largest that works.
    """
    positions = getattr(getattr(network, "config", None), "max_position_embeddings", None)
    for limit in limits if isinstance(positions, int) else ():
        if limit.tokens > positions:
            raise ConfigurationError(
                f"{limit.argument} {limit.tokens} is more than the {positions} positions of {type(network).__name__} "
                f"(max_position_embeddings): set {limit.argument} to at most {positions}"
            )


def check_attention(network: nn.Module) -> None:
    """Refuse packing for an attention that would not keep the rows of a sequence apart.

    Raises:
        ConfigurationError: Naming the implementation and those that work.
    """
    attention = getattr(getattr(network, "config", None), "_attn_implementation", None)
    if attention not in (None, *_MASKED):
        raise ConfigurationError(
            f"packing with attn_implementation={attention!r}: rows of one sequence would see each other; set packing "
            f"to false, or load the model with attn_implementation {' or '.join(_MASKED)}"
        )


def with_usable_mask(batch: dict[str, Any], network: nn.Module | None) -> dict[str, Any]:
    """Return a batch whose mask of queries by keys means to a network's attention what it says.

    Eager attention adds its mask to the scores, where a bool one would add 1: the mask becomes 0 where attention is
    allowed and the smallest number of the network's dtype elsewhere, whose exponential is exactly 0.

    Args:
        batch: A batch, with or without an ``attention_mask``; that of packed rows is bool ``(B, 1, T, T)``.
        network: The network that reads it.
    """
    mask = batch.get("attention_mask")
    config = getattr(network, "config", None)
    if mask is None or mask.dtype != torch.bool or getattr(config, "_attn_implementation", None) != "eager":
        return batch
    dtype = getattr(network, "dtype", torch.float32)
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return {**batch, "attention_mask": additive.masked_fill(~mask, torch.finfo(dtype).min)}


def shifts_labels(network: nn.Module | None) -> bool:
    """Tell whether a network's own loss compares logits at t with the label at t + 1: causal LMs of transformers."""
    if not hasattr(network, "config") or is_encoder_decoder(network):
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return any(cls.__name__ in causal for cls in type(network).__mro__)


def is_encoder_decoder(network: nn.Module | None) -> bool:
    """Whether a network of transformers reads its inputs with an encoder; False for any other network."""
    return bool(getattr(getattr(network, "config", None), "is_encoder_decoder", False))


def generated_tokens(network: nn.Module | None, output: Tensor, prompt_length: int) -> Tensor:
    """Return the tokens that were generated.

    Args:
        network: Whose output it is.
        output: What ``generate`` returned, ``(..., T)``.
        prompt_length: Tokens of the prompt, padding included.

    Returns:
        ``(..., new)``; of an encoder-decoder all of the output, which begins with the decoder's start token.
    """
    return output if is_encoder_decoder(network) else output[..., prompt_length:]


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network and all modules in it into evaluation mode, and each back into the mode that it had."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
