"""Tables of the costs of a POET layer's routes on a device: their paths, and how they are read and checked.

The package has the table ``route_costs.json`` beside this file. ``orthotrain calibrate`` measures a device and writes
``routes.json`` into the user's cache folder; the environment variable ``ORTHOTRAIN_ROUTES`` names another file. A
device that is in neither table takes the first entry of its type; a type other than ``cpu`` without entries takes the
first entry of a GPU, because only ratios of costs decide.
"""

import functools
import json
import os
from contextlib import suppress
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from orthotrain.errors import ConfigurationError

VARIABLE = "ORTHOTRAIN_ROUTES"
"""Environment variable with the path of a table that is read before the table of the package."""

SHIPPED = Path(__file__).with_name("route_costs.json")


@dataclass(frozen=True)
class Costs:
    """Nanoseconds of the parts of a forward and backward pass.

    Attributes:
        multiply_add: A large product, per multiply-add.
        rotate_call: Rotating activations, per rotated side.
        rotate_element: Rotating activations, per element of the activations.
        rotate_column: Rotating activations, per element and column of a block.
        fold_call: Folding both rotations into a weight.
        fold_element: Folding, per element of the weight.
        fold_column: Folding, per element and column of the blocks of both sides.
        contract_call: Contracting the activations of one side, per rotated side. This cost and the next two are None
            where they were not measured; then the contraction is never chosen.
        contract_element: Contracting, per element of the activations.
        contract_column: Contracting, per element and column of a block.
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
        """Return the cost of rotating activations on one side."""
        return self.rotate_call + elements * (self.rotate_element + block_size * self.rotate_column)

    def fold(self, elements: int, block_sizes: int) -> float:
        """Return the cost of folding into a weight; ``block_sizes`` is the sum of the block sizes of its sides."""
        return self.fold_call + elements * (self.fold_element + block_sizes * self.fold_column)

    def contraction(self, width: int, block_size: int) -> tuple[float, float] | None:
        """Return the cost of contracting one side, per token and per call; None where it was not measured.

        Undoing the rotation takes three products of its blocks.
        """
        if self.contract_call is None or self.contract_element is None or self.contract_column is None:
            return None
        undone = 3 * self.multiply_add * width * block_size**2
        return width * (self.contract_element + block_size * self.contract_column), self.contract_call + undone


def costs_for(device_type: str, index: int | None, half: bool) -> Costs:
    """Return the costs of a device, from the user's table if it names the device, else from the package's.

    Args:
        device_type: ``cpu``, ``cuda`` or another type of torch.
        index: Index of the device, None for the current one.
        half: Whether the device computes in 16 bits.

    Raises:
        ConfigurationError: If a table cannot be read or is ill-formed.
    """
    own, cache = os.environ.get(VARIABLE), os.environ.get("ORTHOTRAIN_CACHE")
    return cached_costs(own or _cached_path(cache), own is not None, device_type, device_name(device_type, index), half)


def default_path() -> Path:
    """Return the file in the user's cache folder that ``orthotrain calibrate`` writes and layers read."""
    return Path(_cached_path(os.environ.get("ORTHOTRAIN_CACHE")))


@functools.cache
def device_name(device_type: str, index: int | None = None) -> str:
    """Return the name of a device in tables of costs: the model of a GPU, else the type.

    A CPU with AMX is ``cpu, AMX``: it multiplies in 16 bits several times as fast as other CPUs, and rotates no faster.
    """
    if device_type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(index)
    with suppress(OSError):  # a host without /proc
        if device_type == "cpu" and " amx_bf16" in Path("/proc/cpuinfo").read_text():
            return "cpu, AMX"
    return device_type


def read_table(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a table of costs, ``float32`` and ``half`` of each as :class:`Costs`.

    Raises:
        ConfigurationError: If the file cannot be read or is ill-formed, naming the file and the fault.
    """
    try:
        entries = json.loads(path.read_text())["devices"]
        if not all(isinstance(entry[key], str) for entry in entries for key in ("type", "name")):
            raise ValueError("type and name of a device must be strings")
        return [entry | {key: _checked(entry[key]) for key in ("float32", "half")} for entry in entries]
    except OSError as error:
        raise ConfigurationError(f"table of costs {path} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"table of costs {path} is ill-formed ({type(error).__name__}: {error}); "
            "'orthotrain calibrate' writes a new one; without the file the table of the package is used"
        ) from error


@functools.cache
def cached_costs(path: str, required: bool, device_type: str, name: str, half: bool) -> Costs:
    """Return the costs of a device as :func:`costs_for` does; a process reads each table once.

    Args:
        path: The user's table.
        required: Whether the file must exist.
        device_type: See :func:`costs_for`.
        name: Name of the device (:func:`device_name`).
        half: See :func:`costs_for`.
    """
    key = "half" if half else "float32"
    own = read_table(Path(path)) if required or Path(path).exists() else []
    shipped = read_table(SHIPPED)
    for table in (own, shipped):
        named = [entry for entry in table if entry["type"] == device_type]
        # the entry "cpu" serves every CPU that no other entry names
        fitting = [e for e in named if fnmatchcase(name, e["name"])] + [e for e in named if e["name"] == device_type]
        if fitting:
            return fitting[0][key]
    kind = "cpu" if device_type == "cpu" else "cuda"
    return next(entry[key] for entry in shipped if entry["type"] == kind)


@functools.cache
def _cached_path(cache: str | None) -> str:
    return str(Path(cache or "~/.cache/orthotrain").expanduser() / "routes.json")


def _checked(entry: dict[str, float]) -> Costs:
    names = [field.name for field in fields(Costs)]
    required = [name for name in names if not name.startswith("contract_")]
    if sorted(entry) not in (sorted(names), sorted(required)):
        raise ValueError(
            f"costs are {', '.join(required)}, and all or none of those that begin with contract_; "
            f"found {', '.join(entry)}"
        )
    for name, value in entry.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value!r}, not a number of nanoseconds")
    if not entry["multiply_add"] > 0:
        raise ValueError("multiply_add is 0")
    return Costs(**entry)
