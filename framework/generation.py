"""Generating with a network, and what of the output is new: a decoder goes on after its prompt, others begin anew."""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn


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
