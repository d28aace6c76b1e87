"""CUDA graphs on a machine without a GPU: operations are recorded, and repeated on the same memory."""

import ctypes

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orthotrain.modules import graph_replay

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"}


class PlayedRecorder:
    """Refuses a wait and restores all memory, as a capture does; a replay runs no Python code of a layer."""

    def __init__(self):
        self.recordings = []
        self.replays = 0

    def warm(self, function):
        return function()

    def record(self, function):
        recording, drawn = Recording(), torch.get_rng_state()
        with recording:
            function()
        recording.take_back()
        torch.set_rng_state(drawn)
        self.recordings.append(recording)

        def replay():
            if not self.replays:  # not earlier: the backward pass is recorded with the values of the forward pass
                for every in self.recordings:
                    every.spoil()
            self.replays += 1
            recording.replay()

        return replay


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made, self.own = [], {}, [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function._schema.name in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function._schema.name}")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors(value):
                    if storage(tensor) not in self.own:
                        self.before.setdefault(tensor.data_ptr(), (tensor, tensor.clone()))
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        given = {storage(tensor) for tensor in tensors((args, kwargs))}
        made = [tensor for tensor in tensors(result) if storage(tensor) not in given]
        self.made += made
        self.own |= {storage(tensor) for tensor in made}
        return result

    def take_back(self):
        """A capture executes nothing: restore the values of all memory that was written to."""
        for tensor, old in self.before.values():
            assert tensor.is_contiguous()
            ctypes.memmove(tensor.data_ptr(), old.contiguous().data_ptr(), old.numel() * old.element_size())

    def spoil(self):
        for tensor in self.made:
            if tensor.is_floating_point():
                ctypes.memset(tensor.data_ptr(), 0xFF, tensor.untyped_storage().nbytes())  # NaN

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                if old.numel() and storage(old) != storage(new):  # a probe of changes gives its memory back
                    old.copy_(new)


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


def tensors(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def played_graphs(monkeypatch):
    """Let the CPU have graphs, and layers take the paths of a GPU; gives the recorders."""
    recorders = []

    def recorder():
        recorders.append(PlayedRecorder())
        return recorders[-1]

    monkeypatch.setitem(graph_replay.RECORDERS, "cpu", recorder)
    # transformers asks this before it reads positions; the eager run must have the same attention mask
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr("orthotrain.layers.poet.poet_linear.serves", lambda x: False)
    monkeypatch.setattr("orthotrain.layers.oft.oft_linear._fuses", lambda *_: False)
    return recorders
