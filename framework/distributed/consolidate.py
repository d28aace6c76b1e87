"""``orthotrain consolidate FOLDER FILE``: write a distributed checkpoint as one file that any strategy resumes."""

import os
from pathlib import Path
from typing import Any

from orthotrain.checkpoints.reading import check_checkpoint, read_checkpoint
from orthotrain.checkpoints.shards import REST, load_shards
from orthotrain.checkpoints.writing import AtomicCheckpointIO
from orthotrain.console.progress import waiting
from orthotrain.distributed.optimizer_state import joined_state, optimizer_key
from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import local_path


def consolidate(folder: str | Path, file: str | Path) -> Path:
    """Write the shards of a checkpoint of :class:`orthotrain.distributed.strategy.ShardedStrategy` as one file.

    Needs one process, no devices, and memory for the whole checkpoint.

    Args:
        folder: The distributed checkpoint.
        file: The file to write; must not exist.

    Returns:
        The path of the file.

    Raises:
        ConfigurationError: If the folder is not a complete distributed checkpoint, if the file exists, or if the
            file's folder does not exist.
    """
    folder, file = local_path(folder, "FOLDER"), local_path(file, "FILE")
    if not folder.is_dir():
        raise ConfigurationError(f"{str(folder)!r} is not the folder of a distributed checkpoint")
    if os.path.lexists(file):
        raise ConfigurationError(f"{str(file)!r} exists; give another name")
    if not file.parent.is_dir():
        raise ConfigurationError(f"{str(file)!r} cannot be written: there is no folder {str(file.parent)!r}; make it")
    check_checkpoint(folder)
    rest = read_checkpoint(folder / REST)
    states = rest.get("optimizer_states")
    if states is None:
        raise ConfigurationError(f"{str(folder)!r} has no optimizer_states beside its shards; take another checkpoint")
    if not isinstance(states, list) or not all(isinstance(state, dict) for state in states):
        raise ConfigurationError(f"{str(folder)!r}: optimizer_states is no list of states; take an earlier checkpoint")
    shards: dict[str, Any] = {}
    load_shards(shards, folder)
    if not isinstance(shards.get("state_dict"), dict):
        raise ConfigurationError(f"{str(folder)!r} holds no network (state_dict); take an earlier checkpoint")
    parts = [_tensors(shards, number, folder) for number in range(len(states))]
    rest["optimizer_states"] = [joined_state(*pair) for pair in zip(parts, states, strict=True)]
    with waiting("writing the checkpoint"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": shards["state_dict"], **rest}, file)
    return file


def _tensors(shards: dict[str, Any], number: int, folder: Path) -> dict[str, Any]:
    tensors = shards.get(optimizer_key(number), {})
    if not isinstance(tensors, dict) or not all(isinstance(entry, dict) for entry in tensors.values()):
        raise ConfigurationError(f"{str(folder)!r}: {optimizer_key(number)} is no table of parameters")
    return tensors
