"""One run in one folder: a file in it says who writes there, for as long as that is so. Only rank 0 has one."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from dspref.errors import EnvironmentFault
from dspref.files import read_json, read_object
from dspref.processes import Process, place
from dspref.reading import is_count
from dspref.terminal import command, duration, printable

NAME = ".lock"
# Where this is, the folder is a run's.
RECORD = "run.json"

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
        failed = None
        try:
            for _ in range(3):
                with contextlib.suppress(FileExistsError):
                    os.link(draft, path)
                    _sweep(folder, draft)
                    return cls(folder, token)
                refuse_held(folder)
                try:
                    path.rename(taken)
                except OSError as error:
                    failed = error
                    continue
                if holder := _live_holder(taken):  # another has claimed it since we looked
                    with contextlib.suppress(OSError):
                        os.link(taken, path)
                        raise _held(folder, holder)
        finally:
            for left in (draft, taken):
                left.unlink(missing_ok=True)
        if failed is not None and os.path.lexists(path):
            reason = f"is left from a run that is gone, and cannot be removed ({failed.strerror})"
            raise EnvironmentFault(f"output_dir: {path} {reason}; remove it")
        raise EnvironmentFault(f"output_dir: {folder} was taken by another run just now; use another folder")

    @property
    def has_gone(self) -> bool:
        """Whether the folder was deleted or moved, with all that says whose it is."""
        return not (self.folder / NAME).exists() and not (self.folder / RECORD).exists()

    def keep(self) -> bool:
        """Show that the holder lives. False where another run has taken the folder, from a process that stood still."""
        if time.monotonic() - self._touched < TOUCH_SECONDS:
            return True
        self._touched = time.monotonic()
        with contextlib.suppress(OSError):
            if _token(self.folder / NAME) != self.token:
                return False
            os.utime(self.folder / NAME)
        return True

    def release(self) -> None:
        with contextlib.suppress(OSError):
            if _token(self.folder / NAME) == self.token:
                (self.folder / NAME).unlink()


def clear(folder: Path) -> None:
    """Remove what is left of the lock of a run that ended between its last word and its lock."""
    if (folder / NAME).exists():
        with contextlib.suppress(OSError, EnvironmentFault):  # a folder that cannot be written, or one that another takes
            Lock.claim(folder).release()


def _attempt() -> list[str | None]:
    """Of a SLURM job, which start of it this is: its older ones are gone."""
    return [os.environ.get(name) for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")]


class Holder(NamedTuple):
    """What a lock says of who has it; None for what it does not say, or not in the right form."""

    place: str | None
    process: Process | None
    attempt: list[str | None] | None

    @classmethod
    def read(cls, path: Path) -> Holder:
        known = read_object(path)
        where, process, attempt = known.get("place"), known.get("process"), known.get("attempt")
        return cls(
            where if isinstance(where, str) and where.strip() else None,
            Process(process[0], process[1]) if _is_process(process) else None,
            attempt if isinstance(attempt, list) and len(attempt) == 2 else None,
        )


def _is_process(value: Any) -> TypeGuard[list]:
    return isinstance(value, list) and len(value) == 2 and is_count(value[0]) and isinstance(value[1], str)


def _token(path: Path) -> Any:
    """Raises OSError where there is no lock that can be read."""
    try:
        known = read_json(path)
    except ValueError:
        return None
    return known.get("token") if isinstance(known, dict) else None


def refuse_held(folder: Path) -> None:
    """Raise EnvironmentFault where a run that is alive has the folder, and where its lock can be nobody's."""
    if (folder / NAME).is_dir():
        raise EnvironmentFault(f"output_dir: {folder / NAME} is a folder, where the lock of a run would be; delete it")
    if holder := _live_holder(folder / NAME):
        raise _held(folder, holder)


def _held(folder: Path, holder: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"output_dir: {folder} is in use by {holder}; wait for it, stop it ({command('touch', folder / 'STOP')}), "
        "or choose another"
    )


def _live_holder(path: Path) -> str:
    """In words; empty where nobody lives who holds it."""
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return ""
    known = Holder.read(path)
    process = known.process
    where = printable(known.place.split()[0]) if known.place else "?"
    if known.place == place() and process:
        is_other = process.is_alive and process.pid != os.getpid()
        return f"process {process.pid} on {where}" if is_other else ""
    own = _attempt()
    restarted = known.attempt and own[0] is not None and known.attempt[0] == own[0] and known.attempt != own
    if age >= STALE_SECONDS or restarted:
        return ""
    who = f"process {process.pid if process else '?'}"
    when = f", of a time {duration(-age)} ahead of this machine's" if age < -STALE_SECONDS else ""
    return f"{who} on {where}, by {path.parent / NAME}{when} (delete it where you know that process gone)"


def _sweep(folder: Path, own: Path) -> None:
    """Remove what claims left whose processes were killed."""
    for left in folder.glob(f"{NAME}-*"):
        if left != own and not _live_holder(left):
            with contextlib.suppress(OSError):
                left.unlink()
