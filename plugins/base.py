"""The base class of the orthogonal parameterizations."""

import math
from abc import ABC, abstractmethod
from inspect import signature
from typing import Any

import torch
from torch import Tensor


class Parameterization(ABC):
    """A smooth map from the generators of skew-symmetric blocks Q to (nearly) orthogonal blocks R.

    A subclass keeps three promises. Zero generators give R = I exactly. To first order R = I + 2Q for every map, so
    that a learning rate means the same for all parameterizations. R is orthogonal, or the docstring says how far from
    orthogonal R is at which norm of Q. A subclass holds no tensors. The arguments of its constructor are plain values
    (numbers, strings, booleans, None), each kept in an attribute of the same name.

    ``orthotrain plugins`` prints the first line of a subclass's docstring.
    """

    registered_name: str | None = None
    """Name given by ``@register``; None for a class that is not registered."""

    _argument_names: tuple[str, ...]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "displacement" in cls.__dict__ and "rounded_displacement" not in cls.__dict__:
            # the subclass has another map than its parent, so it must not inherit the rounded map of the parent
            cls.rounded_displacement = Parameterization.rounded_displacement  # type: ignore[method-assign]

    @abstractmethod
    def displacement(self, generators: Tensor, block_size: int) -> Tensor:
        """Return D = R - I.

        Args:
            generators: Shape ``(n, b(b-1)/2)``, the entries of Q above its diagonal row by row; any floating dtype.
            block_size: Rows and columns b of one block.

        Returns:
            D of shape ``(n, b, b)`` in the dtype of the generators, differentiable in them.

        Raises:
            ValueError: The generators do not fit the block size.
        """

    def rounded_displacement(self, generators: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
        """Return D in the dtype of the activations that it rotates.

        A subclass may override this where a result of few digits is cheaper to compute. Merges never call it.

        Args:
            generators: See :meth:`displacement`.
            block_size: See :meth:`displacement`.
            dtype: Of the result, such as bf16.

        Returns:
            D of shape ``(n, b, b)`` in ``dtype``, off by little more than the rounding to it.
        """
        return self.displacement(generators, block_size).to(dtype)

    def largest_norm(self, error: float) -> float:
        """Return the largest ``||Q||_2`` of a block at which every singular value of R is within ``error`` of 1.

        The base class says infinity, which holds for a map that is orthogonal at every norm; a map that is not
        overrides this.
        """
        return math.inf

    def config(self) -> dict[str, Any]:
        """Return the plain values from which ``create`` builds an equal object, as checkpoints store them.

        Returns:
            ``{"class_path": name, "init_args": {...}}`` with the registered name, or for a class without one its
            dotted import path.
        """
        cls = type(self)
        # A subclass of a registered class is another map and must not be stored under the name of its parent.
        class_path = cls.__dict__.get("registered_name") or f"{cls.__module__}.{cls.__qualname__}"
        return {"class_path": class_path, "init_args": {name: getattr(self, name) for name in cls.argument_names()}}

    @classmethod
    def argument_names(cls) -> tuple[str, ...]:
        """Return the names of the constructor's arguments.

        The names are looked up once for a class, because a network compares its parameterizations in every forward.
        They are kept in a plain attribute, because torch.compile does not see the cache of a cached function.
        """
        if "_argument_names" not in cls.__dict__:
            cls._argument_names = tuple(signature(cls).parameters)
        return cls._argument_names

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.config()["init_args"].items())
        return f"{type(self).__name__}({arguments})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Parameterization):
            return NotImplemented
        return type(self) is type(other) and self.config() == other.config()

    def __hash__(self) -> int:
        return hash((type(self), repr(self)))
