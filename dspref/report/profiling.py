"""A profile of some steps, for those who want to know where their time and memory go: `train.profile`.

On every rank torch's profiler records them, with ranges that have the names of the phases that `performance` times. What is
due between two steps stays out where it is long: an evaluation and answers to prompts end one trace, and another begins
behind them. Nothing that fails here ends a run, or changes what it computes.
"""

from __future__ import annotations

import errno
import gzip
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dspref import distributed
from dspref.files import DRAFT, drafted, remove, write_atomically

NAME = "profile"
# Rows of the table of operators.
OPERATORS = 50
# Allocations and releases that a memory snapshot goes back; each takes some hundred bytes.
EVENTS = 200_000
# gzip's own default takes three times as long, for a twentieth of the size.
COMPRESSION = 4


class Profile:
    """The profile of steps `first` to `last` on this rank, in a folder for each trace. Called on all ranks alike."""

    def __init__(
        self,
        run: Path,
        steps: tuple[int, int] | None,
        device: torch.device,
        say: Callable[[str], None],
        beat: Callable[[str], None] = lambda phase: None,
    ) -> None:
        """`run`: its folder; `steps`: the first and the last one, from 1; None: nothing here does anything. `say` tells a
        person, and `beat` that this rank moves, as what is written may be large."""
        self._folder, self._steps, self._say, self._beat = run / NAME, steps, say, beat
        self._cuda = device.type == "cuda"
        self._at = 0
        self._session: profile | None = None
        self._recorded: profile | None = None
        self._began = 0
        self._stopped = 0
        self._memory: Any = None
        self._ranges: list[Any] = []
        self._fault = ""
        self._told = False

    def covers(self, step: int) -> bool:
        """Whether a step is profiled: it takes longer than others."""
        return self._steps is not None and self._steps[0] <= step <= self._steps[1]

    # -----------------------------------------------------------------------------------------------------------------
    # While steps are taken

    def begin(self, step: int) -> None:
        """A step begins, with the wait for its data."""
        self._at = step
        if not self.covers(step):
            return
        if not self._began:
            self._began = step
            self._guarded(self._start)
        self._guarded(lambda: self._enter(f"step {step}"))
        self.phase("data")

    def phase(self, name: str) -> None:
        """What is done from now on has this name."""
        if self._session:
            self._guarded(lambda: self._rename(name))

    def end(self) -> None:
        """The step is done. After the last one nothing more is recorded."""
        if self._session:
            self._guarded(lambda: self._leave(0))
        if self._began and self._steps and self._at == self._steps[1]:
            self.pause()

    def due(self, name: str) -> None:
        """What is due between two steps, and is short."""
        if self._session:
            self._guarded(lambda: self._rename(name, below=0))

    def pause(self) -> None:
        """Record nothing until the next step begins."""
        if self._began and not self._stopped:
            self._stopped = self._at
            self._guarded(self._stop)

    def write(self) -> None:
        """Write what has been recorded up to a pause, and say where."""
        if self._stopped:
            self._write()

    def close(self, over: bool = False) -> None:
        """No more steps are taken, perhaps before the last one that was asked for. `over`: for good."""
        self.pause()
        self.write()
        if over and self._steps and not self._told:
            self._say(f"warning: train.profile: the run ended before {in_steps(*self._steps)}; nothing is profiled")

    def drop(self) -> None:
        """Stop, and write nothing."""
        self._began = self._stopped = 0
        self._abandon()

    # -----------------------------------------------------------------------------------------------------------------
    # On this rank; what is raised switches the profile off

    def _guarded(self, work: Callable[[], None]) -> None:
        if self._fault:
            return
        try:
            work()
        except Exception as error:
            self._fault = in_words(error)
            self._abandon()

    def _abandon(self) -> None:
        session, self._session, self._memory = self._session, None, None
        self._ranges.clear()
        with suppress(Exception):
            if session:
                session.stop()
        with suppress(Exception):
            if session and self._cuda:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _start(self) -> None:
        # Where a profile cannot be written no step need be slower for it.
        self._folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=self._folder):
            pass
        if distributed.world().rank == 0:
            for left in self._folder.rglob(f"{DRAFT}*"):  # by a process that was killed; no rank writes now
                remove(left)
        # Else it prints two lines at each start and stop.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        # Memory in the trace doubles what it takes, and on GPUs the snapshot has it.
        session = profile(activities=kinds, record_shapes=True, profile_memory=not self._cuda)
        session.start()
        self._session = session
        if self._cuda:
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=EVENTS)

    def _stop(self) -> None:
        self._leave(0)
        if self._cuda:
            torch.cuda.synchronize()
            self._memory = torch.cuda.memory._snapshot()
            torch.cuda.memory._record_memory_history(enabled=None)
        if self._session:
            self._session.stop()
            self._recorded, self._session = self._session, None

    def _enter(self, name: str) -> None:
        self._leave(0)
        if self._session:
            self._ranges.append(record_function(name))
            self._ranges[-1].__enter__()

    def _rename(self, name: str, below: int = 1) -> None:
        self._leave(below)
        self._ranges.append(record_function(name))
        self._ranges[-1].__enter__()

    def _leave(self, kept: int) -> None:
        while len(self._ranges) > kept:
            self._ranges.pop().__exit__(None, None, None)

    # -----------------------------------------------------------------------------------------------------------------
    # What is written

    def _write(self) -> None:
        began, ended = self._began, self._stopped
        folder = self._folder / (f"steps-{began}-{ended}" if ended > began else f"step-{began}")
        lacks: list[str] = []
        self._guarded(lambda: lacks.extend(self._write_into(folder, began, ended)))
        if self._fault:
            with suppress(OSError):  # others have written into it
                folder.rmdir()
        self._began = self._stopped = 0
        self._recorded = self._memory = None
        faults = distributed.gather_objects(self._fault)
        if all(faults):
            self._steps = None
        self._told = True
        self._say(told(folder, began, ended, faults, lacks))

    def _write_into(self, folder: Path, began: int, ended: int) -> list[str]:
        """Write the files of this rank; what is not among them, in words."""
        assert self._recorded is not None
        stem = f"rank-{distributed.world().rank}"
        folder.mkdir(parents=True, exist_ok=True)
        with drafted(folder / f"{stem}.trace.json.gz") as draft:
            compress(self._recorded, draft)
        self._beat(NAME)
        averages = self._recorded.key_averages(group_by_input_shape=True)
        by, device = ("self_device_time_total", "CUDA") if self._cuda else ("self_cpu_time_total", "CPU")
        table = averages.table(by, OPERATORS, max_name_column_width=70, max_shapes_column_width=80)
        title = f"{in_steps(began, ended)}, {stem}: the {OPERATORS} costliest operators and shapes, by {device} time\n"
        write_atomically(folder / f"{stem}.operators.txt", title + table)
        self._beat(NAME)
        if not self._cuda:
            return ["a CPU has no memory snapshot"]
        write_atomically(folder / f"{stem}.memory.pickle", pickle.dumps(self._memory))
        has_kernels = any(event.self_device_time_total for event in averages)
        return [] if has_kernels else ["without GPU kernels: CUPTI gave none"]


