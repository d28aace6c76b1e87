"""Checks that the descriptions of POET and OFT layers share."""

from orthotrain.errors import ConfigurationError
from orthotrain.plugins import Parameterization, create


def check_parameterization(spec: Parameterization | str) -> None:
    """Refuse a parameterization that does not exist.

    Raises:
        ConfigurationError: Naming it and the known ones.
    """
    try:
        create(spec)
    except ValueError as error:
        raise ConfigurationError(f"parameterization: {error}") from error
