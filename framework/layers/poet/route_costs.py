"""Where a layer rotates: its activations (input-centric) or its weight (weight-centric).

The gradient of a rotated weight's rotations is formed by one of two routes: from the gradient of the weight, a third
large product (``product``), or from the activations on either side (``contraction``, kernels/poet_linear).

What each route costs is predicted from coefficients of the device, ``centre_costs.json`` beside this file; ``orthotrain
calibrate`` measures those of another device. A device that no table names takes the first entry of its type, one of
another type than CPU the first entry of a GPU: only ratios of costs matter.
"""

import functools
import json
import os
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch

from orthotrain.errors import ConfigurationError

Centre = Literal["auto", "input", "weight"]
Route = Literal["input", "product", "contraction"]
ActivationMode = Literal["fast", "mem"]

ROUTES: tuple[Route, ...] = ("input", "product", "contraction")

VARIABLE = "ORTHOTRAIN_CENTRES"
"""Environment variable with the path of a table of costs that comes before the one of the package."""

SHIPPED = Path(__file__).with_name("centre_costs.json")


@dataclass(frozen=True)
class Costs:
    """Nanoseconds of a forward and backward pass, by what they grow with.

    Attributes:
        multiply_add: Of a large product, per multiply-add.
        rotate_call: Of rotating activations, per rotated side.
        rotate_element: The same per element of the activations.
        rotate_column: The same per element and column of a block.
        fold_call: Of folding both rotations into a weight.
        fold_element: The same per element of the weight.
        fold_column: The same per element and column of the blocks of both sides.
        contract_call: Of contracting the activations on one side, per rotated side. It and the next two are None where
            they were not measured: then that route is not taken.
        contract_element: The same per element of the activations.
        contract_column: The same per element and column of a block.
    """

    multiply_add: float
    rotate_call: float
    rotate_element: float
    rotate_column: float
    fold_call: float
    fold_element: float
    fold_column: float
    contract_call: float | None = None
    contract_element: float | None = None
    contract_column: float | None = None

    def rotation(self, elements: int, block_size: int) -> float:
        """Return what rotating activations costs on one side."""
        return self.rotate_call + elements * (self.rotate_element + block_size * self.rotate_column)

    def fold(self, elements: int, block_sizes: int) -> float:
        """Return what folding into a weight costs, for the sum of the block sizes of its sides."""
        return self.fold_call + elements * (self.fold_element + block_sizes * self.fold_column)

    def contraction(self, width: int, block_size: int) -> tuple[float, float] | None:
        """Return what contracting a side costs, per token and apart from that; None where it was not measured.

        Undoing the rotation takes three products of its blocks.
        """
        if self.contract_call is None or self.contract_element is None or self.contract_column is None:
            return None
        undone = 3 * self.multiply_add * width * block_size**2
        return width * (self.contract_element + block_size * self.contract_column), self.contract_call + undone


