"""Rebuilds the network of a checkpoint with its weights, and merges its rotations."""

import copy
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

BASE_KEYS = ("name", "path")
"""Arguments of PretrainedModel and CheckpointModel that say where the model is."""


def make_plain_(network: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turn a network, in place, into a plain one, without wrapped or quantized layers and their traces in its config.

    Args:
        network: Any network.
        dtype: Dtype of the result; None keeps the dtypes. Weights are merged in fp32 and rounded once.

    Raises:
        ConfigurationError: A value that is finite in the network is not finite in ``dtype``; the message names the
            parameter.
    """
    own = compute_dtype_of(network)
    if dtype is not None and own is not None:
        # merging rounds to the dtype of the network: cast first, so that weights are rounded only once
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
    """Remove what transformers has set in a model that it has quantized: plain layers could not be loaded with it."""
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
    base: str | Path | None = None,
) -> nn.Module:
    """Rebuild the network of a checkpoint with its weights.

    Args:
        contents: Result of :func:`read_checkpoint`.
        origin: Name of the file, for messages.
        allow: Your own classes, or their dotted names, that the checkpoint may name.
        trust_remote_code: Whether code that comes with a pretrained model may run, if the run of the checkpoint has run
            it.
        base: Place of the pretrained model, or of the checkpoint, that the run started from; None for the place that it
            had then.

    Raises:
        ConfigurationError: See :func:`~orthotrain.checkpoints.rebuild.rebuild_module`; or the run has no base model.
    """
    if base is not None:
        contents = {**contents, "hyper_parameters": _moved(contents.get("hyper_parameters"), str(base), origin)}
    network = rebuild_module(contents, BaseModule, origin, allow, trust_remote_code).model
    assert network is not None
    return network.eval()


def _moved(description: Any, base: str, origin: str) -> Any:
    """Return the description of a module whose base model is in another place."""
    description = copy.deepcopy(description)
    try:
        arguments = description["init_args"]["model"]["init_args"]
        arguments[next(key for key in BASE_KEYS if key in arguments)] = base
    except (KeyError, TypeError, StopIteration):
        raise ConfigurationError(f"--base {base!r}: {origin} is of a run without a base model; leave it out") from None
    return description


class CheckpointModel(ModelBuilder):
    """Builds the merged network of a checkpoint that ``orthotrain fit`` wrote, as the start of finetuning.

    Args:
        path: The ``.ckpt`` file.
        allow: Dotted names of your own classes that the file may name.
    """

    _being_read: ClassVar[list[Path]] = []

    def __init__(self, path: str, allow: list[str] | None = None) -> None:
        self.path = path
        self.allow = list(allow or [])

    def __call__(self) -> nn.Module:
        """Read, merge and return the network in training mode.

        Raises:
            ConfigurationError: See :func:`load_network`; or the network of the file is described by the file itself,
                directly or through other files.
        """
        with waiting("reading the checkpoint"):
            contents = read_checkpoint(self.path)
        if any(os.path.samefile(self.path, other) for other in self._being_read):
            raise ConfigurationError(f"checkpoint {self.path!r} describes its network by the file itself")
        self._being_read.append(Path(self.path))
        try:
            network = load_network(contents, self.path, self.allow)
        finally:
            self._being_read.pop()
        make_plain_(network)
        return network.train()
