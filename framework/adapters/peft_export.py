"""Exports OFT layers as a folder that ``PeftModel.from_pretrained`` loads."""

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from orthotrain.adapters.peft_folder import PREFIX, PeftSettings, card, nearest_divisor, write_folder
from orthotrain.adapters.state import oft_layers
from orthotrain.errors import ConfigurationError
from orthotrain.layers import OftConv2d, OftEmbedding, OftLayer, OftLinear, OftRotation, QuantizedWeight
from orthotrain.plugins import Cayley, CayleyNeumann

_PASSED = ("input_ids", "attention_mask", "inputs_embeds", "labels", "output_attentions", "output_hidden_states",
           "return_dict")  # fmt: skip
_PASSED_TO_DECODER = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")
"""What PEFT's classes for a task pass to ``forward``; without a task, PEFT passes the caller's arguments on."""

_INSTEAD = "merge and export the network instead"


def export_peft(network: nn.Module, folder: str | Path, base_model_name: str | None = None) -> Path:
    """Write the adapter of a network as a folder that ``PeftModel.from_pretrained(base, folder)`` loads.

    ``base`` is the network before its layers were wrapped. An adapter has no frozen weights, so nothing may have been
    merged into them. Trained modules outside of the OFT layers become PEFT's ``modules_to_save``.

    Args:
        network: A network with OFT layers. It is not changed.
        folder: Folder to write. It must be missing or empty.
        base_model_name: Name or path of the base; None for the name in the config of the network, if there is one.

    Returns:
        The folder.

    Raises:
        ConfigurationError: PEFT has no setting for a layer; the message names the layer.
    """
    layers = oft_layers(network)
    _check_not_shared(network, layers)
    settings = _common_settings(layers)
    saved = _saved_modules(network, layers)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        kind = "oft_embedding_R" if isinstance(layer, OftEmbedding) else "oft_R"
        generators = layer.rotation.generators
        tensors[f"{PREFIX}{name}.{kind}.weight"] = generators if settings.use_cayley_neumann else -generators
    for name in saved:
        state = network.get_submodule(name).state_dict()
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in state.items()}
    config: dict[str, Any] = {
        "base_model_name_or_path": base_model_name or getattr(getattr(network, "config", None), "_name_or_path", None),
        "task_type": task_type(network),
        "inference_mode": True,
        "target_modules": _targets(network, layers),
        "modules_to_save": saved or None,
        **_block_setting(layers),
    }
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    storage = _storage(layers)
    if storage:
        rank_zero_info(f"the adapter was trained on a base {storage}; README.md in the folder says so")
    write_folder(Path(folder), config, settings, plain, card(config["base_model_name_or_path"], storage))
    return Path(folder)


def _storage(layers: Mapping[str, OftLayer]) -> str | None:
    """Describe the quantization of the frozen weights; None if no weight is quantized."""
    found = set()
    for layer in layers.values():
        if isinstance(layer, OftLinear) and isinstance(layer.weight, QuantizedWeight):
            nested = ", the scales quantized too" if hasattr(layer.weight, "nested_absmax") else ""
            found.add(f"{layer.weight.format} with groups of {layer.weight.group_size}{nested}")
    return "in " + " and ".join(sorted(found)) if found else None


def _common_settings(layers: Mapping[str, OftLayer]) -> PeftSettings:
    """Return the PEFT settings of all layers, or refuse two layers with different settings."""
    shared = any(layer.rotation.generators.shape[0] < layer.rotation.blocks for layer in layers.values())
    found = {name: _settings_of(name, layer, shared) for name, layer in layers.items()}
    first, settings = next(iter(found.items()))
    for name, other in found.items():
        for key, value in asdict(settings).items():
            if (needed := getattr(other, key)) != value and not _same_bound(needed, value):
                raise ConfigurationError(
                    f"PEFT has one setting for all layers, but {first} needs {key}={value!r} and {name} "
                    f"{key}={needed!r}: {_INSTEAD}"
                )
    return settings


def _same_bound(a: Any, b: Any) -> bool:
    """Tell whether two numbers differ by rounding alone: bounds are multiplied by roots."""
    return isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-6)


def task_type(network: nn.Module) -> str | None:
    """Return PEFT's name for the task of a network; None where PEFT's class for the task would not work.

    PEFT's classes for a task pass arguments by name that not every network takes (Whisper has no ``input_ids``). Its
    class without a task works with every network.
    """
    decodes = bool(getattr(getattr(network, "config", None), "is_encoder_decoder", False))
    end, task = ("ForConditionalGeneration", "SEQ_2_SEQ_LM") if decodes else ("ForCausalLM", "CAUSAL_LM")
    if not type(network).__name__.endswith(end) or not hasattr(network, "prepare_inputs_for_generation"):
        return None
    parameters = inspect.signature(network.forward).parameters
    passed = (*_PASSED, *_PASSED_TO_DECODER) if decodes else _PASSED
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    missing = [name for name in passed if name not in parameters]
    return None if (missing and not takes_any) or "input_ids" in missing else task


