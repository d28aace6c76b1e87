"""Singular values of a weight, which rotations keep up to rounding, and bounds of the norm of generators."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle, groupby

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from orthotrain.kernels.skew import block_size_of, skew
from orthotrain.layers.protocols import Mergeable, Scaled, count_numbers, mergeable_layers
from orthotrain.layers.sharding import gathered, whole


@torch.no_grad()
def singular_values(weight: Tensor) -> Tensor:
    """Return the singular values of ``weight (out, in)``, descending, ``(min(out, in),)`` in fp32 or wider."""
    return torch.linalg.svdvals(weight.to(torch.promote_types(weight.dtype, torch.float32)))


def spectral_drift(values: Tensor, start: Tensor) -> float:
    """Return ``max_i |s_i - s_i(start)| / s_1(start)`` for descending singular values ``(r,)``."""
    return float((values - start).abs().max() / start[0])


@torch.no_grad()
def with_spectrum(weight: Tensor, values: Tensor) -> Tensor:
    """Return the matrix with given singular values that is nearest to ``weight`` in the Frobenius norm.

    With ``weight = U S V^T`` it is ``U diag(values) V^T`` (Mirsky, 1960: the values in the same order).

    Args:
        weight: ``(out, in)``, fp32 or wider.
        values: ``(min(out, in),)``, descending.
    """
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    return (left * values.to(weight.dtype)) @ right


def svd_entropy(values: Tensor) -> Tensor:
    """Return the normalized SVD entropy of singular values ``(..., r)``: 1 for a flat spectrum, 0 for rank one.

    ``H = -sum_i p_i log(p_i) / log(r)`` with ``p_i = s_i^2 / sum_j s_j^2`` (Alter, Brown and Botstein, 2000).
    """
    energy = values.double().square()
    share = energy / energy.sum(-1, keepdim=True).clamp_min(1e-300)
    return torch.special.entr(share).sum(-1) / torch.log(torch.tensor(float(max(2, values.shape[-1]))))


BATCH_NUMBERS = 1 << 24
"""Entries of the skew blocks that are measured together: 64 MiB in fp32, whatever the size of the network."""


@torch.no_grad()
def spectral_bound(generators: Tensor) -> Tensor:
    """Return an upper bound of ``||Q||_2`` for each block, ``(n,)``, at most ``(b/2)^(1/8)`` times as large.

    A skew-symmetric Q of size b has eigenvalues ``+-i t_1, ..., +-i t_m`` with m = floor(b/2), and ``||Q||_2`` is the
    largest t. The symmetric ``Q^4`` has the eigenvalues ``t_j^4``, each twice, so ``||Q^4||_F^2 = 2 sum_j t_j^8`` and

        ``max_j t_j <= (sum_j t_j^8)^(1/8) = (||Q^4||_F^2 / 2)^(1/8) <= m^(1/8) max_j t_j``.

    The norm of the generators, ``(||Q||_F^2 / 2)^(1/2)``, is a bound too, but up to ``m^(1/2)`` times too large: at
    b = 256 up to 11.3 times, and this bound up to 1.83 times.

    Args:
        generators: ``(n, b(b-1)/2)``.
    """
    size = block_size_of(generators.shape[1])
    assert size is not None, f"generators of shape {tuple(generators.shape)}"
    lengths = generators.float().norm(dim=1)
    # scaled to length 1: an eighth power of small angles would underflow
    unit = skew(generators.float() / lengths.clamp_min(1e-30)[:, None], size)
    square = unit @ unit
    return lengths * ((square @ square).flatten(1).square().sum(1) / 2).pow(1 / 8)


@torch.no_grad()
def largest_bounds(layers: Mapping[str, Mergeable]) -> Tensor:
    """Return the largest :func:`spectral_bound` of each layer, ``(len(layers),)``, without waiting for the device.

    Blocks of one size are batched over all layers. With sharded generators it is a collective.
    """
    owners = [(index, whole(p)) for index, layer in enumerate(layers.values()) for p in layer.rotation_parameters()]
    owners.sort(key=lambda owner: owner[1].shape[1])  # stable: each rank has the same order
    device = owners[0][1].device
    largest = torch.zeros(len(layers), device=device)
    for batch in _batches(owners):
        indices = torch.tensor([index for index, p in batch for _ in range(p.shape[0])]).to(device, non_blocking=True)
        bounds = spectral_bound(torch.cat([p.detach().to(device) for _, p in batch]))
        largest.scatter_reduce_(0, indices, bounds, "amax")
    return largest


@torch.no_grad()
def limit_norms_(generators: Sequence[Tensor], limit: float) -> Tensor:
    """Scale every block of generators whose :func:`spectral_bound` is larger than ``limit`` down to it, in place.

    Nothing waits for a device. Of sharded generators each rank scales its own blocks.

    Args:
        generators: ``(n, b(b-1)/2)`` each, on one device.
        limit: Largest ``||Q||_2`` of a block.

    Returns:
        Whether any block was scaled, a bool ``()`` on the device. A block within the limit keeps its bits.
    """
    local = [(i, p.to_local() if isinstance(p, DTensor) else p) for i, p in enumerate(generators)]
    largest = []
    for batch in _batches(sorted(local, key=lambda owner: owner[1].shape[1])):
        parts = [p for _, p in batch]
        bounds = spectral_bound(torch.cat(parts))
        factors = (limit / bounds).clamp(max=1)[:, None].split([len(p) for p in parts])
        torch._foreach_mul_(parts, [factor.to(p.dtype) for factor, p in zip(factors, parts, strict=True)])
        largest.append(bounds.max() if len(bounds) else bounds.new_zeros(()))
    return torch.stack(largest).amax() > limit


def _batches(owners: list[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Split generators, sorted by width, into batches of one width and about :data:`BATCH_NUMBERS` entries at most."""
    for width, same in groupby(owners, key=lambda owner: owner[1].shape[1]):
        batch: list[tuple[int, Tensor]] = []
        for owner in same:
            blocks = sum(p.shape[0] for _, p in batch) + owner[1].shape[0]
            if batch and 2 * blocks * width > BATCH_NUMBERS:
                yield batch
                batch = []
            batch.append(owner)
        yield batch


