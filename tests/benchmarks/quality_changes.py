"""Changes of step-wise POET that tests/benchmarks/quality.py tries, and that are no options of the package."""

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from orthotrain.layers import StepwiseLinear
from orthotrain.modules import PoetModule
from orthotrain.optimizers import LieOptimizer


def scaled_input(layer: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
    """Multiply each input of a layer by its trained factor."""
    return (arguments[0] * layer.input_factors.to(arguments[0].dtype),)


def scaled_output(layer: nn.Module, arguments: Any, y: Tensor) -> Tensor:
    """Multiply each output of a layer by its trained factor."""
    return y * layer.output_factors.to(y.dtype)


class MoveSpectrum(L.Callback):
    """Move the singular values of each step-wise layer by one step of sign descent, every few steps.

    With ``W = U S V^T`` the derivative of the loss by the singular values is the diagonal of ``U^T (dL/dW) V``. Its
    moment (0.9) is divided by its root mean square, so that a step of rate r moves the singular values by r of their
    mean.

    Args:
        rate: Relative size of a step.
        every: Optimizer steps between steps.
    """

    def __init__(self, rate: float, every: int = 10) -> None:
        self.rate, self.every = rate, every
        self.moments: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.handles: list[Any] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, number: int) -> None:
        """Form dL/dW in this step, if it is one that moves the spectrum."""
        if trainer.global_step % self.every == 0:
            named = ((n, layer) for n, layer in pl_module.named_modules() if isinstance(layer, StepwiseLinear))
            self.handles = [layer.register_forward_hook(self._watch(name)) for name, layer in named]

    def _watch(self, name: str) -> Any:
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> None:
            x = arguments[0].detach().flatten(0, -2)

            def keep(dy: Tensor) -> None:
                self.gradients[name] = dy.flatten(0, -2).mT.float() @ x.float()

            if y.requires_grad:
                y.register_hook(keep)

        return hook

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Move the spectra after the rotations are folded."""
        rate = (
            self.rate
            * trainer.optimizers[0].param_groups[0]["lr"]
            / trainer.optimizers[0].param_groups[0]["initial_lr"]
        )
        for name, layer in pl_module.named_modules():
            if name not in self.gradients:
                continue
            left, values, right = torch.linalg.svd(layer.weight.dequantize(torch.float32), full_matrices=False)
            slope = ((left.mT @ self.gradients.pop(name)) * right).sum(1)
            moment = self.moments.setdefault(name, torch.zeros_like(slope)).lerp_(slope, 0.1)
            moved = values - rate * values.mean() * moment / moment.square().mean().sqrt().clamp_min(1e-30)
            layer.weight.assign_((left * moved.clamp_min(0.05 * values.mean())) @ right)
        for handle in self.handles:
            handle.remove()
        self.handles = []


class FrontLoaded(LieOptimizer):
    """LieOptimizer whose first steps are larger: by ``1 + front * exp(-10 t)`` at the share t of the run.

    Muon's steps are so: the first ones change small initial weights by a tenth, the last ones grown weights by less.

    Args:
        params: See :class:`LieOptimizer`.
        front: Factor of the first step, minus 1.
        steps: Steps of the run.
        options: See :class:`LieOptimizer`.
    """

    def __init__(self, params: Any, front: float, steps: int, **options: Any) -> None:
        super().__init__(params, **options)
        self.front, self.length = front, steps

    def step(self, closure: Any = None) -> Any:
        """Take a step with larger angles."""
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate * (1 + self.front * math.exp(-10 * group["steps"] / self.length))
        loss = super().step(closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        return loss


class ChangedPoet(PoetModule):
    """Step-wise POET with changes.

    Attributes:
        diagonal: Sides of each layer with a trained factor for each feature: ``out``, ``in`` or ``both``.
        moved: Rate of :class:`MoveSpectrum`, 0 for a spectrum that stays.
    """

    diagonal: str = ""
    moved: float = 0.0

    def wrap(self, model: nn.Module) -> None:
        """Add the trained factors."""
        super().wrap(model)
        for layer in model.modules():
            if isinstance(layer, StepwiseLinear) and self.diagonal in ("in", "both"):
                layer.input_factors = nn.Parameter(torch.ones(layer.in_features))
                layer.register_forward_pre_hook(scaled_input)
            if isinstance(layer, StepwiseLinear) and self.diagonal in ("out", "both"):
                layer.output_factors = nn.Parameter(torch.ones(layer.out_features))
                layer.register_forward_hook(scaled_output)

    def configure_callbacks(self) -> list[L.Callback]:
        """Attach what moves the spectrum."""
        return [*super().configure_callbacks(), *([MoveSpectrum(self.moved)] if self.moved else [])]
