"""A device that is not there: tensors say that they are on ``played:0`` and are computed on the CPU, autograd included.

It refuses what CUDA refuses: operands on two devices, and a draw from a generator of the CPU. ``WAITS`` counts the
moments at which a program would wait for the device: a value that becomes a Python number or decides a shape, a
decomposition that checks its result, and a copy between the CPU and the device that is not ``non_blocking``. What a
``non_blocking`` copy brings to the CPU is there only after ``synchronize`` of an event that was recorded later; that is
a wait unless the device has been given ``LAG`` operations since. Not played are several streams, memory, collectives,
inference mode (take ``L.Trainer(inference_mode=False)``), what writes through pointers (8-bit optimizers of
bitsandbytes) and Triton kernels: the operations of PyTorch run in their place.

    with played.Mode(), torch.device("played"):
        module.configure_model()                 # as Lightning does on a GPU
    with played.Mode():
        module.loss(played.batch(batch)).backward()
        L.Trainer(strategy=played.strategy()).fit(module, batches)
    played.WAITS                                 # host waits by operation
"""

from collections import Counter

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("played")
torch.played.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
# the device draws from the generator of the CPU, whose state whoever asks for that of a device saves too
torch.played.get_rng_state = lambda device=None: torch.empty(0, dtype=torch.uint8)
torch.played.set_rng_state = lambda state, device=None: None

DEVICE = torch.device("played", 0)
WAITS: Counter[str] = Counter()
LAG = 100
"""Operations by which the device is behind the host."""

_COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
_WAITING = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"),
    *("aten::_unique2", "aten::unique_consecutive", "aten::masked_select", "aten::bincount"),
    *("aten::_linalg_check_errors", "aten::_linalg_svd", "aten::_linalg_eigh", "aten::linalg_qr"),
}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}

_issued = 0
_on_the_way: list[tuple[torch.Tensor, torch.Tensor]] = []


class PlayedTensor(torch.Tensor):
    """A tensor of the CPU, ``raw``, that says that it is on the played device."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )
        tensor.raw = raw
        return tensor

    def __repr__(self):
        return f"PlayedTensor({self.raw!r})"

    def tolist(self):
        """Wait for the values."""
        WAITS["tolist"] += 1
        return self.raw.tolist()

    def __reduce_ex__(self, protocol):
        """Save the values; whoever loads them decides where they go."""
        return self.raw.__reduce_ex__(protocol)

    @property
    def data(self):
        return super().data

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.raw = value.raw

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Lets factories with ``device="played"`` make played tensors."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def batch(values):
    """Return nested tensors on the played device."""
    return tree_map_only(torch.Tensor, PlayedTensor, values)


def raw(value):
    """Return the tensor of the CPU behind a played one; anything else as it is."""
    return value.raw if isinstance(value, PlayedTensor) else value


def _is_played(device):
    return device is not None and torch.device(device).type == "played"


def _run(function, args, kwargs):
    global _issued
    name, device, tensors = function._schema.name, kwargs.get("device"), []
    tree_map_only(torch.Tensor, tensors.append, (args, kwargs))
    played = any(isinstance(tensor, PlayedTensor) for tensor in tensors)
    result_is_played = _is_played(device) if device is not None else played
    _refuse(name, tensors, played, kwargs.get("generator") if result_is_played else None)
    _issued += played or result_is_played
    if played and (name in _WAITING or (name in _INDEXING and any(t.dtype == torch.bool for t in tensors[1:]))):
        WAITS[name] += 1
    if name == "aten::copy_":
        return _copied(*args, **kwargs)
    if name == "aten::_to_copy" and played != result_is_played and not kwargs.get("non_blocking"):
        WAITS[name] += 1
    raw_kwargs = tree_map(raw, kwargs)
    if _is_played(device):
        raw_kwargs["device"] = torch.device("cpu")
    result = function(*tree_map(raw, args), **raw_kwargs)
    given = {id(raw(tensor)): tensor for tensor in tensors}  # operations in place return what they were given

    def wrapped(value):
        if id(value) in given:
            return given[id(value)]
        return PlayedTensor(value) if result_is_played else value

    return tree_map_only(torch.Tensor, wrapped, result)


def _copied(target, source, non_blocking=False):
    arrives, leaves = (isinstance(tensor, PlayedTensor) for tensor in (target, source))
    if leaves and not arrives and non_blocking:
        _on_the_way.append((target, raw(source).clone()))
        return target
    if arrives != leaves and not non_blocking:
        WAITS["aten::copy_"] += 1
    raw(target).copy_(raw(source))
    return target


class _Event:
    """What has been asked of the device until now."""

    def __init__(self):
        self._place, self._copies = _issued, list(_on_the_way)
        _on_the_way.clear()

    def synchronize(self):
        if _issued - self._place < LAG:
            WAITS["event"] += 1
        for target, values in self._copies:
            target.copy_(values)
        self._copies = []


class _Stream:
    @staticmethod
    def record_event():
        return _Event()


torch.played.current_stream = lambda device=None: _Stream()


def _refuse(name, tensors, played, generator):
    if played and name not in _COPIES:
        for tensor in tensors:
            if not isinstance(tensor, PlayedTensor) and tensor.dim() > 0:  # numbers may come from anywhere
                raise RuntimeError(f"{name}: expected all tensors on one device, found {DEVICE} and {tensor.device}")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{name}: expected a 'played' device type for generator but found 'cpu'")


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return PlayedTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return PlayedTensor(torch.empty(size, dtype=dtype, device="cpu"))


def _copy_from(source, target, non_blocking=False):
    return _copied(target, source, non_blocking)


_LIBRARY = torch.library.Library("aten", "IMPL", "PrivateUse1")
_LIBRARY.impl("empty_strided", _empty_strided)
_LIBRARY.impl("empty.memory_format", _empty)
_LIBRARY.impl("_copy_from", _copy_from)


class PlayedAccelerator(Accelerator):
    """Lets ``lightning.Trainer`` run on the played device, as part of :func:`strategy`.

    Given as ``accelerator`` it would not do: without a strategy Lightning runs on the CPU for any accelerator but its
    own.
    """

    def setup_device(self, device):
        """Nothing has to be made current."""

    def teardown(self):
        """Nothing was set up."""

    @staticmethod
    def parse_devices(devices):
        """Return how many devices are wanted."""
        return devices

    @staticmethod
    def get_parallel_devices(devices):
        """Return the device."""
        return [DEVICE] * int(devices)

    @staticmethod
    def auto_device_count():
        """There is one."""
        return 1

    @staticmethod
    def is_available():
        """It needs no hardware."""
        return True

    @staticmethod
    def name():
        """Return the name."""
        return "played"

    def get_device_stats(self, device):
        """There is nothing to measure."""
        return {}


def strategy():
    """Return what lets a trainer run on the played device: ``L.Trainer(strategy=played.strategy())``."""
    return SingleDeviceStrategy(DEVICE, PlayedAccelerator())


def raw_state(module):
    """Return the state of a module as tensors of the CPU."""
    return {name: raw(value).clone() for name, value in module.state_dict().items()}
