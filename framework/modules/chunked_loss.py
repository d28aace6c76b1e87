"""The cross-entropy of a linear head computed from its inputs by chunks of rows, so that the whole logits never exist.

The loss of N tokens with V classes usually takes three fp32 arrays of N x V in backward (the log-softmax, and the
gradients of its output and of its input). Here the logits, the loss and the gradients of one chunk of rows are computed
together, and the next chunk reuses the memory. If the head is trained, its gradient exists from the forward pass on.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORED = -100
"""The label that does not count."""

CHUNK_BYTES = 128 << 20
"""Bytes of the fp32 logits of one chunk. With fewer rows a GPU multiplies less efficiently; more rows save less."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes in which the chunked loss can compute."""

Operands = tuple[Tensor, Tensor, Tensor | None]
"""Inputs of a head, its weight and its bias."""

Wanted = tuple[bool, ...]
"""Whether the gradient of each operand is computed."""


def chunk_rows(classes: int) -> int:
    """Return how many rows of logits make a chunk: a power of two, at least one."""
    return 1 << max(0, (CHUNK_BYTES // (4 * classes)).bit_length() - 1)


def loss_bytes(tokens: int, classes: int, dtype: torch.dtype, rows: int | None) -> int:
    """Return how many bytes the loss of ``tokens`` holds at its peak, without the gradients of the head.

    Args:
        tokens: Rows of logits.
        classes: Columns of logits.
        dtype: Dtype of the logits.
        rows: Rows of a chunk; None for whole logits.
    """
    rounded = dtype.itemsize if dtype.itemsize < 4 else 0
    return tokens * classes * 12 if rows is None else min(rows, tokens) * classes * (4 + rounded)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of whole logits in fp32 nats.

    Without gradients the logits are copied to fp32 by chunks of rows.

    Args:
        logits: Shape ``(N, V)``.
        labels: Shape ``(N,)``; -100 does not count. If no label counts, the mean is NaN.
    """
    rows = chunk_rows(logits.shape[-1])
    if torch.is_grad_enabled() or len(logits) <= rows:
        return F.cross_entropy(logits.float(), labels)
    parts = zip(logits.split(rows), labels.split(rows), strict=True)
    total = sum(F.cross_entropy(part.float(), targets, reduction="sum") for part, targets in parts)
    return torch.as_tensor(total) / (labels != IGNORED).sum()


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: int) -> Tensor:
    """Return ``cross_entropy(F.linear(hidden, weight, bias), labels)`` without holding the logits of all rows.

    ``torch.nn.functional.linear_cross_entropy`` (torch 2.13) computes by chunks too, but returns the loss of a bf16
    network rounded to bf16 (10.94 instead of 10.87), and NaN gradients if no label counts.

    Args:
        hidden: Inputs of the head, shape ``(N, H)``, in one of `DTYPES`.
        weight: Shape ``(V, H)``, in the dtype of ``hidden``.
        bias: Shape ``(V,)`` in the same dtype, or None.
        labels: Shape ``(N,)``; -100 does not count. If no label counts, the mean is NaN.
        rows: Rows of a chunk.
    """
    wanted = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias))
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, labels, rows, wanted)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in forward and scales them in backward, so that no logits are computed twice.

    In fp16 the gradients are computed in backward, where the loss scale is known: without the scale they would
    underflow.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: int, wanted: Wanted
    ) -> Tensor:
        """Return the mean loss, fp32."""
        ctx.rows, ctx.wanted, ctx.late = rows, wanted, hidden.dtype == torch.float16
        scale = None if ctx.late or not any(wanted) else torch.ones((), device=hidden.device)
        loss, *gradients = _by_chunks((hidden, weight, bias), labels, rows, wanted, scale)
        ctx.save_for_backward(*((hidden, weight, bias, labels) if ctx.late else gradients))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Return the gradients of hidden, weight and bias; a second call raises: the first has scaled them in place."""
        if ctx.late:
            hidden, weight, bias, labels = ctx.saved_tensors
            _, *gradients = _by_chunks((hidden, weight, bias), labels, ctx.rows, ctx.wanted, grad_loss)
        else:
            gradients = [None if g is None else g.mul_(grad_loss) for g in ctx.saved_tensors]
        return (*gradients, None, None, None)


@torch.no_grad()
def _by_chunks(
    operands: Operands, labels: Tensor, rows: int, wanted: Wanted, scale: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the mean loss, and ``scale`` times the gradients that are ``wanted``; None for every other gradient."""
    hidden, weight, bias = operands
    counted = labels != IGNORED
    number = counted.sum()
    targets = labels.masked_fill(~counted, 0)[:, None]
    factors = None if scale is None else torch.where(counted, scale / number, 0.0)[:, None]
    losses = torch.empty(len(hidden), device=hidden.device)
    by_hidden, by_weight, by_bias = (
        # fp32 for the bias: it is small, and its sum over many chunks would lose most by rounding
        torch.zeros_like(t, dtype=torch.float32 if t is bias else t.dtype)
        if t is not None and asked and scale is not None
        else None
        for t, asked in zip(operands, wanted, strict=True)
    )
    # the operands have one dtype, which autocast would change in forward and not in backward
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            factor = None if factors is None else factors[part]
            losses[part], gradient = _of_chunk(hidden[part], weight, bias, targets[part], factor)
            if gradient is None:
                continue
            if by_hidden is not None:
                torch.mm(gradient, weight, out=by_hidden[part])
            if by_weight is not None:
                by_weight.addmm_(gradient.mT, hidden[part])
            if by_bias is not None:
                by_bias.add_(gradient.sum(0, dtype=torch.float32))
            del gradient  # free its memory before the next chunk
    by_bias = None if by_bias is None else by_bias.to(hidden.dtype)
    return losses.masked_fill(~counted, 0.0).sum() / number, by_hidden, by_weight, by_bias


def _of_chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, factors: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the losses of some rows, and the gradient of their logits times ``factors``; None if factors is None."""
    logits = F.linear(hidden, weight, bias).float()
    largest = logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, targets) - largest
    total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    losses = (total.log() - chosen).squeeze(-1)
    if factors is None:
        return losses, None
    # softmax - one_hot, written over the logits
    logits.mul_(factors / total).scatter_add_(-1, targets, -factors)
    return losses, logits.to(hidden.dtype)
