"""Signals that come before a run has its watch, or to a command that has none: the process leaves with the exit code of an
interruption, and not by the signal. Loads nothing that takes long, as that is when such a signal comes.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from threading import Lock, Thread, current_thread, get_ident, main_thread
from typing import Any

from dspref.errors import ExitCode

STOPPING = {signal.SIGTERM: ExitCode.INTERRUPTED, signal.SIGUSR1: ExitCode.INTERRUPTED, signal.SIGINT: ExitCode.CTRL_C}
BEFORE_RUN = "before the run began; the same command begins it"
# Of the rank, and of how many there are.
NUMBERS = (("RANK", "SLURM_PROCID", "0"), ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "1"))
_depth = 0  # how often it is open
_outcome: int | None = None  # the exit code of a job that has ended
_what = BEFORE_RUN
_leaving = Lock()
_leaver: int | None = None  # the thread that ends this process
_muted: int | None = None  # during a fork, where signals are told


@contextlib.contextmanager
def leaving_at_once(what: str = BEFORE_RUN) -> Iterator[None]:
    """While open, a signal ends this process: there is nothing to commit. `what`: was stopped, and the way on.

    It is a thread that ends it: the main one may be in C for minutes, waiting for other ranks, and what it imports may
    catch whatever is raised there. Does nothing where this is not the main thread, which alone may catch signals.
    """
    if current_thread() is not main_thread():
        yield
        return
    global _depth, _what, _outcome
    outer, _what = _what, what
    if not _depth:
        _outcome = None
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _leave) for number in STOPPING}
    _depth += 1
    thread = Thread(target=_leave_when_asked, args=(reader,), name="interruption", daemon=True)
    thread.start()
    try:
        yield
    finally:
        _depth -= 1
        _what = outer
        for number, before in handlers.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)  # None: not of Python's making
        signal.set_wakeup_fd(wakeup)
        os.write(writer, b"\0")
        thread.join()
        os.close(reader)
        os.close(writer)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """While open, within `leaving_at_once`, Ctrl-C raises KeyboardInterrupt: whoever talks has something to stop by it. The
    others end the process as before."""
    wakeup = signal.set_wakeup_fd(-1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)


def catch_to_the_end() -> None:
    """From now on, and while the interpreter is taken down too, no signal ends this process by itself."""
    global _outcome
    _outcome = None
    if current_thread() is main_thread():
        atexit.unregister(_ignore)
        atexit.register(_ignore)  # first, so that it runs last
        for number in STOPPING:
            signal.signal(number, _leave)


def _ignore() -> None:
    """Python gives each handler of its own back before the libraries are taken down, which may take a second."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def decided(code: int) -> int:
    """The job ends with this exit code: a signal that still comes, while what it used is taken down, changes it no more."""
    global _outcome
    _outcome = code
    return code


# ------------------------------------------------------------------------------------------------------------- forks


def _mute() -> None:
    """Until a fork has its own handlers, it has this process's pipe: a signal to it would end this process."""
    global _muted
    if _depth and current_thread() is main_thread():
        _muted = signal.set_wakeup_fd(-1)


def _unmute() -> None:
    global _muted
    if _muted is not None:
        signal.set_wakeup_fd(_muted, warn_on_full_buffer=False)
        _muted = None


def _forget() -> None:
    """In a fork, which has no thread, signals are what they are to any process: pools are ended by them."""
    if _depth:
        signal.set_wakeup_fd(-1)
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(before=_mute, after_in_parent=_unmute, after_in_child=_forget)

# ----------------------------------------------------------------------------------------------------------- leaving


def _leave_when_asked(reader: int) -> None:
    while (number := os.read(reader, 1)[0]) != 0:
        if number in {*STOPPING}:
            _leave(number)


def _leave(number: int, frame: Any = None) -> None:
    """The main thread comes here too, where it can: while it forks, the other is not told. The first of them speaks."""
    global _leaver
    if not _leaving.acquire(blocking=False):
        if current_thread() is main_thread() and _leaver != get_ident():
            # The other is ending the process. A call in C that the signal has cut short would have it go on till then, and
            # say what it makes of that.
            _leaving.acquire(timeout=10)
        return
    _leaver = get_ident()
    if _outcome is not None:
        os._exit(_outcome)
    name = signal.Signals(number).name
    if first_rank(os.environ):
        with contextlib.suppress(OSError):  # whoever read it has gone: the process ends all the same
            os.write(2, f"stopped by {name} {_what}\n".encode())
    os._exit(int(STOPPING[signal.Signals(number)]))


def first_rank(env: Mapping[str, str]) -> bool:
    """Whether a launcher started this process as rank 0, or none did; or as none that there is, which it has to say."""
    rank, size = (env.get(name, env.get(of_slurm, plain)) for name, of_slurm, plain in NUMBERS)
    return rank == "0" or not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size))


def first_of_host(env: Mapping[str, str]) -> bool:
    """Whether it is the first rank of its machine, as far as a launcher says so."""
    return env.get("LOCAL_RANK", env.get("SLURM_LOCALID", "0")) == "0"
