"""One run in one folder: a file in it says who writes there, for as long as that is so. Only rank 0 calls this."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path

from dspref.errors import EnvironmentFault
from dspref.processes import Process

NAME = ".lock"
# A holder on another machine, of which no more is seen, is gone when its lock has not been touched for so long.
STALE_SECONDS = 90
TOUCH_SECONDS = 10


def claim(folder: Path) -> None:
    """Make the folder this process's. Raises EnvironmentFault where a run that is alive has it."""
    path = folder / NAME
    folder.mkdir(parents=True, exist_ok=True)
    own = Process.find(os.getpid())
    text = json.dumps({"host": socket.gethostname(), "process": own, "job": os.environ.get("SLURM_JOB_ID")})
    for _ in range(2):
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
            return
        except FileExistsError:
            if holder := _live_holder(path):
                raise EnvironmentFault(
                    f"output_dir: {folder} is in use by {holder}; wait for it, stop it (touch {folder}/STOP), or use another"
                ) from None
            path.unlink(missing_ok=True)
    raise EnvironmentFault(f"output_dir: {folder} was taken by another run just now; use another folder")


def touch(folder: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(folder / NAME)


def release(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / NAME).unlink()


def _live_holder(path: Path) -> str:
    """In words; empty where nobody lives who holds it."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        host, process, job = known["host"], known["process"], known["job"]
        age = time.time() - path.stat().st_mtime
    except (OSError, ValueError, KeyError):
        return ""
    if host == socket.gethostname() and process:
        holder = Process(*process)
        alive = holder.is_alive and holder.pid != os.getpid()
    else:  # a job that SLURM has started again has left its old node
        alive = age < STALE_SECONDS and not (job and job == os.environ.get("SLURM_JOB_ID"))
    return f"process {process[0] if process else '?'} on {host}" if alive else ""
