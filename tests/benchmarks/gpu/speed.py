"""Stage 5: tokens a second and peak memory of a 1.3B LLaMA in bf16, each method for ten steps."""

import math
import os
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gpu.device import Gpu
from gpu.recipes import Recipe, methods, trained
from gpu.record import Case
from gpu.training import step_of
from orthotrain.layers.folding import merge_rotations
from orthotrain.layers.protocols import mergeable_layers
from orthotrain.modules import BaseModule

ROWS, LENGTH = 32, 256
WARM_UP, STEPS = 3, 10
COMPILED = ("default", "reduce-overhead")
"""Modes of torch.compile, which takes tens of seconds to compile a network of this size."""


def cases(machine: Gpu) -> Iterator[Case]:
    """Yield the methods in a plain loop, then some with the trainer and all of its callbacks."""
    for name, recipe in methods(machine).items():
        yield Case(name, partial(in_loop, machine, recipe), machine.pick(6.0, 0.0))
    for name, recipe in trained(machine).items():
        seconds = 40.0 if name.endswith(COMPILED) else 8.0
        yield Case(name, partial(in_trainer, machine, recipe), machine.pick(seconds, 0.0))


def built(machine: Gpu, recipe: Recipe) -> tuple[BaseModule, float]:
    """Return a module with its network built on the device in bf16, as the trainer does, and the seconds it took."""
    start, before = time.perf_counter(), torch.get_default_dtype()
    module = recipe()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(machine.device):
            module.configure_model()
    finally:
        torch.set_default_dtype(before)
    module.to(machine.device)
    machine.synchronize()
    return module, time.perf_counter() - start


def batches(machine: Gpu, vocabulary: int, rows: int, length: int, count: int = 4) -> list[dict[str, Tensor]]:
    """Return batches of random tokens on the device."""
    ids = torch.randint(0, vocabulary, (count, rows, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": one, "labels": one.roll(-1, 1)} for one in ids.to(machine.device)]


def vocabulary_of(module: BaseModule) -> int:
    """Return the rows of the embedding of a built network."""
    assert module.model is not None
    return module.model.get_input_embeddings().num_embeddings  # type: ignore[operator]


def in_loop(machine: Gpu, recipe: Recipe) -> dict[str, Any]:
    """Return tokens a second of forward, backward, clipping, optimizer and step-wise fold, and the time of a merge."""
    machine.reset_peak()
    module, build_s = built(machine, recipe)
    made = machine.peak()["peak_gib"]
    rows, length = machine.pick((ROWS, LENGTH), (2, 16))
    step, optimizer = step_of(module, batches(machine, vocabulary_of(module), rows, length))
    for _ in range(machine.pick(WARM_UP, 1)):
        step()
    machine.reset_peak()
    start = time.perf_counter()
    for _ in range(steps := machine.pick(STEPS, 2)):
        loss = step()
    host = time.perf_counter() - start
    machine.synchronize()
    taken = (time.perf_counter() - start) / steps
    found = {"tokens_per_s": rows * length / taken, "step_ms": 1e3 * taken, "host_ms": 1e3 * host / steps}
    found |= {**machine.peak(), "build_s": build_s, "build_peak_gib": made, "loss": finite(loss)}
    layers = dict(mergeable_layers(module))
    if layers:
        found["merge_ms"] = machine.timed(lambda: merge_rotations(layers, [optimizer])).device
    return found


def finite(loss: Tensor) -> float:
    """Return a loss as a number.

    Raises:
        FloatingPointError: The loss is not finite. The speed of such a run means nothing.
    """
    value = float(loss)
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value}")
    return value


class StepClock(L.Callback):
    """Notes when the steps that count begin and end."""

    def __init__(self, machine: Gpu, warm_up: int) -> None:
        self.machine, self.warm_up = machine, warm_up
        self.start = self.seconds = 0.0
        self.loss = torch.zeros(())

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin after the warm-up."""
        if batch_idx == self.warm_up:
            self.machine.reset_peak()
            self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End with the last step."""
        if batch_idx == trainer.max_steps - 1:
            self.machine.synchronize()
            self.seconds, self.loss = time.perf_counter() - self.start, outputs["loss"]


def in_trainer(machine: Gpu, recipe: Recipe) -> dict[str, Any]:
    """Return tokens a second of the same steps by Lightning's trainer, with the callbacks that modules bring."""
    module, (rows, length) = recipe(), machine.pick((ROWS, LENGTH), (2, 16))
    warm_up, steps = machine.pick((WARM_UP + 2, STEPS), (1, 2))
    clock = StepClock(machine, warm_up)
    trainer = L.Trainer(
        accelerator=machine.accelerator,
        devices=1,
        precision="bf16-true",
        max_steps=warm_up + steps,
        default_root_dir=os.environ["ORTHOTRAIN_GPU_SCRATCH"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        gradient_clip_val=1.0,
        callbacks=[clock],
    )
    vocabulary = module._builder.vocab_size  # type: ignore[union-attr]
    rows_of_tokens = torch.randint(0, vocabulary, (rows * trainer.max_steps, length))
    data = [{"input_ids": ids, "labels": ids.roll(-1)} for ids in rows_of_tokens]
    trainer.fit(module, DataLoader(data, batch_size=rows))  # type: ignore[arg-type]
    taken = clock.seconds / steps
    return {"tokens_per_s": rows * length / taken, "step_ms": 1e3 * taken, **machine.peak(), "loss": finite(clock.loss)}
