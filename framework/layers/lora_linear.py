"""The LoRA layer, a baseline: a low-rank update of a frozen weight."""

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthotrain.devices.host_reads import HostCount
from orthotrain.errors import ConfigurationError
from orthotrain.kernels.operation import without_autocast
from orthotrain.layers.protocols import check_stored_counts
from orthotrain.layers.weights.frozen_weight import DenseWeight, FrozenWeight, plain_linear
from orthotrain.layers.weights.rounding import Noise
from orthotrain.seeding import generator


class LoraLinear(nn.Module):
    """``y = x @ (W + alpha / r * B A).T + bias`` (LoRA, arXiv:2106.09685, equation 3).

    Merging the update from time to time and starting a new one is ReLoRA (arXiv:2307.05695, section 3): the sum of many
    updates of rank r has a higher rank.

    Args:
        weight: The frozen weight ``(out, in)``.
        bias: ``(out,)`` trained bias, or None.
        rank: Rank r of the update, at most the smaller width.
        alpha: Numerator of the factor of the update.
        seed: Seed of A; merge k draws it from (seed, k).

    Raises:
        ConfigurationError: If the rank does not fit.
    """

    merge_count: Tensor

    def __init__(
        self, weight: FrozenWeight, bias: nn.Parameter | None, rank: int, alpha: float, *, seed: int = 0
    ) -> None:
        super().__init__()
        widest = min(weight.out_features, weight.in_features)
        if not 1 <= rank <= widest:
            raise ConfigurationError(f"rank={rank!r}: a {weight.out_features} x {weight.in_features} weight takes "
                                     f"1 to {widest}")  # fmt: skip
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.weight = weight
        self.bias = bias
        self.scale = alpha / rank
        self.seed = seed
        self.down = nn.Parameter(torch.empty(rank, self.in_features, dtype=torch.float32))
        self.up = nn.Parameter(torch.empty(self.out_features, rank, dtype=torch.float32))
        self.register_buffer("merge_count", torch.zeros((), dtype=torch.int64))
        self._merges = HostCount()
        self._restart(0)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int = 64, alpha: float | None = None, *, seed: int = 0) -> Self:
        """Wrap a linear layer without changing its function.

        Args:
            linear: Any ``nn.Linear``; its weight and bias are taken over.
            rank: See the class.
            alpha: See the class; None for ``rank``, a factor of 1.
            seed: See the class.
        """
        with torch.device(linear.weight.device):
            return cls(DenseWeight(linear.weight), linear.bias, rank, rank if alpha is None else alpha, seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``; under autocast in its dtype, like nn.Linear."""
        down, up = (self.down, self.up) if torch.is_autocast_enabled(x.device.type) else (
            self.down.to(x.dtype), self.up.to(x.dtype))  # fmt: skip
        return self.weight.matmul(x, self.bias) + self.scale * F.linear(F.linear(x, down), up)

    @torch.no_grad()
    def merge_(self) -> None:
        """Add the update to the frozen weight and start a new one at zero."""
        effective = self._effective_weight()
        count = self._merges.advance(self.merge_count)
        self.weight.assign_(effective, Noise(self.seed, count, "rounding"))
        self._restart(count)

    def read_counts(self) -> None:
        """Read the count of merges from the device, so that the next merge does not make the host wait."""
        self._merges.read(self.merge_count)

    def merged_weight(self) -> Tensor:
        """Return ``W + alpha / r * B A`` ``(out, in)``, rounded to the dtype of the frozen weight."""
        return self._effective_weight().to(self.weight.dtype)

    def rotation_parameters(self) -> list[nn.Parameter]:
        """Return both factors: the parameters that a merge resets."""
        return [self.down, self.up]

    def displacements(self) -> list[Tensor]:
        """Return nothing: the update is no rotation."""
        return []

    @torch.no_grad()
    def unwrap(self) -> nn.Linear:
        """Return an ``nn.Linear`` that computes the same."""
        return plain_linear(self.merged_weight(), self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        check_stored_counts(state_dict, prefix, ("merge_count",))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @torch.no_grad()
    def _effective_weight(self) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with without_autocast(self.down.device.type):
            return self.weight.dequantize(dtype) + self.scale * (self.up @ self.down).to(dtype)

    @torch.no_grad()
    def _restart(self, count: int) -> None:
        # the uniform values of nn.Linear's own initialization, as in the paper's code
        self.up.zero_()
        if not self.down.is_meta:
            bound = 1 / math.sqrt(self.in_features)
            values = torch.rand(self.down.shape, generator=generator(self.seed, count, "down"), device="cpu")
            self.down.copy_((2 * values - 1) * bound)
