"""Folders that ``save_to_disk`` of ``datasets`` wrote: the Arrow files that hold the rows."""

from pathlib import Path
from typing import Any

from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import check_regular_file, is_file_name, read_json


def saved_files(folder: Path) -> list[tuple[Path, str]] | None:
    """Return path and name of each Arrow file of a saved dataset; ``None`` for other folders.

    Of several splits, the split ``train`` is meant, as for datasets of the hub. The others are folders to name.

    Raises:
        ConfigurationError: There is no split ``train``, or a file that describes the folder is damaged.
    """
    if (described := folder / "dataset_dict.json").is_file():
        splits = _names(described, "splits")
        if "train" not in splits:
            found = ", ".join(splits)
            raise ConfigurationError(f"source {str(folder)!r}: has the splits {found} and no train; name one's folder")
        folder = folder / "train"
    described = folder / "state.json"
    if not described.is_file() or not (folder / "dataset_info.json").is_file():
        return None
    files = [(folder / name, name) for name in _names(described, "_data_files")]
    for path, _ in files:
        check_regular_file(path, "source")
    return files


def _names(described: Path, key: str) -> list[str]:
    content = read_json(described, "source")
    entries = content.get(key) if isinstance(content, dict) else None
    entries = entries if isinstance(entries, list) else []
    names: list[Any] = [entry.get("filename") if isinstance(entry, dict) else entry for entry in entries]
    if not names or not all(map(is_file_name, names)):
        raise ConfigurationError(f"source {str(described)!r}: is damaged; save the dataset again")
    return names
