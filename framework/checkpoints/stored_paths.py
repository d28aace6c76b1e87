"""Paths that a checkpoint stores: which of them count in this run, and what becomes of the others.

What a callback remembers decides what the next save removes. A path from a file counts only if it leads to a
checkpoint in the folder where this run keeps its own.
"""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

SHARDED_FILES = (".metadata", "meta.pt", "checksums.json")
"""What the folder of a distributed checkpoint holds beside its shards."""


def is_own_checkpoint(path: Any, folder: str | Path, suffix: str = ".ckpt") -> bool:
    """Tell whether a path is that of a checkpoint in a folder.

    Args:
        path: What a file says.
        folder: Where this run keeps its checkpoints, local or with a protocol.
        suffix: How the names of its checkpoints end.

    Returns:
        True if the path, with its links followed, lies in the folder and has the name of a checkpoint, and there is a
        file, the folder of a distributed checkpoint, or nothing.
    """
    if not isinstance(path, str | Path) or "\0" in str(path) or not str(path).endswith(suffix):
        return False
    if "://" in str(folder):
        inside = str(path).startswith(f"{str(folder).rstrip('/')}/")
        return inside and ".." not in str(path).split("/") and "::" not in str(path)
    if "://" in str(path) or "::" in str(path):
        return False
    try:
        home, place = Path(folder).resolve(), Path(path).resolve()
        if home not in place.parents:
            return False
        if not place.exists():
            return True
        return place.is_file() or all((place / name).is_file() for name in SHARDED_FILES)
    except (OSError, RuntimeError, ValueError):  # a circle of links
        return False


def keep_own_paths(state: dict[str, Any], callback: ModelCheckpoint, folder: str | Path) -> None:
    """Take every path that does not count out of the stored state of a ``ModelCheckpoint``, in place, and name one.

    A run folder that was moved keeps the paths that lead to the checkpoints of those names in it.

    Args:
        state: What the checkpoint stores of the callback, of the right types.
        callback: The callback of this run.
        folder: Where it keeps its checkpoints.
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
    if "dirpath" in state:  # with another folder Lightning would forget all paths, and write last-v1 beside last
        state["dirpath"] = callback.dirpath or str(folder)
    if forgotten:
        rank_zero_info(
            f"forgotten: the checkpoint remembers {forgotten[0]!r}, which is no checkpoint in {str(folder)!r}"
            + (f" (and {len(set(forgotten)) - 1} more)" if len(set(forgotten)) > 1 else "")
        )


def _moved(path: str, before: Any, folder: str | Path) -> str | None:
    """Return where a path lies if the folder of checkpoints was moved; None if nothing is there."""
    if not isinstance(before, str | Path) or "://" in str(folder) or "\0" in path:
        return None
    name = os.path.relpath(path, before) if os.path.isabs(path) == os.path.isabs(before) else path
    there = Path(folder) / name
    return str(there) if there.exists() else None
