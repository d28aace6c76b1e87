"""A block-diagonal rotation of permuted features, and displacements that many rotations compute together."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from orthotrain.devices.host_reads import read_waits
from orthotrain.errors import ConfigurationError
from orthotrain.kernels.block_rotate import block_rotate
from orthotrain.kernels.dispatch import traced
from orthotrain.layers.checks import check_block_size, check_feature_permutation, check_kernels
from orthotrain.layers.rotation.generator_marks import known_zero, mark_generators, mark_zero
from orthotrain.plugins import Parameterization, create


class PooledDisplacements:
    """Displacements of rotations that share block size and parameterization.

    Args:
        rotations: All with generators of one dtype and device.

    Attributes:
        traced: Whether the pool was made while torch.compile traces, and so belongs to a graph.
    """

    def __init__(self, rotations: "list[BlockRotation]") -> None:
        self._parameterization, self._block_size = rotations[0].parameterization, rotations[0].block_size
        self._sizes = [rotation.generators.shape[0] for rotation in rotations]
        self._generators = torch.cat([rotation.generators for rotation in rotations])
        self.traced = torch.compiler.is_compiling()
        # the first request may come without gradients (activation checkpointing), later ones with gradients
        self._grad_enabled = torch.is_grad_enabled()
        self._whole: Tensor | None = None
        self._parts: dict[torch.dtype, tuple[Tensor, ...]] = {}

    def part(self, position: int, dtype: torch.dtype | None) -> Tensor:
        """Return the displacements of one rotation in ``dtype``; the first call computes those of all rotations.

        Args:
            position: Index of the rotation among those of the pool.
            dtype: None for that of the generators.
        """
        dtype = dtype or self._generators.dtype
        if dtype not in self._parts:
            with torch.set_grad_enabled(self._grad_enabled):
                self._parts[dtype] = self._computed(dtype).split(self._sizes)
        return self._parts[dtype][position]

    def _computed(self, dtype: torch.dtype) -> Tensor:
        if dtype.itemsize < self._generators.dtype.itemsize:
            return self._parameterization.rounded_displacement(self._generators, self._block_size, dtype)
        if self._whole is None:  # no cached_property: its lock cannot be traced
            self._whole = self._parameterization.displacement(self._generators, self._block_size)
        return self._whole.to(dtype)


class BlockRotation(nn.Module):
    """``x @ R`` with ``n`` learned blocks of size ``b`` on the first ``n * b`` permuted features.

    Block-stochastic POET (arXiv:2506.08001, section 3) has ``n = floor(d / b)`` blocks; features that are left over
    pass through until another permutation puts them into a block. Fully stochastic POET has ``n = 1``. OFT has no
    permutation.

    The generators are trained and start at zero (the identity). They stay in fp32 when the module is cast to a 16-bit
    type, because a bf16 generator would lose the updates of a small learning rate.

    Args:
        features: Width ``d`` of the rotated axis.
        block_size: Size ``b`` of a block, ``2 <= b <= d``.
        parameterization: A :class:`Parameterization`, a registered name, or ``{"class_path": ..., "init_args": ...}``.
        blocks: Number of blocks ``n``; None for as many as fit.
        permutation: ``(d,)`` int64, or ``(d / g,)`` of groups of ``g`` neighbors
            (kernels/permutations.py), or None for the natural order.
        shared: Whether one row of generators serves all blocks.

    Attributes:
        known_identity: Whether the layer is folded at every step, so that no forward pass needs the displacement.

    Raises:
        ConfigurationError: If no block of this size fits, naming sizes that do; if the permutation has another length
            or dtype, or (checked with ``ORTHOTRAIN_DEBUG=1``) is no permutation; or if the chosen kernels cannot run
            here.
    """

    permutation: Tensor | None

    def __init__(
        self,
        features: int,
        block_size: int,
        parameterization: Parameterization | str | dict[str, Any] = "cayley_neumann",
        blocks: int | None = None,
        permutation: Tensor | None = None,
        *,
        shared: bool = False,
    ) -> None:
        super().__init__()
        check_block_size(features, block_size)
        self.features = features
        self.block_size = block_size
        self.blocks = features // block_size if blocks is None else blocks
        if not 1 <= self.blocks <= features // block_size:
            raise ConfigurationError(
                f"blocks={blocks}: a width of {features} takes 1 to {features // block_size} blocks of {block_size}"
            )
        self.parameterization = create(parameterization)
        width = block_size * (block_size - 1) // 2
        self.generators = nn.Parameter(torch.zeros(1 if shared else self.blocks, width, dtype=torch.float32))
        self._mark()
        if not traced(self.generators):  # orthotrain plan uses fake tensors, on any machine
            check_kernels()
        check_feature_permutation(permutation, features)
        self.register_buffer("permutation", permutation)
        self.pooled: tuple[PooledDisplacements, int] | None = None
        self.known_identity = False

    def displacement(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``D = R - I``, ``(n, b, b)``.

        Args:
            dtype: None for that of the generators; in a narrower one see
                :meth:`~orthotrain.plugins.Parameterization.rounded_displacement`.
        """
        # a layer that is compiled alone does not use the pool of an eager network, which is new in every pass
        if self.pooled is not None and self.pooled[0].traced == torch.compiler.is_compiling():
            displacement = self.pooled[0].part(self.pooled[1], dtype)
        else:
            return self.displacement_of(self.generators, dtype or self.generators.dtype)
        return self._of_all_blocks(displacement)

    def displacement_of(self, generators: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``D (n, b, b)`` of other generators, in the shape of :attr:`generators`; see :meth:`displacement`."""
        if dtype.itemsize >= generators.dtype.itemsize:
            displacement = self.parameterization.displacement(generators, self.block_size).to(dtype)
        else:
            displacement = self.parameterization.rounded_displacement(generators, self.block_size, dtype)
        return self._of_all_blocks(displacement)

    def _of_all_blocks(self, displacement: Tensor) -> Tensor:
        if displacement.shape[0] == self.blocks:
            return displacement
        return displacement.expand(self.blocks, -1, -1).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ R`` for ``x (..., d)``, in the dtype of ``x``."""
        return block_rotate(x, self.displacement(x.dtype), self.permutation, self.permutation)

    def moved(self) -> bool:
        """Tell whether the generators are not all zero.

        Generators whose squares underflow, below 1e-23 in fp32, count as zero: they change no weight. Where reading
        values would wait for a device or for ranks, the answer is True unless the generators are known to be zero.
        """
        if isinstance(self.generators, DTensor) or read_waits(self.generators.device):
            return not known_zero(self.generators)
        # a norm is four times faster than any(); a norm of NaN is not zero
        return float(torch.linalg.vector_norm(self.generators.detach())) != 0

    @torch.no_grad()
    def reset_(self, permutation: Tensor | None = None) -> Self:
        """Set the generators to zero and, if given, take the next permutation, from any device."""
        self.generators.zero_()
        mark_zero(self.generators)
        if permutation is not None:
            assert self.permutation is not None
            self.permutation.copy_(permutation, non_blocking=True)
        return self

    def extra_repr(self) -> str:
        """Describe the blocks in one line."""
        layout = "permuted" if self.permutation is not None else "natural order"
        shared = ", shared" if self.generators.shape[0] < self.blocks else ""
        return f"{self.features}, blocks={self.blocks} x {self.block_size}{shared}, {self.parameterization!r}, {layout}"

    def _mark(self) -> None:
        mark_generators(self.generators, self.blocks * self.block_size / self.features)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.permutation is not None:
            check_stored_permutation(state_dict.get(f"{prefix}permutation"), self.permutation, f"{prefix}permutation")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._mark()  # with assign=True the parameter is a new one

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.generators.detach()
        super()._apply(fn, recurse)
        self._mark()
        if self.generators.dtype in (torch.bfloat16, torch.float16):
            self.generators.data = before.to(self.generators.device, torch.float32)
        return self


def check_stored_permutation(stored: Any, own: Tensor, name: str) -> None:
    """Refuse to load a tensor that is no permutation: kernels use it to address memory.

    Args:
        stored: The entry of a state dict, None if there is none.
        own: The permutation that it would replace; torch refuses another shape.
        name: Name of the entry, which contains the name of the layer.

    Raises:
        ConfigurationError: Naming the entry and the fault.
    """
    if not isinstance(stored, Tensor) or stored.shape != own.shape or traced(stored):
        return
    if stored.dtype != torch.int64:
        raise ConfigurationError(f"{name} is {stored.dtype}; a permutation is int64")
    if not torch.equal(stored.sort().values, torch.arange(stored.numel(), device=stored.device)):
        raise ConfigurationError(f"{name} is no permutation: it repeats or leaves out one of {stored.numel()} indices")
