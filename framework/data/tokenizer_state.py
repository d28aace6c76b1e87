"""A tokenizer inside a checkpoint: plain values, the tokenizer rebuilt from them, and its difference to another."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from orthotrain.console.failures import is_panic
from orthotrain.data.tokenizer_checks import check_encoding, check_tokenizer_json
from orthotrain.data.tokenizers import canonical_json, complete_padding, fingerprint, load_tokenizer
from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import check_regular_file, local_path
from orthotrain.files.torch_files import describe_file
from orthotrain.models.folder import check_there

_SIDES, _SIDED = ("left", "right"), ("padding_side", "truncation_side")
_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "model_max_length": lambda value: type(value) is int and 0 < value <= MAX_LENGTH,
    "padding_side": lambda value: value in _SIDES,
    "truncation_side": lambda value: value in _SIDES,
    "clean_up_tokenization_spaces": lambda value: type(value) is bool,
    "split_special_tokens": lambda value: type(value) is bool,
    "add_prefix_space": lambda value: type(value) is bool,
    "model_input_names": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
}
"""Settings of a tokenizer that are kept -> whether a value is possible."""
MAX_LENGTH = 1 << 62
"""A larger ``model_max_length`` means that there is no limit, and is left out."""

_TEXT, _TABLE = ("tokenizer", "tokenizer_fingerprint"), ("special_tokens", "settings", "tokenizer_settings")
_TYPES: dict[str, Any] = {**dict.fromkeys(_TEXT, str), **dict.fromkeys(_TABLE, dict)}
_TYPES |= {"chat_template": str | dict | None, "extra_special_tokens": list, "has_own_padding": bool}

_TRAINED_FROM = (
    *("source", "val_source", "test_source", "text_column", "streaming", "limit_bytes"),
    *("val_fraction", "test_fraction", "vocab_size", "seed", "tokenizer"),
)
"""Settings that decide the tokenizer of a run that trains one from its train split."""


def tokenizer_state(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return a tokenizer as plain values, for a checkpoint. Inverse of `tokenizer_from_state`."""
    given = {name for name in _SETTINGS if name in tokenizer.init_kwargs}
    given |= {side for side in _SIDED if getattr(tokenizer, side) != getattr(type(tokenizer), side)}
    settings = {name: getattr(tokenizer, name, None) for name in sorted({*given, "model_max_length"})}
    return {
        "tokenizer": canonical_json(tokenizer),
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "special_tokens": {
            name: str(token) for name, token in tokenizer.special_tokens_map.items() if _is_special_name(name)
        },
        "extra_special_tokens": [str(token) for token in tokenizer.extra_special_tokens],
        "tokenizer_settings": {name: value for name, value in settings.items() if _SETTINGS[name](value)},
        "has_own_padding": getattr(tokenizer, "has_own_padding", True),
        "chat_template": tokenizer.chat_template,
    }


def check_data_state(state: Any) -> dict[str, Any]:
    """Return the state of a data module from a checkpoint after a check of its types.

    Raises:
        ConfigurationError: The state is no dictionary, or an entry has another type.
    """
    if not isinstance(state, dict):
        raise ConfigurationError(
            f"the checkpoint's data state is damaged: it is a {type(state).__name__}, no dictionary"
        )
    for name, kind in _TYPES.items():
        if name in state and not isinstance(state[name], kind):
            found = type(state[name]).__name__
            raise ConfigurationError(f"the checkpoint's data state is damaged: {name} is a {found}")
    return state


