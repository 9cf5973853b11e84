"""Time and memory: CUDA events and allocated bytes on a GPU, `perf_counter` and the resident set elsewhere."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch


@dataclass
class Stopwatch:
    """Times of steps. Nothing waits for the GPU before `read`."""

    device: str
    _marks: list[tuple[Any, Any]] = field(default_factory=list)
    _started: Any = None

    def start(self) -> None:
        self._started = self._now()

    def stop(self) -> None:
        self._marks.append((self._started, self._now()))

    def read(self) -> list[float]:
        """Seconds of every step."""
        if self.device == "cpu":
            return [end - start for start, end in self._marks]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in self._marks]

    def _now(self) -> Any:
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def repeat(job: Callable[[], Any], device: str, warmups: int, steps: int, limit: float = 20.0) -> list[float]:
    """Seconds of `steps` runs of a job after its warm-ups. Where they would take more than `limit` seconds: of fewer, but at
    least three, after two warm-ups."""
    job()  # which compiles what is to be compiled
    first = measured(job, device, 1)[0]
    affordable = int(limit / max(first, 1e-6))
    for _ in range(warmups - 2 if affordable >= warmups + steps else 0):
        job()
    return measured(job, device, max(min(steps, affordable), min(steps, 3)))


def measured(job: Callable[[], Any], device: str, steps: int) -> list[float]:
    watch = Stopwatch(device)
    for _ in range(steps):
        watch.start()
        job()
        watch.stop()
    return watch.read()


def timed(job: Callable[[], Any], device: str, warmups: int, steps: int, limit: float = 20.0) -> dict[str, Any]:
    seconds = repeat(job, device, warmups, steps, limit)
    return {"median_seconds": median(seconds), "seconds": seconds}


def settle(device: str) -> None:
    """Give back what is not in use, and count the peak of memory anew."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def extra_bytes(job: Callable[[], Any], device: str) -> int | None:
    """The most memory that a job holds beyond what there was before it; None where that cannot be told."""
    if device == "cpu":
        return None
    settle(device)
    before = torch.cuda.memory_allocated()
    job()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300].rstrip(": ")
