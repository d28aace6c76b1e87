"""Entries of a good checkpoint, each replaced by values of other kinds or taken out; and options that cannot be."""

import copy
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import torch

from hostile.descriptions import MODULE
from hostile.rows import EITHER, Call, Place, Row, use

KIND, STATE, OPTION = "broken value", "state", "option"
LAYER = "model.model.layers.0.self_attn.q_proj"
MISSING = object()
VALUES = {
    "none": None, "-1": -1, "2^70": 1 << 70, "text": "x", "bytes": b"x", "list": [], "dictionary": {}, "true": True,
    "tensor": torch.zeros(2), "meta tensor": torch.empty(3, device="meta"), "nan": float("nan"), "nested": [[[1], {}]], "missing": MISSING,
    "escape": "\x1b]0;owned\x07\x1b[2J\u202e\r\n",
}  # fmt: skip
FIT = "loops.fit_loop"
ENTRIES = {
    # key, parts divided by spaces -> commands that need it, and those to which it does not matter
    "state_dict": (("fit", "validate", "test", "export", "checkpoint_model"), ()),
    "optimizer_states": (("fit",), ("validate", "export")),
    "lr_schedulers": (("fit",), ("test",)),
    "loops": (("fit",), ("validate",)),
    "callbacks": ((), ("fit", "validate")),
    "global_step": ((), ("fit", "validate", "export")),
    "epoch": ((), ("fit", "test")),
    "pytorch-lightning_version": ((), ("fit", "validate", "load_from_checkpoint")),
    "hyper_parameters": (("export", "checkpoint_model"), ("fit", "load_from_checkpoint")),
    "TextData": ((), ("fit", "export", "tokenizer")),
    "poet": ((), ("fit", "export")),
    "hparams_name": ((), ("load_from_checkpoint",)),
    "datamodule_hyper_parameters": ((), ("fit",)),
    f"{FIT} state_dict combined_loader": ((), ("fit",)),
    f"{FIT} epoch_loop.batch_progress": ((), ("fit",)),
    f"{FIT} epoch_loop.batch_progress current ready": ((), ("fit",)),
    f"{FIT} epoch_progress current": ((), ("fit",)),
    f"{FIT} epoch_loop.state_dict": ((), ("fit",)),
    "optimizer_states 0 state": ((), ("fit",)),
    "optimizer_states 0 param_groups": (("fit",), ()),
    "optimizer_states 0 param_groups 0": (("fit",), ()),
    "optimizer_states 0 param_groups 0 lr": ((), ("fit",)),
    "lr_schedulers 0": ((), ("fit",)),
    "lr_schedulers 0 last_epoch": ((), ("fit",)),
    "lr_schedulers 0 base_lrs": ((), ("fit",)),
    "callbacks MergeRotations": ((), ("fit",)),
    "callbacks MergeRotations merges": ((), ("fit",)),
    "callbacks BatchSeeds seed": ((), ("fit",)),
    f"state_dict {LAYER}.weight.values": (("fit", "export", "validate"), ()),
    f"state_dict {LAYER}.rotation_in.permutation": (("fit", "export", "validate"), ()),
    f"state_dict {LAYER}.rotation_out.generators": (("export", "fit", "test"), ()),
    f"state_dict {LAYER}.merge_count": (("export", "validate"), ()),
    "TextData tokenizer": (("tokenizer", "export"), ("fit",)),
    "TextData special_tokens": ((), ("tokenizer", "export")),
    "TextData special_tokens eos_token": ((), ("export", "tokenizer")),
    "TextData tokenizer_fingerprint": ((), ("export", "fit", "tokenizer")),
    "TextData chat_template": ((), ("export", "tokenizer")),
    "TextData settings": ((), ("fit",)),
    f"{MODULE.replace('.', ' ')} layers block_size": ((), ("export",)),
    f"{MODULE.replace('.', ' ')} layers include": ((), ("load_network",)),
    f"{MODULE.replace('.', ' ')} model init_args config": ((), ("load_network", "export")),
    f"{MODULE.replace('.', ' ')} optimization": ((), ("load_network", "export")),
}  # fmt: skip
EVERY = ("state_dict", "optimizer_states", "loops", "hyper_parameters", "TextData")
"""Entries that get every value, by the commands in turn; others get a part of the values."""


