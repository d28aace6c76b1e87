"""The memory that a run will need, counted on tensors without storage before anything is allocated."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from orthotrain.cli.optimizer_bytes import optimizer_bytes
from orthotrain.layers import mergeable_layers
from orthotrain.layers.protocols import count_numbers
from orthotrain.models import CausalLM
from orthotrain.modules import BaseModule
from orthotrain.modules.chunked_loss import loss_bytes
from orthotrain.modules.head_loss import logits_of
from orthotrain.modules.transformers_masks import masks_without_reads

GIB = 1024**3

PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
"""Short forms of the trainer's ``precision``, which Lightning accepts."""

CARDS = (16, 24, 48, 80)
"""Memory of common GPUs in GiB, of which CUDA itself takes one."""


@dataclass(frozen=True)
class Entry:
    """One line of a plan: a category, its count of numbers, and its bytes."""

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
        """Bytes of weights, gradients and optimizer state, which are all in memory at the end of each step."""
        return sum(entry.bytes for entry in self.entries if not entry.category.endswith("(estimate)"))

    @property
    def least_bytes(self) -> int:
        """Least bytes of a run: with all gradients, or without them but with all activations and the loss."""
        estimated = self.total_bytes - self.certain_bytes
        return self.certain_bytes + max(0, estimated - self["gradients"].bytes)

    def all_reduce_bytes(self, devices: int) -> float:
        """Return the bytes that each device sends in a step of data parallelism (DDP).

        A ring sends ``2 (n - 1) / n`` of the gradients. Frozen weights and buffers are never sent. Fully sharded, the
        reduce-scatter of the gradients sends half as much, and the gathering of the parameters comes on top.
        """
        return 2 * (devices - 1) / devices * self["gradients"].bytes

    def table(self, adamw: "Plan | None" = None) -> str:
        """Return the plan as text.

        Args:
            adamw: Plan of the same network with every parameter trained by AdamW, for comparison.
        """
        rows = [f"{'':<24}{'numbers':>18}{'GiB':>10}"]
        rows += [f"{e.category:<24}{e.count:>18,}{e.bytes / GIB:>10.3f}" for e in self.entries]
        rows.append(f"{'total':<24}{'':>18}{self.total_bytes / GIB:>10.3f}")
        cards = f"{'planned to fit on':<24}{_cards(self.total_bytes)}"
        if adamw is not None:
            rows.append(f"{'all trained by AdamW':<24}{'':>18}{adamw.total_bytes / GIB:>10.3f}")
            cards += f"; AdamW: {_cards(adamw.total_bytes)}"
        rows.append(cards)
        sent = ", ".join(f"{self.all_reduce_bytes(n) / GIB:.3f} GiB of {n}" for n in (2, 8))
        return "\n".join([*rows, self.note, f"data parallel, each device sends a step: {sent}"])


def _cards(held: int) -> str:
    fitting = [f"{size}" for size in CARDS if held <= (size - 1) * GIB]
    return f"{', '.join(fitting)} GB" if fitting else f"no card of {CARDS[-1]} GB"


def plan_adamw(module: BaseModule, batch_size: int, sequence_length: int, precision: Any = None) -> Plan | None:
    """Count what training every parameter of the same network with AdamW holds.

    Args:
        module: The module to compare with; its builder is copied.
        batch_size: As for :func:`plan_run`.
        sequence_length: As for :func:`plan_run`.
        precision: As for :func:`plan_run`.

    Returns:
        The plan; None where planning would load a network, or if the module already trains every parameter.
    """
    if not isinstance(module._builder, CausalLM) or type(module) is BaseModule:
        return None
    return plan_run(BaseModule(copy.deepcopy(module._builder)), batch_size, sequence_length, precision)


