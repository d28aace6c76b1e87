"""Model builders: plain descriptions in YAML that become a network when the strategy asks for it."""

import difflib
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import nn

from orthotrain.errors import ConfigurationError, check_choice
from orthotrain.model_folder import check_model_folder

Task = Literal["causal_lm", "seq2seq_lm", "sequence_classification"]
AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "sequence_classification": "AutoModelForSequenceClassification",
}


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
        gradient_checkpointing: Whether decoder layers are computed again in backward: their activations are not kept.

    Raises:
        ConfigurationError: If the model type or a key of ``config`` is unknown, naming the nearest known ones.
    """

    def __init__(
        self, config: dict[str, Any] | None = None, model_type: str = "llama", gradient_checkpointing: bool = False
    ) -> None:
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
        self.gradient_checkpointing = gradient_checkpointing

    def __call__(self) -> nn.Module:
        """Return the model in training mode, weights drawn from torch's global generator."""
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        configuration = CONFIG_MAPPING[self.model_type](**self.config)
        model = AutoModelForCausalLM.from_config(configuration)
        return enable_checkpointing(model, self.gradient_checkpointing).train()


class PretrainedModel(ModelBuilder):
    """A pretrained Hugging Face model with the head of a task.

    Args:
        name: Folder or hub name.
        task: ``causal_lm``, ``seq2seq_lm`` or ``sequence_classification``.
        dtype: ``auto`` for the stored one, or a torch dtype's name such as ``bfloat16``.
        load_in_4bit: Whether transformers quantises the weights to NF4 with double quantisation while loading.
        options: More arguments of ``from_pretrained``, such as ``num_labels``.
        gradient_checkpointing: Whether layers are computed again in backward: their activations are not kept.

    Raises:
        ConfigurationError: An unknown task or dtype; when it is built, a model that cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        task: Task = "causal_lm",
        dtype: str = "auto",
        load_in_4bit: bool = False,
        options: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        check_choice("task", task, Task)
        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ConfigurationError(f"dtype={dtype!r}: take auto, float32, bfloat16 or float16")
        self.name = name
        self.task = task
        self.dtype = dtype
        self.load_in_4bit = load_in_4bit
        self.options = dict(options or {})
        self.gradient_checkpointing = gradient_checkpointing

    def __call__(self) -> nn.Module:
        """Load and return the model in training mode; code that comes with a model is never run.

        Parameters that the checkpoint does not hold have random values (the head of a new task): their names are kept
        in the model's ``fresh_parameters``, for whoever freezes the rest.
        """
        import transformers

        options = {**self.options, "dtype": self.dtype, "trust_remote_code": False}
        if self.load_in_4bit:
            compute = torch.bfloat16 if self.dtype == "auto" else getattr(torch, self.dtype)
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=compute,
            )
        check_model_folder(self.name)
        try:
            load = getattr(transformers, AUTO_CLASSES[self.task]).from_pretrained
            model, report = load(self.name, **options, output_loading_info=True)
        except Exception as error:  # damaged files raise whatever their bytes lead to
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigurationError(f"model {self.name!r} cannot be loaded: {first}") from error
        resized = {name for name, *_ in report["mismatched_keys"]}
        model.fresh_parameters = sorted({*report["missing_keys"], *resized})
        return enable_checkpointing(model, self.gradient_checkpointing).train()


def enable_checkpointing(model: Any, wanted: bool) -> Any:
    """Return ``model``, if wanted with transformers' gradient checkpointing and without a cache for generation."""
    if wanted:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.config.use_cache = False
    return model
