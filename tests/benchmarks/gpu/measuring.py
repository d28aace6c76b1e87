"""Medians of runs that take turns."""

import statistics
from typing import Any

from gpu.device import Gpu, Run


def interleaved(machine: Gpu, runs: dict[str, Run], rounds: int = 8, repeat: int = 3) -> dict[str, dict[str, float]]:
    """Return milliseconds of the device and of the host by name; rounds take turns, so a slow moment meets all runs.

    Args:
        machine: What measures.
        runs: What is measured.
        rounds: Measurements of each, after two that are not counted.
        repeat: Runs in a row, so that the device does not wait for the host.
    """
    rounds, repeat = machine.pick((rounds, repeat), (1, 1))
    times: dict[str, list[Any]] = {name: [] for name in runs}
    for turn in range(rounds + machine.pick(2, 0)):
        for name, run in runs.items():
            measured = machine.timed(run, repeat)
            if turn >= machine.pick(2, 0):
                times[name].append(measured)
    return {
        name: {
            "ms": statistics.median(found.device for found in values),
            "host_ms": statistics.median(found.host for found in values),
        }
        for name, values in times.items()
    }


def peak_mib(machine: Gpu, run: Run, drop: Run) -> float:
    """Return how far one run raises the memory in use, in MiB.

    Args:
        machine: What measures.
        run: What is measured.
        drop: Drops what an earlier run has left, such as gradients, which this one makes again.
    """
    drop()
    machine.reset_peak()
    before = machine.allocated()
    run()
    return machine.peak()["peak_gib"] * 2**10 - before / 2**20
