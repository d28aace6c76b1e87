"""Lets a network's head return the loss of its rows in the place of their logits."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from orthotrain.errors import ConfigurationError
from orthotrain.modules.chunked_loss import DTYPES, chunk_rows, chunked_cross_entropy, cross_entropy


class HeadLoss:
    """The next-token loss of a network, with whole logits or by chunks of them.

    By chunks the head computes the loss of its inputs, and the network returns this loss where it returns logits
    otherwise. That is right only if the network returns the output of its head as it is: without a soft-cap, a factor
    or a second use. The first batch that would go by chunks is run once more, without gradients, to find that out; so
    is the first one in training mode and in evaluation mode, in which a network may differ.

    Args:
        chunked: None for chunks where the fp32 logits of a batch are larger than one chunk and the network allows it;
            True refuses a network that does not allow it, False always takes whole logits.
    """

    def __init__(self, chunked: bool | None = None) -> None:
        self.chunked = chunked
        self.obstacle: str | None = "chunked_loss is false" if chunked is False else None
        self.rows: int | None = None  # of a chunk of the last batch that went by chunks
        self._probed: set[bool] = set()  # modes, training or not

    def check(self, network: nn.Module) -> None:
        """Find out whether the head of a network is a plain linear layer.

        Raises:
            ConfigurationError: It is not, and ``chunked_loss: true`` was asked for.
        """
        if self.obstacle is None:
            self._refuse(head_obstacle(network))

    def probe(self, network: nn.Module, forward: Callable[[], Any], device: torch.device) -> None:
        """Run a batch without gradients to find out whether the network returns the output of its head as it is.

        All ranks do this with the same batch, since a sharded network computes on all ranks together. Buffers of the
        network and generators of random numbers are left as they were.

        Raises:
            ConfigurationError: It does not, and ``chunked_loss: true`` was asked for.
        """
        if self.obstacle is not None or network.training in self._probed:
            return
        self._probed.add(network.training)
        head: Any = network.get_output_embeddings()  # type: ignore[operator]
        returned: list[tuple[Tensor, int]] = []

        def observed(hidden: Tensor) -> Tensor:
            logits = F.linear(hidden, head.weight, head.bias)
            returned.append((logits, logits._version))
            return logits

        # tensors of inference mode have no version, by which a change in place is seen
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            same_draws(device),
            same_buffers(network),
            in_place_of(head, observed),
        ):
            output = logits_of(forward())
        if len(returned) != 1 or output is not returned[0][0] or output._version != returned[0][1]:
            self._refuse(f"{type(network).__name__} does not return the output of its head as it is")

    def __call__(
        self, network: nn.Module, forward: Callable[[], Any], labels: Tensor, whole: str | None = None
    ) -> Tensor:
        """Return the mean next-token cross-entropy in nats.

        Args:
            network: The network; its output head is looked up.
            forward: Runs the network on a batch and returns its output: the logits, or an object that has them.
            labels: Shape ``(B, T)``; -100 does not count.
            whole: Why this batch needs whole logits; None if it does not.
        """
        if whole is None and self._goes_by_chunks(network, labels.numel()):
            self.probe(network, forward, labels.device)
        if self.obstacle is None and whole is None:
            return self._at_head(network, forward, labels.flatten())
        return cross_entropy(logits_of(forward()).flatten(0, 1), labels.flatten())

    def _goes_by_chunks(self, network: nn.Module, tokens: int) -> bool:
        if self.obstacle is not None:
            return False
        head: Any = network.get_output_embeddings()  # type: ignore[operator]
        return self.rows_for(tokens, head.out_features) is not None

    def rows_for(self, tokens: int, classes: int) -> int | None:
        """Return how many rows of logits a batch takes at a time; None for all of them."""
        rows = chunk_rows(classes)
        return None if self.obstacle or (self.chunked is None and tokens <= rows) else rows

    def describe(self, whole: str | None = None) -> str:
        """Return how the batches were computed, in one line for the summary of a run."""
        if self.rows is not None and whole is None:
            return f"by chunks of {self.rows} rows of logits"
        return f"with whole logits ({self.obstacle or whole or 'a batch fits into one chunk'})"

    def _refuse(self, obstacle: str | None) -> None:
        self.obstacle = obstacle
        if obstacle is not None and self.chunked:
            raise ConfigurationError(f"chunked_loss=True: {obstacle}; leave chunked_loss out, or set it to false")

    def _at_head(self, network: nn.Module, forward: Callable[[], Any], labels: Tensor) -> Tensor:
        head: Any = network.get_output_embeddings()  # type: ignore[operator]
        losses: list[Tensor] = []
        versions: list[int] = []

        def computed(hidden: Tensor) -> Tensor:
            rows = self._rows_of(head, hidden, labels.numel())
            if rows is None:
                return F.linear(hidden, head.weight, head.bias)
            # as many dimensions as logits have: what a network may do to logits can be done, and gives another tensor
            losses.append(loss_of(hidden, head, labels, rows).view(1, 1, 1))
            # a tensor of inference mode has no version
            versions.append(0 if losses[-1].is_inference() else losses[-1]._version)
            self.rows = rows
            return losses[-1]

        with in_place_of(head, computed):
            output = logits_of(forward())
        if not losses:
            return cross_entropy(output.flatten(0, 1), labels)
        changed = not output.is_inference() and output._version != versions[0]
        if len(losses) != 1 or output is not losses[0] or changed:
            raise ConfigurationError(
                f"{type(network).__name__} returned the output of its head as it is for the first batch, and changes "
                "that of a later one: set chunked_loss to false"
            )
        return output.view(())

    def _rows_of(self, head: nn.Linear, hidden: Tensor, labels: int) -> int | None:
        """Return how many rows of a head's inputs make a chunk; None where the head has to return logits."""
        matched = hidden.shape[:-1].numel() == labels and not isinstance(head.weight, DTensor)
        return self.rows_for(labels, head.out_features) if matched and dtype_at(hidden) in DTYPES else None


