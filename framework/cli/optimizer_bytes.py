"""The bytes of optimizer state for parameters that have no storage."""

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from orthotrain.layers.rotation.generator_marks import mark_generators, rotated_share
from orthotrain.modules import Optimization

PROBE_NUMBERS = 1 << 16
"""Numbers of a small real parameter, for optimizers that fail on a parameter without storage.

The optimizer state of a larger parameter is computed from the state of this small parameter.
"""


def optimizer_bytes(optimization: Optimization, groups: list[dict[str, Any]]) -> int:
    """Return the bytes of the optimizers' state for the trained parameters of ``groups``, by shape and dtype.

    The bytes are measured: for every shape an optimizer takes a step on a parameter without storage. So they include
    state of another rank than the parameter (GaLore) and of another dtype (bitsandbytes: fp32 below 4,096 numbers).
    """
    total = 0.0
    for group in groups:
        shapes = Counter((tuple(parameter.shape), parameter.dtype) for parameter in group["params"])
        share = rotated_share(group["params"][0])
        for (shape, dtype), count in shapes.items():
            try:
                with FakeTensorMode():
                    held = _state_bytes(optimization, group, _probe(shape, dtype, share))
            except DataDependentOutputException:
                # The kernels of bitsandbytes read memory, so the parameter must be real. Of a large parameter a few
                # rows are enough, since the state grows in proportion to the numbers.
                rows = min(shape[0], max(1, -(-PROBE_NUMBERS // math.prod(shape[1:]))))
                probe = _probe((rows, *shape[1:]), dtype, share)
                held = _state_bytes(optimization, group, probe) * math.prod(shape) / probe.numel()
            total += count * held
    return round(total)


def _probe(shape: tuple[int, ...], dtype: torch.dtype, share: float | None) -> nn.Parameter:
    probe = nn.Parameter(torch.zeros(shape, dtype=dtype))
    probe.grad = torch.zeros_like(probe)
    if share is not None:  # an optimizer of generators accepts no other parameter
        mark_generators(probe, share)
    return probe


def _state_bytes(optimization: Optimization, group: dict[str, Any], probe: nn.Parameter) -> float:
    optimizer = optimization.build([{**group, "params": [probe]}])
    optimizer.step()
    return sum(tensor.nbytes for tensor in state_tensors(optimizer))


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors of an optimizer's state that are no scalars, also those inside objects of the state (GaLore).

    Tables that all parameters share (the quantization map of 8-bit Adam) are left out.
    """
    found: dict[int, Tensor] = {}
    for state in optimizer.state.values():
        for name, value in state.items():
            inside = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, Tensor) else [value]
            tensors = [t for t in inside if isinstance(t, Tensor) and t.ndim and not name.startswith("qmap")]
            found |= {id(tensor): tensor for tensor in tensors}
    return list(found.values())
