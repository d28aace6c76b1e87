"""Optimizers of bitsandbytes on sharded parameters: every rank steps its own part, a checkpoint holds the whole state.

The kernels of bitsandbytes do not support sharded tensors. Their 8-bit moments are stored in blocks of 256 values with
one scale each, and the end of a shard may lie inside a block. For a checkpoint the moments are converted to fp32,
joined, and converted back in the blocks of the whole parameter. This changes no bit if every shard ends at the end of a
block, and rounds once more otherwise.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

WRAPPED = "__bnb_optimizer_quant_state__"
"""Key of the part of bitsandbytes' state dicts that torch must not cast when it loads them."""

BLOCK = 256
"""Values that share one scale."""


class LocalSteps:
    """Mix-in for an optimizer of bitsandbytes that steps this rank's part of each sharded parameter."""

    state: Any

    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Create the moments of this rank's part."""
        with self._local(p) as part:
            super().init_state(group, part, gindex, pindex)  # type: ignore[misc]

    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Step this rank's part."""
        with self._local(p) as part:
            if part.numel():
                super().update_step(group, part, gindex, pindex)  # type: ignore[misc]

    @contextmanager
    def _local(self, p: Tensor) -> Iterator[Tensor]:
        if not isinstance(p, DTensor):
            yield p
            return
        part, gradient = p.to_local(), p.grad
        part.grad = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        self.state[part] = self.state[p]  # one dictionary under two keys
        try:
            yield part
        finally:
            del self.state[part]


def step_locally(optimizer: Optimizer) -> bool:
    """Let an optimizer, or its parts, step sharded parameters; return whether any of them is one of bitsandbytes."""
    found = False
    for part in getattr(optimizer, "parts", [optimizer]):
        if is_bitsandbytes(part):
            found = True
            if not isinstance(part, LocalSteps):
                part.__class__ = type(type(part).__name__, (LocalSteps, type(part)), {})
    return found


def is_bitsandbytes(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer is one of bitsandbytes, without importing it."""
    return any(base.__module__.startswith("bitsandbytes.optim") for base in type(optimizer).__mro__)


def whole_entry(entry: dict[str, Any], parameter: DTensor, optimizer: Any) -> dict[str, Any]:
    """Return the state of a parameter as one device would hold it; every rank must call this.

    Args:
        entry: This rank's entry of the optimizer's state dict.
        parameter: The sharded parameter.
        optimizer: The optimizer of bitsandbytes.
    """
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()

    def whole(part: Tensor) -> Tensor:
        sharded = DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)
        return sharded.full_tensor().cpu()

    return {**entry, WRAPPED: _converted(entry[WRAPPED], whole, optimizer)}


def local_entry(entry: dict[str, Any], parameter: DTensor, optimizer: Any) -> dict[str, Any]:
    """Return this rank's part of the state of a parameter; the arguments are those of :func:`whole_entry`."""
    return {**entry, WRAPPED: _converted(entry[WRAPPED], lambda t: sharded_like(t, parameter).to_local(), optimizer)}


def sharded_like(tensor: Tensor, parameter: DTensor) -> DTensor:
    """Shard a whole tensor, which every rank has, as a parameter is sharded."""
    on_device = tensor.to(parameter.device)
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _converted(stored: dict[str, Tensor], convert: Callable[[Tensor], Tensor], optimizer: Any) -> dict[str, Tensor]:
    """Return stored moments converted in fp32, stored again in 8 bits, or in fp32 if the parameter is small."""
    from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise

    packed: dict[str, Tensor] = {}
    for number in (1, 2):
        values = stored.get(f"state{number}")
        if values is None:
            continue
        if values.dtype == torch.uint8:
            scale, code = stored[f"absmax{number}"], stored[f"qmap{number}"]
            values = dequantize_blockwise(values, absmax=scale, code=code.to(values.device), blocksize=BLOCK)
        values = convert(values)
        if optimizer.args.optim_bits == 8 and values.numel() >= optimizer.args.min_8bit_size:
            code = create_dynamic_map(signed=number == 1).to(values.device)
            values, scales = quantize_blockwise(values.contiguous(), code=code, blocksize=BLOCK)
            packed |= {f"qmap{number}": code, f"absmax{number}": scales.absmax}
        packed[f"state{number}"] = values
    return packed
