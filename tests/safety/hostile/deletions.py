"""States of callbacks whose paths decide what the next save removes."""

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import torch

from hostile.rows import EITHER, Call, Place, Row

KIND = "deletion"
MODEL = "ModelCheckpoint"
PATHS = {
    "file": "{canary}/last.ckpt", "folder": "{canary}", "sub-folder": "{canary}/sub", "local": "local://{canary}",
    "local file": "local://{canary}/a.txt", "file url": "file://{canary}", "memory": "memory://x",
    "upwards": "{saves}/../../../canary", "upwards twice": "{saves}/x/../../../../canary/sub",
    "local upwards": "local://{saves}/../../../canary", "relative": "../canary",
    "relative link": "run/checkpoints/link/a.txt", "through a link": "{saves}/link/last.ckpt",
    "link to a folder": "{saves}/link", "trailing dots": "{saves}/../..", "double slash": "//{canary}",
    "own config": "{run}/config.yaml", "own folder": "{saves}", "run": "{run}", "parent": "{saves}/..", "dot": ".",
    "empty": "", "root of work": "{work}", "with spaces": " {canary}", "tilde": "~/../canary",
    "newline": "{canary}\n",
}  # fmt: skip
FIELDS = ("best_model_path", "last_model_path", "kth_best_model_path", "best_k_models")
WRONG = {
    "none": None, "number": 7, "list": ["{canary}"], "dict": {"{canary}": 1}, "bytes": b"{canary}",
    "missing": "MISSING", "nested": [["{canary}"]], "true": True,
}  # fmt: skip
SAVED = {
    "upwards": "../../../canary", "up one": "..", "dot": ".", "empty": "", "absolute": "{canary}",
    "sub": "../../../canary/sub", "link": "link", "link and file": "link/a.txt", "own config": "../config.yaml",
    "nul": "a\0b", "number": 3, "none": None, "list": ["../../../canary"], "dict": {"a": 1},
    "name of no step": "x.old", "upwards from a step": "step-000001/../../../../canary",
}  # fmt: skip


def fill(value: Any, place: Place) -> Any:
    """Put the paths of a place into a value."""
    folders = {"canary": place.canary, "run": place.run, "saves": place.run / "checkpoints", "work": place.work}
    if isinstance(value, str):
        for name, path in folders.items():
            value = value.replace(f"{{{name}}}", str(path))
        return value
    if isinstance(value, bytes):
        return fill(value.decode(), place).encode()
    if isinstance(value, list):
        return [fill(inner, place) for inner in value]
    if isinstance(value, dict):
        return {fill(key, place): fill(inner, place) for key, inner in value.items()}
    return value


def resumed(name: str, field: str, path: Any, last: bool) -> Row:
    """A run that goes on from a checkpoint whose ModelCheckpoint state names a path, and saves."""

    def make(place: Place) -> Call:
        saves = place.run / "checkpoints"
        saves.mkdir(parents=True)
        (saves / "link").symlink_to(place.canary)
        (saves / "notes.txt").write_text("a user's own file")
        contents = place.contents()
        key = next(key for key in contents["callbacks"] if key.startswith(MODEL))
        state = {**contents["callbacks"].pop(key), "dirpath": str(saves)}
        watched = field in FIELDS[2:]
        if watched:
            key = key.replace("'monitor': None, 'mode': 'min'", "'monitor': 'step', 'mode': 'max'")
            state |= {"monitor": "step", "best_k_models": {}, "kth_value": torch.tensor(-1.0)}
        value = fill(path, place)
        if value == "MISSING":
            state.pop(field)
        elif field in FIELDS[2:] and isinstance(value, str):
            state |= {"kth_best_model_path": value, "best_k_models": {value: torch.tensor(-1.0)}}
        else:
            state[field] = value
        contents["callbacks"][key] = state
        changes = {"monitor": "step", "mode": "max"} if watched else {}
        config = place.config()
        if changes:
            options = place.good.config()["trainer"]["callbacks"][0]["init_args"]
            saver = {"class_path": MODEL, "init_args": {**options, **changes, "dirpath": str(saves)}}
            config = place.config(
                "pretrain", {"trainer.callbacks": [saver], "data.init_args.cache_dir": str(place.work / "cache")}
            )
        saved = place.save(contents, "run/checkpoints/last.ckpt" if last else "bad.ckpt")
        own = place.write("run/config.yaml", config.read_bytes())
        return Call(["fit", "-c", own, "--ckpt_path", "last" if last else saved, "--trainer.logger", "false"],
                    keep=[saves / "notes.txt", config])  # fmt: skip

    return Row(KIND, f"{field} {name}{' last' if last else ''}", "fit", make, EITHER, ("last.ckpt", "bad.ckpt"))


def adapter(name: str, saved: Any) -> Row:
    """A finetuning run that goes on from a checkpoint whose AdapterCheckpoint state names folders."""

    def make(place: Place) -> Call:
        folder = place.run / "adapters"
        folder.mkdir(parents=True)
        (folder / "link").symlink_to(place.canary)
        contents = place.contents("resume")
        value = fill(saved, place)
        contents["callbacks"]["AdapterCheckpoint"] = {"saved": [value] * 6 + ["step-000001", "step-000002"]}
        config = place.config("finetune")
        return Call(["fit", "-c", config, "--ckpt_path", place.save(contents)], keep=[config])

    return Row(KIND, f"saved {name}", "fit", make, EITHER, ("bad.ckpt", "saved"))


def rows() -> Iterator[Row]:
    """All of them."""
    for (name, path), field, last in zip(PATHS.items(), cycle(FIELDS[:2]), cycle((False, False, True, True))):
        yield resumed(name, field, path, last)
        if name in ("local", "upwards", "through a link", "parent"):
            yield resumed(name, FIELDS[0] if field == FIELDS[1] else FIELDS[1], path, not last)
            yield resumed(name, "kth_best_model_path", path, False)
    for (name, value), field in zip(WRONG.items(), cycle(FIELDS)):
        yield resumed(f"is {name}", field, value, False)
    for name, value in SAVED.items():
        yield adapter(name, value)
