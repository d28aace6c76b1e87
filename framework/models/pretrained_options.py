"""Options for loading a pretrained model: options that are safe with any file, and options that would run its code."""

import difflib
from typing import Any

from orthotrain.errors import ConfigurationError

LOADING_OPTIONS = frozenset({
    "attn_implementation", "cache_dir", "device_map", "disable_mmap", "force_download", "id2label",
    "ignore_mismatched_sizes", "label2id", "local_files_only", "max_memory", "num_labels", "offload_folder",
    "problem_type", "proxies", "revision", "subfolder", "token", "use_safetensors", "variant",
})  # fmt: skip
"""Arguments of ``from_pretrained`` that run no code from any file."""

CONFIGURATION_OPTIONS = frozenset({"id2label", "label2id", "num_labels", "subfolder"})
"""Members of :data:`LOADING_OPTIONS` that change the configuration of the network."""

_CODE = "it would fetch code and run it; leave it out"
_REFUSED_OPTIONS = {
    "trust_remote_code": "it is an argument of PretrainedModel beside options",
    "weights_only": "it would run pickles; weights are read as plain tensors, leave it out",
    **dict.fromkeys(("use_kernels", "allow_all_kernels", "kernel_config", "auto_map"), _CODE),
    "dtype": "it is an argument of PretrainedModel beside options",
    "torch_dtype": "dtype is an argument of PretrainedModel beside options",
    "quantization_config": "set load_in_4bit of PretrainedModel, or storage of the layers, instead",
}
"""Options that are refused -> what to do instead."""


def check_options(options: dict[str, Any]) -> None:
    """Refuse options that would run code that comes with a model.

    Raises:
        ConfigurationError: The message names the option, and what to do instead.
    """
    for name, advice in _REFUSED_OPTIONS.items():
        if name in options:
            raise ConfigurationError(f"options: {name}={options[name]!r} is refused: {advice}")
    attention = options.get("attn_implementation")
    if _is_code(attention):
        raise ConfigurationError(
            f"options: attn_implementation={attention!r} would fetch code and run it: take eager, sdpa or "
            "flash_attention_2"
        )


def check_configuration(config: Any, options: dict[str, Any], name: str) -> None:
    """Refuse options that are neither safe options for loading nor keys of the configuration.

    Args:
        config: Configuration of the model.
        options: The options of the user.
        name: Name of the model, for messages.

    Raises:
        ConfigurationError: The message names the option and similar known ones; or the attention of the configuration
            is a repository of code.
    """
    attention = getattr(config, "_attn_implementation", None)  # the attention of its parts follows from it
    if _is_code(attention):
        raise ConfigurationError(
            f"the configuration of {name!r} has attn_implementation={attention!r}, which would fetch code and run it: "
            "remove this key from its config.json"
        )
    known = {*config.to_dict(), *config.attribute_map, *LOADING_OPTIONS}
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known) or sorted(LOADING_OPTIONS)
            raise ConfigurationError(
                f"options: {option!r} is neither a key of the configuration of {name!r} nor an option for loading that "
                f"is safe with any file; try {', '.join(near)}"
            )


def _is_code(attention: Any) -> bool:
    """Tell whether transformers would fetch the attention from a repository and run its code."""
    return isinstance(attention, dict) or "/" in str(attention)
