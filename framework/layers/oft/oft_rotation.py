"""The rotation of the OFT layers: blocks of neighboring features that cover the whole width, with OFT's options."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orthotrain.errors import ConfigurationError
from orthotrain.kernels.block_rotate import block_rotate
from orthotrain.kernels.operation import without_autocast
from orthotrain.layers.checks import check_block_size, check_divides
from orthotrain.layers.finite_checks import finite_or_zero
from orthotrain.layers.oft.oft_settings import OftSettings
from orthotrain.layers.rotation.block_rotation import BlockRotation


class OftRotation(BlockRotation):
    """``x @ R`` with ``R = Diag(R_1 .. R_n)`` and ``n * b = d`` (arXiv:2506.19847, section 3).

    Args:
        features: Width ``d`` of the rotated axis.
        settings: The settings of the layer; ``block_size`` must divide ``d``.

    Attributes:
        enabled: Whether the rotation acts.
        instead: What is computed in place of ``x @ R``, ``(..., d) -> (..., d)``, while several adapters act together
            (:meth:`orthotrain.adapters.AdapterSet.rows`); else None.

    Raises:
        ConfigurationError: If the block size does not divide the width, naming the divisors near it.
    """

    def __init__(self, features: int, settings: OftSettings) -> None:
        check_block_size(features, settings.block_size)
        check_divides("block_size", settings.block_size, features, f"the {features} features to rotate", minimum=2)
        super().__init__(features, settings.block_size, settings.parameterization, shared=settings.block_share)
        self.coft_eps = settings.coft_eps
        self.block_dropout = settings.block_dropout
        self.rotation_dtype = settings.rotation_dtype
        self.enabled = True
        self.instead: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ R`` for ``x (..., d)``, in the dtype of ``x``; ``x`` itself while the rotation is disabled."""
        if not self.enabled:
            return x
        if self.instead is not None:
            return self.instead(x)
        return self.rotate(x, self.training_displacement)

    def rotate(self, x: Tensor, displacement: Callable[[torch.dtype], Tensor]) -> Tensor:
        """Return ``x + x D`` for ``x (..., d)``, in the dtype of ``x``.

        Args:
            x: ``(..., d)``.
            displacement: Returns ``D (n, b, b)`` in the dtype that it is given, by ``rotation_dtype``.
        """
        with without_autocast(x.device.type):
            dtype = torch.promote_types(x.dtype, torch.float32) if self.rotation_dtype == "float32" else x.dtype
            return block_rotate(x.to(dtype), displacement(dtype)).to(x.dtype)

    def training_displacement(self, dtype: torch.dtype) -> Tensor:
        """Return ``D (n, b, b)`` as one forward pass uses it: with blocks dropped while training."""
        with without_autocast(self.generators.device.type):
            displacement = self.displacement(dtype)
            if not (self.training and self.block_dropout):
                return displacement
            dropped = torch.rand(self.blocks, device=displacement.device) < self.block_dropout
            return displacement.masked_fill(dropped[:, None, None], 0.0)

    def fold(
        self,
        weight: Tensor,
        transposed: bool = True,
        error: Callable[[], str] | None = None,
        inverse: bool = False,
    ) -> Tensor:
        """Return ``weight @ R^T`` (``weight @ R`` if not transposed) ``(..., d)`` in fp32 or wider, without dropout.

        Args:
            weight: ``(..., d)``.
            transposed: Whether ``R^T`` is applied.
            error: Returns the message with which a rotation that is not finite is refused; None for no check.
            inverse: Whether ``R^-1`` takes the place of ``R``. A series is orthogonal only near zero, so that
                its ``R^T`` is not exactly the inverse.

        Raises:
            ConfigurationError: If the rotation is disabled, or several adapters act together: folding it would change
                the function of the layer.
            TrainingDiverged: With ``error``, if the rotation is not finite (:func:`finite_or_zero`).
        """
        if not self.enabled:
            raise ConfigurationError("this rotation is disabled: set enabled=True before merging or exporting")
        if self.instead is not None:
            raise ConfigurationError("several adapters act together here: leave their with block before merging")
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        with without_autocast(weight.device.type):
            displacement: Any = self.displacement(weight.dtype)
            if error is not None:
                displacement, _ = finite_or_zero((displacement, None), error)
            if inverse:
                identity = torch.eye(self.block_size, dtype=displacement.dtype, device=displacement.device)
                displacement = torch.linalg.inv(identity + displacement) - identity
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
