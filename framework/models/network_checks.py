"""Checks that a network of transformers fits the data: positions, attention masks, labels and generated tokens."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from orthotrain.devices.host_reads import read_waits
from orthotrain.errors import ConfigurationError

_MASKED = ("sdpa", "eager")
_WINDOWS = ("sliding_window", "attention_window_size", "local_attention", "attention_chunk_size")

# Their own loss compares the label at t with logits at t. Nothing but their code tells: most are decoders of
# encoder-decoders, whose labels are shifted where they become the decoder's inputs.
_UNSHIFTED = {
    *(
        f"{family}ForCausalLM"
        for family in (
            *("Bart", "BigBirdPegasus", "Blenderbot", "BlenderbotSmall", "CpmAnt", "MBart", "Marian", "Musicgen"),
            *("MusicgenMelody", "Mvp", "PLBart", "Pegasus", "ProphetNet", "TrOCR", "Whisper"),
        )
    ),
    *("XLMWithLMHeadModel", "XLNetLMHeadModel"),
}


def check_positions(limits: Iterable[Any], network: nn.Module) -> None:
    """Refuse data whose rows may be longer than the positions of a network.

    Args:
        limits: Limits of the data module, each with ``argument`` (its name) and ``tokens`` (its value).
        network: Any network. If its config has no ``max_position_embeddings``, any length passes.

    Raises:
        ConfigurationError: The message gives the argument, its value and the largest value that works.
    """
    positions = _positions(network)
    for limit in limits if positions is not None else ():
        if limit.tokens > positions:
            raise ConfigurationError(
                f"{limit.argument} {limit.tokens} is more than the {positions} positions of {type(network).__name__} "
                f"(max_position_embeddings): set {limit.argument} to at most {positions}"
            )


def check_sequence_length(data: Any, network: nn.Module) -> None:
    """Refuse a data module with a ``sequence_length`` above the positions of a network; any other object passes.

    Raises:
        ConfigurationError: See :func:`check_positions`.
    """
    if isinstance(length := getattr(data, "sequence_length", None), int):
        check_positions([_Limit("sequence_length", length)], network)


class _Limit(NamedTuple):
    argument: str
    tokens: int


def _positions(network: nn.Module) -> int | None:
    """Return the number of positions of a network; None if its configuration has none."""
    config = getattr(network, "config", None)
    text = getattr(config, "text_config", None)  # of a network that takes pictures too
    rows = getattr(config, "max_position_embeddings", getattr(text, "max_position_embeddings", None))
    if not isinstance(rows, int):
        return None
    # RoBERTa and similar networks count positions from the row after the row of padding
    tables = (
        table for name, table in network.named_modules() if "position" in name and isinstance(table, nn.Embedding)
    )
    skipped = [t.padding_idx + 1 for t in tables if t.num_embeddings == rows and t.padding_idx is not None]
    return rows - max(skipped, default=0)


def check_attention(network: nn.Module, limit: Any) -> None:
    """Refuse packing where the mask of packed rows would not be used, or would replace a mask of the network's own.

    Args:
        network: Any network.
        limit: Limit of a row, with ``argument`` (its name) and ``tokens`` (its value).

    Raises:
        ConfigurationError: The message gives the implementation of attention or the window, and what works.
    """
    attention = getattr(getattr(network, "config", None), "_attn_implementation", None)
    if attention not in (None, *_MASKED):
        raise ConfigurationError(
            f"packing with attn_implementation={attention!r}: rows of one sequence would see each other; set packing "
            f"to false, or load the model with attn_implementation {' or '.join(_MASKED)}"
        )
    name, window = _window(getattr(network, "config", None))
    if window < limit.tokens:
        raise ConfigurationError(
            f"packing with {limit.argument} {limit.tokens}: layers of {type(network).__name__} see the last {window} "
            f"tokens alone ({name}), and would see whole rows; set packing to false, or {limit.argument} to at most "
            f"{window}"
        )


def _window(config: Any) -> tuple[str, float]:
    """Return the shortest window of the layers that see the last tokens alone, and its name; infinity without one."""
    config = getattr(config, "text_config", None) or config  # of a network that takes pictures too
    layers = getattr(config, "layer_types", None)
    local = layers is None or any(str(kind).startswith(("sliding", "chunked", "local")) for kind in layers)
    if config is None or not local or getattr(config, "use_sliding_window", None) is False:
        return "", math.inf
    windows = [(name, getattr(config, name, None)) for name in _WINDOWS]
    return min(((n, w) for n, w in windows if isinstance(w, int) and w > 0), key=lambda w: w[1], default=("", math.inf))


def with_usable_mask(batch: dict[str, Any], network: nn.Module | None) -> dict[str, Any]:
    """Return a batch whose attention mask works with the implementation of attention of a network.

    Eager attention adds the mask to the scores, so that a bool mask would add 1. The returned mask is 0 where attention
    is allowed, and the smallest number of the network's dtype elsewhere, whose exponential is exactly 0.

    Args:
        batch: A batch, with or without an ``attention_mask``. The mask of packed rows is bool, ``(B, 1, T, T)``.
        network: The network that gets the batch.
    """
    mask = batch.get("attention_mask")
    config = getattr(network, "config", None)
    eager = getattr(config, "_attn_implementation", None) == "eager"
    # transformers itself converts masks of padding, (B, T)
    if not (eager and isinstance(mask, Tensor) and mask.ndim == 4 and mask.dtype == torch.bool):
        return batch
    dtype = getattr(network, "dtype", torch.float32)
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return {**batch, "attention_mask": additive.masked_fill(~mask, torch.finfo(dtype).min)}


def input_embedding(network: nn.Module | None) -> nn.Module | None:
    """Return the embedding of the tokens of a network of transformers; None if it takes no tokens, or does not say."""
    with contextlib.suppress(NotImplementedError, AttributeError):  # images and sound have no embedding
        embedding: nn.Module | None = network.get_input_embeddings()  # type: ignore[union-attr, operator]
        return embedding
    return None


def shifts_labels(network: nn.Module | None) -> bool:
    """Tell whether a network's loss compares logits at t with the label at t + 1, as causal LMs of transformers do."""
    if not hasattr(network, "config") or is_encoder_decoder(network):
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    names = {cls.__name__ for cls in type(network).__mro__}
    return bool(names & causal) and not names & _UNSHIFTED


