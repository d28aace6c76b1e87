"""Things that are no regular file where one is read, and paths with odd names."""

import os
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

from hostile.rows import EITHER, Call, Place, Row, use

FILES, NAMES = "special file", "path"


def _remove(path: Path) -> Path:
    path.unlink()
    return path


def _link(path: Path, target: str) -> None:
    _remove(path).symlink_to(target)


def _sparse(path: Path) -> None:
    with _remove(path).open("wb") as file:
        file.truncate(8 << 30)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "fifo": lambda path: os.mkfifo(_remove(path)),
    "link to zeros": lambda path: _link(path, "/dev/zero"),
    "link to random": lambda path: _link(path, "/dev/urandom"),
    "folder": lambda path: _remove(path).mkdir(),
    "link to nothing": lambda path: _link(path, "nowhere"),
    "link to itself": lambda path: _link(path, path.name),
    "empty": lambda path: _remove(path).touch(),
    "8 GB of holes": _sparse,
    "socket": lambda path: _socket(_remove(path)),
}


def _socket(path: Path) -> None:
    import socket

    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _source(suffix: str, base: str) -> Callable[[Place], tuple[Path, Call]]:
    def make(place: Place) -> tuple[Path, Call]:
        path = place.write(f"bad{suffix}", place.good.rows.read_bytes())
        return path, Call(["fit", "-c", place.config(base, {"data.init_args.source": str(path)})])

    return make


def _checkpoint(command: str) -> Callable[[Place], tuple[Path, Call]]:
    def make(place: Place) -> tuple[Path, Call]:
        path = place.copy("checkpoint", "bad.ckpt")
        return path, use(command, place, path)

    return make


def _in_model(name: str, tokenizer: bool = False) -> Callable[[Place], tuple[Path, Call]]:
    def make(place: Place) -> tuple[Path, Call]:
        folder = place.copy("model", "bad")
        if not (folder / name).exists():
            (folder / name).write_text("{}")
        if tokenizer:
            return folder / name, Call(
                ["fit", "-c", place.config("finetune", {"data.init_args.tokenizer": str(folder)})]
            )
        return folder / name, Call([str(folder), {}], entry="pretrained")

    return make


def _in_shards(name: str) -> Callable[[Place], tuple[Path, Call]]:
    def make(place: Place) -> tuple[Path, Call]:
        folder = place.copy("shards", "bad.ckpt")
        return folder / name, Call(["consolidate", folder, "one.ckpt"])

    return make


def _in_peft(name: str) -> Callable[[Place], tuple[Path, Call]]:
    def make(place: Place) -> tuple[Path, Call]:
        folder = place.copy("peft", "bad")
        return folder / name, Call([str(place.good.model), str(folder)], entry="import_peft")

    return make


def _in_cache(name: str) -> Callable[[Place], tuple[Path, Call]]:
    def make(place: Place) -> tuple[Path, Call]:
        config = place.config()
        return next((place.work / "cache").iterdir()) / name, Call(["fit", "-c", config])

    return make


def _config(command: str) -> Callable[[Place], tuple[Path, Call]]:
    def make(place: Place) -> tuple[Path, Call]:
        path = place.config(name="bad.yaml")
        return path, Call([command, "-c", path])

    return make


def _adapter(place: Place) -> tuple[Path, Call]:
    path = place.copy("adapter", "bad.safetensors")
    return path, Call([str(place.good.model), str(path)], entry="load_adapter")


SLOTS = {
    "checkpoint": _checkpoint("export"), "checkpoint of a run": _checkpoint("validate"),
    "start": _checkpoint("checkpoint_model"), "resumed": _checkpoint("fit"), "tokenizer of": _checkpoint("tokenizer"),
    "module": _checkpoint("load_from_checkpoint"), "config": _config("fit"), "plan": _config("plan"),
    "text": _source(".txt", "pretrain"), "rows": _source(".jsonl", "pretrain"), "json": _source(".json", "finetune"),
    "parquet": _source(".parquet", "pretrain"), "gz": _source(".jsonl.gz", "finetune"),
    "config.json": _in_model("config.json"), "weights": _in_model("model.safetensors"),
    "index": _in_model("model.safetensors.index.json"), "tokenizer.json": _in_model("tokenizer.json", True),
    "tokenizer_config.json": _in_model("tokenizer_config.json", True),
    "adapter": _adapter, "peft config": _in_peft("adapter_config.json"),
    "peft weights": _in_peft("adapter_model.safetensors"), "shards .metadata": _in_shards(".metadata"),
    "shards meta.pt": _in_shards("meta.pt"), "shards sums": _in_shards("checksums.json"),
    "shard": _in_shards("__0_0.distcp"), "cache": _in_cache("train.tokens"),
    "cache tokenizer": _in_cache("tokenizer.json"), "cache lock": _in_cache(".orthotrain.lock"),
}  # fmt: skip
COMMANDS = {
    "checkpoint of a run": "validate", "start": "checkpoint_model", "module": "load_from_checkpoint", "plan": "plan",
    "config.json": "pretrained", "weights": "pretrained", "index": "pretrained", "adapter": "load_adapter",
    "peft config": "import_peft", "peft weights": "import_peft", "checkpoint": "export",
    "tokenizer.json": "tokenizer", "tokenizer_config.json": "tokenizer", "tokenizer of": "tokenizer",
}  # fmt: skip
ODD = ("cache", "cache tokenizer", "cache lock", "tokenizer_config.json", "index", "tokenizer.json", "config.json")
SOON = ("fifo", "link to zeros", "folder")
"""What each slot gets; of the others each gets two."""