def plan_run(module: BaseModule, batch_size: int, sequence_length: int, precision: str | int | None = None) -> Plan:
    """Count what training ``module`` holds, without allocating it.

    The network is built and run forward once on fake tensors. Activations are the tensors that autograd saves in that
    pass, each storage once. They are exact for eager execution on a CPU, without the temporary tensors inside an
    operation and without the fragmentation of the allocator. The loss is the peak of the next-token loss: fp32 copies
    of the logits, or of a chunk of them. Where a module has another loss, the tensors that it saves are part of the
    activations. With ``route: auto`` a GPU may choose another route, which keeps other activations.

    Args:
        module: A module whose network is not built yet.
        batch_size: Sequences of one micro-batch on one device.
        sequence_length: Tokens of a sequence.
        precision: The trainer's ``precision``.
    """
    precision = PRECISIONS.get(str(precision or "32-true"), str(precision or "32-true"))
    autocast = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = _built_network(module, precision)
        tokens = torch.zeros(batch_size, sequence_length, dtype=torch.int64)
        mixed = torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None)
        # transformers cannot read from fake tensors that no row is packed, and would give each layer a mask of T x T
        with mixed, GroupedProducts(), masks_without_reads(network, {}):
            activations, loss = forward_bytes(module, {"input_ids": tokens, "labels": tokens})
    trainable = [p for p in network.parameters() if p.requires_grad]
    frozen = [p for p in network.parameters() if not p.requires_grad] + list(network.buffers())
    rotations = [p for _, layer in mergeable_layers(network) for p in layer.rotation_parameters()]
    ids = {id(p) for p in rotations}
    entries = (
        _entry("frozen", frozen, count_numbers(network) - sum(p.numel() for p in network.parameters())),
        _entry("trainable, rotations", rotations),
        _entry("trainable, other", [p for p in trainable if id(p) not in ids]),
        _entry("gradients", trainable),
        Entry("optimizer state", 0, optimizer_bytes(module.optimization, module.optimization.groups(network))),
        Entry("activations (estimate)", 0, activations),
        Entry("loss (estimate)", 0, loss),
    )
    return Plan(entries, f"one device, batch {batch_size} x {sequence_length}, precision {precision}")


class GroupedProducts(TorchFunctionMode):
    """Products of experts on fake tensors of every dtype: torch's own function takes only bf16 there.

    Its replacement keeps the same tensors for backward.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace ``grouped_mm``."""
        if func in (getattr(torch.nn.functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None)):
            x, weight = args[:2]
            return x @ weight[0] if weight.ndim == 3 else func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _built_network(module: BaseModule, precision: str) -> nn.Module:
    """Build the network in the dtype of the parameters, as Lightning's precision plugins do."""
    dtypes = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtypes.get(precision, default))
    try:
        module.configure_model()
    finally:
        torch.set_default_dtype(default)
    assert module.model is not None
    return module.model


def batch_shape(data: dict[str, Any]) -> tuple[int, int] | None:
    """Return the batch size and the tokens of a sequence, None where the arguments of a data module have none."""
    size, length = data.get("batch_size"), data.get("sequence_length") or data.get("max_length")
    return (size, length) if isinstance(size, int) and isinstance(length, int) else None


def forward_bytes(module: BaseModule, batch: dict[str, Tensor]) -> tuple[int, int]:
    """Return the bytes that autograd saves in a forward pass, and the bytes that the loss adds at its peak.

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
    """Return the bytes of distinct storages that autograd saves in ``forward``, without the storages of ``owner``.

    Args:
        owner: The module whose parameters and buffers are not counted.
        forward: Runs a forward pass, on real or on fake tensors.
    """
    owned = {t.untyped_storage()._cdata for t in (*owner.parameters(), *owner.buffers())}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned and storage._cdata not in sizes:
            sizes[storage._cdata] = storage.nbytes()
            kept.append(tensor)  # keeps its address from being reused by a later storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(sizes.values())


def _entry(category: str, tensors: Any, packed: int = 0) -> Entry:
    """Return the line of some tensors; ``packed`` is the count of numbers beyond their elements."""
    tensors = list(tensors)
    return Entry(category, packed + sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors))
