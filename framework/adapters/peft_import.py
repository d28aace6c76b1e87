"""Imports an OFT adapter of PEFT: wraps the layers of the adapter and loads its generators."""

import glob
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthotrain.adapters.peft_folder import PREFIX, PeftSettings, read_folder
from orthotrain.console.progress import shown
from orthotrain.errors import ConfigurationError
from orthotrain.kernels.skew import block_size_of
from orthotrain.layers import (
    OftConv2d,
    OftEmbedding,
    OftLayer,
    OftRotation,
    OftSettings,
    mergeable_layers,
    select_linears,
)
from orthotrain.layers.oft import oft_layer
from orthotrain.layers.replacement import swap_modules
from orthotrain.layers.weights.bitsandbytes_linear import compute_dtype_of
from orthotrain.layers.weights.frozen_linear import frozen_linears
from orthotrain.plugins import create

_GENERATORS = re.compile(re.escape(PREFIX) + r"(?P<layer>.+)\.(?P<kind>oft_R|oft_embedding_R)\.weight")


def import_peft(network: nn.Module, folder: str | Path, *, check_base: bool = True) -> list[str]:
    """Wrap the layers that an OFT adapter of PEFT targets, and load the adapter. Only the adapter is then trained.

    Block sizes follow from the shapes of the tensors: PEFT replaces a block size that does not divide the width, but
    does not change the size in its settings. If the adapter is refused, no module and no value is changed.

    Args:
        network: The base network, plain or already wrapped with the layers that the adapter needs.
        folder: A folder that PEFT or :func:`export_peft` wrote.
        check_base: Whether the name of the base in the adapter must equal the name in the network's config.

    Returns:
        Names of the layers that the adapter rotates, in module order.

    Raises:
        ConfigurationError: The folder is damaged or is not an OFT adapter, or the adapter does not fit the network.
    """
    config, tensors = read_folder(folder)
    settings = PeftSettings.from_config(config)
    if check_base:
        _check_base(network, config.get("base_model_name_or_path"))
    matches = [match for key in tensors if (match := _GENERATORS.fullmatch(key))]
    if not matches:
        raise ConfigurationError(f"{str(folder)!r} has no tensor {PREFIX}<layer>.oft_R.weight")
    generators = {match["layer"]: tensors.pop(match[0]) for match in matches}
    trained = _trained_outside(network, tensors, config.get("modules_to_save") or [])
    targets = _targets(network, trained, set(generators))
    sign = 1 if settings.use_cayley_neumann else -1
    with shown(matches, "wrapping", "layers") as found:
        layers = {
            name: _layer_for(network, name, kind, generators[name], settings)
            for name, kind in map(re.Match.groups, found)
        }
    _check_no_others(network, set(layers))
    leftover = frozen_linears(network, without={network.get_submodule(name) for name in layers})
    network.requires_grad_(False)
    for name, layer in layers.items():
        layer.train(network.get_submodule(name).training)
        network.set_submodule(name, layer)
        _load(layer.rotation.generators, sign * generators[name])
        # PEFT's COFT projects the generators to the bound in the first forward
        layer.project_()
    swap_modules(network, leftover)
    for name, tensor in trained.items():
        _load(targets[name], tensor)
    return [name for name, _ in network.named_modules() if name in layers]


@torch.no_grad()
def _load(target: Tensor, value: Tensor) -> None:
    target.copy_(value)
    if isinstance(target, nn.Parameter):
        target.requires_grad_(True)


def _check_base(network: nn.Module, base: Any) -> None:
    name = getattr(getattr(network, "config", None), "_name_or_path", "")
    if base and base != name:
        raise ConfigurationError(
            f"the adapter was trained on {base!r}, the network is {name!r}: load that base, or pass check_base=False"
        )


def _check_no_others(network: nn.Module, targets: set[str]) -> None:
    for name, _ in mergeable_layers(network):
        if name not in targets:
            raise ConfigurationError(
                f"layer {name} is wrapped, but the adapter does not target it: wrap only {len(targets)} layers like "
                f"{min(targets)}, or none"
            )


def _trained_outside(network: nn.Module, tensors: Mapping[str, Tensor], saved: list[str]) -> dict[str, Tensor]:
    """Return the tensors of ``modules_to_save`` by their names in the network, and refuse all other tensors."""
    state = network.state_dict()
    found = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if ".base_layer." in name:
            raise ConfigurationError(f"{key} belongs to the base: save the adapter with save_embedding_layers=False")
        if name == key or name not in state or not name.rpartition(".")[0].endswith(tuple(saved)):
            raise ConfigurationError(f"unknown tensor {key}: neither generators nor part of modules_to_save={saved}")
        here = state[name]
        if here.shape != tensor.shape or here.is_floating_point() != tensor.is_floating_point():
            raise ConfigurationError(
                f"{key} is {tuple(tensor.shape)} {tensor.dtype}, in the network {tuple(here.shape)} {here.dtype}"
            )
        found[name] = tensor
    return found


