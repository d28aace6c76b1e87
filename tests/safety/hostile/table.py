"""The whole table."""

from hostile import deletions, descriptions

ROWS = [*descriptions.rows(), *deletions.rows()]
KINDS = {"description"}
COMMANDS = set()
