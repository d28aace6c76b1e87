"""The OFT layer: a frozen weight behind a learned block rotation of its input, in full precision or quantised."""

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from orthotrain.errors import ConfigurationError, check_choice
from orthotrain.kernels.dispatch import plain_cpu
from orthotrain.kernels.oft_linear import oft_linear
from orthotrain.layers.oft.oft_rotation import OftRotation, RotationDtype
from orthotrain.layers.weights.bitsandbytes_linear import adopt_bitsandbytes
from orthotrain.layers.weights.frozen_weight import DenseWeight, FrozenWeight, plain_linear
from orthotrain.layers.weights.quantized_weight import Int8Weight, Nf4Weight, QuantizedWeight
from orthotrain.plugins import Parameterization

Quantization = Literal["nf4", "int8"]


class OftLinear(nn.Module):
    """``y = rot_in(x) @ W.T + bias``: OFTv2's ``W_eff = W R^T`` on row vectors (arXiv:2506.19847, equation 3).

    With a quantised weight this is QOFT: ``W`` is unpacked for each product and never stored in between.

    Args:
        weight: The frozen weight ``(out, in)``.
        bias: ``(out,)``, or None.
        rotation_in: Rotation of the ``in`` input features.

    Attributes:
        last_merge_error: After a merge into a quantised weight the relative error of requantising, else None.
    """

    def __init__(self, weight: FrozenWeight, bias: nn.Parameter | None, rotation_in: OftRotation) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.weight = weight
        self.bias = bias
        self.rotation_in = rotation_in
        self.last_merge_error: float | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        block_size: int = 32,
        parameterization: Parameterization | str | dict[str, Any] = "cayley_neumann",
        *,
        block_share: bool = False,
        coft_eps: float | None = None,
        block_dropout: float = 0.0,
        rotation_dtype: RotationDtype = "input",
        quantization: Quantization | None = None,
        group_size: int | None = None,
        train_bias: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> Self:
        """Wrap a linear layer without changing its function (but for the rounding of a quantisation).

        Args:
            linear: Any ``nn.Linear``; its weight and bias are taken over, not copied. A quantised
                ``Linear4bit`` or ``Linear8bitLt`` of bitsandbytes keeps its quantised values.
            block_size: Size of the rotated blocks; must divide the input width.
            parameterization: A :class:`Parameterization`, a registered name or its configuration.
            block_share: See :class:`OftRotation`.
            coft_eps: See :class:`OftRotation`.
            block_dropout: See :class:`OftRotation`.
            rotation_dtype: See :class:`OftRotation`.
            quantization: Storage of the frozen weight: ``nf4``, ``int8``, or None for the one it has.
            group_size: Values that share a quantisation scale; None for 64 (NF4) or :class:`Int8Weight`'s default.
            train_bias: Whether the bias is trained; the weight never is.
            compute_dtype: Dtype of the network, for a ``Linear8bitLt`` without bias; see :func:`adopt_bitsandbytes`.

        Raises:
            ConfigurationError: If a size does not fit, naming what would; or the weight cannot be quantised so.
        """
        with torch.device(linear.weight.device):
            rotation = OftRotation(
                linear.in_features,
                block_size,
                parameterization,
                block_share=block_share,
                coft_eps=coft_eps,
                block_dropout=block_dropout,
                rotation_dtype=rotation_dtype,
            )
        if linear.bias is not None:
            linear.bias.requires_grad_(train_bias)
        return cls(freeze_weight(linear, quantization, group_size, compute_dtype), linear.bias, rotation)

    @property
    def enabled(self) -> bool:
        """Whether the rotation acts; without it the layer computes what the wrapped one did."""
        return self.rotation_in.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.rotation_in.enabled = value

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``; under autocast in its dtype, like nn.Linear."""
        rotation, weight = self.rotation_in, self.weight
        autocast = torch.is_autocast_enabled(x.device.type)
        if autocast and rotation.rotation_dtype == "input":
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if isinstance(weight, DenseWeight) and _fuses(x, weight, rotation, autocast):
            return oft_linear(x, weight.values, rotation.training_displacement(x.dtype), self.bias)
        # the bias inside the product, as nn.Linear has it: the same bits, and no second pass over y
        return weight.matmul(rotation(x), self.bias)

    @torch.no_grad()
    def merge_(self) -> None:
        """Fold the rotation into the frozen weight and reset it to the identity.

        Rotated in fp32 and rounded to nearest once. A quantised weight is unpacked, rotated and requantised; how much
        that lost is kept in ``last_merge_error``.

        Raises:
            ConfigurationError: If the rotation is disabled.
        """
        effective = self._effective_weight()
        self.weight.assign_(effective)
        self.rotation_in.reset_()
        if isinstance(self.weight, QuantizedWeight):
            self.last_merge_error = self.weight.relative_error(effective)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return ``W R^T`` ``(out, in)``, never requantised, in the dtype that the weight computes in."""
        return self._effective_weight().to(self.weight.dtype)

    def rotation_parameters(self) -> list[nn.Parameter]:
        """Return the generators."""
        return [self.rotation_in.generators]

    def displacements(self) -> list[Tensor]:
        """Return ``D = R - I``, ``(n, b, b)``, alone in a list."""
        return [self.rotation_in.displacement()]

    @torch.no_grad()
    def unwrap(self) -> nn.Linear:
        """Return an ``nn.Linear`` that computes the same, with the merged weight and this layer's bias."""
        return plain_linear(self.merged_weight(), self.bias)

    def project_(self) -> None:
        """Bring the generators back to COFT's bound; see :meth:`OftRotation.project_`."""
        self.rotation_in.project_()

    def _effective_weight(self) -> Tensor:
        return self.rotation_in.fold(self.weight.dequantize(torch.promote_types(self.weight.dtype, torch.float32)))


