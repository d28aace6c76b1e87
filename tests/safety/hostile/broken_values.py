"""Entries of a good checkpoint, each replaced by values of other kinds or taken out."""

import copy
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import torch

from hostile.descriptions import MODULE
from hostile.rows import EITHER, Place, Row, use

KIND = "broken value"
LAYER = "model.model.layers.0.self_attn.q_proj"
MISSING = object()
VALUES = {
    "none": None, "-1": -1, "2^70": 1 << 70, "text": "x", "bytes": b"x", "list": [], "dictionary": {}, "true": True,
    "tensor": torch.zeros(2), "meta tensor": torch.empty(3, device="meta"), "nan": float("nan"),
    "nested": [[[1], {}]], "missing": MISSING, "escape": "\x1b]0;owned\x07\x1b[2J\u202e\r\n",
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
    """Every entry with every value or with a part of them, then the whole of it."""
    some = cycle(VALUES)
    for key, (needed, other) in ENTRIES.items():
        commands = cycle([*((c, (2,)) for c in needed), *((c, EITHER) for c in other)])
        for name in VALUES if key in EVERY else dict.fromkeys(next(some) for _ in range(5)):
            command, codes = next(commands)
            if (key, name) in (
                ("state_dict " + LAYER + ".merge_count", "-1"),
                ("optimizer_states 0 state", "dictionary"),
            ):
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
