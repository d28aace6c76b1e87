"""Which runs the grid of tests/benchmarks/quality.py trains: rounds that are chosen from the results before them.

Every method gets its rates first, then one change at a time of its best setting, from one list for all: the start, the
rate and the decay of the rest, the decay, the end of the schedule. The changes that helped are then taken together.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from quality_methods import Setting

Score = Callable[[Setting, int], float | None]
"""Bits per byte of a setting at a share of the full length, seed 0; None for a run that has not ended."""

UNIT = 0.088
"""Root mean square of the entries of a square weight of width 128 with rows of norm 1."""
RATES: dict[Setting, tuple[float, ...]] = {
    Setting("AdamW", 1e-3): (5e-4, 1e-3, 2e-3, 4e-3),
    Setting("Muon", 2e-2): (1e-2, 2e-2, 4e-2),
    Setting("Muon-Kimi", 4e-3): (2e-3, 4e-3, 8e-3, 1.6e-2),
    Setting("NorMuon", 4e-3): (4e-3, 8e-3, 1.6e-2),
    Setting("SOAP", 2e-3): (1e-3, 2e-3, 4e-3),
    Setting("GaLore", 2e-3): (1e-3, 2e-3, 4e-3),
    Setting("LoRA", 1e-3): (5e-4, 1e-3, 2e-3),
    Setting("POET-BS", 2e-3, spectrum="normalized", rms=UNIT): (1e-3, 2e-3, 4e-3),
    Setting("POET-FS", 2e-3, spectrum="normalized", rms=UNIT, options=(("fraction", 0.5),)): (1e-3, 2e-3),
    Setting("step-wise", 0.025, spectrum="normalized", rms=UNIT, block=128): (0.0125, 0.025, 0.05),
    Setting("Pion", 4e-3, spectrum="normalized", rms=UNIT, block=0): (2e-3, 4e-3, 8e-3),
}
"""First round: the first setting of each method, and its rates."""

STARTS = [{"spectrum": s, "rms": r} for s in ("gaussian", "normalized", "flat") for r in (0.02, 0.044, UNIT, 0.13)]
RESTS = (2e-3, 8e-3, 1.6e-2, 3.2e-2)
OTHER_RESTS = [{"rest": rate} for rate in RESTS[1:]]
TRAINED = [
    *({"rest": rate} for rate in RESTS),
    *({"decay": decay, "rest_decay": decay} for decay in (0.0, 0.1)),
    {"floor": 0.1},
    *(start for start in STARTS if start["rms"] in (0.044, UNIT) and start != STARTS[5]),
]
ROTATED = [
    *({"rest": rate} for rate in RESTS),
    *({"rest_decay": decay} for decay in (0.0, 0.1)),
    {"floor": 0.1},
    *(start for start in STARTS if start["rms"] in (UNIT, 0.13)),
    {"spectrum": "normalized", "rms": 0.044},
    {"scale": True},
]
CHANGES: dict[str, list[dict[str, Any]]] = {
    "AdamW": TRAINED,
    "Muon": TRAINED,
    "Muon-Kimi": TRAINED,
    "NorMuon": [
        *OTHER_RESTS,
        {"decay": 0.1, "rest_decay": 0.1},
        {"spectrum": "normalized", "rms": UNIT},
    ],
    "POET-BS": [
        *OTHER_RESTS,
        {"spectrum": "gaussian", "rms": UNIT},
        {"spectrum": "flat", "rms": UNIT},
        {"block": 0},
    ],
    **{method: OTHER_RESTS for method in ("SOAP", "LoRA", "GaLore", "Pion")},
    "step-wise": [*ROTATED, {"block": 64}, {"block": 0}],
}
"""Second round: changes of the best setting of each method. Of the two rules of Muon only the better one."""

MUONS = ("Muon", "Muon-Kimi")
FURTHER = 3
"""How often the rates of a method are extended by a factor of 2 where the best one is the first or the last."""
NOISE = 0.003
"""Bits per byte by which a change has to help before it is taken together with others."""


def rates(score: Score) -> list[Setting]:
    """Return the settings of the first round: the rates of each method, until the best one lies between others."""
    return [replace(setting, lr=rate) for setting in RATES for rate in between(setting, score)]


def between(setting: Setting, score: Score) -> list[float]:
    """Return the rates of a setting: those of :data:`RATES`, and beyond the best one as far as there are results."""
    found = sorted(RATES[setting])
    for _ in range(FURTHER):
        scores = {rate: score(replace(setting, lr=rate), 8) for rate in found}
        if None in scores.values():
            break
        best_rate = min(found, key=lambda rate: scores[rate] or 0)
        if best_rate == found[0]:
            found.insert(0, best_rate / 2)
        elif best_rate == found[-1]:
            found.append(best_rate * 2)
    return found


def best(settings: Iterable[Setting], score: Score, share: int, methods: tuple[str, ...]) -> Setting:
    """Return the best setting of some methods."""
    return min((s for s in settings if s.method in methods), key=lambda s: score(s, share) or float("inf"))


def changes(score: Score) -> list[Setting]:
    """Return the settings of the second round."""
    muon = best(rates(score), score, 8, MUONS).method
    changed = [method for method in CHANGES if method not in MUONS or method == muon]
    bases = {method: best(rates(score), score, 8, (method,)) for method in changed}
    found = [replace(base, **change) for method, base in bases.items() for change in CHANGES[method]]
    return list(dict.fromkeys(setting for setting in found if setting not in bases.values()))


def together(base: Setting, score: Score, share: int) -> Setting:
    """Return a setting with all changes that helped by more than the noise; of changes of one kind the best."""
    chosen: dict[tuple[str, ...], tuple[float, dict[str, Any]]] = {}
    for change in CHANGES.get(base.method, []):
        kind = tuple(sorted({"decay": "rest_decay", "rms": "spectrum"}.get(name, name) for name in change))
        gain = (score(base, share) or 0) - (score(replace(base, **change), share) or float("inf"))
        if gain > max(NOISE, chosen.get(kind, (0.0, {}))[0]):
            chosen[kind] = gain, change
    return replace(base, **{name: value for _, change in chosen.values() for name, value in change.items()})


def quarter(score: Score) -> list[Setting]:
    """Return the settings of the third round."""
    bases = {method: best(rates(score), score, 8, (method,)) for method in ("AdamW", "NorMuon", "POET-BS", "step-wise")}
    bases["Muon"] = best(rates(score), score, 8, MUONS)
    joined = [together(base, score, 8) for base in bases.values()]
    slower = [replace(setting, lr=setting.lr / 2) for setting in joined]
    wider = [replace(joined[3], lr=joined[3].lr / 1.4), replace(joined[4], decay=0.1, rest_decay=0.1)]
    others = [best(rates(score), score, 8, (method,)) for method in ("SOAP", "LoRA", "GaLore", "Pion")]
    return list(dict.fromkeys([*joined, *slower, *wider, *(together(base, score, 8) for base in others)]))


def half(score: Score) -> list[Setting]:
    """Return the settings of the fourth round: two of step-wise POET, one of each strong rival."""
    tried = quarter(score)
    first = best(tried, score, 4, ("step-wise",))
    second = best([s for s in tried if s != first], score, 4, ("step-wise",))
    rivals = [best(tried, score, 4, methods) for methods in (("AdamW",), MUONS, ("NorMuon", "SOAP"), ("POET-BS",))]
    return [first, second, *rivals]


def full(score: Score) -> list[Setting]:
    """Return the settings of the last round: the best of each method."""
    tried = quarter(score)
    strong = [best(half(score), score, 2, ("step-wise",))]
    methods = (("AdamW",), MUONS, ("NorMuon",), ("SOAP",), ("POET-BS",), ("LoRA",), ("GaLore",), ("Pion",))
    return [*strong, *(best(tried, score, 4, each) for each in methods)]


IMPROVEMENTS: list[dict[str, Any]] = [
    {"spectrum": "power-0.5"},
    {"residual": 0.5},
    *({"options": (("front", factor),)} for factor in (1.0, 3.0)),
    *({"options": ((name, value),)} for name, value in (
        ("diagonal", "both"), ("moved", 1e-2), ("momentum", 0.9), ("momentum", 0.98), ("alternate", False),
        ("resample_every", 1000),
    )),
    {"rms": 0.044, "options": (("moved", 3e-2),)},
    {"spectrum": "power-0.5", "rms": 0.044},
]  # fmt: skip
"""Changes of step-wise POET beside those that all methods get."""


IMPROVED = Setting(
    "step-wise", 0.05 / 1.4, rest=8e-3, floor=0.1, spectrum="normalized", rms=UNIT, block=128, scale=True
)
"""The setting of step-wise POET that the improvements change, one at a time: the best at a quarter of the length."""


def improved() -> list[Setting]:
    """Return the setting of step-wise POET, and the same with one change each."""
    return [IMPROVED, *(replace(IMPROVED, **change) for change in IMPROVEMENTS)]
