"""The POET layer whose rotations are folded after every step: its forward pass is a plain product."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from orthotrain.errors import ConfigurationError
from orthotrain.kernels.operation import without_autocast
from orthotrain.kernels.tangent import tangent, tangent_linear, tangent_output
from orthotrain.layers.poet.cost_tables import costs_for
from orthotrain.layers.poet.poet_settings import TOO_COARSE
from orthotrain.layers.poet.two_sided import TwoSided
from orthotrain.layers.weights.bf16_weight import Bf16Weight
from orthotrain.layers.weights.frozen_weight import DenseWeight


class StepwiseLinear(TwoSided):
    """``y = x @ W.T + bias`` with trained rotations of W that are the identity in every forward pass.

    ``W_eff = s R_out^T W R_in^T`` as in :class:`PoetLinear`, but each step of the optimizer is folded at once
    (``MergeRotations(every_n_steps=1)``). So R = I between steps, and only the gradient at the identity is needed
    (kernels/tangent/README.md). The frozen weight is stored in the natural order. The permutations say which features
    share a block, until a merge draws the next ones.

    Args:
        weight: The frozen weight ``(out, in)`` in the natural order.
        bias: ``(out,)`` trained bias, or None.
        rotations: See :class:`TwoSided`.
        settings: The settings of the layer. ``route: input`` forms the gradient from activations, ``weight`` from
            dL/dW, ``auto`` takes the cheaper one by the table of costs. From dL/dW, a weight that is not dense is
            unpacked once and kept until backward; a bf16 weight in 16 bits is not copied.
        seed: See :class:`TwoSided`.

    Example:
        >>> layer = StepwiseLinear.from_linear(torch.nn.Linear(64, 32), block_size=16)
        >>> layer(torch.ones(2, 64)).sum().backward()
        >>> layer.rotation_in.generators.grad.shape
        torch.Size([4, 120])
    """

    stepwise = True

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``; under autocast in its dtype, like nn.Linear."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not torch.is_grad_enabled():  # whether training or not: like any layer, it has gradients in both modes
            y = self._scaled(self.weight.matmul(x))
        elif self._route_for(x) == "weight":
            y = self._through_weight(x)
        else:
            y = self._through_activations(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _through_activations(self, x: Tensor) -> Tensor:
        out, into, log_scale = self.rotation_out, self.rotation_in, None if self.scale is None else self.scale.log
        tapped = x if into is None else tangent(x, into.generators, into.permutation, into.block_size)
        y = self.weight.matmul(tapped)
        if out is None:
            return y if log_scale is None else tangent_output(y, x, None, None, 0, log_scale, self._product)
        return tangent_output(y, x, out.generators, out.permutation, out.block_size, log_scale, self._product)

    def _product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.dequantize(x.dtype))

    def _through_weight(self, x: Tensor) -> Tensor:
        out, into = self.rotation_out, self.rotation_in
        # a dense weight is cast for each product, so that backward keeps the parameter itself and no copy of it
        dtype = None if isinstance(self.weight, DenseWeight) else x.dtype
        with without_autocast(x.device.type):
            return tangent_linear(
                x,
                self.weight.dequantize(dtype),
                None if out is None else out.generators,
                None if into is None else into.generators,
                *self.rotations.permutations,
                (0 if out is None else out.block_size, 0 if into is None else into.block_size),
                None if self.scale is None else self.scale.log,
            )

    def _route_for(self, x: Tensor) -> Literal["input", "weight"]:
        if self.route != "auto":
            return self.route
        sides = tuple((r.blocks * r.block_size, r.block_size) for _, r in self.sides())
        per_token, once = advantage(self.in_features, self.out_features, sides, x.device, x.dtype)
        return "input" if per_token * (x.numel() // self.in_features) + once >= 0 else "weight"

    @torch.no_grad()
    def movement(self) -> Tensor:
        """Return the root mean square of the weight's change by a fold, over that of the weight; a scalar in fp32."""
        exact = self._exact_weight()
        return (self._effective_weight() - exact).norm() / exact.norm().clamp_min(1e-30)

    def check_storage(self, name: str) -> None:
        """Refuse a weight in 16 bits without a residual: a network may be cast after its layers are made.

        Raises:
            ConfigurationError: With the ``name`` of the layer and what would work.
        """
        rounded = isinstance(self.weight, Bf16Weight) and not self.weight.carries_residual
        if rounded or (isinstance(self.weight, DenseWeight) and self.weight.dtype.itemsize < 4):
            raise ConfigurationError(f"{name}: stepwise with a weight in {self.weight.dtype}: {TOO_COARSE}")

    def extra_repr(self) -> str:
        """Describe the modes in one line."""
        return f"route={self.route}, seed={self.seed}"


# torch.compile must see two constants and not trace the reading of a table
@torch.compiler.assume_constant_result
def advantage(
    d_in: int, d_out: int, sides: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Return by how many nanoseconds the gradient from activations is cheaper, per token and per call.

    The gradient from activations takes no product for dL/dW. Its contraction reads the same tensors as the backward
    pass of a rotation, which is about half of the cost of a rotation. In the same way the contraction of dL/dW is half
    of a fold.

    Args:
        d_in: Width of the input.
        d_out: Width of the output.
        sides: Number of features in blocks, and block size, of each rotated side.
        device: Device of the layer.
        dtype: Dtype of its products.
    """
    costs = costs_for(device.type, device.index, dtype.itemsize < 4)
    contracted = sum(costs.rotation(covered, size) - costs.rotate_call for covered, size in sides) / 2
    folded = costs.fold(d_in * d_out, sum(size for _, size in sides))
    return costs.multiply_add * d_in * d_out - contracted, (folded - len(sides) * costs.rotate_call) / 2
