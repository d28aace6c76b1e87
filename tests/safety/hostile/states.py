"""Tensors and progress in a checkpoint that are of other kinds than the run has."""

import copy
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import torch

from hostile.broken_values import LAYER
from hostile.rows import EITHER, Row, use

KIND = "state"


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


def _without_moments(contents: dict[str, Any]) -> None:
    for entry in contents["optimizer_states"][0]["state"].values():
        del entry["exp_avg"]


def _loader(**entries: Any) -> Any:
    return lambda contents: contents["loops"]["fit_loop"]["state_dict"]["combined_loader"][0].update(entries)


def _set(**entries: Any) -> Any:
    return lambda contents: contents.update(entries)


NAN = float("nan")
STATES = {
    "permutation repeats": _permutation(lambda p: _put(p, int(p[1]))),
    "permutation out of range": _permutation(lambda p: _put(p, 32)),
    "permutation far out": _permutation(lambda p: _put(p, 1 << 40)),
    "permutation negative": _permutation(lambda p: _put(p, -1)),
    "permutation of floats": _permutation(lambda p: p.float() + 0.5),
    "permutation of NaN": _permutation(lambda p: p.float() * NAN),
    "permutation of bytes": _permutation(lambda p: p.to(torch.uint8).fill_(3)),
    "permutation short": _permutation(lambda p: p[:-1]), "permutation of rows": _permutation(lambda p: p[None]),
    "permutation complex": _permutation(lambda p: p.to(torch.complex64)),
    "all NaN": _every(lambda t: t * NAN if t.is_floating_point() else t),
    "all infinite": _every(lambda t: t.fill_(float("inf")) if t.is_floating_point() else t),
    "other shapes": _every(lambda t: t[None]), "text": _every(lambda t: "x"), "numbers": _every(lambda t: 1.0),
    "halves": _every(lambda t: t[: len(t) // 2] if t.ndim else t),
    "complex": _every(lambda t: t.to(torch.complex64)), "meta": _every(lambda t: t.to("meta")),
    "sparse": _every(lambda t: t.to_sparse() if t.ndim else t),
    "quantized": _every(lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)),
    "parameters": _every(lambda t: torch.nn.Parameter(t.float())),
    "names with escapes": lambda contents: contents["state_dict"].update({"\x1b]0;owned\x07\x1b[2J": torch.zeros(1)}),
    "names of numbers": lambda contents: contents["state_dict"].update({7: torch.zeros(1)}),
}  # fmt: skip
RESUMED = {
    "moments of other shapes": _moments(lambda t: t[None]), "moments of text": _moments(lambda t: "x"),
    "moments of NaN": _moments(lambda t: t * NAN), "moments missing": _without_moments,
    "moments of integers": _moments(lambda t: t.long()), "moments meta": _moments(lambda t: t.to("meta")),
    "moments of no parameter": lambda contents: contents["optimizer_states"][0]["state"].update({9999: {"step": 1}}),
    "two optimizers": lambda contents: contents["optimizer_states"].append({"state": {}, "param_groups": []}),
    "no optimizer": _set(optimizer_states=[]), "no schedule": _set(lr_schedulers=[]),
    "two schedules": lambda contents: contents["lr_schedulers"].append({}),
    "step beyond the end": _set(global_step=10**9), "negative step": _set(global_step=-5, epoch=-1),
    "old version": _set(**{"pytorch-lightning_version": "0.0.1"}),
    "version of words": _set(**{"pytorch-lightning_version": "latest; rm -rf /"}),
    "new version": _set(**{"pytorch-lightning_version": "999.0"}),
    "ranks 0": _loader(num_replicas=0), "ranks of text": _loader(num_replicas="x"),
    "batches 2^62": _loader(batches=1 << 62), "loader of another kind": _loader(_workers=3, batches=None),
    "base rates short": lambda contents: contents["lr_schedulers"][0].update(base_lrs=[]),
    "warm-up of text": lambda contents: contents["lr_schedulers"][0].update(warmup_steps="x"),
    "schedule with a method": lambda contents: contents["lr_schedulers"][0].update(step="x", optimizer="y"),
    "merges 2^70": lambda contents: contents["callbacks"]["MergeRotations"].update(merges=1 << 70),
    "callback of nobody": lambda contents: contents["callbacks"].update(Nobody={"a": 1}),
    "frozen fingerprints": _set(frozen_fingerprints={"a": 1}),
    "frozen dtype": _set(frozen_fingerprints={"model.lm_head.weight": ["torch.hub", 1]}),
    "rates NaN": lambda contents: [group.update(lr=NAN) for group in contents["optimizer_states"][0]["param_groups"]],
}  # fmt: skip
HARMLESS = (
    "parameters", "sparse", "quantized", "complex", "old version", "new version", "version of words", "negative step",
    "step beyond the end", "callback of nobody", "moments of no parameter", "moments of integers", "merges 2^70",
    "loader of another kind", "batches 2^62",
)  # fmt: skip
"""What may be refused, or be taken as it is meant."""


def rows() -> Iterator[Row]:
    """Tensors and progress of other kinds than the run has."""
    turns = cycle(("export", "validate", "fit", "checkpoint_model"))
    for name, change in [*STATES.items(), *RESUMED.items()]:
        for command in ("fit",) if name in RESUMED else dict.fromkeys((next(turns), next(turns))):

            def make(place, change=change, command=command):
                contents = copy.deepcopy(place.contents())
                change(contents)
                return use(command, place, place.save(contents))

            codes = EITHER if name in HARMLESS else (1, 2) if "NaN" in name or "infinite" in name else (2,)
            yield Row(KIND, name, command, make, codes, ("bad", "the checkpoint", "finite", "NaN"))
