"""Compares the plan of a run with the memory of its device, and names options that lower the memory."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from orthotrain.cli.plan import GIB, Plan, batch_shape, plan_run
from orthotrain.console.failures import asked_for, is_out_of_memory
from orthotrain.devices.accelerators import total_bytes
from orthotrain.errors import ConfigurationError, DeviceMemoryExhausted
from orthotrain.models import CausalLM
from orthotrain.modules import BaseModule, OftLayers, PoetLayers
from orthotrain.modules.head_loss import HeadLoss


@dataclass
class Planned:
    """A run that can be planned: its module, before the network is built, and the shape of its batches."""

    module: BaseModule
    batch_size: int
    length: int
    precision: str

    @classmethod
    def of(cls, module: BaseModule, data: dict[str, Any], precision: Any) -> "Planned | None":
        """Return a run to plan; None if planning would load a network, or if the shape of its batches is not known.

        Args:
            module: The module of the run, its network not built.
            data: Arguments of the data module.
            precision: The trainer's ``precision``.
        """
        shape = batch_shape(data)
        if not isinstance(module._builder, CausalLM) or shape is None:
            return None
        return cls(copy.deepcopy(module), *shape, str(precision or "32-true"))

    def plan(self) -> Plan:
        """Count the bytes of the run without drawing a random number."""
        with torch.random.fork_rng([]):
            return plan_run(copy.deepcopy(self.module), self.batch_size, self.length, self.precision)

    def with_options(self, options: list["Option"]) -> "Planned":
        """Return the run with more options."""
        run = copy.deepcopy(self)
        for option in options:
            option.change(run)
        return run


@dataclass(frozen=True)
class Option:
    """An option that may lower the memory of a run.

    Args:
        text: The option on the command line.
        change: Applies the option to a run, in place.
        resumes: Whether a run can resume from its checkpoints with the option.
    """

    text: str
    change: Callable[[Planned], None]
    resumes: bool = True


def options_of(run: Planned) -> Iterator[Option]:
    """Yield the options that a run does not have yet."""
    module: Any = run.module
    layers = getattr(module, "layers", None)
    if run.batch_size > 1:  # a position in the data counts batches, so a run cannot resume with others
        yield Option("--data.batch_size 1", lambda run: setattr(run, "batch_size", 1), resumes=False)
    if module.head_loss.chunked is False:
        yield Option("--model.chunked_loss null", lambda run: setattr(run.module, "head_loss", HeadLoss()))
    if not module._builder.gradient_checkpointing:
        yield Option("--model.model.gradient_checkpointing true", _recompute)
    if isinstance(layers, PoetLayers) and not layers.stepwise:
        if layers.activation_mode == "fast":
            yield Option("--model.layers.activation_mode mem", _with_layers(activation_mode="mem"))
        for storage in {"int8": ("nf4",), "nf4": ()}.get(layers.storage, ("int8", "nf4")):
            yield Option(f"--model.layers.storage {storage}", _with_layers(storage=storage), resumes=False)
    if isinstance(layers, OftLayers) and layers.storage in (None, "dense"):
        for storage in ("int8", "nf4"):
            yield Option(f"--model.layers.storage {storage}", _with_layers(storage=storage), resumes=False)


def advice(run: Planned, within: int | None, resumes: bool | None = None) -> str:
    """Return one line with the planned memory of a run under each option that lowers it.

    Args:
        run: The run.
        within: Bytes of the device; None if they are not known.
        resumes: True for the options with which the run can resume, False for the other options, None for all.
    """
    options = [option for option in options_of(run) if resumes in (None, option.resumes)]
    before = run.plan().total_bytes
    found = {option.text: _total(run.with_options([option])) for option in options}
    lines = [f"{text} plans {held / GIB:.1f} GiB" for text, held in found.items() if held is not None and held < before]
    if within is not None and not any(held is not None and held <= within for held in found.values()):
        chosen = {option.text.split()[0]: option for option in options}  # of two storages the smaller one
        together = _total(run.with_options(list(chosen.values())))
        if together is not None and len(chosen) > 1:
            lines.append(f"{' '.join(option.text for option in chosen.values())} together {together / GIB:.1f} GiB")
    return ", ".join(lines) or "no option lowers that"


def check_fits(module: BaseModule, data: dict[str, Any], trainer: L.Trainer) -> Planned | None:
    """Refuse a run whose weights, gradients and optimizer state alone exceed the memory of its GPU.

    Activations are an estimate: a run that exceeds the memory only with them gets a warning and starts. The module
    keeps the planned bytes for the summary. A sharded run is not checked, because a plan is for one device.

    Args:
        module: The module of the run, its network not built.
        data: Arguments of the data module.
        trainer: The trainer, for its device and precision.

    Returns:
        The run to plan, None if it cannot be planned.

    Raises:
        ConfigurationError: The message has the plan, the memory, and options that lower the plan.
    """
    run, device = Planned.of(module, data, trainer.precision), trainer.strategy.root_device
    if run is None or device.type != "cuda" or isinstance(trainer.strategy, ModelParallelStrategy):
        return run
    plan, memory = run.plan(), total_bytes(device) or 0
    module.planned_bytes = plan.total_bytes
    if plan.least_bytes > memory:
        text = (
            f"this run is planned to take {plan.total_bytes / GIB:.1f} GiB, {plan.certain_bytes / GIB:.1f} without "
            f"activations, and {_name(device)} has {memory / GIB:.1f}: {advice(run, memory)}"
        )
        if plan.certain_bytes > memory:
            raise ConfigurationError(text)
        rank_zero_warn(text)
    return run


@contextmanager
def naming_memory(run: Planned | None, trainer: L.Trainer) -> Iterator[None]:
    """Name options that lower the memory, on rank 0, when the memory of a device runs out.

    Raises:
        DeviceMemoryExhausted: In place of PyTorch's error.
    """
    try:
        yield
    except Exception as error:
        if run is None or not is_out_of_memory(error) or not trainer.is_global_zero:
            raise
        device = trainer.strategy.root_device
        raise DeviceMemoryExhausted(
            f"the memory of {_name(device)} has run out after step {trainer.global_step} ({asked_for(error)}): the run "
            f"is planned to take {run.plan().total_bytes / GIB:.1f} GiB; the checkpoints are intact. To resume with "
            f"--ckpt_path last add: {advice(run, total_bytes(device), resumes=True)}; to start anew: "
            f"{advice(run, total_bytes(device), resumes=False)}"
        ) from error


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type}"


def _total(run: Planned) -> int | None:
    try:
        return run.plan().total_bytes
    except ConfigurationError:  # the option does not fit the network: no group of int8 divides a width
        return None


def _recompute(run: Any) -> None:
    run.module._builder.gradient_checkpointing = True


def _with_layers(**values: Any) -> Callable[[Any], None]:
    def change(run: Any) -> None:
        run.module.layers = dataclasses.replace(run.module.layers, **values)

    return change
