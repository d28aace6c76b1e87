"""Faults of single rows: collected, so that one message names the first ten rows and counts them all."""

import contextlib
from collections.abc import Iterator

from orthotrain.errors import ConfigurationError

_LISTED = 10


class RowFault(ConfigurationError):
    """A row cannot be used; other rows of the same source may be fine."""


class RowFaults:
    """Collects the faults of rows.

    Attributes:
        count: Faults so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._first, self._rows = "", list[str]()

    @contextlib.contextmanager
    def collect(self, where: str) -> Iterator[None]:
        """Catch the fault of a row.

        Args:
            where: File and row, for the message.
        """
        try:
            yield
        except RowFault as fault:
            self.count += 1
            self._first = self._first or str(fault)
            if self.count <= _LISTED:
                self._rows.append(where)

    def refuse(self) -> None:
        """Refuse the source if there were faults.

        Raises:
            ConfigurationError: The message has the first fault, the first ten rows with a fault and the number of rows.
        """
        if self.count == 1:
            raise ConfigurationError(self._first)
        if self.count:
            file = self._rows[0].rpartition(", ")[0]
            rows = ", ".join(where.removeprefix(f"{file}, ") for where in self._rows)
            more = f" and {self.count - _LISTED:,} more" if self.count > _LISTED else ""
            raise ConfigurationError(f"{self._first} ({self.count:,} rows cannot be used: {rows}{more})")
