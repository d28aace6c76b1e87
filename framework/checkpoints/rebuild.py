"""Builds the module that a checkpoint describes, and loads its weights."""

from collections.abc import Iterable
from typing import Any, TypeVar

from orthotrain.checkpoints.object_builder import ObjectBuilder, missing_arguments, parameters_of
from orthotrain.checkpoints.trusted_classes import TrustedClasses, dotted_name
from orthotrain.checkpoints.writing import FROZEN
from orthotrain.console.config_errors import one_line
from orthotrain.errors import ConfigurationError
from orthotrain.models import CausalLM

Module = TypeVar("Module")


def rebuild_module(
    contents: dict[str, Any],
    kind: type[Module],
    origin: str = "checkpoint",
    allow: Iterable[str | type] = (),
    trust_remote_code: bool = False,
    given: dict[str, Any] | None = None,
    strict: bool = True,
) -> Module:
    """Build the module that a checkpoint describes, and load its weights.

    Args:
        contents: Result of ``read_checkpoint``.
        kind: Class of the module, or a base class.
        origin: Name of the file, for messages.
        allow: Your own classes, or their dotted names, that the checkpoint may name.
        trust_remote_code: Whether code that comes with a pretrained model may run, if the run of the checkpoint has run
            it.
        given: Arguments of the module that replace stored ones.
        strict: Whether the checkpoint and the module must have the same tensors.

    Raises:
        ConfigurationError: The checkpoint has no description of its module, the description names an unknown class, or
            the weights do not fit the description.
    """
    trusted = TrustedClasses(origin, allow, trust_remote_code)
    try:
        module = _described(contents, kind, trusted, given or {})
        _load(module, contents, strict)
    except ConfigurationError as error:
        raise ConfigurationError(f"{origin}: {error}" if origin not in str(error) else str(error)) from error
    except Exception as error:  # a damaged description can raise any exception
        reason = one_line(str(error) or type(error).__name__, ())
        raise ConfigurationError(f"{origin} does not fit its own description: {reason}; take an earlier one") from error
    return module


def _described(contents: dict[str, Any], kind: type[Module], trusted: TrustedClasses, given: dict[str, Any]) -> Module:
    stored = contents.get("hyper_parameters") or {}
    if not isinstance(stored, dict):
        raise ConfigurationError(f"hyper_parameters holds a {type(stored).__name__}, not a dictionary")
    builder = ObjectBuilder(trusted)
    builder.check_plain(
        {name: stored.get(name) for name in ("class_path", "init_args") if name in stored}, "the module"
    )
    if "class_path" in stored:
        found, arguments = trusted.find(stored["class_path"]), stored.get("init_args") or {}
    else:  # the module was not built by the command line: use the arguments that it has saved itself
        found, arguments = kind, {name: value for name, value in stored.items() if name in parameters_of(kind)}
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ConfigurationError(f"the checkpoint is of a {found.__name__}, which is not a {dotted_name(kind)}")
    if isinstance(arguments, dict):
        arguments = {name: value for name, value in arguments.items() if name not in given}
    if missing := missing_arguments(found, [*arguments, *given]):
        raise ConfigurationError(
            f"the checkpoint does not describe its network: {found.__name__} needs {', '.join(missing)}; a checkpoint "
            f"of `orthotrain fit` has the description, for another one call {found.__name__}.load_from_checkpoint("
            f"file, {missing[0]}=...) with the arguments that the module had"
        )
    return found(**{**builder.arguments(found, arguments, found.__name__), **given})


def _load(module: Any, contents: dict[str, Any], strict: bool) -> None:
    state = contents["state_dict"]
    if isinstance(module._builder, CausalLM) and FROZEN not in contents:
        module._builder.check_size(len(state), sum(tensor.numel() for tensor in state.values()))
    module.configure_model()
    module.on_load_checkpoint(contents)
    module.load_state_dict(state, strict=strict)
