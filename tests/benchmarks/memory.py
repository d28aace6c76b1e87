"""The memory that a process has held at most; a benchmark asks for it in a process for each thing that it measures."""

import resource
import sys
from pathlib import Path


def peak_resident_mib() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    if sys.platform == "linux":  # whose ru_maxrss is at least that of the process that started this one
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
