"""How a variant times its steps, and the one line of JSON in which it says what it found."""

from __future__ import annotations

import functools
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.workload import Spec, load_spec

PACKAGES = ("dspref", "deepspeed", "transformers", "trl", "torch", "datasets", "accelerate", "numpy")


@dataclass
class Measurement:
    """What a run found, one entry per optimizer step."""

    losses: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """Of all threads of the process."""
    seconds: list[float] = field(default_factory=list)
    useful_tokens: list[int] = field(default_factory=list)
    extra: dict[str, float] = field(default_factory=dict)
    """CPU and wall seconds of what a run does before its first step, by name."""

    def start(self) -> None:
        """A step begins."""
        self._started = now()

    def stop(self) -> None:
        """The step's update is done."""
        (cpu, wall), (cpu_before, before) = now(), self._started
        self.cpu_seconds.append(cpu - cpu_before)
        self.seconds.append(wall - before)


@contextmanager
def spent(extra: dict[str, float], owner: Any, function: str, name: str) -> Iterator[None]:
    """Within this context, calls of `owner.function` add their time to `extra`."""
    original = getattr(owner, function)

    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        cpu_before, before = now()
        try:
            return original(*args, **kwargs)
        finally:
            cpu, wall = now()
            for key, value in (("cpu_seconds", cpu - cpu_before), ("seconds", wall - before)):
                extra[f"{name}_{key}"] = extra.get(f"{name}_{key}", 0.0) + value

    setattr(owner, function, timed)
    try:
        yield
    finally:
        setattr(owner, function, original)


def now() -> tuple[float, float]:
    """(CPU seconds, wall seconds), after all that the GPU was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


def peak_bytes(device: str) -> int:
    """The most memory so far: allocated on the GPU, or else resident in this process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def main(run: Callable[[Spec], Measurement]) -> None:
    """Run the spec in the file that the command line names; the last line of stdout is the result."""
    spec = load_spec(sys.argv[1])
    if spec.device == "cpu":
        torch.set_num_threads(1)
    found = run(spec)
    result = asdict(found) | {"peak_bytes": peak_bytes(spec.device), "versions": versions()}
    print(json.dumps(result), flush=True)
