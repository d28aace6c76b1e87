"""``python -m orthotrain.consolidate FOLDER FILE``: a distributed checkpoint as one file that any strategy resumes."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from orthotrain.checkpoint import check_checkpoint, read_checkpoint
from orthotrain.checkpoint_io import AtomicCheckpointIO
from orthotrain.errors import ConfigurationError


def consolidate(folder: str | Path, file: str | Path) -> Path:
    """Write the shards of a checkpoint of :class:`orthotrain.strategies.ShardedStrategy` as one file.

    Needs one process, no devices, and memory for the whole checkpoint.

    Args:
        folder: The distributed checkpoint.
        file: What to write; must not exist.

    Returns:
        The path of the file.

    Raises:
        ConfigurationError: If the folder is no whole distributed checkpoint, or the file exists.
    """
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder, file = Path(folder), Path(file)
    if not folder.is_dir():
        raise ConfigurationError(f"{str(folder)!r} is not the folder of a distributed checkpoint")
    if file.exists():
        raise ConfigurationError(f"{str(file)!r} exists; give another name")
    check_checkpoint(folder)
    with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
        dcp_to_torch_save(folder, Path(temporary, "shards.pt"))
        shards = read_checkpoint(Path(temporary, "shards.pt"))
    checkpoint = {"state_dict": shards.pop("state_dict"), **read_checkpoint(folder / "meta.pt")}
    checkpoint["optimizer_states"] = [number_parameters(shards[name]) for name in sorted(shards)]
    AtomicCheckpointIO().save_checkpoint(checkpoint, file)
    return file


def number_parameters(named: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state dict with its parameters numbered by their order in the groups, as torch does it."""
    names = [name for group in named["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in named["param_groups"]]
    return {"state": {numbers[name]: entry for name, entry in named["state"].items()}, "param_groups": groups}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m orthotrain.consolidate FOLDER FILE")
    try:
        print(f"wrote {consolidate(sys.argv[1], sys.argv[2])}")
    except ConfigurationError as error:
        print(f"orthotrain: error: {error}", file=sys.stderr)
        sys.exit(2)
