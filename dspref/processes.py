"""Processes of this machine, as /proc tells of them; where there is no /proc, nothing is known and nobody is missed."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import NamedTuple

# In the command line of what starts ranks.
LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed")


class Process(NamedTuple):
    """A process, told from a later one with the same number by its start time."""

    pid: int
    started: str

    @classmethod
    def find(cls, pid: int) -> Process | None:
        """None where there is no such process, or only its name is left."""
        fields = _fields(pid)
        return cls(pid, fields[19]) if fields and fields[0] not in "ZX" else None

    @property
    def is_alive(self) -> bool:
        return Process.find(self.pid) == self

    @property
    def is_stopped(self) -> bool:
        """By a signal, or by a debugger."""
        fields = _fields(self.pid)
        return bool(fields) and fields[0] in "Tt"


def place() -> str:
    """Where numbers of processes mean the same: a machine since it was started, and within it a container."""
    inner = []
    for read in (lambda: os.readlink("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id").read_text):
        with contextlib.suppress(OSError):
            inner.append(read().strip())
    return " ".join([socket.gethostname(), *inner])


def launchers() -> list[Process]:
    """What started this process, and what started that, where they are launchers by their command lines: a shell may end."""
    found, pid = [], os.getppid()
    for _ in range(2):
        process, fields, words = Process.find(pid), _fields(pid), ""
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        if process and any(name in words for name in LAUNCHERS):
            found.append(process)
        pid = int(fields[1]) if fields else 0
    return found


def _fields(pid: int) -> list[str]:
    """Of /proc/PID/stat, from the state on: [0] state, [1] parent, [19] start time."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return []
