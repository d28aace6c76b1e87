"""The one exception that means "the user's input is wrong", raised anywhere in orthotrain and shown as one line."""


class ConfigurationError(ValueError):
    """Bad input from the user: one line that names the thing, the value and what would work."""
