"""The OFT layer for convolutions: a rotation of the input channels before a frozen kernel."""

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from orthotrain.layers.checks import check_divides
from orthotrain.layers.oft.oft_rotation import OftRotation, RotationDtype
from orthotrain.plugins import Parameterization


class OftConv2d(nn.Module):
    """``y = conv(rot_in(x))``, the rotation acting on the channels of every pixel alike.

    **Which rotation.** Rotating unfolded patches (``C k^2`` wide) and folding them back sums every pixel once per patch
    that holds it, so it is not the identity at the start, and costs ``k^2`` times the work. Rotating channels
    is a 1x1 map: at zero generators ``D = 0`` and ``x + x D = x`` exactly, whatever the convolution does next.

    **The weight that computes the same.** Padding writes zeros or copies pixels, stride and dilation select pixels, and
    a map of channels that is the same at every pixel commutes with all three (``0 R = 0``). With the pixels at offset
    ``p`` under kernel position ``p``,

        y[o] = sum_p sum_c' W[o, c', p] (sum_c x[c, p] R[c, c']) = sum_p sum_c (W R^T)[o, c, p] x[c, p],

    so ``W_eff[:, :, p] = W[:, :, p] R^T`` and merging is exact up to one rounding of ``W``. With groups, the outputs of
    group j see the inputs of group j only; blocks divide ``C / groups``, so none crosses a group and ``W_eff`` has the
    shape of ``W``.

    Args:
        conv: The frozen convolution; it is held, its weight no longer trained.
        rotation_in: Rotation of the ``C`` input channels.
    """

    def __init__(self, conv: nn.Conv2d, rotation_in: OftRotation) -> None:
        super().__init__()
        conv.weight.requires_grad_(False)
        self.conv = conv
        self.rotation_in = rotation_in

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        block_size: int = 32,
        parameterization: Parameterization | str | dict[str, Any] = "cayley_neumann",
        *,
        block_share: bool = False,
        coft_eps: float | None = None,
        block_dropout: float = 0.0,
        rotation_dtype: RotationDtype = "input",
        train_bias: bool = False,
    ) -> Self:
        """Wrap a copy of a convolution without changing its function.

        Args:
            conv: Any ``nn.Conv2d``: kernel, stride, padding, padding mode, dilation and groups are kept.
            block_size: Size of the rotated blocks; must divide the input channels of one group.
            parameterization: A :class:`Parameterization`, a registered name or its configuration.
            block_share: See :class:`OftRotation`.
            coft_eps: See :class:`OftRotation`.
            block_dropout: See :class:`OftRotation`.
            rotation_dtype: See :class:`OftRotation`.
            train_bias: Whether the bias is trained; the weight never is.

        Raises:
            ConfigurationError: If the block size does not fit, naming what would.
        """
        channels = conv.in_channels // conv.groups
        check_divides("block_size", block_size, channels, f"the {channels} input channels of a group", minimum=2)
        with torch.device(conv.weight.device):
            rotation = OftRotation(
                conv.in_channels,
                block_size,
                parameterization,
                block_share=block_share,
                coft_eps=coft_eps,
                block_dropout=block_dropout,
                rotation_dtype=rotation_dtype,
            )
        conv = copy.deepcopy(conv)
        if conv.bias is not None:
            conv.bias.requires_grad_(train_bias)
        return cls(conv, rotation)

    @property
    def enabled(self) -> bool:
        """Whether the rotation acts; without it the layer computes what the wrapped one did."""
        return self.rotation_in.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.rotation_in.enabled = value

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., C, H, W)`` to ``(..., out, H', W')``; under autocast in its dtype, like nn.Conv2d."""
        if torch.is_autocast_enabled(x.device.type) and self.rotation_in.rotation_dtype == "input":
            x = x.to(torch.get_autocast_dtype(x.device.type))
        # channels_last rotates without a copy; the layout leaves as it came, since backends choose by it
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        rotated = self.rotation_in(x.movedim(-3, -1)).movedim(-1, -3)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return self.conv(rotated.contiguous(memory_format=layout))

    @torch.no_grad()
    def merge_(self) -> None:
        """Fold the rotation into the frozen weight, rotated in fp32 and rounded once, and reset it to the identity.

        Raises:
            ConfigurationError: If the rotation is disabled.
        """
        self.conv.weight.copy_(self.merged_weight())
        self.rotation_in.reset_()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return ``W R^T`` in the shape and dtype of the weight, ``(out, C / groups, kh, kw)``."""
        weight, groups = self.conv.weight, self.conv.groups
        # (group, out, in, kh, kw) -> (out, kh, kw, group, in): the last two are the C channels that R acts on
        columns = weight.unflatten(0, (groups, -1)).permute(1, 3, 4, 0, 2)
        folded = self.rotation_in.fold(columns.flatten(-2)).view(columns.shape)
        # into the strides of the weight: backends choose by them, too
        return torch.empty_like(weight).copy_(folded.permute(3, 0, 4, 1, 2).flatten(0, 1))

    def rotation_parameters(self) -> list[nn.Parameter]:
        """Return the generators."""
        return [self.rotation_in.generators]

    def displacements(self) -> list[Tensor]:
        """Return ``D = R - I``, ``(n, b, b)``, alone in a list."""
        return [self.rotation_in.displacement()]

    @torch.no_grad()
    def unwrap(self) -> nn.Conv2d:
        """Return the plain convolution that computes the same, with the merged weight and this layer's bias."""
        conv = copy.copy(self.conv)
        conv._parameters = {**self.conv._parameters, "weight": nn.Parameter(self.merged_weight())}
        return conv

    def project_(self) -> None:
        """Bring the generators back to COFT's bound; see :meth:`OftRotation.project_`."""
        self.rotation_in.project_()
