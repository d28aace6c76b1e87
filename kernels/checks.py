"""Checks of the arguments of operations: the public functions refuse wrong ones before any kernel runs."""

import os

import torch
from torch import Tensor

from orthotrain.kernels.permutations import GROUPS

DEBUG = "ORTHOTRAIN_DEBUG"
"""Environment variable; ``1`` also checks the values of permutations, for which the host waits for the device."""

COMPUTABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that operations take; the Triton kernels serve all but the last."""


def check_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    """Check that a dtype is one that operations compute in.

    Raises:
        ValueError: Naming the argument and the dtypes that operations take.
    """
    if dtype not in COMPUTABLE:
        known = ", ".join(str(known).removeprefix("torch.") for known in COMPUTABLE)
        raise ValueError(f"{op}: {name} is {dtype}; takes {known}")


def check_generators(op: str, generators: Tensor, block_size: int) -> None:
    """Check that generators are a floating-point matrix of ``b(b-1)/2`` columns.

    Raises:
        ValueError: Naming both sizes, or the dtype.
    """
    check_dtype(op, "generators", generators.dtype)
    width = block_size * (block_size - 1) // 2
    if generators.ndim != 2 or generators.shape[1] != width:
        raise ValueError(
            f"generators of shape {tuple(generators.shape)} do not fit block_size={block_size}: "
            f"a block of that size has {width} generators, so the shape must be (n, {width})"
        )


def check_square(op: str, name: str, blocks: Tensor) -> None:
    """Check that a tensor holds square blocks, ``(n, b, b)``, of a floating dtype.

    Raises:
        ValueError: Naming dtype or shape.
    """
    check_dtype(op, name, blocks.dtype)
    if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2]:
        raise ValueError(f"{op}: {name} {tuple(blocks.shape)} does not fit: it takes square blocks, (n, b, b)")


def check_tensor(
    op: str, name: str, tensor: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Check shape, dtype and device of a tensor.

    Args:
        op: Operation, for the message.
        name: Of the argument.
        tensor: To check.
        shape: Expected; None for a size that may be any.
        dtype: Expected.
        device: Expected.

    Raises:
        ValueError: Naming found and expected shape, dtype and device.
    """
    sizes = tensor.ndim == len(shape) and all(e in (None, s) for e, s in zip(shape, tensor.shape, strict=True))
    if sizes and tensor.dtype == dtype and tensor.device == device:
        return
    expected = ", ".join("any" if size is None else str(size) for size in shape) + "," * (len(shape) == 1)
    found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
    raise ValueError(f"{op}: {name} is {found}; takes {dtype} ({expected}) on {device}")


def check_blocks(op: str, name: str, displacement: Tensor, like: Tensor, like_name: str, width: int) -> None:
    """Check dtype, device and shape of a displacement.

    Args:
        op: Operation, for the message.
        name: Of the argument.
        displacement: To check: ``(n, b, b)``, ``n * b <= width``.
        like: Tensor whose dtype and device it must have.
        like_name: Name of that tensor.
        width: Number of coordinates that the blocks act on.

    Raises:
        ValueError: Naming what does not fit.
    """
    if displacement.dtype != like.dtype:
        raise ValueError(f"{op}: {name} is {displacement.dtype} and {like_name} is {like.dtype}; cast one of them")
    if displacement.device != like.device:
        raise ValueError(f"{op}: {name} is on {displacement.device} and {like_name} on {like.device}; move one of them")
    check_square(op, name, displacement)
    if displacement.shape[0] * displacement.shape[1] > width:
        raise ValueError(f"{op}: {name} {tuple(displacement.shape)} does not fit in width {width}")


def check_permutation(op: str, name: str, permutation: Tensor | None, width: int, like: Tensor) -> None:
    """Check dtype, device and length of a permutation of ``width`` coordinates; None is the identity.

    Raises:
        ValueError: Naming what does not fit.
    """
    if permutation is None:
        return
    if (
        permutation.dtype != torch.int64
        or permutation.ndim != 1
        or all(permutation.shape[0] * group != width for group in GROUPS)
    ):
        lengths = " or ".join(f"({width // group},)" for group in reversed(GROUPS) if width % group == 0)
        raise ValueError(
            f"{op}: {name} is {permutation.dtype} {tuple(permutation.shape)}; a permutation here is int64 {lengths}"
        )
    if permutation.device != like.device:
        raise ValueError(f"{op}: {name} is on {permutation.device} and the data on {like.device}; move one of them")


def check_sides(
    op: str,
    weight: Tensor,
    d_out: Tensor | None,
    d_in: Tensor | None,
    permutation_out: Tensor | None,
    permutation_in: Tensor | None,
    like: Tensor,
    like_name: str,
) -> None:
    """Check the displacements and permutations of both sides of a weight ``(out, in)``; see the checks of each.

    Raises:
        ValueError: Naming what does not fit.
    """
    for side, displacement, width in (("output", d_out, weight.shape[0]), ("input", d_in, weight.shape[1])):
        if displacement is not None:
            check_blocks(op, f"{side} displacement", displacement, like, like_name, width)
    check_permutation(op, "permutation_out", permutation_out, weight.shape[0], like)
    check_permutation(op, "permutation_in", permutation_in, weight.shape[1], like)


def debug_permutation(op: str, name: str, permutation: Tensor | None) -> None:
    """With ``ORTHOTRAIN_DEBUG=1``, check the values of a permutation: a wrong index lets a kernel write out of bounds.

    Raises:
        ValueError: The values repeat or leave out coordinates.
    """
    if permutation is None or os.environ.get(DEBUG) != "1":
        return
    if not torch.equal(permutation.sort().values, torch.arange(permutation.numel(), device=permutation.device)):
        raise ValueError(f"{op}: {name} is no permutation: it repeats or leaves out coordinates")
