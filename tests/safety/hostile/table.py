"""The whole table."""

from hostile import bombs, deletions, descriptions, text_bombs

ROWS = [*descriptions.rows(), *deletions.rows(), *bombs.rows(), *text_bombs.rows()]
KINDS = {"description"}
COMMANDS = set()
