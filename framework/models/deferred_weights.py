"""Builds a large network without storage for weights that are given later, so that they need not exist twice."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

_DRAWS = ("aten::normal_", "aten::uniform_")


def build_without_weights(build: Callable[[], nn.Module], choose: Callable[[nn.Module], Collection[str]]) -> nn.Module:
    """Build a network in which chosen linear layers have a weight without storage (on the meta device).

    The network is built twice, the first time without any storage, so that ``choose`` can name the layers. All other
    values equal those of ``build()`` alone: the random numbers for the chosen weights are drawn and thrown away.

    Args:
        build: Returns the network. It must create its layers in the same order each time. It may draw the weights of
            linear layers, but must not read them.
        choose: Takes the network without storage, and returns the names of the linear layers.

    Returns:
        The network. :func:`allocate` gives a weight its memory.
    """
    # some models draw values on the CPU explicitly
    with torch.random.fork_rng(devices=[]), torch.device("meta"), _collect_linears() as made:
        skeleton = build()
    chosen = {skeleton.get_submodule(name) for name in choose(skeleton)}
    numbers = frozenset(number for number, linear in enumerate(made) if linear in chosen)
    del skeleton, made, chosen
    with _collect_linears(numbers), _DrawAndDiscard(torch.get_default_device()):
        return build()


def allocate(linear: nn.Linear) -> None:
    """Give the weight of a linear layer uninitialized memory on the default device."""
    memory = torch.empty_like(linear.weight, device=torch.get_default_device())
    linear.weight = nn.Parameter(memory, linear.weight.requires_grad)


@contextmanager
def _collect_linears(without: Collection[int] = ()) -> Iterator[list[nn.Linear]]:
    """Collect the linear layers in the order of their creation. Weights with an index in ``without`` get no storage."""
    made: list[nn.Linear] = []
    known: set[nn.Module] = set()

    def register(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        # a tied weight is registered again
        if not isinstance(module, nn.Linear) or name != "weight" or module in known:
            return None
        known.add(module)
        made.append(module)
        return nn.Parameter(parameter.to("meta")) if len(made) - 1 in without else None

    handle = register_module_parameter_registration_hook(register)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        handle.remove()


class _DrawAndDiscard(TorchDispatchMode):
    """Draws the random numbers of a weight without storage from the global generator, and throws them away."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name in _DRAWS and isinstance(args[0], Tensor) and args[0].is_meta:
            function(torch.empty(args[0].shape, dtype=args[0].dtype, device=self.device), *args[1:], **(kwargs or {}))
            return args[0]
        return function(*args, **(kwargs or {}))
