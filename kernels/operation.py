"""Makes every operation: a custom op while torch.compile traces, an autograd function in eager mode.

A torch custom op with a gradient costs about 180 us a call on the CPU, more than the rotation of a small layer. In
eager mode the same forward and backward therefore run as a :class:`torch.autograd.Function`. torch.compile and
tensors without values (fake, meta) see the custom op, and never what is inside it.
"""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orthotrain.kernels.checks import debug_permutation
from orthotrain.kernels.dispatch import implementation, traced
from orthotrain.kernels.outputs import unviewed

NAMESPACE = "orthotrain_v2"
"""Namespace of the custom ops. torch keeps compiled backward graphs on disk and finds them by the forward graph alone.
When the arguments of a backward change, this name must change: an old graph would give wrong gradients without an
error."""


def operation(
    name: str,
    differentiable: Sequence[str] = (),
    *,
    folder: str | None = None,
    fake: Callable[..., Tensor] | None = None,
    saved: Sequence[str] | None = None,
    fake_backward: Callable[..., Tensor] | None = None,
    permutations: Sequence[str] = (),
    computes_in: str | None = None,
    unsupported: Callable[[Tensor], str | None] | None = None,
) -> Callable[..., Tensor]:
    """Return the operation ``<NAMESPACE>::<name>``, computed by ``cpu.py`` or ``triton.py`` of its folder.

    Both files hold ``<name>_forward(*arguments)`` and, if there is a gradient, ``<name>_backward(grad, *saved,
    *needed)``. The parameters of the forward in ``cpu.py`` and their annotations are the schema of the operation.
    ``needed`` tells for every differentiable argument whether its gradient is needed; with only one such argument it is
    left out. The backward returns the gradients in the order of ``differentiable``; a gradient that is not needed may
    be None. Both run with the device of their tensors current and without autocast. There is no second derivative.

    Args:
        name: Of the operation.
        differentiable: Names of the arguments that have gradients.
        folder: In ``kernels/``; None for one of the same name.
        fake: Takes the arguments and returns an empty result of the right shape, dtype and device. None where the
            result is like the first argument.
        saved: Names of what is kept for the backward, tensors first: arguments or ``output``. None for all arguments.
        fake_backward: As ``fake``, with the arguments of the backward. None where every gradient is like its argument,
            or like the gradient of the result if that argument is not saved.
        permutations: Names of the arguments whose values are checked with ``ORTHOTRAIN_DEBUG=1``.
        computes_in: Name of the argument whose dtype decides whether Triton serves; None for the dtype of the first.
        unsupported: Takes the first argument; returns why the Triton forward does not serve it, or None.
    """
    folder = folder or name
    definition = getattr(importlib.import_module(f"orthotrain.kernels.{folder}.cpu"), f"{name}_forward")
    names = tuple(inspect.signature(definition).parameters)
    checked = [(argument, names.index(argument)) for argument in permutations]
    dtype_position = None if computes_in is None else names.index(computes_in)

    def forward(*arguments: Any) -> Tensor:
        for argument, index in checked:
            debug_permutation(name, argument, arguments[index])
        first = arguments[0]
        like = first if dtype_position is None else first.new_empty(0, dtype=arguments[dtype_position])
        obstacle = None if unsupported is None else unsupported(first)
        # Triton launches on the current device
        with torch.cuda.device_of(first), without_autocast(first.device.type):
            return getattr(implementation(like, folder, obstacle), f"{name}_forward")(*arguments)

    schema = torch.library.infer_schema(definition, mutates_args=())
    op = _registered(name, forward, schema, fake or (lambda first, *_: first.new_empty(first.shape)))
    eager = forward
    if differentiable:
        kept = names if saved is None else tuple(saved)
        eager = _add_gradient(name, folder, forward, schema, tuple(differentiable), kept, fake_backward)
    return lambda *arguments: (op if traced(arguments[0]) else eager)(*arguments)


