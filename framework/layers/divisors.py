"""Refusing a size that does not divide a width, by naming the sizes near it that do."""

from orthotrain.errors import ConfigurationError


def check_divides(name: str, size: int, width: int, what: str, minimum: int = 1) -> None:
    """Refuse a size that does not divide a width; it is never changed silently.

    Args:
        name: Name of the argument.
        size: Its value, in features.
        width: Width to divide, in features.
        what: What is that wide, as the message says it.
        minimum: Smallest size that makes sense.

    Raises:
        ConfigurationError: Naming both sizes and the divisors of the width next to ``size``.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= minimum and width % size == 0:
        return
    divisors = [d for d in range(minimum, width + 1) if width % d == 0]
    if not divisors:
        raise ConfigurationError(f"{name}={size!r} does not divide {what}: no {name} from {minimum} up does")
    below = [d for d in divisors if isinstance(size, int) and d < size][-1:]
    above = [d for d in divisors if not isinstance(size, int) or d > size][:1]
    near = " and ".join(map(str, below + above))
    raise ConfigurationError(f"{name}={size!r} does not divide {what}; near it: {near}")
