"""Stage 6: an 8B LLaMA with POET in the memory of smaller cards: whether it fits, its peak, seconds a step."""

import importlib.util
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from gpu.device import Gpu
from gpu.recipes import network, offered, poet, rates, shipped
from gpu.record import Case
from gpu.speed import batches, built, finite, vocabulary_of
from gpu.training import step_of
from orthotrain.cli.plan import plan_run
from orthotrain.modules import BaseModule, PoetModule

CONFIG = "paper/poet_llama_8b.yaml"
ROWS, LENGTH, WARM_UP, STEPS = 1, 1024, 1, 3


class Fit(NamedTuple):
    """A storage of the weights, the GiB of a card, and more arguments of the module."""

    storage: str
    gib: int
    extra: dict[str, Any] = {}  # noqa: RUF012  (a constant)


FITS = {
    "bf16 in 24 GiB": Fit("dense", 24),
    "int8 in 18 GiB": Fit("int8", 18),
    "nf4 in 14 GiB": Fit("nf4", 14),
}


def cases(machine: Gpu) -> Iterator[Case]:
    """Yield the storages; where modules offer it, the same with a loss of whole logits; and what is planned."""
    chosen = dict(FITS)
    if offered(PoetModule, "chunked_loss"):
        chosen |= {f"{name}, whole logits": fit._replace(extra={"chunked_loss": False}) for name, fit in FITS.items()}
    for name, fit in chosen.items():
        yield Case(name, partial(trained, machine, fit), machine.pick(12.0, 0.0))
    for name, fit in FITS.items():
        yield Case(f"plan of {name}", partial(planned, machine, fit), machine.pick(10.0, 0.0))


def recipe(machine: Gpu, fit: Fit) -> BaseModule:
    """Return the module of the shipped config: blocks of 256, recomputed activations, AdamW in 8 bits."""
    build = network(machine, CONFIG, gradient_checkpointing=shipped(CONFIG)["gradient_checkpointing"])
    optimization = rates(optimizer=optimizer_factory())
    return poet(machine, build, optimization, fit.extra, activation_mode="mem", storage=fit.storage)


def optimizer_factory() -> Callable[..., torch.optim.Optimizer]:
    """Return AdamW in 8 bits where bitsandbytes is installed, else torch's."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return partial(torch.optim.AdamW, foreach=False)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit


def trained(machine: Gpu, fit: Fit) -> dict[str, Any]:
    """Return memory and time of a few steps, and whether they fit into the memory of a smaller card.

    The network is built without the bound; the peak of building is a result of its own.
    """
    machine.reset_peak()
    module, build_s = built(machine, partial(recipe, machine, fit))
    found: dict[str, Any] = {"build_s": build_s, "build_peak_gib": machine.peak()["peak_gib"], "limit_gib": fit.gib}
    found["optimizer"] = optimizer_name()
    rows, length = machine.pick((ROWS, LENGTH), (1, 16))
    data = batches(machine, vocabulary_of(module), rows, length, 1)
    step, optimizer = step_of(module, data)
    found["fits"] = fits(machine, step, fit.gib)
    if not found["fits"]:  # with a new optimizer: the state of the first may be half made
        module.zero_grad()
        step, optimizer = step_of(module, data)
        machine.release()
    for _ in range(machine.pick(WARM_UP, 1)):
        step()
    machine.reset_peak()
    start = time.perf_counter()
    for _ in range(steps := machine.pick(STEPS, 1)):
        loss = step()
    machine.synchronize()
    return {**found, "step_s": (time.perf_counter() - start) / steps, **machine.peak(), "loss": finite(loss)}


def optimizer_name() -> str:
    """Return what :func:`optimizer_factory` builds."""
    return "AdamW" if importlib.util.find_spec("bitsandbytes") is None else "AdamW8bit"


def fits(machine: Gpu, step: Callable[[], Any], gib: int) -> bool:
    """Tell whether two steps fit: the first one makes the optimizer's state, the second has all at once."""
    try:
        with machine.within(gib):
            step()
            step()
            machine.synchronize()
    except torch.OutOfMemoryError:
        return False
    return True


def planned(machine: Gpu, fit: Fit) -> dict[str, Any]:
    """Return the memory that `orthotrain plan` predicts for the same run, computed on the CPU."""
    rows, length = machine.pick((ROWS, LENGTH), (1, 16))
    plan = plan_run(recipe(machine, fit), rows, length, "bf16-true")
    return {"planned_gib": plan.total_bytes / 2**30, "entries": {e.category: e.bytes for e in plan.entries}}
