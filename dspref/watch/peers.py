"""The other ranks: where they are, whether they live, and the verdict: why all ranks leave, which one of them says first."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from dspref import distributed
from dspref.errors import ExitCode
from dspref.processes import Process, place
from dspref.secrets import redact
from dspref.terminal import shown
from dspref.watch.pace import HangTimer, Pace

TALK_SECONDS = 1.0
# How long after the verdict of another rank this one may take to leave by itself.
GRACE_SECONDS = 5.0


class Verdict(TypedDict):
    rank: int
    exit_code: int
    message: str


class Peers:
    """They speak through the job's key-value store, which rank 0 serves: with rank 0 it is gone. Made on all ranks at the
    same time."""

    def __init__(self, timer: HangTimer) -> None:
        self._timer, self._world = timer, distributed.world()
        self._store: Any = distributed.own_store("watch")
        present = distributed.gather_objects((place(), Process.find(os.getpid())))
        here = present[self._world.rank][0]
        self._processes = {
            rank: Process(*process)
            for rank, (where, process) in enumerate(present)
            if where == here and rank != self._world.rank and process
        }
        self._talked_at = self._verdict_at = 0.0
        self._silent: list[int] = []
        self.verdict: Verdict | None = None

    # -----------------------------------------------------------------------------------------------------------------
    # What they say

    def tell(self, key: str, value: Any) -> None:
        if self._store is not None:
            with contextlib.suppress(Exception):
                self._store.set(key, json.dumps(value))

    def _heard(self, key: str) -> Any:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def talk(self, on_wish: Callable[[dict[str, Any]], None], now: bool = False) -> None:
        """Tell the others where this rank is, now or once a second; hear what they wish, and whether one has left."""
        if self._store is None or not (now or time.monotonic() - self._talked_at >= TALK_SECONDS):
            return
        self._talked_at = time.monotonic()
        try:
            if self._world.size > 1:
                self._tell_pace()
            if wish := self._heard("wish"):
                on_wish(wish)
            if self.verdict is None and (verdict := self._heard("verdict")):
                self._accept(verdict)
        except Exception:
            self._store = None
            if 0 not in self._processes:
                self.died(0)

    def _tell_pace(self) -> None:
        self.tell(f"pace/{self._world.rank}", self._timer.pace)

    # -----------------------------------------------------------------------------------------------------------------
    # Why all leave

    def judge(self, code: ExitCode | int, message: str) -> bool:
        """Publish why all ranks leave; True for the rank that says so first."""
        verdict = Verdict(rank=self._world.rank, exit_code=int(code), message=message)
        if self._store is not None:
            try:
                verdict = json.loads(self._store.compare_set("verdict", "", json.dumps(verdict)))
            except Exception:
                self._store = None
        self._accept(verdict)
        return verdict["rank"] == self._world.rank

    def _accept(self, verdict: Verdict) -> None:
        if self.verdict is None:
            self.verdict, self._verdict_at = verdict, time.monotonic()
            if verdict["exit_code"] == ExitCode.HANG:
                self._timer.dump_stacks()
            if self._store is not None and verdict["rank"] != self._world.rank:
                with contextlib.suppress(Exception):
                    self._store.add("readers", 1)

    @property
    def grace_is_over(self) -> bool:
        """Whether a rank that could leave by itself would have done so."""
        return self.verdict is not None and time.monotonic() - self._verdict_at > GRACE_SECONDS

    def await_verdict(self, error: BaseException, logs: Path) -> None:
        """Where contact broke, somebody else has gone, and will soon be known; of another machine nobody may say so."""
        deadline, seen = time.monotonic() + GRACE_SECONDS, self._paces()
        while self._world.size > 1 and self.verdict is None and time.monotonic() < deadline:
            time.sleep(TALK_SECONDS / 4)
        if self._world.size == 1 or self.verdict is not None:
            return
        now = self._paces()
        others = [rank for rank in range(self._world.size) if rank != self._world.rank]
        self._silent = [rank for rank in others if rank not in now or (rank in seen and seen[rank].tick == now[rank].tick)]
        if not self._silent:
            return  # all are there: what this rank stumbled on is its own error
        details = logs / f"rank-{self._world.rank}.error.txt"
        try:
            details.write_text(redact("".join(traceback.format_exception(error))), encoding="utf-8")
            more = f"more in {details}"
        except OSError:  # the run has no folder yet
            more = str(error).split("\n", 1)[0]
        whom, step = ", ".join(map(str, self._silent)), self._timer.pace.step
        cause = "killed, out of memory, or without its machine"
        message = f"lost contact with rank {whom} in or after step {step}: {cause} ({more})"
        if self.judge(ExitCode.BUG, message):
            print(shown(message), file=sys.__stderr__, flush=True)

    def await_readers(self) -> None:
        """Rank 0 serves the store until all have read why they leave."""
        deadline = time.monotonic() + GRACE_SECONDS
        with contextlib.suppress(Exception):
            while self._store.add("readers", 0) < self._world.size - 1 - len(self._silent) and time.monotonic() < deadline:
                time.sleep(TALK_SECONDS / 4)

    # -----------------------------------------------------------------------------------------------------------------
    # Whether they live and move

    @property
    def dead(self) -> list[int]:
        """Ranks of this machine whose processes are gone."""
        return [rank for rank, process in self._processes.items() if not process.is_alive]

    def died(self, rank: int) -> None:
        """Judge that a rank has gone which said nothing."""
        message = f"rank {rank} died without a word, in or after step {self._timer.pace.step}: killed, or out of memory"
        first = self.judge(ExitCode.BUG, message)
        # With rank 0 the store is gone, and every rank is the first: one of each machine speaks.
        alive = [other for other, process in self._processes.items() if process.is_alive]
        if first and (rank != 0 or all(other > self._world.rank for other in alive)):
            print(shown(message), file=sys.__stderr__, flush=True)

    def kill_stopped(self) -> None:
        """End those of this machine that cannot end themselves."""
        for process in self._processes.values():
            if process.is_alive and process.is_stopped:
                with contextlib.suppress(OSError):
                    os.kill(process.pid, signal.SIGKILL)

    def blame(self) -> tuple[int, str, Pace]:
        """The rank that holds up the others, what is wrong with it, and where it was last: the one whose process stands
        still, else the one that is behind."""
        seen = self._paces()
        for _ in range(3):
            time.sleep(TALK_SECONDS)
            self._timer.look()
            self._tell_pace()  # those who look at the same time must see this rank move
        own = self._timer.pace
        now = self._paces() | {self._world.rank: own}
        others = seen.keys() & now.keys() - {self._world.rank}
        still = sorted((rank for rank in others if seen[rank].tick == now[rank].tick), key=lambda rank: now[rank].beats)
        behind = min(now, key=lambda rank: now[rank].beats)
        if still:
            return still[0], "does not answer", now[still[0]]
        if now[behind].beats == own.beats:
            return self._world.rank, "waits" + " as all others do" * (self._world.size > 1), own
        return behind, "is behind", now[behind]

    def _paces(self) -> dict[int, Pace]:
        found: dict[int, Pace] = {}
        for rank in range(self._world.size if self._store is not None else 0):
            with contextlib.suppress(Exception):
                if told := self._heard(f"pace/{rank}"):
                    found[rank] = Pace(*told)
        return found
