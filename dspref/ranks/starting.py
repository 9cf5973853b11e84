"""Starts the ranks of a run on this machine, hands them the signals that this process gets, and waits for them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from types import FrameType

from dspref.errors import ExitCode

# What asks ranks to stop. A terminal gives its own to all of them; that they have it twice is one to them.
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# After the end of one the others leave by themselves, within minutes where they still commit.
LEAVING_SECONDS = 300.0
ASK_AT_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG


def start(command: Sequence[str], ranks: int) -> int:
    """Run a command as so many ranks, as torchrun would, and return the exit code of all: 0, or of the first that failed."""
    children: dict[int, subprocess.Popen[bytes]] = {}
    waiting: list[signal.Signals] = []

    def pass_on(number: int, frame: FrameType | None = None) -> None:
        waiting.append(signal.Signals(number))
        for child in children.values():
            child.send_signal(number)

    handlers = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        for rank in range(ranks):
            child = subprocess.Popen(command, env=environment(os.environ, rank, ranks), preexec_fn=_end_with_parent)
            children[child.pid] = child
            for number in waiting:  # those that came while there were fewer
                child.send_signal(number)
        return code_of(_ended(children))
    finally:
        for child in children.values():
            child.kill()
        for number, before in handlers.items():
            signal.signal(number, before)


def environment(env: os._Environ[str] | dict[str, str], rank: int, ranks: int) -> dict[str, str]:
    """What a launcher tells a rank; threads are shared out, unless the user has."""
    threads = max(len(os.sched_getaffinity(0)) // ranks, 1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return {"OMP_NUM_THREADS": str(threads), **env, **{name: str(number) for name, number in names.items()}}


def _ended(children: dict[int, subprocess.Popen[bytes]]) -> list[int]:
    """The exit codes of the ranks, in the order of their ends; minus the signal for one that was killed."""
    codes: list[int] = []
    deadline = float("inf")
    while children:
        over = [child for child in children.values() if child.poll() is not None]
        for child in over:
            codes.append(child.returncode)
            del children[child.pid]
            if child.returncode and deadline == float("inf"):
                deadline = time.monotonic() + LEAVING_SECONDS
        if not over:
            if time.monotonic() > deadline:
                for child in children.values():
                    child.kill()
            time.sleep(0.05)
    return codes


def code_of(codes: Sequence[int]) -> int:
    """One exit code for all: of the first that failed by itself; else that of a signal, as a shell has it, or of an
    interruption where it is one that asks, and came before Python could hear it."""
    failed = [code for code in codes if code > 0] or [_code_of_signal(-code) for code in codes if code < 0]
    return failed[0] if failed else 0


def _code_of_signal(number: int) -> int:
    return int(ExitCode.INTERRUPTED) if number in (signal.SIGTERM, signal.SIGUSR1) else 128 + number


def _end_with_parent() -> None:
    """In the child: to be asked to stop where its parent is gone, also by SIGKILL, which nobody can pass on."""
    ctypes.CDLL(None).prctl(ASK_AT_PARENTS_DEATH, signal.SIGTERM)
