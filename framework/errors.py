"""The exceptions of the framework, and the checks of arguments that raise them."""

from typing import get_args


class ConfigurationError(ValueError):
    """Bad input from the user. The message is one line that names the argument, the value and what would work.

    Args:
        message: The line to print. It may quote values of any file; :func:`visible` makes them safe.
    """

    def __init__(self, message: str) -> None:
        super().__init__(visible(message))


def visible(text: str) -> str:
    r"""Return a text as one line without control characters.

    A message may quote a value with escape sequences, which would change the title or the lines of a terminal, or with
    marks that change the direction of writing. Such a character is replaced by its escape, such as ``\x1b``.
    """
    return escaped(" ".join(text.split()))


def escaped(text: str) -> str:
    """Return a text with its control characters as escapes; spaces stay."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class TrainingDiverged(RuntimeError):
    """The loss or a parameter of a run is not finite; the message is one line that names the step and the value."""


class DeviceMemoryExhausted(RuntimeError):
    """A run needs more memory than its device has; the message is one line with options that lower the memory."""


def check_choice(name: str, value: str, choices: object) -> None:
    """Refuse a value that a Literal does not have.

    Raises:
        ConfigurationError: The message names the argument, the value and the choices.
    """
    if value not in get_args(choices):
        raise ConfigurationError(f"{name}={value!r}: choose one of {', '.join(get_args(choices))}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse a value that is not an integer of at least ``least``.

    Raises:
        ConfigurationError: Naming the argument and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name}={value!r}: take an integer of at least {least}")
