"""All calls of CUDA that the stages make, and what replaces them on a CPU in a rehearsal.

Every other line of the stages is the same on both, so that a rehearsal finds its errors before the first run on a GPU.
"""

import contextlib
import gc
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar
from unittest import mock

_BEFORE = time.perf_counter()
import torch  # noqa: E402

TORCH_SECONDS = time.perf_counter() - _BEFORE
"""Time of the import of torch, if this module was the first to import it."""

Run = Callable[[], Any]
T = TypeVar("T")
GIB = 2**30
LEFT_OVER = GIB
"""Bytes that a case may leave without a garbage collection, which can take longer than a case."""


class Times(NamedTuple):
    """Milliseconds of a run by the device's events, and until the host had given it all to the device."""

    device: float
    host: float


class Gpu:
    """The current CUDA device. It is not initialised before the first call."""

    rehearsal = False
    device = torch.device("cuda")
    accelerator = "gpu"

    def pick(self, real: T, small: T) -> T:
        """Return the size of a real run, or the one of a rehearsal."""
        return real

    def name(self) -> str:
        """Return the model of the card."""
        return torch.cuda.get_device_name()

    def properties(self) -> dict[str, Any]:
        """Return what the card is."""
        found = torch.cuda.get_device_properties(self.device)
        return {
            "capability": f"{found.major}.{found.minor}",
            "memory_gib": round(found.total_memory / GIB, 2),
            "multiprocessors": found.multi_processor_count,
            "l2_mib": round(found.L2_cache_size / 2**20, 1),
            "cuda": torch.version.cuda,
        }

    def clocks(self) -> dict[str, str]:
        """Return clocks, power and temperature of this moment, as nvidia-smi tells them."""
        names = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "temperature.gpu")
        command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True).stdout
        return dict(zip(names, (value.strip() for value in told.strip().split(",")), strict=True))

    def synchronize(self) -> None:
        """Wait until the device has finished all work."""
        torch.cuda.synchronize()

    def timed(self, run: Run, repeat: int = 1) -> Times:
        """Return the time of one of ``repeat`` runs in a row."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start = time.perf_counter()
        begin.record()
        for _ in range(repeat):
            run()
        end.record()
        host = time.perf_counter() - start
        end.synchronize()
        return Times(begin.elapsed_time(end) / repeat, 1e3 * host / repeat)

    def captured(self, run: Run) -> Run:
        """Return what replays a run as a CUDA graph.

        Args:
            run: Reads and writes tensors that stay in place. It begins by dropping the gradients, which are then
                allocated in the memory of the graph and written, not added to, by each replay.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # not the default one, as in the capture: kernels are compiled here
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def launches(self, run: Run) -> int:
        """Return how many kernels, copies and fills one run starts.

        Raises:
            RuntimeError: The profiler saw none.
        """
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        count = _device_events(run, activities, self.synchronize)
        if not count:
            raise RuntimeError("the profiler saw no kernel: it may not be allowed to look at this card")
        return count

    def reset_peak(self) -> None:
        """Begin a new measurement of the peak. Memory that only the allocator keeps is given back first."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def allocated(self) -> int:
        """Return the bytes of tensors."""
        return torch.cuda.memory_allocated()

    def peak(self) -> dict[str, float]:
        """Return the largest GiB since the last reset: of tensors, and with what the allocator kept beside them."""
        torch.cuda.synchronize()
        return {
            "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 4),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 4),
        }

    @contextlib.contextmanager
    def within(self, gib: float) -> Iterator[None]:
        """Let this process have no more than so many GiB, as a card of that size would (without CUDA's own part)."""
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def release(self) -> None:
        """Give unused memory back to the device, after a garbage collection if the case has left much behind."""
        if self.allocated() > LEFT_OVER:
            gc.collect()
        torch.cuda.empty_cache()

    def is_lost(self, error: BaseException) -> bool:
        """Tell whether the process has lost the device: after most errors of CUDA every later call fails."""
        if isinstance(error, torch.OutOfMemoryError):
            return False
        try:
            torch.cuda.synchronize()
            return bool(torch.ones(1, device=self.device).item() != 1)
        except Exception:
            return True

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        """Let Triton's kernels run; in a rehearsal they are launched and do nothing."""
        yield


class Rehearsal(Gpu):
    """The CPU in the place of a GPU. Its figures have no meaning."""

    rehearsal = True
    device = torch.device("cpu")
    accelerator = "cpu"
    TOO_SMALL = 14
    """A limit of this many GiB or less fails as a GPU does that has too little memory."""

    def pick(self, real: T, small: T) -> T:
        return small

    def name(self) -> str:
        return "rehearsal without a GPU"

    def properties(self) -> dict[str, Any]:
        return {"capability": "0.0", "memory_gib": 0.0, "multiprocessors": 0, "l2_mib": 0.0, "cuda": None}

    def clocks(self) -> dict[str, str]:
        return {"driver_version": "none", "clocks.sm": "0 MHz", "power.draw": "0 W"}

    def synchronize(self) -> None:
        pass

    def timed(self, run: Run, repeat: int = 1) -> Times:
        start = time.perf_counter()
        for _ in range(repeat):
            run()
        passed = 1e3 * (time.perf_counter() - start) / repeat
        return Times(passed, passed)

    def captured(self, run: Run) -> Run:
        run()
        return run

    def launches(self, run: Run) -> int:
        return _device_events(run, [torch.profiler.ProfilerActivity.CPU], self.synchronize)

    def reset_peak(self) -> None:
        pass

    def allocated(self) -> int:
        return 0

    def peak(self) -> dict[str, float]:
        return {"peak_gib": 0.0, "reserved_gib": 0.0}

    @contextlib.contextmanager
    def within(self, gib: float) -> Iterator[None]:
        if gib <= self.TOO_SMALL:
            raise torch.OutOfMemoryError("CUDA out of memory (played)")
        yield

    def release(self) -> None:
        pass

    def is_lost(self, error: BaseException) -> bool:
        return False

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        from triton.runtime.jit import JITFunction

        from orthotrain.kernels import dispatch as backend

        with (
            mock.patch.object(JITFunction, "run", _started),
            mock.patch.object(backend, "_interpreted", lambda: True),  # so that tensors of the CPU are served
            backend.use_backend("triton"),
        ):
            yield


def _started(kernel: Any, *operands: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """Do nothing, but refuse what the kernel would: an operand too many, one that is missing."""
    kernel.signature.bind(*operands, **{n: v for n, v in options.items() if n in kernel.signature.parameters})


def _device_events(run: Run, activities: list[Any], synchronize: Run) -> int:
    synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        run()
        synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
