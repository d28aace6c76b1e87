"""A row of the table, the place in which it is made, and the commands that read a checkpoint file."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from hostile.good import Good
from hostile.harness import FINE, REFUSED, listing, plant_canary

EITHER = (FINE, REFUSED)
"""Where a file is odd: it is refused, or what is odd does not matter to the command."""


@dataclass
class Call:
    """What is run: the command line, or a function of entries.py.

    Attributes:
        arguments: Of the command line, or of the function.
        entry: Name of the function.
        closed: Numbers of the standard streams that are closed.
        links: Pairs of link and target, made by the child itself; ``{pid}`` in a link is its number.
        keep: Paths that must be there and unchanged afterwards.
    """

    arguments: list[Any]
    entry: str = ""
    closed: tuple[int, ...] = ()
    links: list[tuple[str, str]] = field(default_factory=list)
    keep: list[Path] = field(default_factory=list)


class Place:
    """The folder of one row.

    Attributes:
        folder: All of it; the process may write here, but not in ``canary``.
        work: The working folder of the process, on its path of modules.
        canary: What nothing may touch.
        sprung: A path that each trap makes; it must not exist afterwards.
        good: Good files, to be copied.
    """

    def __init__(self, folder: Path, good: Good) -> None:
        self.folder, self.good = folder, good
        self.work, self.sprung = folder / "work", folder / "sprung"
        self.work.mkdir(parents=True)
        self.canary = plant_canary(folder)
        trap = f"import os\nos.mkdir({str(self.sprung)!r})\n\n\nclass Network:\n    pass\n"
        (self.work / "trap_module.py").write_text(trap)

    @property
    def run(self) -> Path:
        """The folder of the run that the configs of this place describe."""
        return self.work / "run"

    def save(self, contents: Any, name: str = "bad.ckpt") -> Path:
        """Write a checkpoint."""
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(contents, path)
        return path

    def write(self, name: str, data: bytes | str) -> Path:
        """Write a file."""
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)
        return path

    def copy(self, name: str, target: str = "") -> Path:
        """Copy a good file or folder, to its own name or to ``target``."""
        source = getattr(self.good, name)
        path = self.work / (target or source.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copytree(source, path) if source.is_dir() else shutil.copy2(source, path))

    def contents(self, name: str = "checkpoint") -> dict[str, Any]:
        """Return a good checkpoint; what it says of its own run's folder is true of the run of this place."""
        return relocate(
            self.good.contents(name), {str(self.good.run): str(self.run), str(self.good.folder / "tune"): str(self.run)}
        )

    def config(self, base: str = "pretrain", changes: dict[str, Any] | None = None, name: str = "config.yaml") -> Path:
        """Write a good config, changed at dotted keys, for a run in this place that takes three steps."""
        config = relocate(
            self.good.config(base), {str(self.good.run): str(self.run), str(self.good.folder / "tune"): str(self.run)}
        )
        config["trainer"]["max_steps"] = 3
        if base == "pretrain" and not (self.work / "cache").exists():
            self.copy("cache")
            config["data"]["init_args"]["cache_dir"] = str(self.work / "cache")
        for key, value in (changes or {}).items():
            put(config, key, value)
        return self.write(name, yaml.safe_dump(config, allow_unicode=False))


def relocate(value: Any, folders: dict[str, str]) -> Any:
    """Return nested plain values with the paths in some folders moved to others."""
    if isinstance(value, dict):
        return {key: relocate(inner, folders) for key, inner in value.items()}
    if isinstance(value, list):
        return [relocate(inner, folders) for inner in value]
    if isinstance(value, str):
        for old, new in folders.items():
            if value == old or value.startswith(f"{old}/"):
                return new + value[len(old) :]
    return value


def put(value: Any, key: str, new: Any) -> None:
    """Replace what stands at a dotted key in nested dictionaries."""
    *path, last = key.split(".")
    for part in path:
        value = value.setdefault(part, {})
    value[last] = new


@dataclass(frozen=True)
class Row:
    """One input for one command.

    Attributes:
        kind: What the input attacks.
        name: What it is; readable, and with kind and command unique.
        command: The command, or the function of entries.py.
        make: Makes the input in a place and returns what to run.
        codes: Exit codes that are right.
        names: Words of which the error must hold one.
    """

    kind: str
    name: str
    command: str
    make: Callable[[Place], Call]
    codes: tuple[int, ...] = (REFUSED,)
    names: tuple[str, ...] = ("bad", "the checkpoint")

    @property
    def id(self) -> str:
        """Name of the test."""
        return f"{self.kind}-{self.command}-{self.name}".replace(" ", "_").encode("ascii", "replace").decode()


RESUMED = ("fit", "validate", "test")
"""What loads a checkpoint into the network that the config describes."""


def use(command: str, place: Place, path: Path | str) -> Call:
    """Return what reads a checkpoint file by a command.

    Those that read its description rebuild a network (export, fit-from, ...), those of RESUMED load it into a network
    that the config describes, tokenizer takes the tokenizer out of it.
    """
    network = {"model.init_args.model": {"class_path": "CheckpointModel", "init_args": {"path": str(path)}}}
    if command in ("export", "export-peft"):
        more = ["--format", "peft"] if command == "export-peft" else []
        return Call(["export", "--ckpt", path, "--out", place.work / "out", *more])
    if command in ("checkpoint_model", "load_network"):
        return Call([str(path), []], entry=command)
    if command == "load_from_checkpoint":
        return Call(["PoetModule", str(path)], entry=command)
    if command in ("fit-from", "plan-from"):
        return Call([command[:-5], "-c", place.config("finetune", network)])
    if command == "predict":
        return Call(["predict", "-c", place.config("finetune"), "--ckpt_path", path])
    if command == "tokenizer":
        return Call(["fit", "-c", place.config("finetune", {"data.init_args.tokenizer": str(path)})])
    return Call([command, "-c", place.config(), "--ckpt_path", path])


def judged(place: Place, call: Call) -> dict[str, Any]:
    """Return what must not change, to compare before and after."""
    kept = {str(path): listing(path) if path.is_dir() else path.read_bytes() for path in call.keep if path.exists()}
    return {"canary": listing(place.canary), "kept": kept, "sprung": place.sprung.exists()}