def _add_gradient(
    name: str,
    folder: str,
    forward: Callable[..., Tensor],
    schema: str,
    differentiable: tuple[str, ...],
    kept: tuple[str, ...],
    fake_backward: Callable[..., Tensor] | None,
) -> Callable[..., Tensor]:
    """Register the gradient of a custom op and return the function that does the same in eager mode."""
    types = {entry.split()[-1]: entry.split()[0] for entry in schema[1 : schema.index(")")].split(", ")}
    position = {argument: index for index, argument in enumerate((*types, "output"))}
    tensors = [position[argument] for argument in kept if types.get(argument, "Tensor") in ("Tensor", "Tensor?")]
    constants = [position[argument] for argument in kept if position[argument] not in tensors]
    wanted = [position[argument] for argument in differentiable]
    several = len(wanted) > 1

    def gradients(grad: Tensor, *values: Any) -> tuple[Tensor | None, ...]:
        like = values[0] if tensors else grad
        with torch.cuda.device_of(like), without_autocast(like.device.type):
            found = getattr(implementation(like, folder), f"{name}_backward")(grad, *values)
        return found if several else (found,)

    def save(ctx: Any, inputs: tuple, output: Tensor) -> None:
        available = (*inputs, output)
        ctx.save_for_backward(*[available[index] for index in tensors])
        ctx.constants = [available[index] for index in constants]

    def backward(compute: Callable[..., tuple[Tensor | None, ...]], ctx: Any, grad: Tensor) -> tuple:
        needs = ctx.needs_input_grad
        needed = [needs[index] for index in wanted] if several else []
        found = compute(grad, *ctx.saved_tensors, *ctx.constants, *needed)
        placed: list[Tensor | None] = [None] * len(types)
        for index, gradient in zip(wanted, found, strict=True):
            placed[index] = gradient if needs[index] else None
        return tuple(placed)

    def eager_forward(ctx: Any, *arguments: Any) -> Tensor:
        output = unviewed(forward(*arguments))
        save(ctx, arguments, output)
        return output

    entries = [f"{types.get(argument, 'Tensor')} {argument}" for argument in kept]
    backward_op = _registered_backward(name, entries, kept, differentiable, gradients, fake_backward)
    traced_backward = functools.partial(backward, backward_op)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", traced_backward, setup_context=save)
    eager_backward = once_differentiable(functools.partial(backward, gradients))
    methods = {"forward": staticmethod(eager_forward), "backward": staticmethod(eager_backward)}
    return type(name, (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined]


def _registered_backward(
    name: str,
    entries: list[str],
    kept: tuple[str, ...],
    differentiable: tuple[str, ...],
    gradients: Callable[..., tuple[Tensor | None, ...]],
    fake: Callable[..., Any] | None,
) -> Callable[..., tuple[Tensor, ...]]:
    """Register ``<name>_backward``, whose results are tensors, never None: empty where a gradient is not needed."""
    several = len(differentiable) > 1
    needs = [f"bool need_{argument}" for argument in differentiable] if several else []

    def alike(grad: Tensor, values: Sequence[Any]) -> list[Tensor]:
        """Return the tensors that the gradients are like: the arguments, or the gradient of the result."""
        arguments = [values[kept.index(argument)] if argument in kept else None for argument in differentiable]
        return [grad if argument is None else argument for argument in arguments]

    def backward(grad: Tensor, *values: Any) -> Any:
        found = tuple(
            like.new_empty(0) if gradient is None else gradient.contiguous()
            for gradient, like in zip(gradients(grad, *values), alike(grad, values), strict=True)
        )
        return found if several else found[0]

    def fake_backward(grad: Tensor, *values: Any) -> Any:
        needed = values[len(kept) :] if several else [True]
        pairs = zip(alike(grad, values), needed, strict=True)
        found = tuple(like.new_empty(like.shape if need else 0) for like, need in pairs)
        return found if several else found[0]

    results = ", ".join("Tensor" for _ in differentiable)
    schema = f"({', '.join(['Tensor grad', *entries, *needs])}) -> {f'({results})' if several else results}"
    op = _registered(f"{name}_backward", backward, schema, fake or fake_backward)
    return op if several else lambda *arguments: (op(*arguments),)


def _registered(name: str, function: Callable[..., Any], schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    custom = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=(), schema=schema)
    custom.register_fake(fake)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Turn autocast off for a type of device, where it is on: entering it costs 10 us in every pass of every layer."""
    # torch.compile of torch 2.11 cannot trace whether a device has autocast; those that it compiles for have it
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    if known and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
