"""Several optimizers, each with its own parameters, that step as one."""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class CompositeOptimizer(Optimizer):
    """One optimizer made of several, so that the trainer, schedules and checkpoints see a single one.

    The parameter groups are the same objects as in the parts, so a schedule sets the ``lr`` of the parts.

    Args:
        parts: Optimizers without a common parameter.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([p for part in self.parts for group in part.param_groups for p in group["params"]], {})
        self.state = PartStates(self.parts)  # type: ignore[assignment]
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Call the closure once, then take a step with every part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parts."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the parts as the state of one optimizer; parameters are numbered through all parts."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for part, first in self._numbered():
            of_part = part.state_dict()
            state |= {first + number: values for number, values in of_part["state"].items()}
            groups += [{**g, "params": [first + number for number in g["params"]]} for g in of_part["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore every part."""
        groups = list(state_dict["param_groups"])
        for part, first in self._numbered():
            count = len(part.param_groups)
            own, groups = groups[:count], groups[count:]
            numbers = {number for group in own for number in group["params"]}
            state = {number - first: values for number, values in state_dict["state"].items() if number in numbers}
            own = [{**group, "params": [number - first for number in group["params"]]} for group in own]
            part.load_state_dict({"state": state, "param_groups": own})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def _numbered(self) -> Iterator[tuple[Optimizer, int]]:
        """Yield every part and the number of its first parameter."""
        first = 0
        for part in self.parts:
            yield part, first
            first += sum(len(group["params"]) for group in part.param_groups)


class PartStates(MutableMapping[Tensor, Any]):
    """The per-parameter states of several optimizers as one mapping.

    Args:
        parts: The optimizers.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self._parts = parts

    def __getitem__(self, parameter: Tensor) -> Any:
        for part in self._parts:
            if parameter in part.state:
                return part.state[parameter]
        raise KeyError(parameter)

    def __setitem__(self, parameter: Tensor, state: Any) -> None:
        owner = next(p for p in self._parts for g in p.param_groups if any(q is parameter for q in g["params"]))
        owner.state[parameter] = state

    def __delitem__(self, parameter: Tensor) -> None:
        for part in self._parts:
            if parameter in part.state:
                del part.state[parameter]
                return
        raise KeyError(parameter)

    def __iter__(self) -> Iterator[Tensor]:
        for part in self._parts:
            yield from part.state

    def __len__(self) -> int:
        return sum(len(part.state) for part in self._parts)
