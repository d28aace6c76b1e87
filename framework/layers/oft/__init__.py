"""OFT layers: a frozen layer with a learned rotation of its input or output."""

import torch
from torch import nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers.oft.oft_conv2d import OftConv2d
from orthotrain.layers.oft.oft_embedding import OftEmbedding
from orthotrain.layers.oft.oft_layer import OftLayer
from orthotrain.layers.oft.oft_linear import OftLinear
from orthotrain.layers.oft.oft_settings import OftSettings

OFT_CLASSES: dict[type[nn.Module], type[OftLayer]] = {kind.wraps: kind for kind in (OftLinear, OftConv2d, OftEmbedding)}
"""Class of a layer of torch -> the OFT layer around it."""


def oft_layer(layer: nn.Module, settings: OftSettings, compute_dtype: torch.dtype | None = None) -> OftLayer:
    """Return the OFT layer around a layer, by the class of the layer; see :meth:`OftLayer.from_settings`.

    Raises:
        ConfigurationError: As :meth:`OftLayer.from_settings`; or if there is no OFT layer for this class.
    """
    for wrapped, kind in OFT_CLASSES.items():
        if isinstance(layer, wrapped):
            return kind.from_settings(layer, settings, compute_dtype=compute_dtype)
    known = ", ".join(f"nn.{wrapped.__name__}" for wrapped in OFT_CLASSES)
    raise ConfigurationError(f"a {type(layer).__name__} cannot be rotated: there are layers for {known}")
