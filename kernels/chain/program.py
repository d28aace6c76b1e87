"""Chains of matrix products as data. The Triton code of the parameterizations computes its polynomials by them.

Every step is a weighted sum of matrices plus a sum of products. launch.py runs a chain in one launch, or for large
blocks in one launch a step.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

FUSED = 64
"""Largest block that one program computes as a whole."""

FIRST, SECOND = 0, 1
"""Numbers of the two inputs; the targets of the steps are numbered after them, in order."""

MAX_TERMS, MAX_PRODUCTS = 3, 2


class Step(NamedTuple):
    """``target = sum(coefficient * matrix) + factor * sum(left @ right)``; the target is no operand of its own step."""

    target: int
    terms: tuple[tuple[int, float], ...]
    products: tuple[tuple[int, int], ...]
    factor: float


class Chain(NamedTuple):
    """Steps in order; the target of the last one is the result.

    Attributes:
        steps: The steps.
        slots: Number of matrices that a block needs at the same time, with its inputs.
        inputs: Number of inputs: one, or two for a gradient, whose first input is read transposed.
        scale: Factor by which the inputs are multiplied when they are read.
    """

    steps: tuple[Step, ...]
    slots: int
    inputs: int
    scale: float

    def products(self) -> int:
        """Return the number of matrix products, 2b^3 FLOPs each."""
        return sum(len(step.products) for step in self.steps)


class ChainBuilder:
    """Records steps, each of which writes a new matrix, and reuses the slots of matrices that are no longer needed.

    Args:
        inputs: Number of inputs, one or two.
    """

    def __init__(self, inputs: int) -> None:
        self._inputs = inputs
        self._steps: list[Step] = []

    def step(self, *products: tuple[int, int], terms: Sequence[tuple[int, float]] = (), factor: float = 1.0) -> int:
        """Record ``sum of terms + factor * sum of products`` and return the number of the matrix.

        Args:
            products: Pairs of matrices to multiply, ``MAX_PRODUCTS`` at most.
            terms: Pairs of a matrix and its coefficient, ``MAX_TERMS`` at most.
            factor: Coefficient of the products.
        """
        assert len(products) <= MAX_PRODUCTS and len(terms) <= MAX_TERMS
        target = self._inputs + len(self._steps)
        self._steps.append(Step(target, tuple(terms), products, factor))
        return target

    def build(self, scale: float = 1.0) -> Chain:
        """Return the chain whose result is the last step; the inputs keep their slots throughout."""
        last_use = {matrix: number for number, step in enumerate(self._steps) for matrix in _operands(step)}
        slot = {number: number for number in range(self._inputs)}
        busy_until = [len(self._steps)] * self._inputs
        steps = []
        for number, step in enumerate(self._steps):
            slot[step.target] = _free_slot(busy_until, number, last_use.get(step.target, number))
            steps.append(_renamed(step, slot.__getitem__))
        return Chain(tuple(steps), len(busy_until), self._inputs, scale)


def _operands(step: Step) -> list[int]:
    return [matrix for matrix, _ in step.terms] + [matrix for pair in step.products for matrix in pair]


def _free_slot(busy_until: list[int], now: int, last_use: int) -> int:
    """Reserve and return a slot that neither this step nor a later one reads; a new slot if there is none."""
    for index, until in enumerate(busy_until):
        if until < now:
            busy_until[index] = last_use
            return index
    busy_until.append(last_use)
    return len(busy_until) - 1


def _renamed(step: Step, name: Callable[[int], int]) -> Step:
    return Step(
        name(step.target),
        tuple((name(matrix), coefficient) for matrix, coefficient in step.terms),
        tuple((name(left), name(right)) for left, right in step.products),
        step.factor,
    )
