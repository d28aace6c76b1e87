"""The part of a module that trains: the loss of a micro-batch, the gradient of an optimizer step, and clipping."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from orthotrain.callbacks.throughput import logs_at
from orthotrain.devices.accelerators import peak_bytes
from orthotrain.devices.host_reads import host_number, read_waits
from orthotrain.layers.sharding import whole
from orthotrain.modules.attached_callbacks import clip_after_merges
from orthotrain.modules.evaluation import EvaluatedModule
from orthotrain.modules.micro_step import MicroStep
from orthotrain.modules.optimization import ROTATIONS, Optimization
from orthotrain.modules.target_mean import TargetMean, count_of


class TrainedModule(EvaluatedModule):
    """A LightningModule whose optimizer steps follow the mean loss over all targets of all micro-batches and ranks.

    Attributes:
        micro_step: Computes the loss of a training batch.
        optimization: Learning rates, optimizer, schedule and clipping.
        target_mean: Weighs the micro-batches of an optimizer step.
    """

    micro_step: MicroStep
    optimization: Optimization

    def __init__(self) -> None:
        super().__init__()
        self.target_mean = TargetMean()

    @property
    def learning_rate(self) -> float:
        """The rate of all parameters, ``optimization.lr``; Lightning's ``LearningRateFinder`` sets this attribute."""
        return self.optimization.lr

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        self.optimization = replace(self.optimization, lr=rate, rotation_lr=None, rotation_lr_scale=1.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch, and note its number of targets, by which :meth:`backward` weighs it.

        A subclass that computes its loss here, without this method, keeps Lightning's mean: every micro-batch and every
        rank counts the same, and a last window with fewer micro-batches is divided by the number of a full one.
        """
        loss = self.micro_step.loss(self, batch)
        if self.target_mean.applies(self):
            return self.target_mean.note(loss, count_of(self.targets(batch), loss))
        self._log_train_loss(loss)
        return loss

    def _log_train_loss(self, loss: Tensor) -> None:
        # Lightning reads the values of its progress bar at every step, for which the host would wait on a device
        self.log("train_loss", loss, prog_bar=not read_waits(self.device))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass of a micro-batch, so that the step gets the gradient of the mean over its targets."""
        run = super().backward
        self.target_mean.backward(loss, self, lambda weighed: run(weighed, *args, **kwargs))

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear the gradients; their memory is kept if CUDA graphs add to it."""
        self.micro_step.check_ran(self)
        self.target_mean.forget()
        optimizer.zero_grad(set_to_none=not self.micro_step.keeps_gradients)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step with the gradient of the mean over all targets, which callbacks and clipping see too."""

        def closure() -> Any:
            assert optimizer_closure is not None
            output = optimizer_closure()
            self.target_mean.finish(self)
            return output

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the gradients' norm before clipping, rates and memory, and the loss of several micro-batches or ranks."""
        if (loss := self.target_mean.take_loss()) is not None:
            self._log_train_loss(loss)
        if logs_at(self.trainer, self.trainer.global_step + 1):
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.log("grad_norm", whole(torch.nn.utils.get_total_norm(gradients)))
            values = rates_of(optimizer, self.optimization.lr)
            if (peak := peak_bytes(self.device)) is not None:
                values["peak_memory_gib"] = peak / 2**30
            self.log_dict({name: host_number(value) for name, value in values.items()}, rank_zero_only=True)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip as the trainer does, more tightly after a merge if ``optimization.clip_ramp`` is set.

        Raises:
            ConfigurationError: If there is a ramp, and no bound that it could scale or nothing that merges.
        """
        ramp = self.optimization.clip_ramp
        if ramp is None:
            return self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        clip_after_merges(self.trainer, optimizer, ramp, gradient_clip_val, gradient_clip_algorithm)


def rates_of(optimizer: Optimizer, base: float) -> dict[str, float]:
    """Return the present learning rates: ``lr``, and ``rotation_lr`` if the generators have another one.

    Args:
        optimizer: The optimizer.
        base: The rate before a schedule, ``optimization.lr``. A group of ``lr_overrides`` has another one.
    """
    named = [(str(group.get("name", "")), group) for group in optimizer.param_groups]
    rotations = [group for name, group in named if name.startswith(ROTATIONS)]
    others = [group for name, group in named if not name.startswith(ROTATIONS)] or rotations
    usual = next((group for group in others if group.get("initial_lr", group["lr"]) == base), others[0])
    rates = {"lr": float(usual["lr"])}
    if rotations and float(rotations[0]["lr"]) != rates["lr"]:
        rates["rotation_lr"] = float(rotations[0]["lr"])
    return rates
