"""The gradient of an optimizer step as that of the mean loss over all its targets, over micro-batches and ranks."""

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from orthotrain.errors import ConfigurationError
from orthotrain.metrics import count_labels


class TargetMean:
    """Weighs the micro-batches of an optimizer step by their numbers of targets.

    Lightning averages the losses of micro-batches, and DDP and FSDP average the gradients of ranks, as if all had the
    same number of targets. With masked or unequal rows the result is a mean of means. Here the loss of micro-batch i,
    a mean over ``n_i`` targets, is multiplied by ``n_i / u`` before its backward pass. The unit u is the mean number of
    targets of the step's first micro-batch over all ranks. After the last backward pass the gradients are multiplied
    by the number that makes them the gradient of ``sum_i n_i loss_i / sum_i n_i``. This number counts the micro-batches
    that a short last window lacks. Both factors are exactly 1 where all numbers are equal.

    The numbers stay on the device. Several ranks reduce eight bytes before the first backward pass of a step, and
    eight bytes after its last one if it accumulates. A run on one rank that does not accumulate does nothing here.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, Tensor] | None = None  # targets and loss whose backward pass is next
        self._begin()

    def _begin(self) -> None:
        self._unit: Tensor | None = None
        self._sums: Tensor | None = None
        self._total: Tensor | None = None  # the sums over all ranks, while the step has one micro-batch
        self._loss: Tensor | None = None

    def __reduce__(self) -> tuple:
        return TargetMean, ()  # the numbers belong to one run

    @staticmethod
    def applies(module: L.LightningModule) -> bool:
        """Tell whether the steps of a module's run have several micro-batches or ranks whose gradients can be weighed.

        DeepSpeed calls backward itself, and keeps its mean of means.
        """
        trainer = module._trainer
        if trainer is None:
            return False
        several = trainer.accumulate_grad_batches > 1 or trainer.world_size > 1
        return several and module.automatic_optimization and not isinstance(trainer.strategy, DeepSpeedStrategy)

    def note(self, loss: Tensor, targets: Tensor) -> Tensor:
        """Keep the number of targets of a micro-batch for its backward pass.

        Args:
            loss: The mean loss of the micro-batch.
            targets: Over how many targets it is the mean, a scalar on the device of the loss.

        Returns:
            The loss; 0 without a gradient in place of the NaN of a micro-batch without targets.
        """
        loss = torch.where(targets > 0, loss, torch.zeros_like(loss))
        self._pending = targets.float(), loss.detach().sum().float()
        return loss

    def backward(self, loss: Tensor, module: L.LightningModule, run: Callable[[Tensor], None]) -> None:
        """Run the backward pass of a micro-batch with its weight.

        Args:
            loss: The loss of the micro-batch as Lightning gives it, divided and scaled.
            module: The module whose gradients are computed.
            run: Runs the backward pass of a loss.
        """
        if self._pending is None:  # a training_step that has not noted its targets keeps Lightning's mean
            return run(loss)
        (targets, value), self._pending = self._pending, None
        own, ranks = torch.stack([targets, targets * value]), module.trainer.world_size
        if self._sums is None or self._unit is None:
            self._total = over_ranks(own, ranks)
            self._unit, self._sums = self._total[0].clamp_min(1) / ranks, own
        else:
            self._total, self._sums = None, self._sums + own
        run(loss * (targets / self._unit))

    def finish(self, module: L.LightningModule) -> None:
        """Correct the gradients of a step after its last micro-batch, which may have had no loss.

        Args:
            module: The module whose gradients were computed.
        """
        if self._sums is None or self._unit is None:
            return
        ranks, parts = module.trainer.world_size, module.trainer.accumulate_grad_batches
        total, unit = self._total if self._total is not None else over_ranks(self._sums, ranks), self._unit
        self._begin()
        count = total[0].clamp_min(1)  # without any target, the gradient and the loss are 0
        self._loss = total[1] / count
        if parts > 1:
            scale_gradients(module.parameters(), ranks * parts * unit / count)

    def forget(self) -> None:
        """Forget the micro-batches of a step that was not finished."""
        self._begin()

    def take_loss(self) -> Tensor | None:
        """Return the mean loss over all targets of the finished step, once; None if no targets were noted."""
        loss, self._loss = self._loss, None
        return loss


def count_of(labels: Any, loss: Tensor) -> Tensor:
    """Return the number of labels that count, or 1 if there are none, as a scalar on the device of the loss.

    Raises:
        ConfigurationError: For a mask or a number in place of labels.
    """
    if isinstance(labels, int | float) or (isinstance(labels, Tensor) and labels.dtype == torch.bool):
        raise ConfigurationError(
            "targets() of the module returned a mask or a number: return the labels, with -100 where none counts"
        )
    if isinstance(labels, Tensor):
        return count_labels(labels).to(loss.device, non_blocking=True)
    return torch.ones((), device=loss.device)


def over_ranks(values: Tensor, ranks: int) -> Tensor:
    """Return the sum of a tensor over all ranks, which all call this at the same point."""
    if ranks == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply all gradients by a scalar of their device, in place; of a sharded gradient this rank's part."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    torch._foreach_mul_([part for part in parts if not part.is_sparse], factor)
    for part in parts:
        if part.is_sparse:
            part.mul_(factor)
