"""Names the keys of a configuration of transformers from which no working network can be built."""

import re
from typing import Any

import torch
from torch import nn

_TOKENS = 8
_SIZE = re.compile(r"num_|_size$|_dim$|_heads?$|_layers?$|_rank$|^n_")
_SHAPES = re.compile(r"must match|cannot be multiplied|is invalid for input of size|size mismatch|[Ee]xpected size")
_MOST_KEYS = 6


def compute_row(network: nn.Module) -> None:
    """Compute a short row of tokens with a network without storage.

    Raises:
        RuntimeError: The shapes of two layers do not fit. Any other error passes, since an operation may need values.
    """
    try:
        with torch.no_grad():
            network.eval()(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long, device="meta"))
    except Exception as error:
        if isinstance(error, RuntimeError) and _SHAPES.search(str(error)):
            raise


def find_fault(config: Any, given: dict[str, Any], error: Exception) -> str | None:
    """Return which key causes that no network can be built from a configuration, and its remedy; None if unknown.

    Args:
        config: The configuration.
        given: The keys that the user has given; others have the default of the model type.
        error: The error of transformers.
    """
    if isinstance(error, KeyError) and error.args:  # a choice, which may be nested (rope_parameters)
        for name, choice in given.items():
            if error.args[0] in (choice, *(choice.values() if isinstance(choice, dict) else ())):
                return f"{name}={choice!r} is unknown to transformers"

    def value(name: str) -> Any:
        return getattr(config, name, None)

    def shown(name: str) -> str:
        own = config.attribute_map.get(name, name)
        default = "" if own in given or name in given else f" (the default of {config.model_type})"
        return f"{own}={value(name)}{default}"

    heads, groups, width = (value(name) for name in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    token, tokens = value("pad_token_id"), value("vocab_size")
    if _counts(token, tokens) and token >= tokens:
        return (
            f"{shown('pad_token_id')} is no token of a vocabulary of {tokens} (vocab_size): set pad_token_id to a "
            "token of the vocabulary, or to null"
        )
    if _counts(heads, groups) and groups and heads % groups:
        return (
            f"{shown('num_key_value_heads')} does not divide {shown('num_attention_heads')}: set num_key_value_heads "
            f"to {heads}, or to a divisor of {heads}"
        )
    if _counts(width, heads) and heads and width % heads:
        own = config.attribute_map.get("num_attention_heads", "num_attention_heads")
        return (
            f"{shown('num_attention_heads')} does not divide {shown('hidden_size')}: set {own} to a divisor of {width}"
        )
    return None


def sizes_not_given(model_type: str, given: dict[str, Any]) -> str:
    """Return the keys for sizes that have the defaults of a model type, as ``key=value``, for a message."""
    from transformers import CONFIG_MAPPING

    defaults = CONFIG_MAPPING[model_type]()
    known = {*given, *(defaults.attribute_map.get(name, name) for name in given)}
    left = [
        f"{name}={value}"
        for name, value in vars(defaults).items()
        if _counts(value) and value > 1 and _SIZE.search(name) and name not in known and not name.endswith("token_id")
    ]
    return ", ".join(left[:_MOST_KEYS])


def _counts(*values: Any) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)