def choose_centre(
    tokens: int,
    d_in: int,
    d_out: int,
    b_in: int,
    b_out: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Literal["input", "weight"]:
    """Choose the centre of the cheapest route; arguments and errors are those of :func:`choose_route`."""
    route = choose_route(ROUTES, tokens, d_in, d_out, b_in, b_out, device, dtype)
    return "input" if route == "input" else "weight"


def choose_route(
    routes: tuple[Route, ...],
    tokens: int,
    d_in: int,
    d_out: int,
    b_in: int,
    b_out: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Route:
    """Choose the cheapest route for one forward and backward pass.

    The choice follows from shapes, dtype, the name of the device and the table of costs alone: ranks agree.

    Args:
        routes: Which to choose from; one whose costs the table does not have is left out, never the first.
        tokens: Rows of the activations, ``N``.
        d_in: Width of the input.
        d_out: Width of the output.
        b_in: Block size of the input side, 0 if it is not rotated.
        b_out: Block size of the output side, 0 if it is not rotated.
        device: Where the layer computes.
        dtype: What it computes in.

    Raises:
        ConfigurationError: If a table of costs cannot be read, naming the file.
    """
    (best, slope, start), *others = route_costs(routes, d_in, d_out, b_in, b_out, device, dtype)
    for route, per_token, once in others:
        if (slope - per_token) * tokens + (start - once) > 0:
            best, slope, start = route, per_token, once
    return best


# torch.compile shall see constants, not how a file is read
@torch.compiler.assume_constant_result
def route_costs(
    routes: tuple[Route, ...],
    d_in: int,
    d_out: int,
    b_in: int,
    b_out: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> tuple[tuple[Route, float, float], ...]:
    """Return the nanoseconds of each route: per token, and apart from that.

    The products with ``W`` are two; ``product`` adds the weight gradient, a third, and ``contraction`` of the fold only
    its forward pass, a third of its work. Arguments and errors are those of :func:`choose_route`.
    """
    kind, index = (device, None) if isinstance(device, str) else (device.type, device.index)
    costs, elements = costs_for(kind, index, dtype.itemsize < 4), d_in * d_out
    sides = [(d_in, b_in)] * bool(b_in) + [(d_out, b_out)] * bool(b_out)
    products, fold = 2 * costs.multiply_add * elements, costs.fold(elements, b_in + b_out)
    rotated = sum(costs.rotation(width, size) - costs.rotate_call for width, size in sides)
    found: dict[Route, tuple[float, float]] = {
        "input": (products + rotated, len(sides) * costs.rotate_call),
        "product": (1.5 * products, fold),
    }
    contracted = [costs.contraction(width, size) for width, size in sides]
    if None not in contracted:
        found["contraction"] = (
            products + sum(c[0] for c in contracted if c),
            fold / 3 + sum(c[1] for c in contracted if c),
        )
    return tuple((route, *found[route]) for route in routes if route in found)


def costs_for(device_type: str, index: int | None, half: bool) -> Costs:
    """Return the costs of a device: of the user's table if it names the device, else of the package's.

    Args:
        device_type: ``cpu``, ``cuda`` or another of torch's.
        index: Which of them, None for the current one.
        half: Whether it computes in 16 bits.

    Raises:
        ConfigurationError: If a table cannot be read or is ill-formed.
    """
    own, cache = os.environ.get(VARIABLE), os.environ.get("ORTHOTRAIN_CACHE")
    return cached_costs(own or _cached_path(cache), own is not None, device_type, device_name(device_type, index), half)


def default_path() -> Path:
    """Return where ``orthotrain calibrate`` writes and layers look: a file in the cache folder of the user."""
    return Path(_cached_path(os.environ.get("ORTHOTRAIN_CACHE")))


def device_name(device_type: str, index: int | None = None) -> str:
    """Return the name that a table of costs has for a device: the model of a GPU, else the type.

    A CPU with AMX, ``cpu, AMX``, multiplies in 16 bits several times as fast as others, and rotates no faster.
    """
    if device_type == "cuda" and torch.cuda.is_available():
        return _gpu_name(index)
    return _cpu_name() if device_type == "cpu" else device_type


def read_table(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a table of costs; ``float32`` and ``half`` of each as :class:`Costs`.

    Raises:
        ConfigurationError: If it cannot be read or is ill-formed, naming the file and what is wrong.
    """
    try:
        entries = json.loads(path.read_text())["devices"]
        return [entry | {key: _checked(entry[key]) for key in ("float32", "half")} for entry in _named(entries)]
    except OSError as error:
        raise ConfigurationError(f"table of costs {path} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"table of costs {path} is ill-formed ({type(error).__name__}: {error}); "
            "'orthotrain calibrate' writes one, and without it the table of the package is used"
        ) from error


@functools.cache
def cached_costs(path: str, required: bool, device_type: str, name: str, half: bool) -> Costs:
    """Return what :func:`costs_for` does, of the table at ``path`` if it is there; it is read once in a process."""
    key = "half" if half else "float32"
    own = read_table(Path(path)) if required or Path(path).exists() else []
    shipped = read_table(SHIPPED)
    for table in (own, shipped):
        named = [entry for entry in table if entry["type"] == device_type]
        # an entry called cpu serves every CPU that no other names more closely
        fitting = [e for e in named if fnmatchcase(name, e["name"])] + [e for e in named if e["name"] == device_type]
        if fitting:
            return fitting[0][key]
    kind = "cpu" if device_type == "cpu" else "cuda"
    return next(entry[key] for entry in shipped if entry["type"] == kind)


@functools.cache
def _cached_path(cache: str | None) -> str:
    return str(Path(cache or "~/.cache/orthotrain").expanduser() / "centres.json")


@functools.cache
def _cpu_name() -> str:
    try:
        return "cpu, AMX" if " amx_bf16" in Path("/proc/cpuinfo").read_text() else "cpu"
    except OSError:
        return "cpu"


@functools.cache
def _gpu_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def _named(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for entry in entries:
        if not isinstance(entry["type"], str) or not isinstance(entry["name"], str):
            raise ValueError("type and name of a device are words")
    return entries


def _checked(found: dict[str, float]) -> Costs:
    names = [field.name for field in fields(Costs)]
    required = [name for name in names if not name.startswith("contract_")]
    if sorted(found) not in (sorted(names), sorted(required)):
        raise ValueError(
            f"costs are {', '.join(required)}, and all or none of those of contract_; found {', '.join(found)}"
        )
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value!r}, not a number of nanoseconds")
    if not found["multiply_add"] > 0:
        raise ValueError("multiply_add is 0")
    return Costs(**found)
