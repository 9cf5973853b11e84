"""One run in one folder: a file in it says who writes there, for as long as that is so. Only rank 0 has one."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspref.errors import EnvironmentFault
from dspref.processes import Process, place
from dspref.terminal import command

NAME = ".lock"
# A holder elsewhere, of which no more is seen, is gone when its lock has not been touched for so long.
STALE_SECONDS = 90
TOUCH_SECONDS = 10


@dataclass
class Lock:
    """A folder that is this process's."""

    folder: Path
    token: str
    _touched: float = field(default_factory=time.monotonic)

    @classmethod
    def claim(cls, folder: Path) -> Lock:
        """Make the folder this process's. Raises EnvironmentFault where a run that is alive has it."""
        folder.mkdir(parents=True, exist_ok=True)
        own, path, token = Process.find(os.getpid()), folder / NAME, uuid.uuid4().hex
        text = {"token": token, "place": place(), "process": own, "attempt": _attempt()}
        draft = folder / f"{NAME}-{token}"  # whole before it has its name: nobody reads an empty one
        draft.write_text(json.dumps(text), encoding="utf-8")
        taken = folder / f"{NAME}-{token}-taken"
        try:
            for _ in range(3):
                with contextlib.suppress(FileExistsError):
                    os.link(draft, path)
                    return cls(folder, token)
                holder = _live_holder(path)
                with contextlib.suppress(OSError):
                    if not holder:
                        path.rename(taken)
                        holder = _live_holder(taken)  # another may have claimed it since we looked
                        if holder:
                            os.link(taken, path)
                if holder:
                    raise EnvironmentFault(
                        f"output_dir: {folder} is in use by {holder}; wait for it, stop it "
                        f"({command('touch', folder / 'STOP')}), or choose another"
                    )
        finally:
            for left in (draft, taken):
                left.unlink(missing_ok=True)
        raise EnvironmentFault(f"output_dir: {folder} was taken by another run just now; use another folder")

    def keep(self) -> bool:
        """Show that the holder lives. False where another run has taken the folder, from a process that stood still."""
        if time.monotonic() - self._touched < TOUCH_SECONDS:
            return True
        self._touched = time.monotonic()
        with contextlib.suppress(OSError):
            if _read(self.folder / NAME).get("token") != self.token:
                return False
            os.utime(self.folder / NAME)
        return True

    def release(self) -> None:
        with contextlib.suppress(OSError):
            if _read(self.folder / NAME).get("token") == self.token:
                (self.folder / NAME).unlink()


def _attempt() -> list[str | None]:
    """Of a SLURM job, which start of it this is: its older ones are gone."""
    return [os.environ.get(name) for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")]


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}


def _live_holder(path: Path) -> str:
    """In words; empty where nobody lives who holds it."""
    try:
        known, age = _read(path), time.time() - path.stat().st_mtime
    except OSError:
        return ""
    process, job = known.get("process"), known.get("attempt", [None])
    if known.get("place") == place() and process:
        alive = Process(*process).is_alive and process[0] != os.getpid()
    else:
        restarted = job[0] is not None and job[0] == _attempt()[0] and job != _attempt()
        alive = age < STALE_SECONDS and not restarted
    return f"process {process[0] if process else '?'} on {known.get('place', '?').split()[0]}" if alive else ""