def _fuses(x: Tensor, weight: DenseWeight, rotation: OftRotation, autocast: bool) -> bool:
    """Tell whether rotation and product are one operation: on the CPU, where it was measured to be faster.

    Elsewhere the rotation has a kernel of its own. A rotation in fp32 before a product in 16 bits takes the two apart,
    and so does a dtype of ``x`` that nn.Linear would refuse.
    """
    if not rotation.enabled or not plain_cpu(x):
        return False
    if rotation.rotation_dtype == "float32" and (autocast or x.dtype.itemsize < 4):
        return False
    return autocast or x.dtype == weight.dtype


def freeze_weight(
    linear: nn.Linear,
    quantization: Quantization | None,
    group_size: int | None,
    compute_dtype: torch.dtype | None = None,
) -> FrozenWeight:
    """Copy the weight of a linear layer into the storage that is asked for.

    Args:
        linear: Any ``nn.Linear``; a quantised layer of bitsandbytes keeps its format and its values.
        quantization: ``nf4``, ``int8``, or None for the storage that it has.
        group_size: Values that share a scale; None for 64 (NF4) or :class:`Int8Weight`'s default.
        compute_dtype: See :func:`adopt_bitsandbytes`.

    Raises:
        ConfigurationError: If the arguments contradict the layer or each other, or a size does not fit.
    """
    adopted = adopt_bitsandbytes(linear, compute_dtype)
    if adopted is not None:
        if quantization not in (None, adopted.format) or group_size not in (None, adopted.group_size):
            raise ConfigurationError(
                f"quantization={quantization!r}, group_size={group_size!r}: the layer is already quantised to "
                f"{adopted.format} in groups of {adopted.group_size}; leave both unset"
            )
        return adopted
    if quantization is None:
        if group_size is not None:
            raise ConfigurationError(f"group_size={group_size!r} is without meaning unless quantization is set")
        return DenseWeight(linear.weight)
    check_choice("quantization", quantization, Quantization)
    if quantization == "nf4":
        return Nf4Weight(linear.weight, group_size=group_size)
    return Int8Weight(linear.weight, group_size=group_size)
