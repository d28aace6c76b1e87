"""The POET layer: a frozen weight between two learned block rotations."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from orthotrain.kernels.block_rotate import block_rotate
from orthotrain.kernels.poet_linear import poet_linear, serves
from orthotrain.layers.poet.coverage import side_coverage
from orthotrain.layers.poet.poet_settings import PoetSettings
from orthotrain.layers.poet.rotations import Rotations
from orthotrain.layers.poet.route_costs import ROUTES, Route, choose_route
from orthotrain.layers.poet.two_sided import TwoSided
from orthotrain.layers.protocols import SideCoverage
from orthotrain.layers.spectrum import singular_values, with_spectrum
from orthotrain.layers.weights.frozen_weight import FrozenWeight


class PoetLinear(TwoSided):
    """``y = s rot_out(rot_in(x) @ W.T) + bias``: POET's ``W_eff = R_out^T W R_in^T`` (arXiv:2506.08001, equation 1).

    The frozen weight is stored with rows and columns permuted into blocks, so that a forward pass gathers ``x`` once
    and scatters ``y`` once (arXiv:2603.05500, section 3).

    Args:
        weight: The frozen weight ``(out, in)``, rows and columns already permuted into the blocks of both sides.
        bias: ``(out,)`` trained bias, or None.
        rotations: See :class:`TwoSided`.
        settings: The settings of the layer. ``route: auto`` takes the cheaper route for the number of tokens at hand
            (:func:`choose_route`). ``anchor_every`` counts merges and folds.
        seed: See :class:`TwoSided`.

    Example:
        >>> layer = PoetLinear.from_linear(nn.Linear(64, 32), block_size=16)
        >>> layer(torch.ones(2, 64)).shape
        torch.Size([2, 32])
        >>> layer.unwrap()
        Linear(in_features=64, out_features=32, bias=True)
    """

    stepwise = False
    spectrum: Tensor | None

    def __init__(
        self, weight: FrozenWeight, bias: nn.Parameter | None, rotations: Rotations, settings: PoetSettings, seed: int
    ) -> None:
        super().__init__(weight, bias, rotations, settings, seed)
        self.activation_mode = settings.activation_mode
        self.anchor_every = settings.anchor_period
        # filled by the first merge: a decomposition of every layer would slow down the start
        spectrum = torch.zeros(min(weight.out_features, weight.in_features), dtype=torch.float32)
        self.register_buffer("spectrum", spectrum if self.anchor_every else None)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``; under autocast in its dtype, like nn.Linear."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        d_out, d_in = self.rotations.displacements(x.dtype)
        by = {"input": self._by_input, "product": self._by_product, "contraction": self._by_contraction}
        compute = by[self._route(x)]
        if self.activation_mode == "mem" and torch.is_grad_enabled():
            y = checkpoint(compute, x, d_out, d_in, use_reentrant=False, preserve_rng_state=False)
        else:
            y = compute(x, d_out, d_in)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _by_input(self, x: Tensor, d_out: Tensor | None, d_in: Tensor | None) -> Tensor:
        # Autograd keeps only x and the product before the output rotation: the gradient of the frozen product needs W.
        if d_in is not None:
            x = block_rotate(x, d_in, gather=self.rotations.permutations[1])
        y = self._scaled(self.weight.matmul(x), last=d_out is None)
        return y if d_out is None else block_rotate(y, d_out, scatter=self.rotations.permutations[0])

    def _by_product(self, x: Tensor, d_out: Tensor | None, d_in: Tensor | None) -> Tensor:
        return F.linear(x, self._scaled(self.rotations.fold(self.weight.dequantize(x.dtype), d_out, d_in)))

    def _by_contraction(self, x: Tensor, d_out: Tensor | None, d_in: Tensor | None) -> Tensor:
        weight = self.weight.dequantize(x.dtype)
        return self._scaled(poet_linear(x, weight, d_out, d_in, *self.rotations.permutations), last=True)

    def _route(self, x: Tensor) -> Route:
        """Return the route for ``x``: the cheapest one that the setting ``route`` allows."""
        if self.route == "input":
            return "input"
        routes = ROUTES if serves(x) else ROUTES[:-1]
        if self.route == "weight":
            routes = routes[1:]
        b_in, b_out = (0 if r is None else r.block_size for r in (self.rotation_in, self.rotation_out))
        tokens = x.numel() // self.in_features
        return choose_route(routes, tokens, self.in_features, self.out_features, b_in, b_out, x.device, x.dtype)

    def coverage(self, sample: int = 4096) -> dict[str, SideCoverage]:
        """Return which features and pairs of features the blocks of each side have covered since the start.

        Args:
            sample: Number of random pairs of features from which the covered share of all pairs is estimated.
        """
        merges = self._merges.read(self.merge_count)
        with torch.device("cpu"):  # the random generators are on the CPU, whatever the default device is
            return {s: side_coverage(rotation, s, self.seed, merges, sample) for s, rotation in self.sides()}

    def extra_repr(self) -> str:
        """Describe the modes in one line."""
        anchor = f", anchor_every={self.anchor_every}" if self.anchor_every else ""
        return f"route={self.route}, activation_mode={self.activation_mode}, seed={self.seed}{anchor}"

    def _store(self, effective: Tensor) -> None:
        count = self._merges.read(self.merge_count) + self._folds.read(self.fold_count)
        if self.spectrum is not None and count == 1:
            self.spectrum.copy_(singular_values(effective))
        elif self.spectrum is not None and count % self.anchor_every == 0:
            effective = with_spectrum(effective, self.spectrum)
        super()._store(effective)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.spectrum
        super()._apply(fn, recurse)
        if before is not None and self.spectrum is not None and self.spectrum.dtype != before.dtype:
            # in 16 bits the stored spectrum would have the same rounding error that it is meant to correct
            self.spectrum = before.to(self.spectrum.device)
        return self
