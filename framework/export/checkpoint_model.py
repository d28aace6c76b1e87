"""The network of a checkpoint, rebuilt with its weights and merged."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from orthotrain.checkpoints.reading import read_checkpoint
from orthotrain.checkpoints.rebuild import rebuild_module
from orthotrain.console.progress import waiting
from orthotrain.errors import ConfigurationError
from orthotrain.layers.replacement import unwrap_mergeables
from orthotrain.layers.weights.bitsandbytes_linear import compute_dtype_of
from orthotrain.models import ModelBuilder
from orthotrain.modules import BaseModule


def make_plain_(network: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Merge a network in place until nothing in it, nor in its config, is wrapped, quantised or new.

    Args:
        network: Any network.
        dtype: What it is cast to; None leaves it. Weights are merged in fp32 and rounded once.

    Raises:
        ConfigurationError: If a value is finite in the network and not in ``dtype``, naming its parameter.
    """
    own = compute_dtype_of(network)
    if dtype is not None and own is not None:
        # merging rounds to the dtype of the network: one in between would round twice
        nn.Module.to(network, torch.promote_types(own, dtype))
    unwrap_mergeables(network)
    _forget_bitsandbytes(network)
    if hasattr(network, "fresh_parameters"):
        del network.fresh_parameters
    if dtype is None:
        return
    finite = {name for name, p in network.named_parameters() if bool(torch.isfinite(p).all())}
    network.to(dtype)
    for name, parameter in network.named_parameters():
        if name in finite and not bool(torch.isfinite(parameter).all()):
            raise ConfigurationError(f"{name} exceeds what {dtype} can hold: take bfloat16 or float32")


def _forget_bitsandbytes(network: nn.Module) -> None:
    """Undo what transformers notes of a model that it has quantised: its linears are plain now and would not load."""
    quantizer: Any = getattr(network, "hf_quantizer", None)
    if getattr(getattr(network, "quantization_method", None), "value", None) != "bitsandbytes":
        return
    quantizer.remove_quantization_config(network)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(network, flag):
            delattr(network, flag)


def load_network(
    contents: dict[str, Any],
    origin: str = "checkpoint",
    allow: Iterable[str | type] = (),
    trust_remote_code: bool = False,
) -> nn.Module:
    """Rebuild the network that a checkpoint was written from, with its weights.

    Args:
        contents: What :func:`read_checkpoint` returned.
        origin: Name of the file, for messages.
        allow: Classes of your own, or their dotted names, that the checkpoint may name.
        trust_remote_code: Whether code that comes with a pretrained model is run where the run has done so.

    Raises:
        ConfigurationError: If the checkpoint does not describe its module, names code that is not known, or does not
            fit its own description.
    """
    network = rebuild_module(contents, BaseModule, origin, allow, trust_remote_code).model
    assert network is not None
    return network.eval()


def load_tokenizer(contents: dict[str, Any]) -> Any:
    """Return the tokenizer that a checkpoint carries, or None."""
    from orthotrain.data import tokenizer_from_state

    state = next((v for k, v in contents.items() if isinstance(v, dict) and "tokenizer_fingerprint" in v), None)
    return None if state is None else tokenizer_from_state(state)


class CheckpointModel(ModelBuilder):
    """The merged network of a checkpoint that ``orthotrain fit`` wrote: what finetuning starts from.

    Args:
        path: The ``.ckpt`` file.
        allow: Dotted names of classes of your own that the file may name.
    """

    _under_way: ClassVar[list[Path]] = []

    def __init__(self, path: str, allow: list[str] | None = None) -> None:
        self.path = path
        self.allow = list(allow or [])

    def __call__(self) -> nn.Module:
        """Read, merge and return the network in training mode.

        Raises:
            ConfigurationError: See :func:`load_network`; or if the file starts from itself, directly or by others.
        """
        with waiting("reading the checkpoint"):
            contents = read_checkpoint(self.path)
        if any(os.path.samefile(self.path, other) for other in self._under_way):
            raise ConfigurationError(f"checkpoint {self.path!r} says that its network is that of the file itself")
        self._under_way.append(Path(self.path))
        try:
            network = load_network(contents, self.path, self.allow)
        finally:
            self._under_way.pop()
        make_plain_(network)
        return network.train()