def rows() -> Iterator[Row]:
    """Special files in every slot, then odd names in every option."""
    others = cycle(name for name in SPECIAL if name not in SOON)
    for slot, prepare in SLOTS.items():
        command = COMMANDS.get(slot, "consolidate" if slot.startswith("shard") else "fit")
        for special in (*SOON, next(others), next(others)):

            def make(place, prepare=prepare, special=special):
                path, call = prepare(place)
                SPECIAL[special](path)
                return call

            odd = slot in ODD or (slot in ("text", "rows") and special == "folder") or command == "load_from_checkpoint"
            yield Row(
                FILES,
                f"{slot} is {special}",
                command,
                make,
                EITHER if odd else (2,),
                ("bad", "cache", "tokens", "tokenizer"),
            )
    yield from name_rows()


OPTIONS: dict[str, tuple[str, Callable[[Place, str], Call]]] = {
    "export ckpt": ("export", lambda place, path: Call(["export", "--ckpt", path, "--out", "out"])),
    "export out": ("export", lambda place, path: Call(["export", "--ckpt", place.good.checkpoint, "--out", path])),
    "peft out": ("export-peft", lambda place, path: Call(["export", "--ckpt", place.good.resume, "--out", path,
    "--format", "peft"])),
    "config": ("fit", lambda place, path: Call(["fit", "-c", path])),
    "plan config": ("plan", lambda place, path: Call(["plan", "-c", path])),
    "fit ckpt_path": ("fit", lambda place, path: Call(["fit", "-c", place.config(), "--ckpt_path", path])),
    "validate ckpt_path": ("validate", lambda place, path: Call(["validate", "-c", place.config(), "--ckpt_path",
    path])),
    "test ckpt_path": ("test", lambda place, path: Call(["test", "-c", place.config(), "--ckpt_path", path])),
    "predict ckpt_path": ("predict", lambda place, path: Call(["predict", "-c", place.config("finetune"),
    "--ckpt_path", path])),
    "run_folder": ("fit", lambda place, path: Call(["fit", "-c", place.config(), "--run_folder", path])),
    "root": ("fit", lambda place, path: Call(["fit", "-c", place.config(), "--trainer.default_root_dir", path])),
    "source": ("fit", lambda place, path: Call(["fit", "-c", place.config(), "--data.source", path])),
    "rows": ("fit", lambda place, path: Call(["fit", "-c", place.config("finetune"), "--data.source", path])),
    "tokenizer": ("fit", lambda place, path: Call(["fit", "-c", place.config("finetune"), "--data.tokenizer", path])),
    "cache_dir": ("fit", lambda place, path: Call(["fit", "-c", place.config(), "--data.cache_dir", path])),
    "model name": ("fit", lambda place, path: Call(["fit", "-c", place.config("finetune"), "--model.model.name",
    path])),
    "consolidate folder": ("consolidate", lambda place, path: Call(["consolidate", path, "one.ckpt"])),
    "consolidate file": ("consolidate", lambda place, path: Call(["consolidate", place.good.shards, path])),
    "start": ("checkpoint_model", lambda place, path: Call([path, []], entry="checkpoint_model")),
    "module": ("load_from_checkpoint", lambda place, path: Call(["PoetModule", path], entry="load_from_checkpoint")),
    "adapter": ("load_adapter", lambda place, path: Call([str(place.good.model), path], entry="load_adapter")),
    "peft": ("import_peft", lambda place, path: Call([str(place.good.model), path], entry="import_peft")),
    "pretrained": ("pretrained", lambda place, path: Call([path, {}], entry="pretrained")),
    "calibrate out": ("calibrate", lambda place, path: Call(["calibrate", "--device", "cuda", "--out", path])),
}  # fmt: skip
ODD_PATHS = {
    "nul": "a\0bad", "not UTF-8": "bad\udcff\udcfe", "escape": "bad\x1b]0;owned\x07\x1b[2J",
    "newline": "bad\nname\rback", "right to left": "bad\u202etxt.", "too long": "bad" * 2000,
    "too deep": "bad/" * 2000, "empty": "", "file url": "file:///bad", "dev": "/dev/zero/bad", "dash": "-bad",
}  # fmt: skip
WORDS = ("bad", "a", "ckpt", "path", "out", "-c", "config", "folder", "file", "empty")


def name_rows() -> Iterator[Row]:
    """A NUL in every option with a path, and other odd names in turn; where a file may be made, it may be made."""
    others = cycle(name for name in ODD_PATHS if name != "nul")
    for option, (command, call) in OPTIONS.items():
        for odd in dict.fromkeys(("nul", "escape", next(others), next(others))):
            writes = option in (
                "export out",
                "peft out",
                "run_folder",
                "root",
                "cache_dir",
                "consolidate file",
                "calibrate out",
            )
            codes = EITHER if ((writes or option == "tokenizer") and odd != "nul") or odd == "empty" else (2,)

            def make(place, call=call, odd=odd):
                return call(place, ODD_PATHS[odd])

            yield Row(NAMES, f"{option} {odd}", command, make, codes, WORDS)
