"""Names of the classes, and what a whole number in a row means: a name, or the place of a name."""

from typing import Any

from orthotrain.data.instructions.row_faults import RowFault
from orthotrain.data.labels.rows import LabeledRow, class_text
from orthotrain.errors import ConfigurationError


class ClassNames:
    """The declared names of the classes.

    Where a name is a number and another name has that place (``1, 2, 3``), a number of a row has two meanings. The
    whole column of the training rows then decides which one it is.

    Args:
        names: Names in the order of the network's outputs.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self._by_text = {class_text(name): name for name in names}
        self._of_dataset: dict[tuple[str, ...], ClassNames] = {}
        self.is_ambiguous = any(self._at(text) not in (None, name) for text, name in self._by_text.items())
        """Whether a number of a row may have two meanings."""
        self.uses_places: bool | None = None
        """Whether all rows have places (True) or names (False); None if each row may have what it wants."""

    def _at(self, label: str) -> str | None:
        """Return the name at a place, None for a label that is no place."""
        is_place = label.isdecimal() and label.isascii() and len(label) < 10 and int(label) < len(self.names)
        return self.names[int(label)] if is_place else None

    def name(self, row: LabeledRow) -> LabeledRow:
        """Return a row whose classes, given by name or place, are names.

        Raises:
            RowFault: There is no such class.
        """
        row.labels[:] = [self._name(str(label), row.where) for label in row.labels]  # type: ignore[misc]
        return row

    def _name(self, label: str, where: str) -> str:
        by_name = None if self.uses_places is True else self._by_text.get(label)
        by_place = None if self.uses_places is False else self._at(label)
        if (found := by_name or by_place) is None:
            meaning = {None: "", True: "; numbers are places here", False: "; the training rows have names"}
            raise RowFault(
                f"{where}: the class {label!r:.60} is none of {', '.join(self.names):.200}, nor a number from 0 to "
                f"{len(self.names) - 1}{meaning[self.uses_places]}"
            )
        return found

    def decide(self, rows: list[LabeledRow]) -> None:
        """Decide from all training rows whether their numbers are names or places.

        Raises:
            ConfigurationError: They can be both.
        """
        values = {str(label) for row in rows for label in row.labels}
        are_names, are_places = values <= {*self._by_text}, all(self._at(value) is not None for value in values)
        if are_names == are_places and values != {*self._by_text}:
            shown = ", ".join(sorted(values))
            raise ConfigurationError(
                f"labels {self.names!s:.200}: the rows ({rows[0].where}, ...) have classes {shown:.100}, which "
                "may be names or places from 0; give names that are no numbers, and rows with these names or places"
            )
        self.uses_places = not are_names

    def of_dataset(self, own: tuple[str, ...], where: str) -> "ClassNames":
        """Return the names for rows that have places of other names: the same names, or those at these places.

        Raises:
            ConfigurationError: A name is missing, and the places differ.
        """
        if own not in self._of_dataset:
            same = [self._by_text.get(class_text(name)) for name in own]
            moved = any(name is not None and self.names[place : place + 1] != [name] for place, name in enumerate(same))
            if None in same and (moved or len(own) != len(self.names)):
                raise ConfigurationError(
                    f"{where}: the dataset has the classes {', '.join(own):.200}, not {self.names!s:.200}; "
                    "set labels to all names"
                )
            found = ClassNames(self.names if None in same else [name for name in same if name is not None])
            found.uses_places = True
            self._of_dataset[own] = found
        return self._of_dataset[own]


def feature_names(features: Any, column: str) -> tuple[str, ...] | None:
    """Return the names of the classes of a column of a dataset; None if the column has none.

    Args:
        features: ``Features.to_dict()`` of ``datasets``.
        column: The column.
    """
    feature = features.get(column) if isinstance(features, dict) else None
    while isinstance(feature, list) and len(feature) == 1:
        feature = feature[0]
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):  # a list of classes
        feature = feature["feature"]
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    return tuple(map(str, names)) if isinstance(names, list) and names else None


def check_booleans(first: dict[str, str]) -> None:
    """Refuse true and false beside other spellings of the same.

    Args:
        first: Name of a class -> place of the first row with this class.

    Raises:
        ConfigurationError: There are two spellings.
    """
    words = [name for name in first if name.lower() in ("true", "false")]
    for word in words:
        same = [name for name in first if name != word and name.lower() in (word.lower(), "0", "1")]
        if same:
            raise ConfigurationError(
                f"{first[same[0]]}: has the class {same[0]!r}, and {first[word]} has {word!r}; write classes in one way"
            )