def _settings_of(name: str, layer: OftLayer, shared: bool) -> PeftSettings:
    rotation = layer.rotation
    _check_representable(name, layer, rotation)
    parameterization, rows = rotation.parameterization, rotation.generators.shape[0]
    series: dict[str, Any] = {}
    if type(parameterization) is CayleyNeumann and parameterization.order >= 2:
        series = {"use_cayley_neumann": True, "num_cayley_neumann_terms": parameterization.order + 2}
    elif type(parameterization) is Cayley:
        series = {"use_cayley_neumann": False}
    else:
        raise ConfigurationError(
            f"{name}: PEFT has no {parameterization!r}, only Cayley and CayleyNeumann of order 2 and above: {_INSTEAD}"
        )
    # with a single block, block_share has no effect: use the value of the other layers
    shared = shared if rotation.blocks == 1 else rows < rotation.blocks
    coft: dict[str, Any] = {}
    if rotation.coft_eps is not None:
        # orthotrain's bound is for all blocks together, PEFT's for all rows of generators
        eps = rotation.coft_eps * math.sqrt(rows / rotation.blocks)
        norms = math.sqrt(2) * rotation.generators.detach().norm(dim=1)
        if norms.max() > (1 + 1e-5) * eps / math.sqrt(rows):
            raise ConfigurationError(f"{name}: generators exceed coft_eps={rotation.coft_eps}: call project_() first")
        coft = {"coft": True, "eps": eps}
    return PeftSettings(block_share=shared, module_dropout=rotation.block_dropout, **series, **coft)


def _check_representable(name: str, layer: OftLayer, rotation: OftRotation) -> None:
    if not rotation.enabled:
        raise ConfigurationError(f"{name}: its rotation is disabled: set enabled=True before exporting")
    if getattr(layer, "is_conv1d", False):
        raise ConfigurationError(f"{name}: PEFT's OFT has no layer for a Conv1D of transformers: {_INSTEAD}")
    if isinstance(layer, OftConv2d) and (layer.conv.kernel_size != (1, 1) or layer.conv.dilation != (1, 1)):
        raise ConfigurationError(
            f"{name}: PEFT rotates the patches of a convolution, not its channels; this is the same only for a 1x1 "
            f"kernel without dilation, not for {layer.conv.kernel_size}, {layer.conv.dilation}: {_INSTEAD}"
        )
    bias = layer.bias if isinstance(layer, OftLinear) else layer.conv.bias if isinstance(layer, OftConv2d) else None
    if bias is not None and bias.requires_grad:
        raise ConfigurationError(f"{name}: its bias is trained, and PEFT cannot store it in the adapter: {_INSTEAD}")


def _check_not_shared(network: nn.Module, layers: Mapping[str, OftLayer]) -> None:
    known = {id(layer): name for name, layer in layers.items()}
    for name, module in network.named_modules(remove_duplicate=False):
        if known.get(id(module), name) != name:
            raise ConfigurationError(
                f"{known[id(module)]} is also used as {name}: PEFT would rotate only one of them: {_INSTEAD}"
            )


def _block_setting(layers: Mapping[str, OftLayer]) -> dict[str, int]:
    """Return PEFT's settings ``oft_block_size`` and ``r`` for all layers; one of them is 0."""
    sizes = {name: (layer.rotation.features, layer.rotation.block_size) for name, layer in layers.items()}
    if len({width // size for width, size in sizes.values()}) == 1 < len({size for _, size in sizes.values()}):
        width, size = next(iter(sizes.values()))
        return {"r": width // size, "oft_block_size": 0}
    for asked in sorted({size for _, size in sizes.values()}):
        if all(nearest_divisor(width, asked) == size for width, size in sizes.values()):
            return {"r": 0, "oft_block_size": asked}
    listing = ", ".join(f"{name} {size} of {width}" for name, (width, size) in list(sizes.items())[:8])
    raise ConfigurationError(
        f"PEFT has one block size, or one number of blocks, for all layers, not these: {listing}: {_INSTEAD}"
    )


def _targets(network: nn.Module, layers: Mapping[str, OftLayer]) -> list[str] | str:
    """Return ``target_modules`` that match exactly these layers: the ends of their names, or a regular expression."""
    inside = tuple(f"{name}." for name in layers)
    names = {name for name, _ in network.named_modules() if name and not name.startswith(inside)}
    last = {name.rpartition(".")[2] for name in layers}
    if {name for name in names if name.rpartition(".")[2] in last} == set(layers):
        return sorted(last)
    return "|".join(re.escape(name) for name in layers)


def _saved_modules(network: nn.Module, layers: Mapping[str, OftLayer]) -> list[str]:
    """Return the modules outside of the OFT layers that training changes. PEFT saves each of them as a whole."""
    inside = tuple(f"{name}." for name in layers)
    trained = [n for n, p in network.named_parameters() if p.requires_grad and not n.startswith(inside)]
    # the running statistics of batch normalization follow the training data
    trained += [n for n, _ in network.named_buffers() if n.endswith(".running_mean")]
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in trained))
    names = [name for name, _ in network.named_modules(remove_duplicate=False)]
    owners: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for module in modules:
        if not module or any(name.startswith(f"{module}.") for name in names):
            raise ConfigurationError(f"{module or 'the network'} has a trained parameter and submodules: {_INSTEAD}")
        # PEFT selects modules by the ends of their names
        if alike := [name for name in names if name.endswith(module) and name not in modules]:
            raise ConfigurationError(f"PEFT would save {alike[0]} along with the trained {module}: {_INSTEAD}")
        for name, parameter in network.get_submodule(module).named_parameters(prefix=module):
            if tied := [other for other in owners[id(parameter)] if other != name]:
                raise ConfigurationError(f"the trained {name} is tied to {tied[0]}, PEFT would untie them: {_INSTEAD}")
    return modules
