"""Model builders: plain descriptions in YAML that become a network when the strategy asks for it."""

import difflib
from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from orthotrain.errors import ConfigurationError


class ModelBuilder(ABC):
    """Builds a network late, on the device and in the precision that the strategy has set up."""

    @abstractmethod
    def __call__(self) -> nn.Module:
        """Return the network."""


class CausalLM(ModelBuilder):
    """A Hugging Face causal language model from its configuration, with random weights.

    Args:
        config: Keys of the model type's Hugging Face configuration: ``hidden_size``, ``num_hidden_layers``, ...
        model_type: Any causal language model of transformers, by its ``model_type``.

    Raises:
        ConfigurationError: If the model type or a key of ``config`` is unknown, naming the nearest known ones.
    """

    def __init__(self, config: dict[str, Any] | None = None, model_type: str = "llama") -> None:
        from transformers import CONFIG_MAPPING

        if model_type not in CONFIG_MAPPING:
            near = ", ".join(difflib.get_close_matches(model_type, CONFIG_MAPPING.keys())) or "llama, qwen2, gpt2"
            raise ConfigurationError(f"model_type={model_type!r} is unknown to transformers; try {near}")
        defaults = CONFIG_MAPPING[model_type]()
        known = sorted({*defaults.to_dict(), *defaults.attribute_map})
        for key in config or {}:
            if key not in known:
                near = ", ".join(difflib.get_close_matches(key, known)) or ", ".join(known[:5])
                raise ConfigurationError(f"{model_type} configuration has no key {key!r}; try {near}")
        self.model_type = model_type
        self.config = dict(config or {})

    def __call__(self) -> nn.Module:
        """Return the model in training mode, weights drawn from torch's global generator."""
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        configuration = CONFIG_MAPPING[self.model_type](**self.config)
        return AutoModelForCausalLM.from_config(configuration).train()


class PretrainedCausalLM(ModelBuilder):
    """A pretrained Hugging Face causal language model.

    Args:
        name: Folder or hub name.
        dtype: ``auto`` for the stored one, or a torch dtype's name such as ``bfloat16``.
    """

    def __init__(self, name: str, dtype: str = "auto") -> None:
        self.name = name
        self.dtype = dtype

    def __call__(self) -> nn.Module:
        """Load and return the model in training mode; code that comes with a model is never run."""
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(self.name, dtype=self.dtype, trust_remote_code=False)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ConfigurationError(f"model {self.name!r} cannot be loaded: {first}") from error
        return model.train()
