"""Model builders: plain descriptions in YAML that become a network when the strategy asks for it."""

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

Task = Literal["causal_lm", "seq2seq_lm", "sequence_classification"]
AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "sequence_classification": "AutoModelForSequenceClassification",
}

LOADING_OPTIONS = frozenset({
    "attn_implementation", "cache_dir", "device_map", "disable_mmap", "force_download", "id2label",
    "ignore_mismatched_sizes", "label2id", "local_files_only", "max_memory", "num_labels", "offload_folder",
    "problem_type", "proxies", "revision", "subfolder", "token", "use_safetensors", "variant",
})  # fmt: skip
"""Arguments of ``from_pretrained`` that run nothing, whatever the files hold."""
_DESCRIBING = frozenset({"id2label", "label2id", "num_labels", "subfolder"})
"""Those of them that the configuration of the network depends on."""

_PICKLES = "it would run pickles; weights are read as plain tensors, leave it out"
_KERNELS = "it would fetch code and run it; leave it out"
REFUSED_OPTIONS = {
    "trust_remote_code": "it is an argument of PretrainedModel beside options",
    "weights_only": _PICKLES,
    "use_kernels": _KERNELS,
    "allow_all_kernels": _KERNELS,
    "kernel_config": _KERNELS,
    "auto_map": _KERNELS,
    "dtype": "it is an argument of PretrainedModel beside options",
    "torch_dtype": "dtype is an argument of PretrainedModel beside options",
    "quantization_config": "load_in_4bit of PretrainedModel, or storage of the layers, says it",
}
"""What is said of the options that a user may think of."""


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
        return self.build()

    def build(self, without: Callable[[nn.Module], Collection[str]] | None = None) -> nn.Module:
        """Return the model in training mode, weights drawn from torch's global generator.

        Args:
            without: Returns the names of the linear layers, of a network that it is given, whose weights will be given
                later: they have no storage yet (:func:`~orthotrain.models.deferred_weights.build_without_weights`).
        """
        from transformers import AutoModelForCausalLM

        values = count_described(self.model_type, self.config)
        # what is given later may take fewer bytes
        bytes_each = torch.get_default_dtype() if without is None else torch.uint8
        check_memory(values, bytes_each, f"the {self.model_type} configuration")

        def draw() -> nn.Module:
            return AutoModelForCausalLM.from_config(self._configuration())

        with waiting("drawing the network's weights"):
            model = draw() if without is None else build_without_weights(draw, without)
        return enable_checkpointing(model, self.gradient_checkpointing).train()

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding, where the model type has one of that name."""
        return getattr(self._configuration(), "vocab_size", None)

    def check_size(self, tensors: int, values: int) -> None:
        """Refuse a network much larger than what is to be loaded into it, before anything is allocated.

        Args:
            tensors: How many tensors there are.
            values: How many values they have, those of quantised weights packed.

        Raises:
            ConfigurationError: Naming both sizes.
        """
        from transformers import CONFIG_MAPPING

        name = CONFIG_MAPPING[self.model_type].attribute_map.get("num_hidden_layers", "num_hidden_layers")
        layers = self.config.get(name, self.config.get("num_hidden_layers", 0))
        if isinstance(layers, int) and layers > tensors:
            raise ConfigurationError(f"a network of {layers} layers is described, there are {tensors} tensors")
        described = count_described(self.model_type, self.config)
        if described is not None and described > 8 * values:
            raise ConfigurationError(f"a network of {described:,} values is described, there are {values:,}")

    def _configuration(self) -> Any:
        from transformers import CONFIG_MAPPING

        count_described(self.model_type, self.config)  # a number in it may ask for a list of any length
        return CONFIG_MAPPING[self.model_type](**self.config)


def check_vocabulary(tokens: Any, rows: Any) -> None:
    """Refuse a vocabulary that an embedding has no rows for; either may be unknown.

    Raises:
        ConfigurationError: Naming both sizes.
    """
    if isinstance(tokens, int) and isinstance(rows, int) and tokens > rows:
        raise ConfigurationError(
            f"the tokenizer's vocabulary of {tokens} does not fit the model's embedding of {rows} rows: "
            "set the model's vocab_size and the data's to the same number"
        )


class PretrainedModel(ModelBuilder):
    """A pretrained Hugging Face model with the head of a task.

    Args:
        name: Folder or hub name.
        task: ``causal_lm``, ``seq2seq_lm`` or ``sequence_classification``.
        dtype: ``auto`` for the stored one, or a torch dtype's name such as ``bfloat16``.
        load_in_4bit: Whether transformers quantises the weights to NF4 with double quantisation while loading.
        options: More arguments of ``from_pretrained``, such as ``num_labels`` and ``revision``, and keys of the model's
            configuration; none that would run what a file says.
        gradient_checkpointing: Whether layers are computed again in backward: their activations are not kept.
        trust_remote_code: Whether Python code that comes with the model is run. It can do whatever you can.

    Raises:
        ConfigurationError: An unknown task or dtype, or an option that is not safe; when it is built, a model that
            cannot be loaded or has no such option.
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

    def __call__(self) -> nn.Module:
        """Load and return the model in training mode.

        Parameters that the checkpoint does not hold have random values (the head of a new task): their names are kept
        in the model's ``fresh_parameters``, for whoever freezes the rest.
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
            self._check_configuration(transformers.AutoConfig)
            load = getattr(transformers, AUTO_CLASSES[self.task]).from_pretrained
            with transformers_bars(lambda weights: shown(weights, "loading the model", "tensors")):
                model, report = load(self.name, **options, output_loading_info=True)
        except ConfigurationError:
            raise
        except Exception as error:  # damaged files raise whatever their bytes lead to
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            if "trust_remote_code" in str(error) and not self.trust_remote_code:
                first = "it comes with code of its own; read that, and set trust_remote_code: true if you trust it"
            raise ConfigurationError(f"model {self.name!r} cannot be loaded: {first}") from error
        resized = {name for name, *_ in report["mismatched_keys"]}
        model.fresh_parameters = sorted({*report["missing_keys"], *resized})
        return enable_checkpointing(model, self.gradient_checkpointing).train()

    def _check_size(self) -> None:
        """Refuse a config.json and options that describe a network that no machine, or not this one, can hold."""
        import transformers

        passed_by = LOADING_OPTIONS - _DESCRIBING
        given = {name: value for name, value in self.options.items() if name not in passed_by}

        def build() -> nn.Module:
            config = transformers.AutoConfig.from_pretrained(self.name, trust_remote_code=False, **given)
            config.quantization_config = None
            return getattr(transformers, AUTO_CLASSES[self.task]).from_config(config)

        what = f"model {self.name!r}: its config.json{' with the options' if given else ''}"
        try:
            values = count_values(build, what)
        except NotBuildable:
            return  # loading it says why
        stored = torch.uint8 if self.load_in_4bit else torch.bfloat16 if self.dtype == "auto" else None
        check_memory(values, stored or getattr(torch, self.dtype), what)

    def _check_configuration(self, auto_config: Any) -> None:
        """Refuse options that neither load safely nor are keys of the configuration, and one that would fetch code."""
        loading = {name: value for name, value in self.options.items() if name in LOADING_OPTIONS}
        asked = {name: value for name, value in self.options.items() if name not in LOADING_OPTIONS}
        where = {
            name: value for name, value in loading.items() if name in ("cache_dir", "revision", "subfolder", "token")
        }
        config = auto_config.from_pretrained(self.name, trust_remote_code=self.trust_remote_code, **where)
        check_attention_of(config, f"the configuration of {self.name!r}")
        known = {*config.to_dict(), *config.attribute_map}
        for name in asked:
            if name not in known:
                near = difflib.get_close_matches(name, [*known, *LOADING_OPTIONS]) or sorted(LOADING_OPTIONS)
                raise ConfigurationError(
                    f"options: {name!r} is no key of the configuration of {self.name!r}, and no option of loading that "
                    f"is safe with any file; try {', '.join(near)}"
                )


def check_options(options: dict[str, Any]) -> None:
    """Refuse options that would run what a file says.

    Raises:
        ConfigurationError: Naming the option and what to do instead.
    """
    for name, advice in REFUSED_OPTIONS.items():
        if name in options:
            raise ConfigurationError(f"options: {name}={options[name]!r} is not taken: {advice}")
    attention = options.get("attn_implementation")
    if isinstance(attention, dict) or "/" in str(attention):
        raise ConfigurationError(
            f"options: attn_implementation={attention!r} would fetch code and run it: take eager, sdpa or "
            "flash_attention_2"
        )


def check_attention_of(config: Any, origin: str) -> None:
    """Refuse a configuration, or a part of one, whose attention is a repository of code.

    transformers would fetch that repository and run its code when it builds the model.

    Args:
        config: A configuration of transformers.
        origin: Whose it is, for messages.

    Raises:
        ConfigurationError: Naming the attention.
    """
    attention = getattr(config, "_attn_implementation", None)  # that of the parts of a configuration follows from it
    if isinstance(attention, dict) or "/" in str(attention):
        raise ConfigurationError(
            f"{origin} has attn_implementation={attention!r}, which would fetch code and run it: take that key out of "
            "its config.json"
        )


def enable_checkpointing(model: Any, wanted: bool) -> Any:
    """Return ``model``, if wanted with transformers' gradient checkpointing and without a cache for generation."""
    if wanted:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.config.use_cache = False
    return model
