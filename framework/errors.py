"""The exceptions of the framework, and the check of an argument that takes a few words."""

from typing import get_args


class ConfigurationError(ValueError):
    """Bad input from the user: one line that names the thing, the value and what would work."""


class TrainingDiverged(RuntimeError):
    """A run whose loss or parameters are no longer finite: one line that names the step and what it found."""


def check_choice(name: str, value: str, choices: object) -> None:
    """Refuse a value outside a Literal.

    Raises:
        ConfigurationError: Naming the argument, the value and the choices.
    """
    if value not in get_args(choices):
        raise ConfigurationError(f"{name}={value!r}: choose one of {', '.join(get_args(choices))}")


def printable(text: str) -> str:
    """Return a text from a file with everything that a terminal would obey, or that ends a line, written out."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
