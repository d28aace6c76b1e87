"""The product of Givens rotations and its gradient, as one PyTorch operator; README.md derives both.

One operator in place of a chain of PyTorch operations: its backward pass keeps one matrix instead of one for every
round, and ``torch.compile`` does not look inside.
"""

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=64)
def rounds(block_size: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return a round-robin tournament of the coordinates: every pair meets once, the pairs of a round are disjoint.

    Returns:
        For each of the b - 1 rounds (b for odd b) the coordinates on the left and those on the right of its pairs.
    """
    players: list[int | None] = [*range(block_size), *([None] if block_size % 2 else [])]
    schedule = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = [(a, b) for a, b in zip(players[:half], reversed(players[half:]), strict=True) if None not in (a, b)]
        if pairs:
            left, right = torch.tensor(pairs, device=device).T
            schedule.append((left, right))
        players = [players[0], players[-1], *players[1:-1]]
    return tuple(schedule)


def turn_rows_(matrix: Tensor, left: Tensor, right: Tensor, sine: Tensor, versine: Tensor) -> None:
    """Multiply ``matrix (n, b, b)`` from the left by G^T of disjoint planes, in place.

    Args:
        matrix: Becomes G^T M: row i is c m_i - s m_j, row j is s m_i + c m_j. Rows, since they are contiguous.
        left: First coordinates i of the planes, ``(p,)``.
        right: Second coordinates j.
        sine: s = sin of the angles, ``(n, p, 1)``.
        versine: c - 1 = cos of the angles minus 1, ``(n, p, 1)``.
    """
    first, second = matrix.index_select(1, left), matrix.index_select(1, right)
    matrix.index_add_(1, left, torch.addcmul(versine * first, sine, second, value=-1))
    matrix.index_add_(1, right, torch.addcmul(versine * second, sine, first))


def angles(q: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return sin and cos - 1 of the angles ``q[:, left, right]``, the latter without cancellation; ``(n, p, 1)``."""
    angle = q[:, left, right, None]
    return angle.sin(), -2 * (angle / 2).sin().square()


@torch.library.custom_op("orthotrain_givens::palindrome", mutates_args=())
def palindrome(q: Tensor) -> Tensor:
    """Return D = G_1 G_2 ... G_m G_m ... G_2 G_1 - I, the planes of round k turned by the entries of Q.

    Args:
        q: Skew-symmetric blocks ``(n, b, b)``, of which the pairs ``(left, right)`` of the rounds are read.
    """
    transposed = torch.zeros_like(q, memory_format=torch.contiguous_format)
    schedule = rounds(q.shape[-1], q.device)
    for left, right in (*schedule, *reversed(schedule)):
        sine, versine = angles(q, left, right)
        # G^T (I + D^T) - I = G^T D^T + (G - I)^T: the identity is never added, so that small angles lose nothing
        turn_rows_(transposed, left, right, sine, versine)
        transposed[:, left, left] += versine[..., 0]
        transposed[:, right, right] += versine[..., 0]
        transposed[:, left, right] -= sine[..., 0]
        transposed[:, right, left] += sine[..., 0]
    return transposed.mT.contiguous()


@torch.library.custom_op("orthotrain_givens::palindrome_backward", mutates_args=())
def palindrome_backward(grad: Tensor, q: Tensor, displacement: Tensor) -> Tensor:
    """Return dL/dQ ``(n, b, b)`` at the pairs of the rounds and 0 elsewhere, from dL/dD.

    With A the skew part R^T dL/dR - (dL/dR)^T R, the gradient of an angle of the last round is ``A[left, right]``, and
    taking that round away turns A to ``G A G^T``.
    """
    skew_part = grad + displacement.mT @ grad
    skew_part = skew_part - skew_part.mT
    result = torch.zeros_like(q, memory_format=torch.contiguous_format)
    schedule = rounds(q.shape[-1], q.device)
    for left, right in (*schedule, *reversed(schedule)):  # a palindrome is the same from behind
        result[:, left, right] += skew_part[:, left, right]
        sine, versine = angles(q, left, right)
        turn_rows_(skew_part, left, right, -sine, versine)
        skew_part = -skew_part.mT.contiguous()  # (G A)^T = -A G^T: its rows are next
        turn_rows_(skew_part, left, right, -sine, versine)
    return result


@palindrome.register_fake
def _(q: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@palindrome_backward.register_fake
def _(grad: Tensor, q: Tensor, displacement: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _keep(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _gradient(ctx, grad: Tensor) -> Tensor:
    return palindrome_backward(grad, *ctx.saved_tensors)


palindrome.register_autograd(_gradient, setup_context=_keep)
