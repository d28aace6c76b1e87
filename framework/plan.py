"""What a run will hold in memory, counted on tensors without storage before anything is allocated."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from orthotrain.layers import mergeable_layers
from orthotrain.layers.generators import mark_generators, rotated_share
from orthotrain.modules import BaseModule, Optimization

GIB = 1024**3


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

    def table(self) -> str:
        """Return the plan as text."""
        rows = [f"{'':<24}{'numbers':>18}{'GiB':>10}"]
        rows += [f"{e.category:<24}{e.count:>18,}{e.bytes / GIB:>10.3f}" for e in self.entries]
        return "\n".join([*rows, f"{'total':<24}{'':>18}{self.total_bytes / GIB:>10.3f}", self.note])


def plan_run(module: BaseModule, batch_size: int, sequence_length: int, precision: str | int | None = None) -> Plan:
    """Count what training ``module`` holds, without allocating it.

    The network is built and run forward once on fake tensors. Activations are the tensors that autograd saves in that
    pass, each storage once: exact for eager execution, without the transients of a single operation and the
    allocator's fragmentation.

    Args:
        module: A module whose network is not built yet.
        batch_size: Sequences of one micro-batch on one device.
        sequence_length: Tokens of a sequence.
        precision: The trainer's ``precision``.
    """
    precision = str(precision or "32-true")
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # as Lightning's half precision does: the network is built in it
        default = torch.get_default_dtype()
        torch.set_default_dtype({"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, default))
        try:
            module.configure_model()
        finally:
            torch.set_default_dtype(default)
        assert module.model is not None
        network = module.model
        tokens = torch.zeros(batch_size, sequence_length, dtype=torch.int64)
        batch = {"input_ids": tokens, "labels": tokens}
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            activations = saved_bytes(module, lambda: module.loss(batch))
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
    )
    note = f"one device, batch {batch_size} x {sequence_length}, precision {precision}"
    return Plan(entries, note)


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

    Measured, not assumed: every optimizer takes a step on one small real parameter of each group, and what it then
    holds is scaled to the numbers of the group. An optimizer that keeps a state of another rank (GaLore) is
    overestimated where a matrix is larger than the small one.
    """
    total = 0.0
    for group in groups:
        for dtype in {parameter.dtype for parameter in group["params"]}:
            width = group["params"][0].shape[-1] if group["name"] == "rotations" else 256
            probe = nn.Parameter(torch.zeros(-(-65536 // width), width, dtype=dtype))
            probe.grad = torch.zeros_like(probe)
            share = rotated_share(group["params"][0])
            if share is not None:  # an optimizer of generators takes nothing else
                mark_generators(probe, share)
            optimizer = optimization.build([{**group, "params": [probe]}])
            optimizer.step()
            tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
            held = sum(t.nbytes for t in tensors if t.ndim)
            numbers = sum(p.numel() for p in group["params"] if p.dtype == dtype)
            total += numbers * held / probe.numel()
    return round(total)


def _entry(category: str, tensors: Any) -> Entry:
    tensors = list(tensors)
    return Entry(category, sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors))
