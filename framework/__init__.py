"""Orthogonal training for PyTorch on Lightning: POET pretraining and OFTv2 finetuning.

Each name below is imported at its first use, so that ``import orthotrain`` does not import torch.

Example:
    >>> import orthotrain
    >>> orthotrain.Optimization(lr=1e-3).lr
    0.001
"""

TYPE_CHECKING = False  # as typing.TYPE_CHECKING, whose import takes longer than this module
if TYPE_CHECKING:
    from orthotrain.adapters import load_adapter as load_adapter
    from orthotrain.callbacks import MergeRotations as MergeRotations
    from orthotrain.data import InstructionData as InstructionData
    from orthotrain.data import LabeledData as LabeledData
    from orthotrain.data import TextData as TextData
    from orthotrain.export import CheckpointModel as CheckpointModel
    from orthotrain.export import export_huggingface as export_huggingface
    from orthotrain.layers import OftLinear as OftLinear
    from orthotrain.layers import PoetLinear as PoetLinear
    from orthotrain.layers import StepwiseLinear as StepwiseLinear
    from orthotrain.models import CausalLM as CausalLM
    from orthotrain.models import PretrainedModel as PretrainedModel
    from orthotrain.modules import BaseModule as BaseModule
    from orthotrain.modules import LoraModule as LoraModule
    from orthotrain.modules import OftLayers as OftLayers
    from orthotrain.modules import OftModule as OftModule
    from orthotrain.modules import Optimization as Optimization
    from orthotrain.modules import PoetLayers as PoetLayers
    from orthotrain.modules import PoetModule as PoetModule
    from orthotrain.optimizers import LieOptimizer as LieOptimizer
    from orthotrain.plugins import register as register

__version__ = "0.1.0"

_NAMES = {
    "adapters": ("load_adapter",),
    "callbacks": ("MergeRotations",),
    "data": ("InstructionData", "LabeledData", "TextData"),
    "export": ("CheckpointModel", "export_huggingface"),
    "layers": ("OftLinear", "PoetLinear", "StepwiseLinear"),
    "models": ("CausalLM", "PretrainedModel"),
    "modules": ("BaseModule", "LoraModule", "OftLayers", "OftModule", "Optimization", "PoetLayers", "PoetModule"),
    "optimizers": ("LieOptimizer",),
    "plugins": ("register",),
}
"""Room -> the names that the package offers from it."""

_ROOM_OF = {name: room for room, names in _NAMES.items() for name in names}
__all__ = list(_ROOM_OF)


def __getattr__(name: str) -> object:
    """Import a name at its first use."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
