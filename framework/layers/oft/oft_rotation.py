"""The rotation of the OFT layers: blocks of neighboring features that cover the whole width, with OFT's options."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from orthotrain.errors import ConfigurationError, check_choice
from orthotrain.kernels.block_rotate import block_rotate
from orthotrain.kernels.operation import without_autocast
from orthotrain.layers.checks import check_block_size, check_divides
from orthotrain.layers.rotation.block_rotation import BlockRotation
from orthotrain.plugins import Parameterization

RotationDtype = Literal["input", "float32"]


class OftRotation(BlockRotation):
    """``x @ R`` with ``R = Diag(R_1 .. R_n)`` and ``n * b = d`` (arXiv:2506.19847, section 3).

    Args:
        features: Width ``d`` of the rotated axis.
        block_size: Size ``b`` of a block; must divide ``d``.
        parameterization: A :class:`Parameterization`, a registered name or its configuration.
        block_share: Whether all blocks share the generators of one.
        coft_eps: COFT (arXiv:2306.07280): bound of the Frobenius norm ``||Q||`` over all blocks together, which
            :meth:`project_` restores; to first order ``||R - I|| <= 2 coft_eps``. None for no bound.
        block_dropout: Probability with which a block is the identity for one forward pass in training. The other blocks
            are not rescaled, since a product of rotations has no mean to keep.
        rotation_dtype: ``input`` rotates in the dtype of ``x``: ``D`` is computed in fp32 and rounded to that dtype,
            and the sum ``x + x D`` is accumulated in fp32. ``float32`` rotates 16-bit inputs in fp32 and rounds the
            result.

    Raises:
        ConfigurationError: If the block size does not divide the width, naming the divisors near it, or an option is
            out of its range.
    """

    def __init__(
        self,
        features: int,
        block_size: int,
        parameterization: Parameterization | str | dict[str, Any] = "cayley_neumann",
        *,
        block_share: bool = False,
        coft_eps: float | None = None,
        block_dropout: float = 0.0,
        rotation_dtype: RotationDtype = "input",
    ) -> None:
        check_block_size(features, block_size)
        check_divides("block_size", block_size, features, f"the {features} features to rotate", minimum=2)
        check_options(coft_eps, block_dropout, rotation_dtype)
        super().__init__(features, block_size, parameterization, shared=block_share)
        self.coft_eps = coft_eps
        self.block_dropout = block_dropout
        self.rotation_dtype = rotation_dtype
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ R`` for ``x (..., d)``, in the dtype of ``x``; ``x`` itself while the rotation is disabled."""
        if not self.enabled:
            return x
        with without_autocast(x.device.type):
            dtype = torch.promote_types(x.dtype, torch.float32) if self.rotation_dtype == "float32" else x.dtype
            return block_rotate(x.to(dtype), self.training_displacement(dtype)).to(x.dtype)

    def training_displacement(self, dtype: torch.dtype) -> Tensor:
        """Return ``D (n, b, b)`` as one forward pass uses it: with blocks dropped while training."""
        with without_autocast(self.generators.device.type):
            displacement = self.displacement(dtype)
            if not (self.training and self.block_dropout):
                return displacement
            dropped = torch.rand(self.blocks, device=displacement.device) < self.block_dropout
            return displacement.masked_fill(dropped[:, None, None], 0.0)

    def fold(self, weight: Tensor, transposed: bool = True) -> Tensor:
        """Return ``weight @ R^T`` (``weight @ R`` if not transposed) ``(..., d)`` in fp32 or wider, without dropout.

        Raises:
            ConfigurationError: If the rotation is disabled: folding it would change the function of the layer.
        """
        if not self.enabled:
            raise ConfigurationError("this rotation is disabled: set enabled=True before merging or exporting")
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        with without_autocast(weight.device.type):
            displacement = self.displacement(weight.dtype)
            return block_rotate(weight, displacement.mT.contiguous() if transposed else displacement)

    @torch.no_grad()
    def project_(self) -> None:
        """Scale every block of generators back to ``||Q_k|| <= coft_eps / sqrt(n)``; nothing without ``coft_eps``."""
        if self.coft_eps is None:
            return
        bound = self.coft_eps / math.sqrt(self.blocks)
        # every generator is an entry of Q twice
        norms = math.sqrt(2) * self.generators.norm(dim=1, keepdim=True)
        self.generators.mul_((bound / norms).clamp(max=1))

    def extra_repr(self) -> str:
        """Describe blocks and options in one line."""
        options = {
            "coft_eps": self.coft_eps,
            "block_dropout": self.block_dropout or None,
            "rotation_dtype": self.rotation_dtype if self.rotation_dtype != "input" else None,
            "enabled": None if self.enabled else False,
        }
        given = "".join(f", {name}={value}" for name, value in options.items() if value is not None)
        return super().extra_repr() + given


def check_options(coft_eps: float | None, block_dropout: float, rotation_dtype: RotationDtype) -> None:
    """Refuse options of a rotation that are out of their range.

    Raises:
        ConfigurationError: Naming the option and values that would work.
    """
    if coft_eps is not None and not coft_eps > 0:
        raise ConfigurationError(f"coft_eps={coft_eps!r}: take a positive bound, or null for none")
    if not 0 <= block_dropout < 1:
        raise ConfigurationError(f"block_dropout={block_dropout!r}: take a probability of at least 0 and below 1")
    check_choice("rotation_dtype", rotation_dtype, RotationDtype)
