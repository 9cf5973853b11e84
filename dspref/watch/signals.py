"""Signals that a thread hears while the main thread is in C, where Python runs no handler."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable
from threading import current_thread, main_thread
from typing import Any

from dspref.errors import Interrupted
from dspref.watch.interruption import STOPPING

# Wakes the main thread where another rank was asked to stop.
POKE = signal.SIGUSR2


class Signals:
    """Those that stop a run, caught until `release`."""

    def __init__(self, in_main_thread: Callable[[signal.Signals], None]) -> None:
        """`in_main_thread` is called with each, POKE too, as soon as the main thread is back in Python; once it has
        raised Interrupted, what is put in order on the way out is not cut short by the next."""
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        self._before: dict[int, Any] = {}
        self._raised = self._swallowed = False
        self._unraisable = sys.unraisablehook
        sys.unraisablehook = self._on_unraisable
        if current_thread() is not main_thread():
            return  # under a debugger or a notebook: the files still work
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in (*STOPPING, POKE):
            self._before[number] = signal.signal(number, lambda number, frame: self._handle(number, in_main_thread))

    def heard(self, seconds: float) -> list[signal.Signals]:
        """Those that stop a run and came since the last call. Waits so many seconds for one, or for `wake`."""
        if self._swallowed:
            self._swallowed = self._raised = False
            self.poke_main_thread()
        ready, _, _ = select.select([self._pipe[0]], [], [], seconds)
        return [signal.Signals(number) for number in (os.read(self._pipe[0], 64) if ready else b"") if number in {*STOPPING}]

    def wake(self) -> None:
        os.write(self._pipe[1], b"\0")

    def poke_main_thread(self) -> None:
        os.kill(os.getpid(), POKE)

    def _handle(self, number: int, in_main_thread: Callable[[signal.Signals], None]) -> None:
        if not self._raised:
            try:
                in_main_thread(signal.Signals(number))
            except Interrupted:
                self._raised = True
                raise

    def _on_unraisable(self, what: Any) -> None:
        """A handler may run within a finalizer, where Python drops what it raises: the next `heard` sees to it."""
        if isinstance(what.exc_value, Interrupted):
            self._swallowed = True
        else:
            self._unraisable(what)

    def release(self) -> None:
        """Give them back to who had them."""
        sys.unraisablehook = self._unraisable
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._before.items():
                signal.signal(number, handler)
        for end in self._pipe:
            os.close(end)
