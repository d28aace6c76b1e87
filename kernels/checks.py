"""What the rotating operations ask of their operands: one clear error at the public function, before any kernel."""

import os

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

DEBUG = "ORTHOTRAIN_DEBUG"
"""Environment variable; ``1`` also checks the values of permutations, which waits for the device."""


def traced(x: Tensor) -> bool:
    """Return whether somebody traces, who should see one opaque custom op and not what is inside it."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


def check_blocks(op: str, name: str, displacement: Tensor, like: Tensor, like_name: str, width: int) -> None:
    """Check dtype, device and shape of a displacement.

    Args:
        op: Operation, for the message.
        name: What the displacement is called there.
        displacement: To check: ``(n, b, b)``, ``n * b <= width``.
        like: Tensor whose dtype and device it must have.
        like_name: What that is called.
        width: Coordinates that it acts on.

    Raises:
        ValueError: Naming what does not fit.
    """
    if displacement.dtype != like.dtype:
        raise ValueError(f"{op}: {name} is {displacement.dtype} and {like_name} is {like.dtype}; cast one of them")
    if displacement.device != like.device:
        raise ValueError(f"{op}: {name} is on {displacement.device} and {like_name} on {like.device}; move one of them")
    if displacement.ndim != 3 or displacement.shape[1] != displacement.shape[2]:
        shape = tuple(displacement.shape)
        raise ValueError(f"{op}: {name} {shape} does not fit: it takes square blocks, (n, b, b)")
    if displacement.shape[0] * displacement.shape[1] > width:
        raise ValueError(f"{op}: {name} {tuple(displacement.shape)} does not fit in width {width}")


def check_permutation(op: str, name: str, index: Tensor | None, width: int, like: Tensor) -> None:
    """Check dtype, device and length of a permutation of ``width`` coordinates; None is the identity.

    Raises:
        ValueError: Naming what does not fit.
    """
    if index is None:
        return
    if index.dtype != torch.int64 or index.shape != (width,):
        raise ValueError(f"{op}: {name} is {index.dtype} {tuple(index.shape)}; a permutation here is int64 ({width},)")
    if index.device != like.device:
        raise ValueError(f"{op}: {name} is on {index.device} and the data on {like.device}; move one of them")


def debug_permutation(op: str, name: str, index: Tensor | None) -> None:
    """With ``ORTHOTRAIN_DEBUG=1``, check that an index holds every coordinate once: a kernel would write past the end.

    Raises:
        ValueError: It does not.
    """
    if index is None or os.environ.get(DEBUG) != "1":
        return
    if not torch.equal(index.sort().values, torch.arange(index.numel(), device=index.device)):
        raise ValueError(f"{op}: {name} is no permutation: it repeats or leaves out coordinates")