def _replaced(place: Place, key: str, value: Any) -> dict[str, Any]:
    contents = copy.deepcopy(place.contents())
    parts = key.split(" ")
    inner: Any = contents
    if parts[0] == FIT:
        parts[:1] = FIT.split(".")
    for part in parts[:-1]:
        inner = inner[int(part) if isinstance(inner, list) else part]
    last: Any = int(parts[-1]) if isinstance(inner, list) else parts[-1]
    if value is MISSING:
        if isinstance(inner, list):
            del inner[last]
        else:
            inner.pop(last, None)
    else:
        inner[last] = value
    return contents


def rows() -> Iterator[Row]:
    """Every entry with every value or with a part of them, then states that lie, then options."""
    some = cycle(VALUES)
    for key, (needed, other) in ENTRIES.items():
        commands = cycle([*((c, (2,)) for c in needed), *((c, EITHER) for c in other)])
        for name in VALUES if key in EVERY else dict.fromkeys(next(some) for _ in range(5)):
            command, codes = next(commands)
            if (key, name) in (("state_dict " + LAYER + ".merge_count", "-1"), ("optimizer_states 0 state", "dictionary")):
                codes = EITHER
            short = key.replace(LAYER, "layer").replace(MODULE.replace(".", " "), "module")

            def make(place, key=key, value=VALUES[name], command=command):
                return use(command, place, place.save(_replaced(place, key, value)))

            yield Row(KIND, f"{short} is {name}", command, make, codes)
    for name, value in VALUES.items():
        if value is not MISSING and name != "escape":
            command = ("export", "fit", "validate", "tokenizer", "checkpoint_model")[len(name) % 5]
            yield Row(KIND, f"all of it is {name}", command,
                      lambda place, value=value, command=command: use(command, place, place.save(value)))  # fmt: skip
    yield from state_rows()
    yield from option_rows()


def _permutation(change: Any) -> Any:
    def changed(contents: dict[str, Any]) -> None:
        name = f"{LAYER}.rotation_in.permutation"
        contents["state_dict"][name] = change(contents["state_dict"][name].clone())

    return changed


def _put(tensor: torch.Tensor, value: int) -> torch.Tensor:
    tensor[0] = value
    return tensor


def _every(change: Any) -> Any:
    def changed(contents: dict[str, Any]) -> None:
        contents["state_dict"] = {name: change(value) for name, value in contents["state_dict"].items()}

    return changed


def _moments(change: Any) -> Any:
    def changed(contents: dict[str, Any]) -> None:
        for entry in contents["optimizer_states"][0]["state"].values():
            entry["exp_avg"] = change(entry["exp_avg"])

    return changed


def _set(**entries: Any) -> Any:
    return lambda contents: contents.update(entries)


