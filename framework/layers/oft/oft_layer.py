"""The base of the OFT layers: a frozen layer of torch with a learned rotation of its features."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers.linear_kinds import check_wrappable
from orthotrain.layers.oft.oft_rotation import OftRotation
from orthotrain.layers.oft.oft_settings import OftSettings
from orthotrain.layers.weights.frozen_weight import NoTensor
from orthotrain.layers.weights.quantized_weight import QuantizedWeight


@dataclass(frozen=True)
class WeightInfo(NoTensor):
    """What code around a layer may read of its frozen weight; :meth:`OftLayer.merged_weight` gives the values."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class OftLayer(nn.Module):
    """A frozen layer with a learned rotation of its features. A subclass wraps one class of layers of torch.

    Args:
        rotation: The rotation, kept as ``rotation_in`` or ``rotation_out``, by :attr:`side`.
    """

    side: ClassVar[Literal["in", "out"]] = "in"
    """Whether the rotation acts on the input or on the output of the frozen layer."""
    wraps: ClassVar[type[nn.Module]]
    """The class of layers of torch that this class wraps."""
    width: ClassVar[str]
    """Name of the attribute of the frozen layer that holds the number of rotated features."""

    def __init__(self, rotation: OftRotation) -> None:
        super().__init__()
        self.add_module(f"rotation_{self.side}", rotation)

    @classmethod
    def from_settings(
        cls,
        layer: Any,
        settings: OftSettings,
        *,
        train_bias: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> Self:
        """Wrap a layer of torch without changing its function, except for the rounding of a quantization.

        Args:
            layer: The layer, of the class that this class wraps. The weight and bias of a linear layer are taken over,
                without a copy; a quantized ``Linear4bit`` or ``Linear8bitLt`` of bitsandbytes keeps its quantized
                values. A convolution or an embedding is copied.
            settings: Blocks, rotation and storage.
            train_bias: Whether the bias is trained; the weight never is.
            compute_dtype: Dtype of the network, for a ``Linear8bitLt`` without bias; see :func:`adopt_bitsandbytes`.

        Raises:
            ConfigurationError: If the layer is of another class, has a hook or may compute something else, a size
                does not fit, naming sizes that would, or the weight cannot be stored so.
        """
        if not issubclass(type(layer), cls.wraps):
            raise ConfigurationError(f"{cls.__name__} wraps an nn.{cls.wraps.__name__}, not a {type(layer).__name__}")
        check_wrappable(layer)
        with torch.device(layer.weight.device):
            rotation = OftRotation(getattr(layer, cls.width), settings)
        if not isinstance(layer, nn.Linear):
            if settings.storage in ("int8", "nf4"):
                raise ConfigurationError(
                    f"storage={settings.storage!r}: only linear layers are quantized, not a {type(layer).__name__}; "
                    "set storage to null for this layer (overrides)"
                )
            layer = copy.deepcopy(layer)
            # a forward of accelerate, which unwrap would copy with a reference to this layer
            layer.__dict__.pop("forward", None)
            layer.weight.requires_grad_(False)
        if getattr(layer, "bias", None) is not None:
            layer.bias.requires_grad_(train_bias)
        return cls._around(layer, rotation, settings, compute_dtype)

    @property
    def rotation(self) -> OftRotation:
        """The rotation."""
        return getattr(self, f"rotation_{self.side}")

    @property
    def enabled(self) -> bool:
        """Whether the rotation acts; if not, the layer computes the function of the frozen layer."""
        return self.rotation.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.rotation.enabled = value

    @torch.no_grad()
    def merge_(self) -> None:
        """Fold the rotation into the frozen weight, in fp32 and rounded once, and reset the rotation to the identity.

        Raises:
            ConfigurationError: If the rotation is disabled.
            TrainingDiverged: If the rotation is not finite; the layer keeps its weight.
        """
        self._store(self._effective_weight(self._not_finite))
        self.rotation.reset_()

    @torch.no_grad()
    def unmerge_(self) -> None:
        """Undo :meth:`merge_`, for generators as they were before: fold the inverse rotation into the frozen weight.

        The generators stay, so that the layer computes what it computes with zero generators now. The weight comes back
        up to the rounding of its dtype.

        Raises:
            ConfigurationError: If the rotation is disabled, or the weight is quantized: a merge quantizes it again, and
                its values before are lost.
            TrainingDiverged: If the rotation is not finite; the layer keeps its weight.
        """
        if isinstance(self._weight, QuantizedWeight):
            raise ConfigurationError(
                f"its weight is stored in {self._weight.format}: the merge has quantized it again, and the values "
                "before are lost; load the base again"
            )
        self._store(self._effective_weight(self._not_finite, inverse=True))

    def unload(self) -> nn.Module:
        """Return the frozen layer without the rotation: the weight itself, bit for bit and not trained.

        A quantized weight stays packed, in a :class:`orthotrain.layers.FrozenLinear`.
        """
        return self._frozen

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return the rotated weight in the shape of the frozen weight, rounded to the dtype of products."""
        return self._effective_weight().to(self._weight.dtype)

    def rotation_parameters(self) -> list[nn.Parameter]:
        """Return the generators."""
        return [self.rotation.generators]

    def displacements(self) -> list[Tensor]:
        """Return ``D = R - I``, ``(n, b, b)``, as the only element of a list."""
        return [self.rotation.displacement()]

    def project_(self) -> None:
        """Scale the generators back to COFT's bound; see :meth:`OftRotation.project_`."""
        self.rotation.project_()

    @torch.no_grad()
    def unwrap(self) -> nn.Module:
        """Return a plain layer of torch that computes the same, with the merged weight and this layer's bias."""
        plain = copy.copy(self._frozen)
        plain._parameters = {**plain._parameters, "weight": nn.Parameter(self.merged_weight())}
        return plain

    @classmethod
    def _around(
        cls, layer: Any, rotation: OftRotation, settings: OftSettings, compute_dtype: torch.dtype | None
    ) -> Self:
        """Return this class around a layer of torch."""
        return cls(layer, rotation)  # type: ignore[call-arg]

    @property
    def _frozen(self) -> nn.Module:
        """The frozen layer of torch."""
        raise NotImplementedError

    @property
    def _weight(self) -> Any:
        """The frozen weight."""
        return self._frozen.weight

    def _info(self) -> WeightInfo:
        return WeightInfo(self._weight.shape, self._weight.dtype, self._weight.device)

    def _effective_weight(self, error: Callable[[], str] | None = None, inverse: bool = False) -> Tensor:
        """Return the rotated weight in fp32 or wider; ``error`` and ``inverse`` as in :meth:`OftRotation.fold`."""
        raise NotImplementedError

    def _not_finite(self) -> str:
        return (
            f"the rotation of a {self.wraps.__name__} holds NaN, infinite or huge values, and was not folded; lower "
            "the learning rate of the generators, or set max_generator_norm"
        )

    def _store(self, effective: Tensor) -> None:
        """Store the rotated weight as the frozen weight."""
        self._weight.copy_(effective)
