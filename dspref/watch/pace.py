"""How far a rank has come, and for how long it has not moved."""

from __future__ import annotations

import contextlib
import faulthandler
import time
from pathlib import Path
from threading import Lock
from typing import IO, NamedTuple

# How much longer than the watch, which needs Python's lock, the timer in C waits.
GIL_SECONDS = 8.0
# The most of the time between two looks that counts: the job may have been suspended.
LOOK_SECONDS = 1.0


class Pace(NamedTuple):
    """Where a rank is. `tick` counts its looks: it stands still when the whole process does."""

    beats: int = 0
    step: int = 0
    phase: str = "start"
    tick: int = 0


class HangTimer:
    """This rank's pace. While `limit` is not 0, a rank that does not move for so many seconds is hung."""

    def __init__(self, stacks: Path) -> None:
        """`stacks`: the file for the stacks of a hung rank's threads."""
        self.pace, self.limit = Pace(), 0.0
        self._idle, self._looked_at = 0.0, time.monotonic()
        self._path, self._stacks = stacks, None
        self._stacks: IO[str] | None
        self._setting = Lock()

    def begin(self, limit: float) -> None:
        if limit:
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._stacks = open(self._path, "w", encoding="utf-8")
        self.beat("start")
        self.limit = limit
        self.set()

    def set(self) -> None:
        """Begin anew with the timer in C, which stands behind for a main thread that holds Python's lock."""
        with self._setting:
            if self._stacks and self.limit:
                faulthandler.dump_traceback_later(self.limit + GIL_SECONDS, exit=True, file=self._stacks)

    def stop(self) -> None:
        with self._setting:
            self.limit = 0.0
            faulthandler.cancel_dump_traceback_later()

    def beat(self, phase: str, step: int | None = None) -> None:
        """This rank moves: it has just finished `phase`."""
        self.pace = Pace(self.pace.beats + 1, self.pace.step if step is None else step, phase, self.pace.tick)
        self._idle = 0.0

    def look(self) -> None:
        """Count this look, and the time since the last one."""
        now = time.monotonic()
        self._idle += min(now - self._looked_at, LOOK_SECONDS)
        self._looked_at = now
        self.pace = self.pace._replace(tick=self.pace.tick + 1)

    @property
    def is_hung(self) -> bool:
        return 0 < self.limit < self._idle

    def dump_stacks(self) -> None:
        if self._stacks:
            faulthandler.dump_traceback(self._stacks, all_threads=True)

    def close(self) -> None:
        """No timer and, where nothing was hung, no file is left."""
        faulthandler.cancel_dump_traceback_later()
        if self._stacks:
            self._stacks.close()
            with contextlib.suppress(OSError):
                if self._path.stat().st_size == 0:
                    self._path.unlink()
