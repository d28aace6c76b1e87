"""The exceptions of the framework, and the checks of arguments that raise them."""

from typing import get_args

LONGEST_MESSAGE = 4000
"""Characters of one message."""


class ConfigurationError(ValueError):
    """Bad input from the user: one line that names the thing, the value and what would work.

    Args:
        message: What is printed; it may quote values of any file, see :func:`visible`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(visible(message))


def visible(text: str) -> str:
    r"""Return a text as one line in which every character shows.

    A value that a message quotes may hold escape sequences, which would change the title or the lines of a terminal,
    and marks that turn the direction of writing. Such a character becomes its escape, as ``\x1b``.
    """
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class TrainingDiverged(RuntimeError):
    """A run whose loss or parameters are no longer finite: one line that names the step and what it found."""


class DeviceMemoryExhausted(RuntimeError):
    """A run that needs more memory than its device has: one line that says what would fit."""


def check_choice(name: str, value: str, choices: object) -> None:
    """Refuse a value outside a Literal.

    Raises:
        ConfigurationError: Naming the argument, the value and the choices.
    """
    if value not in get_args(choices):
        raise ConfigurationError(f"{name}={value!r}: choose one of {', '.join(get_args(choices))}")


def check_count(name: str, value: object) -> None:
    """Refuse a value that is not an integer of at least 1.

    Raises:
        ConfigurationError: Naming the argument and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name}={value!r}: take an integer of at least 1")
