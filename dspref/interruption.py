"""Signals that come before a run has its watch: the process leaves with the exit code of an interruption, and not by the
signal. Loads nothing that takes long, as that is when such a signal comes.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from threading import Thread, current_thread, main_thread
from typing import Any

from dspref.errors import ExitCode

STOPPING = {signal.SIGTERM: ExitCode.INTERRUPTED, signal.SIGUSR1: ExitCode.INTERRUPTED, signal.SIGINT: ExitCode.CTRL_C}
_depth = 0  # how often it is open


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """While open, a signal ends this process. There is nothing to commit yet.

    It is a thread that ends it: the main one may be in C for minutes, waiting for other ranks, and what it imports may
    catch whatever is raised there. Does nothing where this is not the main thread, which alone may catch signals.
    """
    if current_thread() is not main_thread():
        yield
        return
    global _depth
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _left_to_the_thread) for number in STOPPING}
    _depth += 1
    thread = Thread(target=_leave_when_asked, args=(reader,), name="interruption", daemon=True)
    thread.start()
    try:
        yield
    finally:
        _depth -= 1
        for number, before in handlers.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)  # None: not of Python's making
        signal.set_wakeup_fd(wakeup)
        os.write(writer, b"\0")
        thread.join()
        os.close(reader)
        os.close(writer)


def _left_to_the_thread(number: int, frame: Any) -> None:
    """Without a handler of Python's, the system would end the process by the signal."""


def _forget() -> None:
    """In a fork, which has the pipe and no thread, signals are what they are to any process: pools are ended by them, and
    what they write there would end this process."""
    if _depth:
        signal.set_wakeup_fd(-1)
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)


def _leave_when_asked(reader: int) -> None:
    while (number := os.read(reader, 1)[0]) != 0:
        if number in {*STOPPING}:
            name = signal.Signals(number).name
            if first_rank(os.environ):
                os.write(2, f"stopped by {name} before the run began; the same command begins it\n".encode())
            os._exit(int(STOPPING[signal.Signals(number)]))


def first_rank(env: Mapping[str, str]) -> bool:
    """Whether a launcher started this process as rank 0, or none did."""
    return env.get("RANK", env.get("SLURM_PROCID", "0")) == "0"
