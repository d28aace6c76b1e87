"""The one way to make an operation: a custom op where somebody traces, an autograd function in eager mode.

A torch custom op with a gradient costs about 180 us a call on the CPU, more than the rotation of a small layer. In
eager mode the same forward and backward therefore run as a :class:`torch.autograd.Function`. torch.compile and
tensors without values (fake, meta) see the custom op, and never what is inside it.
"""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orthotrain.kernels.checks import debug_permutation
from orthotrain.kernels.dispatch import implementation, traced


def operation(
    name: str,
    fake: Callable[..., Tensor],
    differentiable: Sequence[str] = (),
    *,
    folder: str | None = None,
    saved: Sequence[str] | None = None,
    fake_backward: Callable[..., Tensor] | None = None,
    permutations: Sequence[str] = (),
    computes_in: str | None = None,
    unsupported: Callable[[Tensor], str | None] | None = None,
) -> Callable[..., Tensor]:
    """Return the operation ``orthotrain::<name>``, computed by ``cpu.py`` or ``triton.py`` of its folder.

    Both files hold ``<name>_forward(*arguments)`` and, if there is a gradient, ``<name>_backward(grad, *saved,
    *needed)``. ``needed`` tells for every differentiable argument whether its gradient is needed; with only one such
    argument it is left out. The backward returns the gradients in the order of ``differentiable``; a gradient that is
    not needed may be None. Both run with the device of their tensors current and without autocast. There is no second
    derivative.

    Args:
        name: Of the operation.
        fake: Returns an empty result of the right shape, dtype and device. Its parameters and their annotations are the
            schema of the operation.
        differentiable: Names of the arguments that have gradients.
        folder: In ``kernels/``; None for one of the same name.
        saved: Names of what is kept for the backward, tensors first: arguments or ``output``. None for all arguments.
        fake_backward: As ``fake``, with the arguments of the backward. None where the differentiable arguments are
            saved and every gradient is like its argument.
        permutations: Names of the arguments whose values are checked with ``ORTHOTRAIN_DEBUG=1``.
        computes_in: Name of the argument whose dtype decides whether Triton serves; None for the dtype of the first.
        unsupported: Takes the first argument; returns why the Triton forward does not serve it, or None.
    """
    signature = inspect.signature(fake).parameters
    position = {argument: index for index, argument in enumerate((*signature, "output"))}
    folder = folder or name
    checked = [(argument, position[argument]) for argument in permutations]

    def forward(*arguments: Any) -> Tensor:
        for argument, index in checked:
            debug_permutation(name, argument, arguments[index])
        first = arguments[0]
        like = first if computes_in is None else first.new_empty(0, dtype=arguments[position[computes_in]])
        obstacle = None if unsupported is None else unsupported(first)
        # Triton launches on the current device
        with torch.cuda.device_of(first), without_autocast(first.device.type):
            return getattr(implementation(like, folder, obstacle), f"{name}_forward")(*arguments)

    schema = torch.library.infer_schema(fake, mutates_args=())
    torch.library.custom_op(f"orthotrain::{name}", forward, mutates_args=(), schema=schema).register_fake(fake)
    op = getattr(torch.ops.orthotrain, name).default
    if not differentiable:
        return lambda *arguments: (op if traced(arguments[0]) else forward)(*arguments)

    kept = tuple(signature) if saved is None else tuple(saved)
    tensors = [position[n] for n in kept if n == "output" or signature[n].annotation in (Tensor, Tensor | None)]
    constants = [position[n] for n in kept if position[n] not in tensors]
    wanted = [position[n] for n in differentiable]
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

    def values_of(ctx: Any) -> list[Any]:
        needs = ctx.needs_input_grad
        return [*ctx.saved_tensors, *ctx.constants, *([needs[index] for index in wanted] if several else [])]

    def by_argument(ctx: Any, found: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        placed: list[Tensor | None] = [None] * len(signature)
        needs = ctx.needs_input_grad
        for index, gradient in zip(wanted, found, strict=True):
            placed[index] = gradient if needs[index] else None
        return tuple(placed)

    def eager_forward(ctx: Any, *arguments: Any) -> Tensor:
        output = forward(*arguments)
        save(ctx, arguments, output)
        return output

    @once_differentiable
    def eager_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return by_argument(ctx, gradients(grad, *values_of(ctx)))

    backward_op = _register_backward(name, schema, kept, differentiable, gradients, fake_backward)

    def traced_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = backward_op(grad, *values_of(ctx))
        return by_argument(ctx, found if several else (found,))

    torch.library.register_autograd(op, traced_backward, setup_context=save)
    methods = {"forward": staticmethod(eager_forward), "backward": staticmethod(eager_backward)}
    apply = type(name, (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined]
    return lambda *arguments: (op if traced(arguments[0]) else apply)(*arguments)


def _register_backward(
    name: str,
    schema: str,
    kept: Sequence[str],
    differentiable: Sequence[str],
    gradients: Callable[..., tuple[Tensor | None, ...]],
    fake_backward: Callable[..., Tensor] | None,
) -> Callable[..., Any]:
    """Register ``orthotrain::<name>_backward``, which returns tensors, never None: empty where none is needed."""
    typed = {entry.split()[-1]: entry for entry in schema[1 : schema.index(")")].split(", ")}
    several = len(differentiable) > 1
    needs = [f"bool need_{argument}" for argument in differentiable] if several else []
    entries = ["Tensor grad", *(typed.get(argument, f"Tensor {argument}") for argument in kept), *needs]
    results = ", ".join("Tensor" for _ in differentiable)
    positions = [kept.index(argument) for argument in differentiable] if fake_backward is None else [0]

    def unneeded(grad: Tensor, value: Tensor | None) -> Tensor:
        return (grad if value is None else value).new_empty(0)

    def backward(grad: Tensor, *values: Any) -> Any:
        found = tuple(
            unneeded(grad, values[index]) if gradient is None else gradient.contiguous()
            for gradient, index in zip(gradients(grad, *values), positions, strict=True)
        )
        return found if several else found[0]

    def fake(grad: Tensor, *values: Any) -> Any:
        if fake_backward is not None:
            return fake_backward(grad, *values)
        if not several:
            return values[positions[0]].new_empty(values[positions[0]].shape)
        needed = values[len(kept) :]
        return tuple(
            values[index].new_empty(values[index].shape) if need else unneeded(grad, values[index])
            for index, need in zip(positions, needed, strict=True)
        )

    declared = f"({', '.join(entries)}) -> {f'({results})' if several else results}"
    full_name = f"orthotrain::{name}_backward"
    torch.library.custom_op(full_name, backward, mutates_args=(), schema=declared).register_fake(fake)
    return getattr(torch.ops.orthotrain, f"{name}_backward").default


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Turn autocast off for a type of device, where it is on: entering it costs 10 us in every pass of every layer."""
    # torch.compile of torch 2.11 cannot trace whether a device has autocast; those that it compiles for have it
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    if known and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