def loss_of(hidden: Tensor, head: nn.Linear, labels: Tensor, rows: int) -> Tensor:
    """Return the mean cross-entropy of a head's inputs ``(..., H)`` by chunks, in the dtype that the head computes in.

    Args:
        hidden: Inputs of the head.
        head: A plain linear layer.
        labels: One for each row of ``hidden``.
        rows: Rows of a chunk.
    """
    dtype = dtype_at(hidden)
    bias = None if head.bias is None else head.bias.to(dtype)
    return chunked_cross_entropy(hidden.flatten(0, -2).to(dtype), head.weight.to(dtype), bias, labels, rows)


def dtype_at(x: Tensor) -> torch.dtype:
    """Return the dtype that a linear layer computes ``x`` in: that of autocast, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def head_obstacle(network: nn.Module) -> str | None:
    """Return why the loss of a network cannot be computed at its head, or None."""
    kind = type(network).__name__
    find = getattr(network, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        return f"{kind} does not name its output head (get_output_embeddings)"
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        return f"the output head of {kind} is a {type(head).__name__}, and not a plain nn.Linear"
    return None


def logits_of(output: Any) -> Tensor:
    """Return the logits of a network's output: its ``logits``, or the output itself."""
    logits: Tensor = getattr(output, "logits", output)
    return logits


@contextmanager
def in_place_of(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a module compute something else for as long as the ``with`` block lasts; its hooks run as usual."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextmanager
def same_draws(device: torch.device) -> Iterator[None]:
    """Let all generators (PyTorch's, numpy's, Python's) go on from where they were before the ``with`` block."""
    on_device = [device] if device.type not in ("cpu", "meta") else []
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one is what others use
    with torch.random.fork_rng(on_device, device_type=device.type if on_device else "cuda"):
        yield
    random.setstate(of_python)
    np.random.set_state(of_numpy)  # noqa: NPY002


@contextmanager
def same_buffers(network: nn.Module) -> Iterator[None]:
    """Give the buffers of a network, such as running statistics, the values that they had before the ``with`` block."""
    # those of batch normalisation are written without a new version
    before = [(buffer, buffer.clone()) for buffer in network.buffers() if not buffer.is_inference()]
    yield
    for buffer, values in before:
        buffer.copy_(values)
