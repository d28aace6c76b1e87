"""Decides whether an operation runs its PyTorch code (``cpu.py``) or its Triton kernels; no other file decides it.

The choice is ``auto``, ``reference`` or ``triton``. ``auto`` takes Triton where the kernels serve the tensor and the
PyTorch code elsewhere. ``reference`` always takes the PyTorch code. ``triton`` never falls back: a tensor that the
kernels do not serve is an error that says why. The choice belongs to the process, not to a thread, since autograd runs
the backward of GPU tensors in threads of its own.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Backend = Literal["reference", "triton"]
Choice = Literal["auto", "reference", "triton"]

VARIABLE = "ORTHOTRAIN_KERNELS"
"""Environment variable with the initial choice; without it, ``auto``."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CAPABILITY = (8, 0)
"""The oldest CUDA devices that the kernels are compiled and checked for."""

_choice: Choice | None = None
_ran: set[tuple[Backend, str, str | None, str]] = set()  # (implementation, device type, obstacle, operation)


class use_backend(contextlib.AbstractContextManager[Any]):
    """Choose the implementation of every operation, until the next call or the end of a ``with`` block.

    Args:
        choice: ``auto``, ``reference`` or ``triton``.

    Raises:
        ValueError: Another word.
    """

    def __init__(self, choice: str) -> None:
        global _choice
        self._previous = _choice
        _choice = _checked(choice, "kernels")

    def __exit__(self, *_: Any) -> None:
        global _choice
        _choice = self._previous


def chosen() -> Choice:
    """Return the current choice: from ``use_backend``, else from the environment variable, else ``auto``.

    Raises:
        ValueError: The environment variable holds another word.
    """
    return _choice or _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)


def backend_for(tensor: Tensor, op: str, unsupported: str | None = None) -> Backend:
    """Return which implementation computes an operation on a tensor.

    Args:
        tensor: The operand whose device and dtype decide.
        op: Name of the operation, for the message.
        unsupported: Why the Triton kernels do not serve these shapes; None if they do.

    Raises:
        ValueError: The choice is ``triton``, and the kernels do not serve this tensor; the message says why and which
            choices would run.
    """
    choice, device = chosen(), tensor.device.type
    if choice == "reference" or (choice == "auto" and device != "cuda"):
        _ran.add(("reference", device, "kernels=reference" if device == "cuda" else None, op))
        return "reference"
    obstacle = unsupported or _obstacle(tensor)
    if obstacle is not None and choice == "triton":
        raise ValueError(f"{op}: kernels=triton, but {obstacle}; kernels=auto or kernels=reference would run")
    backend: Backend = "triton" if obstacle is None else "reference"
    _ran.add((backend, device, obstacle, op))
    return backend


def implementation(tensor: Tensor, op: str, unsupported: str | None = None) -> ModuleType:
    """Return the module ``orthotrain.kernels.<op>.cpu`` or ``.triton`` that ``backend_for`` decides on."""
    return _module(op, "cpu" if backend_for(tensor, op, unsupported) == "reference" else "triton")


@functools.cache
def _module(op: str, file: str) -> ModuleType:
    """Import the code of an operation. No other file imports ``triton.py``, so triton is imported only when used."""
    return importlib.import_module(f"orthotrain.kernels.{op}.{file}")


def plain_cpu(tensor: Tensor) -> bool:
    """Tell whether PyTorch code runs on the CPU: with the choice ``triton``, Triton's interpreter runs there."""
    return tensor.device.type == "cpu" and chosen() != "triton"


def traced(tensor: Tensor) -> bool:
    """Tell whether torch.compile traces or the tensor has no values (fake, meta): operations then run as custom ops."""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.is_meta


def check_possible(device: torch.device | None = None) -> None:
    """Refuse the choice ``triton`` where the kernels cannot run, before anything is computed.

    Args:
        device: Where operations will run; None for any device of this machine.

    Raises:
        ValueError: The kernels cannot run; the message says why and which choices would run. Or the choice is unknown.
    """
    if chosen() != "triton":
        return
    obstacle = _missing()
    if obstacle is None and device is None and not torch.cuda.is_available():
        obstacle = None if _interpreted() else "torch finds no GPU here"
    elif obstacle is None:
        obstacle = _type_obstacle(device or torch.device("cuda", torch.cuda.current_device()))
    if obstacle is not None:
        raise ValueError(f"kernels=triton, but {obstacle}; {VARIABLE}=auto or {VARIABLE}=reference would run")


def forget_ran() -> None:
    """Forget which implementations have run, for the next :func:`describe`."""
    _ran.clear()


def describe() -> str:
    """Return one line: what has computed operations since :func:`forget_ran`, where, and why not Triton on a GPU."""
    by_kind: dict[tuple[Backend, str, str | None], list[str]] = {}
    for backend, device, obstacle, op in sorted(_ran, key=str):
        by_kind.setdefault((backend, device, obstacle), []).append(op)
    parts = [_described(*kind, ops if len(by_kind) > 1 else []) for kind, ops in by_kind.items()]
    return "; ".join(sorted(parts, reverse=True)) or "none were needed: no rotation was computed"


def _described(backend: Backend, device: str, obstacle: str | None, ops: list[str]) -> str:
    which = f" for {', '.join(ops)}" if ops else ""
    if backend == "reference":
        where = "the CPU" if device == "cpu" else "the GPU" if device == "cuda" else device
        return f"PyTorch code on {where}{which}" + (f" ({obstacle})" if obstacle else "")
    where = f"on {torch.cuda.get_device_name()}" if device == "cuda" else "interpreted on the CPU"
    return f"Triton {importlib.import_module('triton').__version__} {where}{which}"


def _checked(choice: str, name: str) -> Choice:
    if choice not in get_args(Choice):
        raise ValueError(f"{name}={choice!r}: choose one of {', '.join(get_args(Choice))}")
    return choice  # type: ignore[return-value]


def _obstacle(tensor: Tensor) -> str | None:
    """Return why no Triton kernel can take the tensor, or None."""
    if tensor.dtype not in DTYPES:
        return f"Triton kernels compute in fp16, bf16 and fp32, not in {tensor.dtype}"
    return _missing() or _type_obstacle(tensor.device)


def _type_obstacle(device: torch.device) -> str | None:
    """Return why no Triton kernel can run on a device, or None."""
    if device.type == "cuda":
        return _device_obstacle(device)
    if device.type == "cpu":
        return None if _interpreted() else "this runs on the CPU and TRITON_INTERPRET=1 was not set at the start"
    return f"Triton kernels run on CUDA devices, not on {device.type}"


@functools.cache
def _missing() -> str | None:
    """Return that triton is not installed, or None."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _interpreted() -> bool:
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


@functools.cache
def _device_obstacle(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs, and this torch is built for AMD"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has compute capability {capability}, below {CAPABILITY}"
    return None
