"""Folding the rotations of an adapter into frozen weights, and taking them out again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from orthotrain.adapters.state import adapter_parameters
from orthotrain.console.progress import shown
from orthotrain.errors import ConfigurationError
from orthotrain.layers import OftLayer, OftLinear, QuantizedWeight


@dataclass(eq=False)
class Merge:
    """An adapter that was merged into the frozen weights. Two merges are equal only if they are the same."""

    name: str
    state: dict[str, Tensor]
    left_out: frozenset[str]


def merge_layers(name: str, layers: Mapping[str, OftLayer]) -> dict[str, float]:
    """Fold the rotations of all layers, and log the errors of quantizing weights again.

    Args:
        name: Name of the adapter, for messages.
        layers: Name -> layer.

    Returns:
        Layer name -> relative error (Frobenius norm) of quantizing the rotated weight.
    """
    errors = {}
    with shown(layers.items(), "merging", "layers") as named:
        for layer_name, layer in named:
            layer.merge_()
            if isinstance(layer, OftLinear) and layer.last_merge_error is not None:
                errors[layer_name] = layer.last_merge_error
    if errors:
        worst, mean = max(errors, key=errors.__getitem__), sum(errors.values()) / len(errors)
        rank_zero_info(
            f"merged {name!r}: {len(errors)} weights were quantized again, with a mean relative error of "
            f"{mean:.2%} and at most {errors[worst]:.2%} in {worst}"
        )
    return errors


def check_made_for(name: str, made_for: Sequence[Merge], merges: Sequence[Merge]) -> None:
    """Refuse an adapter ``name`` that was made for other frozen weights.

    Args:
        name: Name of the adapter.
        made_for: The merges in the weights that the adapter was made for.
        merges: The merges in the present weights.

    Raises:
        ConfigurationError: Naming the merges that differ.
    """
    if list(made_for) == list(merges):
        return
    since = ", ".join(merge.name for merge in merges if merge not in made_for)
    undone = ", ".join(merge.name for merge in made_for if merge not in merges)
    weights = f"the weights with {undone} merged" if undone else f"the weights before {since} was merged"
    raise ConfigurationError(
        f"adapter {name!r} was made for {weights}: with the present weights it gives another network; remove it, "
        "reload the base, or pass force=True"
    )


def check_acting(doing: str, name: str, layers: Mapping[str, OftLayer]) -> None:
    """Refuse to merge or unmerge an adapter ``name`` while its rotations do not act, or not alone.

    Raises:
        ConfigurationError: Rotations are disabled, or several adapters act together.
    """
    if not all(layer.enabled for layer in layers.values()):
        raise ConfigurationError(f"the rotations are disabled: call enable() before {doing} adapter {name!r}")
    if any(layer.rotation.instead for layer in layers.values()):
        raise ConfigurationError(f"several adapters act together: leave their with block before {doing} {name!r}")


def check_not_quantized(name: str, layers: Mapping[str, OftLayer]) -> None:
    """Refuse to undo the merge of an adapter ``name`` into quantized weights.

    Raises:
        ConfigurationError: Naming the layer and its storage.
    """
    for layer_name, layer in layers.items():
        if isinstance(layer, OftLinear) and isinstance(layer.weight, QuantizedWeight):
            raise ConfigurationError(
                f"adapter {name!r} cannot be unmerged: {layer_name} is stored in {layer.weight.format}, the merge has "
                "quantized it again, and the values before are lost; load the base again"
            )


@torch.no_grad()
def check_rotations(name: str, layers: Mapping[str, OftLayer]) -> None:
    """Refuse an adapter ``name`` with a rotation that is not finite.

    Raises:
        ConfigurationError: Naming the layer.
    """
    for layer_name, layer in layers.items():
        if not all(bool(torch.isfinite(d).all()) for d in layer.displacements()):
            raise ConfigurationError(
                f"adapter {name!r}: the rotation of {layer_name} holds NaN or infinite values, and nothing was merged; "
                "take values from before its run diverged"
            )


@torch.no_grad()
def write(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy an adapter into a network without a check."""
    for name, parameter in adapter_parameters(network).items():
        parameter.copy_(state[name])


def equal(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Tell whether two adapters have the same names and values."""
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())