def tokenizer_from_state(state: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Rebuild the tokenizer of a checkpoint.

    Args:
        state: ``state_dict()`` of a data module, which a checkpoint holds under the name of its class.

    Raises:
        ConfigurationError: The state holds no tokenizer, the tokenizer does not match its fingerprint, or it needs very
            much memory, time or tokens for a short text.
    """
    try:
        check_data_state(state)
        check_tokenizer_json(json.loads(state["tokenizer"]), "of the checkpoint")
        backend = Tokenizer.from_str(state["tokenizer"])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **_checked_options(state, backend.get_vocab()))
        expected = state["tokenizer_fingerprint"]
    except BaseException as error:  # tokenizers raises bare Exception, and panics
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise ConfigurationError(f"the checkpoint's data state holds no readable tokenizer ({error!r:.200})") from error
    if (found := fingerprint(tokenizer)) != expected:
        raise ConfigurationError(
            f"the checkpoint's tokenizer has sha {found[:12]}, its state says {str(expected)[:12]}"
        )
    check_encoding(tokenizer, "of the checkpoint")
    tokenizer.chat_template = state.get("chat_template")
    tokenizer.has_own_padding = state.get("has_own_padding", True)
    tokenizer.data_settings = state.get("settings", {})  # of the run that has trained the model
    return tokenizer


def _is_special_name(name: str) -> bool:
    """Tell whether an argument is the name of a special token, also one of a single model such as ``image_token``."""
    return name.endswith("_token") and not name.startswith("add_")


def _checked_options(state: dict[str, Any], vocabulary: dict[str, int]) -> dict[str, Any]:
    """Return the special tokens and the settings of a tokenizer as arguments of its class."""
    special, extra = state["special_tokens"], state.get("extra_special_tokens", [])
    for name, token in [*special.items(), *(("extra_token", token) for token in extra)]:
        if not _is_special_name(name) or token not in vocabulary:
            raise ConfigurationError(f"special token {name!s:.40} {token!s:.40} is not in its vocabulary")
    settings = state.get("tokenizer_settings", {})
    for name, value in settings.items():
        if name not in _SETTINGS or not _SETTINGS[name](value):
            raise ConfigurationError(f"a tokenizer has no setting {name!s:.40} {value!s:.40}")
    templates = state.get("chat_template")
    if isinstance(templates, dict) and not all(isinstance(text, str) for item in templates.items() for text in item):
        raise ConfigurationError("a chat template is no text")
    return {**special, **settings, "extra_special_tokens": extra}


def stored_tokenizer(checkpoint: dict[str, Any]) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer that a data module has saved in a checkpoint; ``None`` if there is no tokenizer."""
    states = [state for state in checkpoint.values() if isinstance(state, dict) and "tokenizer_fingerprint" in state]
    return tokenizer_from_state(states[0]) if states else None


def load_model_tokenizer(name: str, joins: bool = True) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model, as `load_tokenizer` does, or from a checkpoint.

    Args:
        name: A tokenizer.json, a folder with one, a Hugging Face name, or a checkpoint (.ckpt) of an orthotrain run.
        joins: As for `load_tokenizer`.

    Raises:
        ConfigurationError: The tokenizer cannot be loaded, or it has no end-of-text token.
    """
    if not name.endswith(".ckpt"):
        return load_tokenizer(name, joins=joins)
    check_there(name)
    check_regular_file(name, "tokenizer")
    try:
        checkpoint = describe_file(local_path(name, "tokenizer"))
    except ConfigurationError as error:
        raise ConfigurationError(f"tokenizer {name!r}: {error}") from error
    if (tokenizer := stored_tokenizer(checkpoint)) is None:
        raise ConfigurationError(
            f"tokenizer {name!r}: the checkpoint holds no tokenizer; give the folder of its tokenizer"
        )
    complete_padding(tokenizer)
    return tokenizer


def tokenizer_difference(state: dict[str, Any], tokenizer: PreTrainedTokenizerFast, here: Mapping) -> str | None:
    """Describe how the tokenizer of a checkpoint differs from the tokenizer of this run.

    With another tokenizer, the rows of the model's embedding would mean other tokens. A tokenizer trained on the train
    split depends on the settings of the split too; the message names those that changed.

    Args:
        state: ``state_dict()`` of the data module in the checkpoint.
        tokenizer: This run's tokenizer.
        here: This run's settings, with ``vocab_size``.

    Returns:
        The difference and what to do about it; ``None`` if there is no difference.
    """
    saved, found = str(state.get("tokenizer_fingerprint")), fingerprint(tokenizer)
    if saved == found:
        return None
    settings = state.get("settings", {})
    changed = [name for name in _TRAINED_FROM if name in settings and settings[name] != here.get(name)]
    trained = {"source", *changed} if settings.get("tokenizer") is None else ()
    inputs = ", ".join(f"{name} {settings.get(name)!r:.200}" for name in _TRAINED_FROM if name in trained)
    advice = f", or train it from the same inputs: {inputs}" if trained else ""
    if trained and changed:
        advice += f" (changed: {', '.join(f'{name} is {here.get(name)!r:.200} here' for name in changed)})"
    elif trained:
        advice += " (these have not changed, but the text of the source or its split has)"
    return (
        f"the tokenizer of this run (vocab {here.get('vocab_size')}, sha {found[:12]}) differs from the checkpoint's "
        f"(vocab {state.get('vocab_size')!s:.20}, sha {saved[:12]}): set tokenizer to the one exported with the "
        f"checkpoint{advice}"
    )