def _targets(network: nn.Module, trained: Mapping[str, Tensor], rotated: set[str]) -> dict[str, Tensor]:
    """Return the parameters and buffers that get the tensors of ``modules_to_save``, before anything is changed.

    Raises:
        ConfigurationError: A tensor lies in a rotated layer, or its parameter is tied to another one. PEFT trains a
            copy of the module, so that the two are no longer tied.
    """
    own = dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers(remove_duplicate=False))
    for name in trained:
        module, _, attribute = name.rpartition(".")
        if any(module == layer or module.startswith(f"{layer}.") for layer in rotated):
            raise ConfigurationError(f"modules_to_save holds {name}, which the adapter rotates too")
        if name not in own:
            raise ConfigurationError(f"modules_to_save holds {name}, which is no parameter or buffer of the network")
        if tied := [other for other, tensor in own.items() if tensor is own[name] and other != name]:
            raise ConfigurationError(
                f"{name} is tied to {tied[0]} and PEFT has trained a copy of it, so that they are no longer tied: "
                f"untie them first (network.{module}.{attribute} = nn.Parameter(network.{module}.{attribute}."
                "detach().clone()), and tie_word_embeddings of the config to False)"
            )
    return {name: own[name] for name in trained}


def _layer_for(network: nn.Module, name: str, kind: str, tensor: Tensor, settings: PeftSettings) -> OftLayer:
    """Return the OFT layer for generators of this shape: an existing one, or a new one around the module."""
    try:
        module = network.get_submodule(name)
    except AttributeError as error:
        raise ConfigurationError(f"the adapter targets {name}, which the network does not have") from error
    try:
        rotation = _rotation_for(_features(module, kind), tensor, settings)
        if isinstance(module, OftLayer):
            _compare(module.rotation, rotation)
            return module
        if isinstance(module, nn.Linear):
            select_linears(network, [glob.escape(name)])
        options = OftSettings(
            rotation.block_size,
            rotation.parameterization,
            block_share=settings.block_share,
            coft_eps=rotation.coft_eps,
            block_dropout=rotation.block_dropout,
        )
        return oft_layer(module, options, compute_dtype_of(network))
    except ConfigurationError as error:
        raise ConfigurationError(f"layer {name}: {error}") from error


def _features(module: nn.Module, kind: str) -> int:
    """Return the width that PEFT rotates in a plain or wrapped module."""
    if isinstance(module, nn.Embedding | OftEmbedding) != (kind == "oft_embedding_R"):
        raise ConfigurationError(f"the adapter has {kind} for a {type(module).__name__}")
    conv = module.conv if isinstance(module, OftConv2d) else module
    if isinstance(conv, nn.Conv2d) and conv.kernel_size != (1, 1):
        raise ConfigurationError(
            "PEFT rotates the patches of a convolution, orthotrain its channels: this is the same only for a 1x1 "
            f"kernel, not {conv.kernel_size}; merge the adapter with PEFT and load the result"
        )
    if isinstance(module, OftLayer):
        return module.rotation.features
    if isinstance(module, nn.Conv2d):
        return module.in_channels
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if isinstance(module, nn.Linear):
        return module.in_features
    raise ConfigurationError(
        f"a {type(module).__name__} cannot be wrapped, only linear layers, embeddings and 1x1 convolutions"
    )


def _rotation_for(features: int, tensor: Tensor, settings: PeftSettings) -> OftRotation:
    """Return a rotation whose generators have the shape of a tensor, or refuse the tensor."""
    rows, columns = tensor.shape if tensor.ndim == 2 else (0, 0)
    block_size = block_size_of(columns) or 0
    blocks = features // max(1, block_size) if settings.block_share else rows
    if not block_size or blocks * block_size != features:
        raise ConfigurationError(
            f"generators of shape {tuple(tensor.shape)} do not give blocks for its width of {features} "
            f"(block_share={settings.block_share})"
        )
    if not tensor.is_floating_point():
        raise ConfigurationError(f"generators in {tensor.dtype}: a floating-point type is needed")
    # PEFT's bound is for all rows of generators, orthotrain's for all blocks together
    coft_eps = settings.eps * math.sqrt(blocks / rows) if settings.coft else None
    with torch.device("meta"):
        rotation = OftRotation(
            features,
            OftSettings(
                block_size,
                create(settings.parameterization()),
                block_share=settings.block_share,
                coft_eps=coft_eps,
                block_dropout=settings.module_dropout,
            ),
        )
    if rotation.generators.shape != tensor.shape:
        raise ConfigurationError(f"{rows} rows of generators with block_share=True: there must be one")
    return rotation


def _compare(here: OftRotation, adapter: OftRotation) -> None:
    """Refuse a wrapped layer in which the generators of the adapter would give another rotation."""
    pairs = {
        "block_size": (here.block_size, adapter.block_size),
        "parameterization": (here.parameterization, adapter.parameterization),
        "rows of generators": (here.generators.shape[0], adapter.generators.shape[0]),
        "coft_eps": (here.coft_eps, adapter.coft_eps),
    }
    if math.isclose(here.coft_eps or 0, adapter.coft_eps or 0, rel_tol=1e-6):
        del pairs["coft_eps"]
    for setting, (found, needed) in pairs.items():
        if found != needed:
            raise ConfigurationError(f"it is wrapped with {setting} {found!r}, the adapter needs {needed!r}")
