"""The OFT layer for convolutions: a rotation of the input channels before a frozen kernel."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from orthotrain.layers.checks import check_divides
from orthotrain.layers.oft.oft_layer import OftLayer, WeightInfo
from orthotrain.layers.oft.oft_rotation import OftRotation


class OftConv2d(OftLayer):
    """``y = conv(rot_in(x))``, the rotation acting on the channels of every pixel alike.

    **Which rotation.** Rotating unfolded patches (``C k^2`` wide) and folding the patches back sums every pixel once
    per patch. That is not the identity at the start, and takes ``k^2`` times the work. Rotating channels is a 1x1 map:
    at zero generators ``D = 0`` and ``x + x D = x`` exactly, whatever the convolution does next.

    **The merged weight.** Padding writes zeros or copies pixels, stride and dilation select pixels. A map of channels
    that is the same at every pixel commutes with all three (``0 R = 0``). With the pixels at offset ``p`` under kernel
    position ``p``,

        y[o] = sum_p sum_c' W[o, c', p] (sum_c x[c, p] R[c, c']) = sum_p sum_c (W R^T)[o, c, p] x[c, p],

    so ``W_eff[:, :, p] = W[:, :, p] R^T``, and merging is exact up to one rounding of ``W``. With groups, the outputs
    of group j see only the inputs of group j. Blocks divide ``C / groups``, so no block crosses a group, and ``W_eff``
    has the shape of ``W``.

    Args:
        conv: The frozen convolution.
        rotation_in: Rotation of the ``C`` input channels.
    """

    wraps, width = nn.Conv2d, "in_channels"
    rotation_in: OftRotation

    def __init__(self, conv: nn.Conv2d, rotation_in: OftRotation) -> None:
        super().__init__(rotation_in)
        channels = conv.in_channels // conv.groups
        check_divides(
            "block_size", rotation_in.block_size, channels, f"the {channels} input channels of a group", minimum=2
        )
        self.conv = conv
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.padding, self.dilation = conv.padding, conv.dilation

    @property
    def weight(self) -> WeightInfo:
        """Shape, dtype and device of the frozen kernel."""
        return self._info()

    @property
    def bias(self) -> Tensor | None:
        """The bias of the convolution."""
        return self.conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., C, H, W)`` to ``(..., out, H', W')``; under autocast in its dtype, like nn.Conv2d."""
        if torch.is_autocast_enabled(x.device.type) and self.rotation_in.rotation_dtype == "input":
            x = x.to(torch.get_autocast_dtype(x.device.type))
        # channels_last rotates without a copy; the output keeps the layout of the input, by which backends choose
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        rotated = self.rotation_in(x.movedim(-3, -1)).movedim(-1, -3)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return self.conv(rotated.contiguous(memory_format=layout))

    @property
    def _frozen(self) -> nn.Conv2d:
        return self.conv

    def _effective_weight(self, error: Callable[[], str] | None = None, inverse: bool = False) -> Tensor:
        weight, groups = self.conv.weight, self.conv.groups
        # (group, out, in, kh, kw) -> (out, kh, kw, group, in): the last two are the C channels that R acts on
        columns = weight.unflatten(0, (groups, -1)).permute(1, 3, 4, 0, 2)
        folded = self.rotation_in.fold(columns.flatten(-2), error=error, inverse=inverse).view(columns.shape)
        # with the strides of the weight, by which backends choose
        return torch.empty_like(weight, dtype=folded.dtype).copy_(folded.permute(3, 0, 4, 1, 2).flatten(0, 1))
