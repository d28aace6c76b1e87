"""Building a large network without the weights that are drawn anew: they get memory one layer at a time."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

DRAWS = ("aten::normal_", "aten::uniform_")


def build_without_weights(build: Callable[[], nn.Module], choose: Callable[[nn.Module], Collection[str]]) -> nn.Module:
    """Build a network in which some linear layers have a weight without storage (on the meta device).

    The network is built twice: first without any storage, to ask which layers they are. Every other value is what
    ``build()`` alone would give: the numbers that the chosen weights take from the global generator are drawn too, and
    thrown away.

    Args:
        build: Returns the network; deterministic in the order in which it makes its layers. It only draws the weights
            of linear layers, and does not read them.
        choose: Returns the names of the linear layers of a network whose weight is given later.

    Returns:
        The network; :func:`allocate` gives a weight of those layers its memory.
    """
    # some models name the CPU for a draw of their own
    with torch.random.fork_rng(devices=[]), torch.device("meta"), _numbered() as made:
        skeleton = build()
    chosen = {skeleton.get_submodule(name) for name in choose(skeleton)}
    numbers = frozenset(number for number, linear in enumerate(made) if linear in chosen)
    del skeleton, made, chosen
    with _numbered(numbers), _Discarded(torch.get_default_device()):
        return build()


def allocate(linear: nn.Linear) -> None:
    """Give a linear layer's weight memory on the default device, without values."""
    memory = torch.empty_like(linear.weight, device=torch.get_default_device())
    linear.weight = nn.Parameter(memory, linear.weight.requires_grad)


@contextmanager
def _numbered(without: Collection[int] = ()) -> Iterator[list[nn.Linear]]:
    """Collect the linear layers that are made, in this order; those with a number of ``without`` get no storage."""
    made: list[nn.Linear] = []
    known: set[nn.Module] = set()

    def register(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        # a tied weight is registered a second time
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


class _Discarded(TorchDispatchMode):
    """Takes from the global generator what a draw into a weight without storage would take."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name in DRAWS and isinstance(args[0], Tensor) and args[0].is_meta:
            function(torch.empty(args[0].shape, dtype=args[0].dtype, device=self.device), *args[1:], **(kwargs or {}))
            return args[0]
        return function(*args, **(kwargs or {}))
