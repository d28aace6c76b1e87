"""What a run will hold in memory, counted on tensors without storage before anything is allocated."""

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from orthotrain.layers import mergeable_layers
from orthotrain.layers.rotation.generators import mark_generators, rotated_share
from orthotrain.modules import BaseModule, Optimization
from orthotrain.modules.chunked_loss import loss_bytes
from orthotrain.modules.head_loss import logits_of

GIB = 1024**3

PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
"""Short forms of the trainer's ``precision``, as Lightning takes them."""

PROBE_NUMBERS = 1 << 16
"""Numbers of the parameter from which the state of a larger one is extrapolated, where one without storage fails."""


@dataclass(frozen=True)
class Entry:
    """One line of a plan: a category, how many numbers it holds, and in how many bytes."""

    category: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """Parameters and bytes of a run on one device, by category."""

    entries: tuple[Entry, ...]
    note: str

    def __getitem__(self, category: str) -> Entry:
        return next(entry for entry in self.entries if entry.category == category)

    @property
    def total_bytes(self) -> int:
        """Bytes of all categories together."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def certain_bytes(self) -> int:
        """Bytes of weights, gradients and optimizer state, which are in memory together at the end of each step."""
        return sum(entry.bytes for entry in self.entries if not entry.category.endswith("(estimate)"))

    @property
    def least_bytes(self) -> int:
        """Bytes of the larger of two moments: all gradients, or all activations and the loss without gradients."""
        estimated = self.total_bytes - self.certain_bytes
        return self.certain_bytes + max(0, estimated - self["gradients"].bytes)

    def table(self) -> str:
        """Return the plan as text."""
        rows = [f"{'':<24}{'numbers':>18}{'GiB':>10}"]
        rows += [f"{e.category:<24}{e.count:>18,}{e.bytes / GIB:>10.3f}" for e in self.entries]
        return "\n".join([*rows, f"{'total':<24}{'':>18}{self.total_bytes / GIB:>10.3f}", self.note])


def plan_run(module: BaseModule, batch_size: int, sequence_length: int, precision: str | int | None = None) -> Plan:
    """Count what training ``module`` holds, without allocating it.

    The network is built and run forward once on fake tensors. Activations are the tensors that autograd saves in that
    pass, each storage once: exact for eager execution on a CPU, without the transients of a single operation and the
    allocator's fragmentation. The loss is what the next-token loss holds at its peak, fp32 copies of the logits or
    those of a chunk; where a module has another loss, what that saves is part of the activations. With ``route: auto``
    a GPU may take another route, which keeps other activations.

    Args:
        module: A module whose network is not built yet.
        batch_size: Sequences of one micro-batch on one device.
        sequence_length: Tokens of a sequence.
        precision: The trainer's ``precision``.
    """
    precision = PRECISIONS.get(str(precision or "32-true"), str(precision or "32-true"))
    built_in = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
    autocast = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # as Lightning's half precision does: the network is built in it
        default = torch.get_default_dtype()
        torch.set_default_dtype(built_in.get(precision, default))
        try:
            module.configure_model()
        finally:
            torch.set_default_dtype(default)
        assert module.model is not None
        network = module.model
        tokens = torch.zeros(batch_size, sequence_length, dtype=torch.int64)
        batch = {"input_ids": tokens, "labels": tokens}
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            activations, loss = forward_bytes(module, batch)
    trainable = [p for p in network.parameters() if p.requires_grad]
    frozen = [p for p in network.parameters() if not p.requires_grad] + list(network.buffers())
    rotations = [p for _, layer in mergeable_layers(network) for p in layer.rotation_parameters()]
    taken = {id(p) for p in rotations}
    state = optimizer_bytes(module.optimization, module.optimization.groups(network))
    entries = (
        _entry("frozen", frozen),
        _entry("trainable, rotations", rotations),
        _entry("trainable, other", [p for p in trainable if id(p) not in taken]),
        _entry("gradients", trainable),
        Entry("optimizer state", 0, state),
        Entry("activations (estimate)", 0, activations),
        Entry("loss (estimate)", 0, loss),
    )
    note = f"one device, batch {batch_size} x {sequence_length}, precision {precision}"
    return Plan(entries, note)


def forward_bytes(module: BaseModule, batch: dict[str, Tensor]) -> tuple[int, int]:
    """Return the bytes that autograd saves in a forward pass, and those that the loss holds at its peak beside them.

    Args:
        module: A module whose network is built.
        batch: Its ``input_ids`` and ``labels``, both ``(B, T)``.
    """
    if not module.has_next_token_loss:
        return saved_bytes(module, lambda: module.loss(batch)), 0
    assert module.model is not None
    head, tokens, outputs = module.head_loss, batch["labels"].numel(), []
    if module.needs_logits is None:
        head.probe(module.model, lambda: module.network_output(batch), batch["labels"].device)
    saved = saved_bytes(module, lambda: outputs.append(logits_of(module.network_output(batch))))
    classes = outputs[0].shape[-1]
    rows = head.rows_for(tokens, classes) if module.needs_logits is None else None
    return saved, loss_bytes(tokens, classes, outputs[0].dtype, rows)


def saved_bytes(owner: nn.Module, forward: Callable[[], Any]) -> int:
    """Return the bytes of distinct storages that autograd saves in ``forward``, those of ``owner`` left out.

    Args:
        owner: The module whose parameters and buffers do not count.
        forward: Runs a forward pass, on real or on fake tensors.
    """
    owned = {t.untyped_storage()._cdata for t in (*owner.parameters(), *owner.buffers())}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned and storage._cdata not in sizes:
            sizes[storage._cdata] = storage.nbytes()
            kept.append(tensor)  # alive, so that no later storage takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(sizes.values())


def optimizer_bytes(optimization: Optimization, groups: list[dict[str, Any]]) -> int:
    """Return the bytes of the optimizers' state for the trained parameters of ``groups``, by shape and dtype.

    Measured, not assumed: for every shape an optimizer takes a step on a parameter without storage, so that what it
    keeps of another rank (GaLore) or of small parameters (bitsandbytes: fp32 below 4,096 numbers) counts as it is.
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
                # kernels that read memory, as those of bitsandbytes: a real parameter, and where that would be large
                # one of as many rows as are enough for a state that grows with the numbers
                rows = min(shape[0], max(1, -(-PROBE_NUMBERS // math.prod(shape[1:]))))
                probe = _probe((rows, *shape[1:]), dtype, share)
                held = _state_bytes(optimization, group, probe) * math.prod(shape) / probe.numel()
            total += count * held
    return round(total)


def _probe(shape: tuple[int, ...], dtype: torch.dtype, share: float | None) -> nn.Parameter:
    probe = nn.Parameter(torch.zeros(shape, dtype=dtype))
    probe.grad = torch.zeros_like(probe)
    if share is not None:  # an optimizer of generators takes nothing else
        mark_generators(probe, share)
    return probe


def _state_bytes(optimization: Optimization, group: dict[str, Any], probe: nn.Parameter) -> float:
    optimizer = optimization.build([{**group, "params": [probe]}])
    optimizer.step()
    return sum(tensor.nbytes for tensor in state_tensors(optimizer))


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors of an optimizer's state that are no scalars, those in objects of its own (GaLore) too.

    Tables that all parameters share (the code of 8-bit Adam) are left out.
    """
    found: dict[int, Tensor] = {}
    for state in optimizer.state.values():
        for name, value in state.items():
            inside = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, Tensor) else [value]
            tensors = [t for t in inside if isinstance(t, Tensor) and t.ndim and not name.startswith("qmap")]
            found |= {id(tensor): tensor for tensor in tensors}
    return list(found.values())


def _entry(category: str, tensors: Any) -> Entry:
    tensors = list(tensors)
    return Entry(category, sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors))
