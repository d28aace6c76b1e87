"""The OFT layer for linear layers: a learned rotation before a frozen weight, dense or quantized."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from orthotrain.errors import ConfigurationError
from orthotrain.kernels.dispatch import plain_cpu
from orthotrain.kernels.oft_linear import oft_linear
from orthotrain.layers.oft.oft_layer import OftLayer
from orthotrain.layers.oft.oft_rotation import OftRotation
from orthotrain.layers.oft.oft_settings import OftSettings, RotationDtype
from orthotrain.layers.weights.bitsandbytes_linear import adopt_bitsandbytes
from orthotrain.layers.weights.frozen_linear import FrozenLinear
from orthotrain.layers.weights.frozen_weight import DenseWeight, FrozenWeight, plain_linear
from orthotrain.layers.weights.quantized_weight import QuantizedWeight
from orthotrain.layers.weights.storage import Storage, store
from orthotrain.plugins import Parameterization


class OftLinear(OftLayer):
    """``y = rot_in(x) @ W.T + bias``: OFTv2's ``W_eff = W R^T`` on row vectors (arXiv:2506.19847, equation 3).

    With a quantized weight this is QOFT: each product unpacks ``W``, and the unpacked weight is not kept.

    Args:
        weight: The frozen weight ``(out, in)``.
        bias: ``(out,)``, or None.
        rotation_in: Rotation of the ``in`` input features.

    Attributes:
        last_merge_error: The relative error of requantization in the last merge into a quantized weight, else None.

    Example:
        >>> layer = OftLinear.from_linear(nn.Linear(64, 32), block_size=16, coft_eps=1e-3)
        >>> sum(p.numel() for p in layer.parameters() if p.requires_grad)
        480
    """

    wraps, width = nn.Linear, "in_features"
    rotation_in: OftRotation

    def __init__(self, weight: FrozenWeight, bias: nn.Parameter | None, rotation_in: OftRotation) -> None:
        super().__init__(rotation_in)
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.weight = weight
        self.bias = bias
        self.last_merge_error: float | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        block_size: int = 32,
        parameterization: Parameterization | str = "cayley_neumann",
        *,
        storage: Storage | None = None,
        group_size: int | None = None,
        block_share: bool = False,
        coft_eps: float | None = None,
        block_dropout: float = 0.0,
        rotation_dtype: RotationDtype = "input",
        train_bias: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> Self:
        """Wrap a linear layer: :meth:`from_settings` with the fields of :class:`OftSettings` as arguments."""
        settings = OftSettings(
            block_size, parameterization, storage, group_size, block_share, coft_eps, block_dropout, rotation_dtype
        )
        return cls.from_settings(linear, settings, train_bias=train_bias, compute_dtype=compute_dtype)

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
    def unwrap(self) -> nn.Linear:
        """Return an ``nn.Linear`` that computes the same, with the merged weight and this layer's bias."""
        return plain_linear(self.merged_weight(), self.bias)

    def unload(self) -> nn.Module:
        """Return an ``nn.Linear`` or a :class:`FrozenLinear` with the frozen weight itself; see :class:`OftLayer`."""
        if not isinstance(self.weight, DenseWeight):
            return FrozenLinear(self.weight, self.bias).train(self.training)
        linear = plain_linear(self.weight.values, self.bias).train(self.training)
        linear.weight.requires_grad_(False)
        return linear

    @classmethod
    def _around(cls, layer: Any, rotation: OftRotation, settings: OftSettings, compute_dtype: Any) -> Self:
        return cls(frozen(layer, settings, compute_dtype), layer.bias, rotation)

    @property
    def _weight(self) -> FrozenWeight:
        return self.weight

    def _effective_weight(self, error: Callable[[], str] | None = None, inverse: bool = False) -> Tensor:
        exact = self.weight.dequantize(torch.promote_types(self.weight.dtype, torch.float32))
        return self.rotation_in.fold(exact, error=error, inverse=inverse)

    def _store(self, effective: Tensor) -> None:
        self.weight.assign_(effective)
        if isinstance(self.weight, QuantizedWeight):
            self.last_merge_error = self.weight.relative_error(effective)


def _fuses(x: Tensor, weight: DenseWeight, rotation: OftRotation, autocast: bool) -> bool:
    """Tell whether rotation and product are one operation: on the CPU, where this was measured to be faster.

    On other devices the rotation has a kernel of its own. A rotation in fp32 before a product in 16 bits needs two
    operations, and so does a dtype of ``x`` that nn.Linear would refuse.
    """
    if not rotation.enabled or rotation.instead is not None or not plain_cpu(x):
        return False
    if rotation.rotation_dtype == "float32" and (autocast or x.dtype.itemsize < 4):
        return False
    return autocast or x.dtype == weight.dtype


def frozen(linear: nn.Linear, settings: OftSettings, compute_dtype: torch.dtype | None) -> FrozenWeight:
    """Return the weight of a linear layer in the storage of ``settings``.

    Args:
        linear: Any ``nn.Linear``; a quantized layer of bitsandbytes keeps its format and its values.
        settings: Storage and group size.
        compute_dtype: See :func:`adopt_bitsandbytes`.

    Raises:
        ConfigurationError: If the settings contradict the layer, or a size does not fit.
    """
    adopted = adopt_bitsandbytes(linear, compute_dtype)
    if adopted is None:
        return store(linear.weight, settings.storage or "dense", settings.group_size)
    if settings.storage not in (None, adopted.format) or settings.group_size not in (None, adopted.group_size):
        raise ConfigurationError(
            f"storage={settings.storage!r}, group_size={settings.group_size!r}: the layer is already quantized to "
            f"{adopted.format} in groups of {adopted.group_size}; leave both unset"
        )
    return adopted
