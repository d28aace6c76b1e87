"""Forward and backward of a batch replayed as two CUDA graphs: one launch each instead of thousands."""

import itertools
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from orthotrain.errors import ConfigurationError

WARM_UP = 2
"""Batches of a new set of shapes that are computed eagerly first: kernels are compiled, gradients allocated."""

MOST_SHAPES = 4
"""Sets of shapes that are captured; batches of further sets are always computed eagerly."""

MOST_SEEN = 1024
"""Sets of shapes (and of the plain values beside the tensors) whose batches are counted before a capture."""

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
"""Types that a batch may hold beside tensors: their values can be compared, and contain no tensors."""


class Recorder(Protocol):
    """Records the work that a function launches on a device, to launch it again."""

    def warm(self, function: Callable[[], Tensor]) -> Tensor:
        """Call a function under the conditions of :meth:`record`, and return its result."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record the work of a function; return a function that launches the same work on the same memory."""


class CudaRecorder:
    """Records CUDA graphs; all graphs of a recorder share one memory, so only one of them may be in progress."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def warm(self, function: Callable[[], Tensor]) -> Tensor:
        """Call a function on the stream of the captures, so that libraries allocate their workspace for that stream."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture a function without executing it, and return its replay."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as those that pin batches, may use CUDA during the capture
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            function()
        return graph.replay


RECORDERS: dict[str, Callable[[], Recorder]] = {"cuda": CudaRecorder}
"""Type of a device -> recorder for that device."""


@dataclass
class _Graphs:
    """The two graphs of one set of shapes, with the tensors that they read and write."""

    inputs: list[Any]
    loss: Tensor
    grad: Tensor
    forward: Callable[[], None]
    backward: Callable[[], None]