NAN = float("nan")
STATES = {
    "permutation repeats": _permutation(lambda p: _put(p, int(p[1]))), "permutation out of range": _permutation(lambda p: _put(p, 32)),
    "permutation far out": _permutation(lambda p: _put(p, 1 << 40)), "permutation negative": _permutation(lambda p: _put(p, -1)),
    "permutation of floats": _permutation(lambda p: p.float() + 0.5), "permutation of NaN": _permutation(lambda p: p.float() * NAN),
    "permutation of bytes": _permutation(lambda p: p.to(torch.uint8).fill_(3)), "permutation short": _permutation(lambda p: p[:-1]),
    "permutation of rows": _permutation(lambda p: p[None]), "permutation complex": _permutation(lambda p: p.to(torch.complex64)),
    "all NaN": _every(lambda t: t * NAN if t.is_floating_point() else t), "all infinite": _every(lambda t: t.fill_(float("inf")) if t.is_floating_point() else t),
    "other shapes": _every(lambda t: t[None]), "text": _every(lambda t: "x"), "numbers": _every(lambda t: 1.0), "halves": _every(lambda t: t[: len(t) // 2] if t.ndim else t),
    "complex": _every(lambda t: t.to(torch.complex64)), "meta": _every(lambda t: t.to("meta")), "sparse": _every(lambda t: t.to_sparse() if t.ndim else t),
    "quantized": _every(lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)), "parameters": _every(lambda t: torch.nn.Parameter(t.float())),
    "names with escapes": lambda contents: contents["state_dict"].update({"\x1b]0;owned\x07\x1b[2J": torch.zeros(1)}),
    "names of numbers": lambda contents: contents["state_dict"].update({7: torch.zeros(1)}),
}  # fmt: skip
RESUMED = {
    "moments of other shapes": _moments(lambda t: t[None]), "moments of text": _moments(lambda t: "x"), "moments of NaN": _moments(lambda t: t * NAN),
    "moments missing": lambda contents: [entry.pop("exp_avg") for entry in contents["optimizer_states"][0]["state"].values()],
    "moments of integers": _moments(lambda t: t.long()), "moments meta": _moments(lambda t: t.to("meta")),
    "moments of no parameter": lambda contents: contents["optimizer_states"][0]["state"].update({9999: {"step": 1}}),
    "two optimizers": lambda contents: contents["optimizer_states"].append({"state": {}, "param_groups": []}),
    "no optimizer": _set(optimizer_states=[]), "no schedule": _set(lr_schedulers=[]), "two schedules": lambda contents: contents["lr_schedulers"].append({}),
    "step beyond the end": _set(global_step=10**9), "negative step": _set(global_step=-5, epoch=-1), "old version": _set(**{"pytorch-lightning_version": "0.0.1"}),
    "version of words": _set(**{"pytorch-lightning_version": "latest; rm -rf /"}), "new version": _set(**{"pytorch-lightning_version": "999.0"}),
    "ranks 0": lambda contents: contents["loops"]["fit_loop"]["state_dict"]["combined_loader"][0].update(num_replicas=0),
    "ranks of text": lambda contents: contents["loops"]["fit_loop"]["state_dict"]["combined_loader"][0].update(num_replicas="x"),
    "batches 2^62": lambda contents: contents["loops"]["fit_loop"]["state_dict"]["combined_loader"][0].update(batches=1 << 62),
    "loader of another kind": lambda contents: contents["loops"]["fit_loop"]["state_dict"].update(combined_loader=[{"_workers": 3}]),
    "base rates short": lambda contents: contents["lr_schedulers"][0].update(base_lrs=[]), "warm-up of text": lambda contents: contents["lr_schedulers"][0].update(warmup_steps="x"),
    "schedule with a method": lambda contents: contents["lr_schedulers"][0].update(step="x", optimizer="y"),
    "merges 2^70": lambda contents: contents["callbacks"]["MergeRotations"].update(merges=1 << 70), "callback of nobody": lambda contents: contents["callbacks"].update(Nobody={"a": 1}),
    "frozen fingerprints": _set(frozen_fingerprints={"a": 1}), "frozen dtype": _set(frozen_fingerprints={"model.lm_head.weight": ["torch.hub", 1]}),
    "rates NaN": lambda contents: [group.update(lr=NAN) for group in contents["optimizer_states"][0]["param_groups"]],
}  # fmt: skip
HARMLESS = ("parameters", "old version", "new version", "version of words", "step beyond the end", "callback of nobody", "moments of no parameter",
            "merges 2^70", "negative step", "loader of another kind", "batches 2^62")  # fmt: skip


def state_rows() -> Iterator[Row]:
    """Tensors and progress of other kinds than the run has."""
    turns = cycle(("export", "validate", "fit", "checkpoint_model"))
    for name, change in [*STATES.items(), *RESUMED.items()]:
        for command in ("fit",) if name in RESUMED else dict.fromkeys((next(turns), next(turns))):
            def make(place, change=change, command=command):
                contents = copy.deepcopy(place.contents())
                change(contents)
                return use(command, place, place.save(contents))

            codes = EITHER if name in HARMLESS else (1, 2) if "NaN" in name or "infinite" in name else (2,)
            yield Row(STATE, name, command, make, codes, ("bad", "finite", "NaN"))


OPTIONS = {
    "negative seed": ["--seed_everything", "-1"], "huge seed": ["--seed_everything", str(1 << 70)], "seed of the model": ["--model.seed", "-1"],
    "seed of the data": ["--data.seed", "-5"], "accumulate 0": ["--trainer.accumulate_grad_batches", "0"], "accumulate -3": ["--trainer.accumulate_grad_batches", "-3"],
    "batch size 0": ["--data.batch_size", "0"], "batch size 2^62": ["--data.batch_size", str(1 << 62)], "sequence 0": ["--data.sequence_length", "0"],
    "sequence 2^62": ["--data.sequence_length", str(1 << 62)], "vocabulary 2^62": ["--data.vocab_size", str(1 << 62)], "vocabulary -1": ["--data.vocab_size", "-1"],
    "block size 0": ["--model.layers.block_size", "0"], "block size -8": ["--model.layers.block_size", "-8"], "block size 2^62": ["--model.layers.block_size", str(1 << 62)],
    "merge every 0": ["--model.merge_every", "0"], "merge every -1": ["--model.merge_every", "-1"], "rate NaN": ["--model.optimization.lr", ".nan"],
    "rate infinite": ["--model.optimization.lr", ".inf"], "fraction NaN": ["--data.val_fraction", ".nan"], "workers -1": ["--data.num_workers", "-1"],
    "clip NaN": ["--trainer.gradient_clip_val", ".nan"], "clip -1": ["--trainer.gradient_clip_val", "-1"], "devices -5": ["--trainer.devices", "-5"],
    "devices 0": ["--trainer.devices", "0"], "log every -1": ["--trainer.log_every_n_steps", "-1"], "precision": ["--trainer.precision", "3"],
    "max steps -7": ["--trainer.max_steps", "-7"], "max time": ["--trainer.max_time", "soon"], "strategy": ["--trainer.strategy", "\x1b[2Jx"],
    "unknown with escape": ["--trainer.\x1b]0;owned\x07", "1"], "value with escape": ["--model.merge_every", "\x1b[2J1"], "surrogate": ["--trainer.max_steps", "\udcff"],
    "callback with escape": ["--trainer.callbacks+", "\x1b[2JRunReport"], "limit 2": ["--trainer.limit_val_batches", "-2"], "overfit -1": ["--trainer.overfit_batches", "-1"],
}  # fmt: skip
FINE_TOO = ("seed of the model", "seed of the data", "log every -1", "huge seed")


def option_rows() -> Iterator[Row]:
    """Options of the user's own that cannot be, and closed output."""
    for name, options in OPTIONS.items():
        words = (options[0].strip("-").split(".")[-1].replace("\x1b]0;owned\x07", "owned").rstrip("+"), options[1], "trainer", "callback")
        yield Row(OPTION, name, "fit", lambda place, options=options: Call(["fit", "-c", place.config(), *options]),
                  EITHER if name in FINE_TOO else (2,), words)  # fmt: skip
    yield Row(OPTION, "command with escape", "main", lambda place: Call(["f\x1b]0;owned\x07it"]), names=("f",))
    yield Row(OPTION, "command of bytes", "main", lambda place: Call(["\udcfffit"]), names=("fit",))
    yield Row(OPTION, "allow with escape", "export", lambda place: Call(
        ["export", "--ckpt", place.good.checkpoint, "--out", "out", "--allow", "\x1b[2Jx.y"]), EITHER, ("allow", "x.y"))  # fmt: skip
    calls = {
        "plan": lambda place: ["plan", "-c", place.config()],
        "export": lambda place: ["export", "--ckpt", place.good.checkpoint, "--out", "out"],
        "fit": lambda place: ["fit", "-c", place.config()],
        "validate": lambda place: ["validate", "-c", place.config(), "--ckpt_path", place.good.checkpoint],
        "consolidate": lambda place: ["consolidate", place.good.shards, "one.ckpt"],
        "main": lambda place: ["plugins"],
    }
    for command, arguments in calls.items():
        for name, closed in {"stdout": (1,), "stderr": (2,), "both": (1, 2)}.items():
            yield Row(OPTION, f"{name} closed", command, lambda place, arguments=arguments, closed=closed: Call(
                arguments(place), closed=closed), EITHER if name != "stderr" else (0,), ("stdout", "output"))  # fmt: skip
        yield Row(OPTION, "full device", command, lambda place, arguments=arguments: Call(arguments(place), closed=(-1,)),
                  EITHER, ("output", "No space", "stdout"))  # fmt: skip
