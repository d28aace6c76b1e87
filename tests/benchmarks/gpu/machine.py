"""Stage 1: the machine, the versions and the commit."""

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpu.device import TORCH_SECONDS, Gpu
from gpu.record import Case

PACKAGES = (
    *("torch", "triton", "lightning", "transformers", "tokenizers", "peft", "bitsandbytes", "datasets"),
    *("jsonargparse", "torchmetrics", "galore-torch"),
)


def cases(machine: Gpu) -> Iterator[Case]:
    """Yield the descriptions of the machine."""
    yield Case("machine", lambda: described(machine))
    yield Case("clocks", lambda: {"clocks": machine.clocks()})
    yield Case("import", imported)
    yield Case("first kernel", lambda: first_kernel(machine))


def described(machine: Gpu) -> dict[str, Any]:
    """Return card, processor, versions and commit."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    where = {"system": platform.platform(), "cores": len(os.sched_getaffinity(0)), "time": time.strftime("%F %T%z")}
    return {**machine.properties(), **where, "versions": versions, "commit": commit()}


def version(name: str) -> str | None:
    """Return the version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of this checkout, with ``+`` where files differ from it; None where there is no repository."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return os.environ.get("ORTHOTRAIN_COMMIT")
    found = head.stdout.strip() + ("+" if changed.stdout.strip() else "")
    return found or os.environ.get("ORTHOTRAIN_COMMIT")


def imported() -> dict[str, Any]:
    """Return the seconds of importing torch and all modules, and whether the modules are those of this checkout."""
    start = time.perf_counter()
    import orthotrain.modules

    seconds, file = time.perf_counter() - start, Path(orthotrain.modules.__file__ or "").resolve()
    here = Path(__file__).resolve().parents[3] in file.parents
    return {"torch_s": TORCH_SECONDS, "orthotrain_s": seconds, "from_this_checkout": here}


def first_kernel(machine: Gpu) -> dict[str, Any]:
    """Return which kernels are chosen, and the seconds of the first and of the second call of one."""
    from orthotrain.kernels import dispatch as backend
    from orthotrain.kernels.skew import skew

    generators = torch.randn(4, 120, device=machine.device)
    with machine.kernels():
        taken = []
        for _ in range(2):
            machine.synchronize()
            start = time.perf_counter()
            skew(generators, 16)
            machine.synchronize()
            taken.append(time.perf_counter() - start)
        return {"kernels": backend.describe(), "first_s": taken[0], "second_s": taken[1]}