def is_encoder_decoder(network: nn.Module | None) -> bool:
    """Tell whether a network is an encoder-decoder of transformers."""
    return bool(getattr(getattr(network, "config", None), "is_encoder_decoder", False))


def generated_tokens(network: nn.Module | None, output: Tensor, prompt_length: int) -> Tensor:
    """Return the generated tokens without the prompt.

    Args:
        network: The network that generated them.
        output: Result of ``generate``, ``(..., T)``.
        prompt_length: Number of tokens of the prompt, including padding.

    Returns:
        ``(..., new)``. For an encoder-decoder this is the whole output, which begins with the start token of the
        decoder.
    """
    return output if is_encoder_decoder(network) else output[..., prompt_length:]


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode inside the block, and each of its modules back into its mode afterwards."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def same_draws(device: torch.device) -> Iterator[None]:
    """Restore the states of all generators (PyTorch's, numpy's, Python's) after the ``with`` block."""
    devices = [device] if read_waits(device) else []
    with (
        isolate_rng(include_cuda=False),
        torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
    ):
        yield


@contextlib.contextmanager
def same_buffers(network: nn.Module) -> Iterator[None]:
    """Restore the buffers of a network, such as running statistics, after the ``with`` block."""
    before = [(buffer, buffer._version, buffer.clone()) for buffer in network.buffers() if not buffer.is_inference()]
    yield
    for buffer, version, values in before:
        # batch normalization writes its statistics without a new version; counts keep theirs, by which they are read
        if buffer.is_floating_point() or buffer._version != version:
            buffer.copy_(values)
