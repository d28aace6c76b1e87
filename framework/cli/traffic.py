"""What data parallelism sends in a step: the gradients of what is trained, nothing of what is frozen."""

from torch import nn


def gradient_bytes(module: nn.Module) -> int:
    """Return the bytes of one set of gradients: every trained parameter in its dtype. Works on the meta device."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)


def all_reduce_bytes(module: nn.Module, ranks: int) -> float:
    """Return the bytes that each rank sends in an optimizer step of DDP: a ring's ``2 (n - 1) / n`` of the gradients.

    Buffers and frozen weights are not sent, in no step and at no merge; fully sharded, the reduce-scatter of gradients
    sends half of this, and gathering the parameters comes on top.
    """
    return 2 * (ranks - 1) / ranks * gradient_bytes(module)