class GraphedStep:
    """``compute(batch)`` and its backward pass, replayed as CUDA graphs.

    For each set of shapes, the first batches are computed eagerly and the next batch is captured. Every later batch is
    copied into the memory that the capture has read. Gradients are added to the existing ``.grad`` of the parameters,
    so that batches accumulate; code that clears them must keep their memory (``zero_grad(set_to_none=False)``). The
    next replay sees optimizer steps, merges and folds, which change parameters and buffers in place. If a parameter,
    buffer or gradient has moved to other memory, or a parameter is trained now and was not before, all graphs are
    dropped and captured again.

    Decisions that ``compute`` takes on the host are taken once for each set of shapes. Every call must be followed by
    its backward pass before the next call, which uses the same memory.

    Args:
        compute: Returns the loss of a batch, a scalar on the device of the module, without waiting for the device.
        module: The module whose parameters and buffers ``compute`` reads; its layers must not be replaced later.
        recorder: Records the graphs; None for the recorder of the module's device.

    Attributes:
        captures: How many sets of shapes have been captured so far, including those that were dropped.
        turn: Number of the current pass.
    """

    def __init__(self, compute: Callable[[Any], Tensor], module: nn.Module, recorder: Recorder | None = None) -> None:
        self.captures = 0
        self._compute = compute
        self._module = module
        self._recorder = recorder or RECORDERS[_device(module).type]()
        self._graphs: dict[Hashable, _Graphs] = {}
        self._seen: dict[Hashable, int] = {}
        # the modules' own dictionaries: a walk through the modules of a large network takes milliseconds a step
        owned = (tensors for part in module.modules() for tensors in (part._parameters, part._buffers))
        self._owned = [tensors for tensors in owned if tensors]
        self._memory: list[Any] = []
        self.turn = 0
        self._anchor = torch.zeros((), device=_device(module), requires_grad=True)

    def __call__(self, batch: Any) -> Tensor:
        """Return the loss of a batch; its ``backward()`` adds to the gradients of the parameters.

        Args:
            batch: Tensors in any nesting of dictionaries, lists and tuples, beside plain values.

        Raises:
            ConfigurationError: If ``compute`` does something that cannot be captured, if the batch holds anything but
                tensors and plain values, or if a trained parameter has no part in the loss or has lost its gradient.
        """
        leaves, structure = tree_flatten(batch)
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *PLAIN)):
                raise ConfigurationError(
                    f"compile=cuda-graph: a batch holds a {type(leaf).__name__}, whose tensors a replay would not see: "
                    "let the data give dictionaries, lists or tuples of tensors, or take compile=none"
                )
        key = (structure, *(_shape_key(leaf) for leaf in leaves))
        if self._graphs and self._addresses() != self._memory:
            self._graphs.clear()
            self._seen.clear()
        if key not in self._graphs:
            seen = self._seen.get(key, 0)
            if len(self._graphs) >= MOST_SHAPES or (not seen and len(self._seen) >= MOST_SEEN):
                return self._compute(batch)
            self._seen[key] = seen + 1
            if seen < WARM_UP:
                return self._recorder.warm(lambda: self._compute(batch))
            self._graphs[key] = self._captured(leaves, structure)
        return _Replay.apply(self._anchor, self, self._graphs[key], leaves)

    def _captured(self, leaves: list[Any], structure: Any) -> _Graphs:
        inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        batch, kept = tree_unflatten(inputs, structure), {}
        trained = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        had_gradient = {name: parameter.grad is not None for name, parameter in trained.items()}

        def forward() -> None:
            kept["loss"] = self._compute(batch)

        def backward() -> None:
            kept["loss"].backward(kept["grad"])

        reached: set[nn.Parameter] = set()
        handles = [p.register_post_accumulate_grad_hook(reached.add) for p in trained.values()]
        try:
            with _uncached_casts():
                replay_forward = self._recorder.record(forward)
                kept["grad"] = torch.ones_like(kept["loss"])
                replay_backward = self._recorder.record(backward)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConfigurationError(
                f"compile=cuda-graph: the loss of {type(self._module).__name__} cannot be captured as a CUDA graph "
                f"({str(error).splitlines()[0]}): it may not wait for the GPU, as .item() does; take compile=default "
                "or compile=none"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        self._check_gradients(trained, had_gradient, reached)
        self.captures += 1
        self._memory = self._addresses()
        return _Graphs(inputs, kept["loss"].detach(), kept["grad"], replay_forward, replay_backward)

    def _check_gradients(
        self, trained: dict[str, nn.Parameter], had: dict[str, bool], reached: set[nn.Parameter]
    ) -> None:
        """Refuse gradients to which replays would not add, and zero gradients that would be None without graphs."""
        for name, parameter in trained.items():
            if parameter in reached and not had[name]:
                raise ConfigurationError(
                    f"compile=cuda-graph: the gradient of {name} was dropped after the first batches, and a replay "
                    "could not add to it: let zero_grad keep the memory of gradients (set_to_none=False), or take "
                    "compile=none"
                )
            if parameter not in reached and had[name]:
                raise ConfigurationError(
                    f"compile=cuda-graph: {name} has no part in the loss of this batch, and had one before. Its "
                    "gradient would be zero, and None without graphs: take compile=default"
                )

    def _addresses(self) -> list[Any]:
        """Return the addresses of all tensors that a graph reads or writes, and which of them are trained."""
        tensors = [tensor for owned in self._owned for tensor in owned.values() if tensor is not None]
        trained = [tensor.requires_grad for tensor in tensors]
        grads = [tensor.grad for tensor in itertools.compress(tensors, trained)]
        return [
            *map(Tensor.data_ptr, tensors),
            *trained,
            *(None if grad is None else grad.data_ptr() for grad in grads),
        ]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, step: GraphedStep, graphs: _Graphs, leaves: list[Any]) -> Tensor:
        step.turn += 1
        ctx.turn, ctx.step, ctx.graphs = step.turn, step, graphs
        for captured, leaf in zip(graphs.inputs, leaves, strict=True):
            if isinstance(leaf, Tensor):
                captured.copy_(leaf, non_blocking=True)
        graphs.forward()
        return graphs.loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        if ctx.turn != ctx.step.turn:
            raise ConfigurationError(
                "compile=cuda-graph: backward() of an earlier batch, whose memory a later batch has overwritten: call "
                "backward before the next loss, or take compile=none"
            )
        ctx.step.turn += 1  # refuse a second backward of this batch, which would find other values
        ctx.graphs.grad.copy_(grads[0])
        ctx.graphs.backward()
        return None, None, None, None


def _shape_key(leaf: Any) -> Hashable:
    """Return a key that is equal for two leaves of batches if one graph can serve both."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    return type(leaf), repr(leaf)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _uncached_casts() -> Any:
    """Return a context in which autocast keeps no cast weights: they would lie outside the memory of the graph."""
    for kind in ("cuda", "cpu"):
        if torch.is_autocast_enabled(kind):
            return torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)
    return nullcontext()