def spread(names: Sequence[str], count: int) -> list[str]:
    """Return ``count`` names of layers in their order, spread over depth and roles; all of them if there are no more.

    Layers whose names differ in numbers only have one role. Roles take turns, each time at a greater depth, so that no
    role is left out because the layers of a block are as many as the steps between chosen names.
    """
    roles: dict[str, list[str]] = {}
    for name in names:
        roles.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(name)
    count, chosen = min(max(count, 0), len(names)), set[str]()
    for left in cycle(roles.values()):
        if len(chosen) == count:
            break
        if left:
            depth = len(chosen) / max(1, count - 1)
            chosen.add(left.pop(round(depth * (len(left) - 1))))
    return [name for name in names if name in chosen]


@torch.no_grad()
def spectrum(layer: Mergeable) -> Tensor:
    """Return the singular values of the merged weight without its trained scale, descending, on the CPU in fp32."""
    with gathered(layer):
        values = singular_values(layer.merged_weight().float().flatten(1)).cpu()
        factor = layer.trained_factor() if isinstance(layer, Scaled) else None
    return values if factor is None else values / factor


COST = 5e11
"""Largest cost of the decompositions of a report, as the sum of numbers ** 1.5: about two minutes on two CPU cores."""


def affordable_layers(model: nn.Module) -> int:
    """Return how many mergeable layers a report watches by default: all that :data:`COST` allows, at least 8."""
    sizes = [count_numbers(layer) for _, layer in mergeable_layers(model) if isinstance(layer, nn.Module)]
    cost = sum(size**1.5 for size in sizes)
    return len(sizes) if cost <= COST else max(8, int(len(sizes) * COST / cost))


@torch.no_grad()
def spectra(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return name -> singular values (fp32, descending) of the merged weights of the named mergeable layers."""
    layers = dict(mergeable_layers(model))
    return {name: spectrum(layers[name]) for name in names}


def spectrum_drift(model: nn.Module, start: dict[str, Tensor]) -> float:
    """Return the largest :func:`spectral_drift` of the watched layers."""
    now = spectra(model, start)
    return max(spectral_drift(now[name], values) for name, values in start.items())
