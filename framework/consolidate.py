"""``orthotrain consolidate FOLDER FILE``: a distributed checkpoint as one file that any strategy resumes."""

from pathlib import Path
from typing import Any

from orthotrain.checkpoint import check_checkpoint, read_checkpoint
from orthotrain.checkpoint_io import AtomicCheckpointIO, partial_of
from orthotrain.errors import ConfigurationError
from orthotrain.progress import bytes_in, writing
from orthotrain.sharded_checkpoint import REST, load_shards
from orthotrain.sharded_optimizer import joined_state, optimizer_key


def consolidate(folder: str | Path, file: str | Path) -> Path:
    """Write the shards of a checkpoint of :class:`orthotrain.strategies.ShardedStrategy` as one file.

    Needs one process, no devices, and memory for the whole checkpoint.

    Args:
        folder: The distributed checkpoint.
        file: What to write; must not exist.

    Returns:
        The path of the file.

    Raises:
        ConfigurationError: If the folder is no whole distributed checkpoint, or the file exists or has no folder.
    """
    folder, file = Path(folder), Path(file)
    if not folder.is_dir():
        raise ConfigurationError(f"{str(folder)!r} is not the folder of a distributed checkpoint")
    if file.exists():
        raise ConfigurationError(f"{str(file)!r} exists; give another name")
    if not file.parent.is_dir():
        raise ConfigurationError(f"{str(file)!r} cannot be written: there is no folder {str(file.parent)!r}; make it")
    check_checkpoint(folder)
    shards: dict[str, Any] = {}
    load_shards(shards, folder)
    rest = read_checkpoint(folder / REST)
    parts = [shards.get(optimizer_key(number), {}) for number in range(len(rest["optimizer_states"]))]
    rest["optimizer_states"] = [joined_state(*pair) for pair in zip(parts, rest["optimizer_states"], strict=True)]
    with writing("writing the checkpoint", partial_of(file), bytes_in(folder)):
        AtomicCheckpointIO().save_checkpoint({"state_dict": shards["state_dict"], **rest}, file)
    return file
