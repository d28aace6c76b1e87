"""Model builders: they hold a description of a network, and build the network when the strategy asks for it."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from orthotrain.console.progress import shown, transformers_bars, waiting
from orthotrain.errors import ConfigurationError, check_choice
from orthotrain.models.deferred_weights import build_without_weights
from orthotrain.models.folder import check_model_folder
from orthotrain.models.network_size import NotBuildable, check_memory, count_described, count_values
from orthotrain.models.pretrained_options import (
    CONFIGURATION_OPTIONS,
    LOADING_OPTIONS,
    check_configuration,
    check_options,
)
from orthotrain.models.vocabulary import check_embeddings_loaded, enlarge_embeddings_

Task = Literal["causal_lm", "seq2seq_lm", "sequence_classification", "token_classification"]
AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
}

_FINDING_OPTIONS = ("cache_dir", "revision", "subfolder", "token")
"""Options that are needed to find the configuration of a model."""


class ModelBuilder(ABC):
    """Builds a network when it is called, on the device and in the precision that the strategy has set up."""

    @abstractmethod
    def __call__(self) -> nn.Module:
        """Return the network."""


class CausalLM(ModelBuilder):
    """A Hugging Face causal language model from its configuration, with random weights.

    Args:
        config: Keys of the model type's Hugging Face configuration: ``hidden_size``, ``num_hidden_layers``, ...
        model_type: The ``model_type`` of any causal language model of transformers.
        gradient_checkpointing: Whether activations of decoder layers are computed again in backward instead of kept.

    Raises:
        ConfigurationError: The model type or a key of ``config`` is unknown (the message suggests similar known ones),
            or ``config`` has another ``model_type``.

    Example:
        >>> sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> network = CausalLM({**sizes, "vocab_size": 256})()
        >>> network.num_parameters()
        73920
    """

    def __init__(
        self, config: dict[str, Any] | None = None, model_type: str = "llama", gradient_checkpointing: bool = False
    ) -> None:
        from transformers import CONFIG_MAPPING

        if model_type not in CONFIG_MAPPING:
            near = ", ".join(difflib.get_close_matches(model_type, CONFIG_MAPPING.keys())) or "llama, qwen2, gpt2"
            raise ConfigurationError(f"model_type={model_type!r} is unknown to transformers; try {near}")
        if (inner := (config or {}).get("model_type", model_type)) != model_type:
            raise ConfigurationError(
                f"config.model_type {inner!r}: the network is a {model_type}; choose it by model_type beside "
                "config, and leave the key out of config"
            )
        defaults = CONFIG_MAPPING[model_type]()
        known = sorted({*defaults.to_dict(), *defaults.attribute_map})
        for key in config or {}:
            if key not in known:
                near = ", ".join(difflib.get_close_matches(key, known)) or ", ".join(known[:5])
                raise ConfigurationError(f"{model_type} configuration has no key {key!r}; try {near}")
        self.model_type = model_type
        self.config = dict(config or {})
        self.gradient_checkpointing = gradient_checkpointing

    def __call__(self, without: Callable[[nn.Module], Collection[str]] | None = None) -> nn.Module:
        """Return the model in training mode, with weights drawn from torch's global generator.

        Args:
            without: Takes the network without storage, and returns the names of linear layers whose weights get no
                storage yet (see :func:`~orthotrain.models.deferred_weights.build_without_weights`).
        """
        from transformers import AutoModelForCausalLM

        values = count_described(self.model_type, self.config)
        # a weight that is given later may be stored in a byte for each value, or less
        bytes_each = torch.get_default_dtype() if without is None else torch.uint8
        check_memory(values, bytes_each, f"the {self.model_type} configuration")

        def draw() -> nn.Module:
            return AutoModelForCausalLM.from_config(self._configuration())

        with waiting("drawing the network's weights"):
            model = draw() if without is None else build_without_weights(draw, without)
        return enable_checkpointing(model, self.gradient_checkpointing).train()

    @property
    def vocab_size(self) -> int | None:
        """Number of rows of the embedding; None if the configuration of the model type has no ``vocab_size``."""
        return getattr(self._configuration(), "vocab_size", None)

    def check_size(self, tensors: int, values: int) -> None:
        """Refuse a network that is much larger than its checkpoint, before anything is allocated.

        Args:
            tensors: Number of tensors in the checkpoint.
            values: Number of their elements. Quantized weights are packed, so that they have fewer elements.

        Raises:
            ConfigurationError: The message gives both sizes.
        """
        from transformers import CONFIG_MAPPING

        name = CONFIG_MAPPING[self.model_type].attribute_map.get("num_hidden_layers", "num_hidden_layers")
        layers = self.config.get(name, self.config.get("num_hidden_layers", 0))
        if isinstance(layers, int) and layers > tensors:
            raise ConfigurationError(f"the description is of {layers} layers, but there are {tensors} tensors")
        described = count_described(self.model_type, self.config)
        if described is not None and described > 8 * values:
            raise ConfigurationError(f"the description is of {described:,} values, but there are {values:,}")

    def _configuration(self) -> Any:
        from transformers import CONFIG_MAPPING

        count_described(self.model_type, self.config)  # a number in the configuration may create a list of any length
        return CONFIG_MAPPING[self.model_type](**self.config)


class PretrainedModel(ModelBuilder):
    """A pretrained Hugging Face model with the head of a task.

    Args:
        name: Folder or hub name.
        task: ``causal_lm``, ``seq2seq_lm``, ``sequence_classification`` or ``token_classification``. A regression is a
            ``sequence_classification`` with the options ``num_labels: 1`` and ``problem_type: regression``.
        dtype: ``auto`` for the dtype in the files, or the name of a torch dtype such as ``bfloat16``.
        load_in_4bit: Whether transformers quantizes the weights to NF4 with double quantization while loading.
        options: More arguments of ``from_pretrained``, such as ``num_labels`` and ``revision``, and keys of the model's
            configuration. Options that would run code of a file are refused.
        gradient_checkpointing: Whether activations of layers are computed again in backward instead of kept.
        trust_remote_code: Whether Python code that comes with the model is run. The code has all rights of the user.
        resize_vocabulary: Whether the embedding is enlarged if the tokenizer of the data has more tokens than it has
            rows; or the number of rows. New rows are the mean of the others, in the output layer too.

    Raises:
        ConfigurationError: The task, the dtype or an option is refused. The call of the builder also raises it if the
            model cannot be loaded or does not have an option.
    """

    def __init__(
        self,
        name: str,
        task: Task = "causal_lm",
        dtype: str = "auto",
        load_in_4bit: bool = False,
        options: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        resize_vocabulary: bool | int = False,
    ) -> None:
        check_choice("task", task, Task)
        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ConfigurationError(f"dtype={dtype!r}: take auto, float32, bfloat16 or float16")
        self.name = name
        self.task = task
        self.dtype = dtype
        self.load_in_4bit = load_in_4bit
        self.options = dict(options or {})
        check_options(self.options)
        self.gradient_checkpointing = gradient_checkpointing
        self.trust_remote_code = trust_remote_code
        self.resize_vocabulary = resize_vocabulary

    def __call__(self) -> nn.Module:
        """Load and return the model in training mode.

        Parameters that are missing from the files get random values, for example the head of a new task. Their names
        are in ``fresh_parameters`` of the model, so that they can be trained while the others are frozen.
        """
        import transformers

        options = {**self.options, "dtype": self.dtype, "trust_remote_code": self.trust_remote_code}
        if self.load_in_4bit:
            compute = torch.bfloat16 if self.dtype == "auto" else getattr(torch, self.dtype)
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=compute,
            )
        check_model_folder(self.name)
        if Path(self.name).is_dir() and "subfolder" in self.options:
            check_model_folder(Path(self.name) / str(self.options["subfolder"]))
        if Path(self.name).is_dir() and not self.trust_remote_code:
            self._check_size()
        try:
            found = {key: value for key, value in self.options.items() if key in _FINDING_OPTIONS}
            config = transformers.AutoConfig.from_pretrained(
                self.name, trust_remote_code=self.trust_remote_code, **found
            )
            check_configuration(config, self.options, self.name)
            load = getattr(transformers, AUTO_CLASSES[self.task]).from_pretrained
            with transformers_bars(lambda weights: shown(weights, "loading the model", "tensors")):
                model, report = load(self.name, **options, output_loading_info=True)
        except ConfigurationError:
            raise
        except Exception as error:  # damaged files can raise any exception
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            if "trust_remote_code" in str(error) and not self.trust_remote_code:
                first = "it comes with its own code; read the code, and set trust_remote_code: true if you trust it"
            raise ConfigurationError(f"model {self.name!r} cannot be loaded: {first}") from error
        resized = {name for name, *_ in report["mismatched_keys"]}
        model.fresh_parameters = sorted({*report["missing_keys"], *resized})
        check_embeddings_loaded(model, resized)
        if self.resize_vocabulary is not True:
            enlarge_embeddings_(model, int(self.resize_vocabulary))
        return enable_checkpointing(model, self.gradient_checkpointing).train()

    def described(self) -> nn.Module | None:
        """Return the model from its configuration alone, not quantized, with random values; None if it needs code."""
        if self.trust_remote_code:
            return None
        check_model_folder(self.name)
        if Path(self.name).is_dir():
            self._check_size()
        return self._from_config()

    @property
    def _config_options(self) -> dict[str, Any]:
        loading = LOADING_OPTIONS - CONFIGURATION_OPTIONS
        return {name: value for name, value in self.options.items() if name not in loading}

    def _from_config(self) -> nn.Module:
        import transformers

        config = transformers.AutoConfig.from_pretrained(self.name, trust_remote_code=False, **self._config_options)
        config.quantization_config = None
        return getattr(transformers, AUTO_CLASSES[self.task]).from_config(config)

    def _check_size(self) -> None:
        """Refuse a config.json, with the options, that describes a network too large for this or for any machine."""
        origin = f"model {self.name!r}: its config.json{' with the options' if self._config_options else ''}"
        try:
            values = count_values(self._from_config, origin)
        except NotBuildable:
            return  # loading raises a clear error
        stored = torch.uint8 if self.load_in_4bit else torch.bfloat16 if self.dtype == "auto" else None
        check_memory(values, stored or getattr(torch, self.dtype), origin)


def enable_checkpointing(model: Any, wanted: bool) -> Any:
    """Switch gradient checkpointing on, if ``wanted``; return ``model``, whose config stays as it is for an export."""
    if wanted:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model