def compress(recorded: profile, draft: Path) -> None:
    """Write the trace. Raises OSError where it does not fit, of which the profiler itself says nothing."""
    plain = draft.with_name(f"{draft.name}.json")
    try:
        recorded.export_chrome_trace(str(plain))
        if not plain.exists():
            raise OSError(errno.EIO, "no trace came of it; is the disk full?")
        with open(plain, "rb") as file:
            file.seek(-min(16, plain.stat().st_size), os.SEEK_END)
            if not file.read().rstrip().endswith(b"}"):
                raise OSError(errno.EIO, "the trace was cut short; is the disk full?")
            file.seek(0)
            with gzip.open(draft, "wb", COMPRESSION) as packed:
                shutil.copyfileobj(file, packed, 2**20)
    finally:
        for left in plain.parent.glob(f"{plain.name}*"):  # with its own draft, on a full disk
            with suppress(OSError):
                os.truncate(left, 0)  # it keeps that one open
            remove(left)


def in_words(error: Exception) -> str:
    """An error of the profiler in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


def in_steps(first: int, last: int) -> str:
    return f"steps {first} to {last}" if last > first else f"step {first}"


def told(folder: Path, began: int, ended: int, faults: list[str], lacks: list[str]) -> str:
    """Where a profile is and how to open it; `faults`: of each rank, empty where there is none."""
    failed = {rank: fault for rank, fault in enumerate(faults) if fault}
    said = ""
    if failed:
        ranks = ", ".join(map(str, list(failed)[:5])) + (", ..." if len(failed) > 5 else "")
        of = f"rank{'s' if len(failed) > 1 else ''} {ranks}" if len(faults) > 1 else ""
        said = f"switched off{f' on {of}' if of else ''} ({next(iter(failed.values()))})"
    if len(failed) == len(faults):
        return f"warning: train.profile: {said}; {in_steps(began, ended)}: nothing is written, the run goes on"
    first = min(set(range(len(faults))) - set(failed))
    written = f"{in_steps(began, ended)} in {folder}: open rank-{first}.trace.json.gz in https://ui.perfetto.dev"
    more = [*lacks, *([said] if said else [])]
    return f"{'warning: train.profile' if said else 'profile'}: {'; '.join([written, *more])}"
