"""The next-token loss computed inside the output head of a network, without the logits of all rows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from orthotrain.errors import ConfigurationError
from orthotrain.models.network_checks import same_buffers, same_draws
from orthotrain.modules.chunked_loss import DTYPES, chunk_rows, chunked_cross_entropy, cross_entropy


class HeadLoss:
    """The next-token loss of a network, from whole logits or by chunks of rows.

    By chunks, the head returns the loss of its inputs instead of their logits, and the network passes the loss on. That
    is right only if the network returns the output of its head unchanged: without a soft-cap, a factor or a second use.
    To check this, the first batch that is computed by chunks is run a second time without gradients, once in training
    mode and once in evaluation mode, in which a network may differ.

    Args:
        chunked: None for chunks if the fp32 logits of a batch are larger than one chunk and the network allows chunks;
            True to refuse a network that does not allow chunks; False for whole logits always.

    Attributes:
        obstacle: Why the loss is never computed by chunks; None if it may be.
        rows: Rows of a chunk in the last batch that was computed by chunks; None if there was no such batch.
    """

    def __init__(self, chunked: bool | None = None) -> None:
        self.chunked = chunked
        self.obstacle: str | None = "chunked_loss is false" if chunked is False else None
        self.rows: int | None = None
        self._probed: set[bool] = set()  # values of network.training

    def check(self, network: nn.Module) -> None:
        """Check whether the head of a network is a plain linear layer.

        Raises:
            ConfigurationError: If it is not, and ``chunked_loss`` is true.
        """
        if self.obstacle is None:
            self._refuse(head_obstacle(network))

    def probe(self, network: nn.Module, forward: Callable[[], Any], device: torch.device) -> None:
        """Run a batch without gradients to check whether the network returns the output of its head unchanged.

        All ranks run this at the same batch, since a sharded network computes on all ranks together. The network's
        buffers and the generators of random numbers are restored.

        Raises:
            ConfigurationError: If it does not, and ``chunked_loss`` is true.
        """
        if self.obstacle is not None or network.training in self._probed:
            return
        self._probed.add(network.training)
        head: Any = network.get_output_embeddings()  # type: ignore[operator]

        def logits(hidden: Tensor) -> Tensor:
            return F.linear(hidden, head.weight, head.bias)

        # not in inference mode, whose tensors have no version
        with torch.inference_mode(False), torch.no_grad(), same_draws(device), same_buffers(network):
            _, unchanged = run_with_head(head, logits, forward)
        if not unchanged:
            self._refuse(f"{type(network).__name__} does not return the output of its head unchanged")

    def __call__(
        self, network: nn.Module, forward: Callable[[], Any], labels: Tensor, whole: str | None = None
    ) -> Tensor:
        """Return the mean next-token cross-entropy in nats.

        Args:
            network: The network, which names its output head.
            forward: Runs the network on a batch and returns its output: the logits, or an object with ``logits``.
            labels: Shape ``(B, T)``; -100 does not count.
            whole: Why this batch needs whole logits; None if it does not.
        """
        if whole is None and self.obstacle is None:
            head: Any = network.get_output_embeddings()  # type: ignore[operator]
            if self.rows_for(labels.numel(), head.out_features) is not None:
                self.probe(network, forward, labels.device)
                if self.obstacle is None:
                    return self._loss_at_head(network, forward, labels.flatten())
        return cross_entropy(logits_of(forward()).flatten(0, 1), labels.flatten())

    def rows_for(self, tokens: int, classes: int) -> int | None:
        """Return how many rows of logits a batch is computed by; None for all of them at once."""
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

    def _loss_at_head(self, network: nn.Module, forward: Callable[[], Any], labels: Tensor) -> Tensor:
        head: Any = network.get_output_embeddings()  # type: ignore[operator]
        used: list[int] = []

        def loss_or_logits(hidden: Tensor) -> Tensor:
            rows = self.rows_for(labels.numel(), head.out_features)
            matched = hidden.shape[:-1].numel() == labels.numel() and not isinstance(head.weight, DTensor)
            if rows is None or not matched or dtype_at(hidden) not in DTYPES:
                return F.linear(hidden, head.weight, head.bias)
            used.append(rows)
            # as many dimensions as logits have, so that a network that changes its logits can run, and is noticed
            return loss_of(hidden, head, labels, rows).view(1, 1, 1)

        output, unchanged = run_with_head(head, loss_or_logits, forward)
        if not used:
            return cross_entropy(output.flatten(0, 1), labels)
        self.rows = used[-1]
        if not unchanged:
            raise ConfigurationError(
                f"{type(network).__name__} returned the output of its head unchanged for the first batch, and changes "
                "the output for a later batch: set chunked_loss to false"
            )
        return output.view(())


def loss_of(hidden: Tensor, head: nn.Linear, labels: Tensor, rows: int) -> Tensor:
    """Return the mean cross-entropy of a head's inputs by chunks, in the dtype in which the head computes.

    Args:
        hidden: Inputs of the head, shape ``(..., H)``.
        head: A plain linear layer.
        labels: A label for each row of ``hidden``.
        rows: Rows of a chunk.
    """
    dtype = dtype_at(hidden)
    bias = None if head.bias is None else head.bias.to(dtype)
    return chunked_cross_entropy(hidden.flatten(0, -2).to(dtype), head.weight.to(dtype), bias, labels, rows)


def dtype_at(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer computes with ``x``: that of autocast, or that of ``x``."""
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
    """Return the ``logits`` of a network's output, or the output itself if it has none."""
    logits: Tensor = getattr(output, "logits", output)
    return logits


def run_with_head(
    head: nn.Module, compute: Callable[[Tensor], Tensor], forward: Callable[[], Any]
) -> tuple[Tensor, bool]:
    """Run a network whose head computes something else; the hooks of the head run as usual.

    Args:
        head: The head.
        compute: Takes the place of the head's forward pass.
        forward: Runs the network.

    Returns:
        The network's logits; and whether they are the output of the head, used once and unchanged.
    """
    outputs: list[tuple[Tensor, int]] = []

    def recorded(hidden: Tensor) -> Tensor:
        output = compute(hidden)
        outputs.append((output, _version(output)))
        return output

    head.forward = recorded
    try:
        logits = logits_of(forward())
    finally:
        del head.forward
    return logits, len(outputs) == 1 and logits is outputs[0][0] and _version(logits) == outputs[0][1]


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; 0 for a tensor of inference mode, which does not count it."""
    return 0 if tensor.is_inference() else tensor._version
