"""The base of the OFT layers, and their settings."""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers.checks import check_parameterization
from orthotrain.layers.oft.oft_rotation import OftRotation, RotationDtype, check_options
from orthotrain.layers.weights.storage import Storage, check_group_size
from orthotrain.plugins import Parameterization

OFT_STORAGES = (None, "dense", "int8", "nf4")


@dataclass(frozen=True)
class OftSettings:
    """Settings of one OFT layer.

    Args:
        block_size: Size of the rotated blocks; must divide the rotated width (of a convolution with groups: the input
            channels of one group).
        parameterization: How generators become rotations: a registered name (`orthotrain plugins` lists them) or a
            class with its arguments, in YAML ``{class_path: CayleyNeumann, init_args: {order: 4}}``.
        storage: Format of the frozen weight of a linear layer: ``dense`` (the dtype of the network), ``int8`` or
            ``nf4``. None for the format that the layer has: dense, or quantized by bitsandbytes.
        group_size: Values that share a scale in ``int8`` (None for 256, or where 256 does not divide a width, the
            largest power of two that does, at least 32) and ``nf4`` (None for 64).
        block_share: Whether all blocks of a layer share the generators of one block.
        coft_eps: COFT (arXiv:2306.07280): bound of the Frobenius norm ``||Q||`` of a layer, kept by projection after
            each step; to first order ``||R - I|| <= 2 coft_eps``. None for no bound.
        block_dropout: Probability with which a block is the identity for one forward pass in training.
        rotation_dtype: ``input`` rotates in the dtype of the activations, ``float32`` in fp32.

    Raises:
        ConfigurationError: For a value out of its range, naming the setting and values that would work.
    """

    block_size: int = 32
    parameterization: Parameterization | str = "cayley_neumann"
    storage: Storage | None = None
    group_size: int | None = None
    block_share: bool = False
    coft_eps: float | None = None
    block_dropout: float = 0.0
    rotation_dtype: RotationDtype = "input"

    def __post_init__(self) -> None:
        check_parameterization(self.parameterization)
        check_options(self.coft_eps, self.block_dropout, self.rotation_dtype)
        if self.storage not in OFT_STORAGES:
            raise ConfigurationError(
                f"storage={self.storage!r}: the weight of an OFT layer does not change in training, and needs no "
                "storage for many merges; take dense, int8 or nf4, or null for the format that the layer has"
            )
        check_group_size(self.group_size, self.storage)

    def rotation(self, features: int) -> OftRotation:
        """Return the identity rotation of ``features`` features."""
        return OftRotation(
            features,
            self.block_size,
            self.parameterization,
            block_share=self.block_share,
            coft_eps=self.coft_eps,
            block_dropout=self.block_dropout,
            rotation_dtype=self.rotation_dtype,
        )


class OftLayer(nn.Module):
    """A frozen layer with a learned rotation of its features. A subclass wraps one class of layers of torch.

    Args:
        rotation: The rotation, kept as ``rotation_in`` or ``rotation_out``, by :attr:`side`.
    """

    side: ClassVar[Literal["in", "out"]] = "in"
    """Whether the rotation acts on the input or on the output of the frozen layer."""

    def __init__(self, rotation: OftRotation) -> None:
        super().__init__()
        self.add_module(f"rotation_{self.side}", rotation)

    @classmethod
    def from_settings(
        cls,
        layer: Any,
        settings: OftSettings = OftSettings(),
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
            ConfigurationError: If a size does not fit, naming sizes that would, or the weight cannot be stored so.
        """
        with torch.device(layer.weight.device):
            rotation = cls._rotation_for(layer, settings)
        if not isinstance(layer, nn.Linear):
            if settings.storage in ("int8", "nf4"):
                raise ConfigurationError(
                    f"storage={settings.storage!r}: only linear layers are quantized, not a {type(layer).__name__}; "
                    "set storage to null for this layer (overrides)"
                )
            layer = copy.deepcopy(layer)
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
        """
        self._store(self._effective_weight())
        self.rotation.reset_()

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

    @staticmethod
    def _rotation_for(layer: Any, settings: OftSettings) -> OftRotation:
        """Return the identity rotation of the layer's features."""
        raise NotImplementedError

    @classmethod
    def _around(
        cls, layer: Any, rotation: OftRotation, settings: OftSettings, compute_dtype: torch.dtype | None
    ) -> Self:
        """Return this class around a layer of torch."""
        return cls(layer, rotation)  # type: ignore[call-arg]

    @property
    def _weight(self) -> Any:
        """The frozen weight."""
        raise NotImplementedError

    def _effective_weight(self) -> Tensor:
        """Return the rotated weight in fp32 or wider."""
        raise NotImplementedError

    def _store(self, effective: Tensor) -> None:
        """Store the rotated weight as the frozen weight."""
        self._weight.copy_(effective)
