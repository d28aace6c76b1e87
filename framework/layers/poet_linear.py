"""The POET layer: a frozen weight between two learned block rotations."""

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from orthotrain.errors import check_choice
from orthotrain.kernels.block_rotate import block_rotate
from orthotrain.kernels.fold import fold
from orthotrain.layers.block_rotation import BlockRotation, check_block_size
from orthotrain.layers.centre import ActivationMode, Centre, choose_centre
from orthotrain.layers.frozen_weight import DenseWeight, FrozenWeight, plain_linear
from orthotrain.plugins import Parameterization, create
from orthotrain.seeding import draw_permutation, generator


class PoetLinear(nn.Module):
    """``y = rot_out(rot_in(x) @ W.T) + bias``: POET's ``W_eff = R_out^T W R_in^T`` (arXiv:2506.08001, equation 1).

    The frozen weight is kept in the frame of both permutations, so that the hot path gathers ``x`` once and scatters
    ``y`` once (arXiv:2603.05500, section 3). The bias is added last: a merge never changes it.

    Args:
        weight: The frozen weight ``(out, in)``, rows and columns already in the permuted frame.
        bias: ``(out,)`` trained bias, or None.
        rotation_in: Rotation of the ``in`` input features.
        rotation_out: Rotation of the ``out`` output features.
        centre: ``input`` rotates activations, ``weight`` forms the effective weight once per pass, ``auto`` takes the
            cheaper one for the number of tokens at hand (:func:`choose_centre`).
        activation_mode: ``fast`` saves the activation before the output rotation, ``mem`` recomputes it in backward.
        seed: Seed of the permutations; merge k draws them from (seed, k, side).
    """

    merge_count: Tensor

    def __init__(
        self,
        weight: FrozenWeight,
        bias: nn.Parameter | None,
        rotation_in: BlockRotation,
        rotation_out: BlockRotation,
        *,
        centre: Centre = "auto",
        activation_mode: ActivationMode = "fast",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("centre", centre, Centre)
        check_choice("activation_mode", activation_mode, ActivationMode)
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.weight = weight
        self.bias = bias
        self.rotation_in = rotation_in
        self.rotation_out = rotation_out
        self.centre = centre
        self.activation_mode = activation_mode
        self.seed = seed
        self.register_buffer("merge_count", torch.zeros((), dtype=torch.int64))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        block_size: int = 256,
        parameterization: Parameterization | str | dict[str, Any] = "cayley_neumann",
        *,
        centre: Centre = "auto",
        activation_mode: ActivationMode = "fast",
        seed: int = 0,
    ) -> Self:
        """Wrap a linear layer without changing its function.

        Args:
            linear: Any ``nn.Linear``; its weight is copied, its bias parameter is taken over.
            block_size: Size of the rotated blocks on both sides, from 2 to the smaller width.
            parameterization: A :class:`Parameterization`, a registered name or its configuration.
            centre: See the class.
            activation_mode: See the class.
            seed: Seed of the permutations.

        Raises:
            ConfigurationError: If the block size does not fit, naming what would work.
        """
        out_features, in_features = linear.weight.shape
        check_block_size(min(in_features, out_features), block_size)
        shared = create(parameterization)
        device = linear.weight.device
        order_out = draw_permutation(out_features, seed, 0, "out").to(device)
        order_in = draw_permutation(in_features, seed, 0, "in").to(device)
        with torch.device(device):
            rotation_in = BlockRotation(in_features, block_size, shared, permutation=order_in)
            rotation_out = BlockRotation(out_features, block_size, shared, permutation=order_out)
            return cls(
                DenseWeight(linear.weight.detach()[order_out][:, order_in]),
                linear.bias,
                rotation_in,
                rotation_out,
                centre=centre,
                activation_mode=activation_mode,
                seed=seed,
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``; under autocast in its dtype, like nn.Linear."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        d_in, d_out = self.rotation_in.displacement(x.dtype), self.rotation_out.displacement(x.dtype)
        compute = self._input_centric if self._centre_for(x) == "input" else self._weight_centric
        if self.activation_mode == "mem" and torch.is_grad_enabled():
            y = checkpoint(compute, x, d_in, d_out, use_reentrant=False, preserve_rng_state=False)
        else:
            y = compute(x, d_in, d_out)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _input_centric(self, x: Tensor, d_in: Tensor, d_out: Tensor) -> Tensor:
        # Autograd keeps x and the product before the output rotation, nothing else: the
        # frozen product needs only W for its gradient.
        product = self.weight.matmul(block_rotate(x, d_in, load=self.rotation_in.permutation))
        return block_rotate(product, d_out, store=self.rotation_out.permutation)

    def _weight_centric(self, x: Tensor, d_in: Tensor, d_out: Tensor) -> Tensor:
        weight = self.weight.dequantize().to(x.dtype)
        return F.linear(x, fold(weight, d_out, d_in, self.rotation_out.permutation, self.rotation_in.permutation))

    def _centre_for(self, x: Tensor) -> Literal["input", "weight"]:
        if self.centre != "auto":
            return self.centre
        tokens = x.numel() // self.in_features
        return choose_centre(
            tokens, self.in_features, self.out_features, self.rotation_in.block_size, self.rotation_out.block_size
        )

    @torch.no_grad()
    def merge_(self) -> None:
        """Fold both rotations into the frozen weight, reset them and take the next permutations.

        The function of the layer changes by no more than the rounding of the stored weight. Every rank draws the same
        permutations and, for a bf16 weight, the same rounding bits, from (seed, merge count).
        """
        effective = self._effective_weight()
        self.merge_count += 1
        count = int(self.merge_count)
        order_out = draw_permutation(self.out_features, self.seed, count, "out").to(effective.device)
        order_in = draw_permutation(self.in_features, self.seed, count, "in").to(effective.device)
        self.rotation_out.reset_(order_out)
        self.rotation_in.reset_(order_in)
        self.weight.assign_(effective[order_out][:, order_in], generator(self.seed, count, "rounding"))

    def merged_weight(self) -> Tensor:
        """Return ``R_out^T W R_in^T`` ``(out, in)`` in the natural frame, rounded to the dtype of the frozen weight."""
        return self._effective_weight().to(self.weight.dequantize().dtype)

    def rotation_parameters(self) -> list[nn.Parameter]:
        """Return the generators of both sides."""
        return [self.rotation_in.generators, self.rotation_out.generators]

    def displacements(self) -> list[Tensor]:
        """Return ``D = R - I`` of both sides, ``(n, b, b)`` each."""
        return [self.rotation_in.displacement(), self.rotation_out.displacement()]

    @torch.no_grad()
    def unwrap(self) -> nn.Linear:
        """Return an ``nn.Linear`` that computes the same, with the merged weight and this layer's bias."""
        return plain_linear(self.merged_weight(), self.bias)

    @torch.no_grad()
    def _effective_weight(self) -> Tensor:
        # A fold in 16 bits would move the singular values at every merge.
        weight = self.weight.dequantize()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        d_out, d_in = self.rotation_out.displacement(weight.dtype), self.rotation_in.displacement(weight.dtype)
        with torch.autocast(weight.device.type, enabled=False):
            return fold(weight, d_out, d_in, self.rotation_out.permutation, self.rotation_in.permutation)

    def extra_repr(self) -> str:
        """Describe the modes in one line."""
        return f"centre={self.centre}, activation_mode={self.activation_mode}, seed={self.seed}"
