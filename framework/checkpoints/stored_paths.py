"""Paths that a checkpoint stores: which of them this run keeps, and which it forgets.

The next save may delete a path that ``ModelCheckpoint`` remembers. A path from a file is therefore kept only if it
leads to a checkpoint in the checkpoint folder of this run.
"""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

SHARDED_FILES = (".metadata", "meta.pt", "checksums.json")
"""Files in the folder of a distributed checkpoint beside its shards."""


def is_own_checkpoint(path: Any, folder: str | Path, suffix: str = ".ckpt") -> bool:
    """Tell whether a path is the path of a checkpoint in a folder.

    Args:
        path: A value from a file.
        folder: Checkpoint folder of this run, a local path or a path with a protocol.
        suffix: End of the names of checkpoints.

    Returns:
        True if the path (links are followed) is inside the folder and ends with the suffix, and if there is a file, the
        folder of a distributed checkpoint, or nothing at the path.
    """
    if not isinstance(path, str | Path) or "\0" in str(path) or not str(path).endswith(suffix):
        return False
    if "://" in str(folder):
        inside = str(path).startswith(f"{str(folder).rstrip('/')}/")
        return inside and ".." not in str(path).split("/") and "::" not in str(path)
    if "://" in str(path) or "::" in str(path):
        return False
    try:
        resolved = Path(path).resolve()
        if Path(folder).resolve() not in resolved.parents:
            return False
        if not resolved.exists():
            return True
        return resolved.is_file() or all((resolved / name).is_file() for name in SHARDED_FILES)
    except (OSError, RuntimeError, ValueError):  # links that form a circle
        return False


def keep_own_paths(state: dict[str, Any], callback: ModelCheckpoint, folder: str | Path) -> None:
    """Remove every path that is not a checkpoint of this run from the stored state of a ``ModelCheckpoint``, in place.

    The first removed path is logged. If the checkpoint folder was moved, a stored path is replaced by the path of the
    same name in the new folder.

    Args:
        state: State of the callback in a checkpoint, with the right types.
        callback: The callback of this run.
        folder: Checkpoint folder of the callback.
    """
    forgotten: list[str] = []

    def own(path: str) -> str:
        for candidate in (path, path and _moved(path, state.get("dirpath"), folder)):
            if candidate and is_own_checkpoint(candidate, folder, callback.FILE_EXTENSION):
                return candidate
        if path:
            forgotten.append(path)
        return ""

    for name in ("best_model_path", "last_model_path", "kth_best_model_path"):
        if name in state:
            state[name] = own(state[name])
    if "best_k_models" in state:
        kept = {own(path): score for path, score in state["best_k_models"].items()}
        kept.pop("", None)
        state["best_k_models"] = kept
        if state.get("kth_best_model_path", "") not in kept:
            worst = max if callback.mode == "min" else min
            state["kth_best_model_path"] = worst(kept, key=kept.__getitem__) if kept else ""
        if state["kth_best_model_path"]:
            state["kth_value"] = kept[state["kth_best_model_path"]]
    if "dirpath" in state:  # if it differed, Lightning would forget all paths and write last-v1.ckpt beside last.ckpt
        state["dirpath"] = callback.dirpath or str(folder)
    if forgotten:
        rank_zero_info(
            f"forgotten: the checkpoint remembers {forgotten[0]!r}, which is not a checkpoint in {str(folder)!r}"
            + (f" (and {len(set(forgotten)) - 1} more)" if len(set(forgotten)) > 1 else "")
        )


def _moved(path: str, before: Any, folder: str | Path) -> str | None:
    """Return the path of a checkpoint after its folder was moved from ``before``; None if there is no such file."""
    if not isinstance(before, str | Path) or "://" in str(folder) or "\0" in path:
        return None
    name = os.path.relpath(path, before) if os.path.isabs(path) == os.path.isabs(before) else path
    moved = Path(folder) / name
    return str(moved) if moved.exists() else None
