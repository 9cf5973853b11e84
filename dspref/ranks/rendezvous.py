"""Who this process is among the ranks, and how those of one machine find each other: in a folder of their user alone.

    TMPDIR/dspref-UID-HOST/   mode 700, of this user, no link
      KEY.rank-K              rank K has been started: its process
      KEY.notice              rank 0 is there: its process, and the folder of the job
      job-.../{socket,group}  the store of the job, and where process groups meet; its server removes it

KEY says which job: what started it, and what that tells its ranks. All is reached through a descriptor of the folder, so
nothing that happens to its name matters, and no path is too long for a socket.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dspref.errors import EnvironmentFault, Relayed
from dspref.files import write_atomically
from dspref.processes import Process, launchers, place
from dspref.ranks.local_store import LocalStore, serve

MEETING_MINUTES = 15
# A rank that nobody has heard of is waited for so long only: to say that it is there takes it seconds.
UNHEARD_MINUTES = 5
WORD_SECONDS = 30
# Where several jobs have one parent, as in a shell, they differ by one of these; so do the attempts of one job.
OF_A_JOB = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
OF_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "MASTER_PORT")
# An announcement that is older than this process by more is left from another job of the same shell.
STALE_SECONDS = 1.0
# What is younger is not swept: somebody may be writing it.
SWEEP_SECONDS = 60.0


@dataclass(frozen=True)
class World:
    """This process among all, and among those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    sequence: int = 1
    """So many ranks, one behind the other, hold a pack between them."""

    @property
    def group(self) -> int:
        """The number of this rank's group among `groups`."""
        return self.rank // self.sequence

    @property
    def groups(self) -> int:
        return self.size // self.sequence

    @property
    def part(self) -> int:
        """The number of this rank in its group."""
        return self.rank % self.sequence

    @property
    def is_one_machine(self) -> bool:
        return self.size == self.local_size

    @property
    def beside_first(self) -> bool:
        """Whether this rank is on rank 0's machine."""
        return self.rank < self.local_size


def read_environment(env: Mapping[str, str]) -> World:
    """The world as the launcher tells it: deepspeed and torchrun by RANK, srun by SLURM_*, plain python by silence.

    Raises EnvironmentFault for what is no number.
    """

    def number(name: str, default: str = "") -> int:
        text = env.get(name, default)
        if not re.fullmatch("[0-9]{1,9}", text):
            raise EnvironmentFault(f"{name}: {text!r} is not a number; start the ranks by deepspeed, torchrun or srun")
        return int(text)

    if "RANK" in env:
        rank, size, local_rank = number("RANK"), number("WORLD_SIZE", "1"), number("LOCAL_RANK", "0")
        found = World(rank, size, local_rank, number("LOCAL_WORLD_SIZE", "0") or number("LOCAL_SIZE", "1"))
    elif number("SLURM_STEP_NUM_TASKS", "1") > 1:
        tasks = number("SLURM_STEP_NUM_TASKS")
        per_node = re.split("[(,]", env.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)))[0]
        found = World(number("SLURM_PROCID"), tasks, number("SLURM_LOCALID"), int(per_node))
    else:
        found = World()
    if found.rank >= found.size:
        raise EnvironmentFault(f"RANK: {found.rank}, but WORLD_SIZE is {found.size}; ranks count from 0")
    return found


def is_announced(env: Mapping[str, str]) -> bool:
    """Whether DeepSpeed's launcher, which has printed seven lines and one for each rank by now, started this process."""
    return "CROSS_RANK" in env


class Mark(NamedTuple):
    """A process that left a word in the folder."""

    process: Process
    place: str
    folder: str = ""

    @property
    def is_dead(self) -> bool:
        """As far as this process can see: of another container it sees nothing."""
        return self.place == place() and not self.process.is_alive


class Spot:
    """The folder where this process meets others of its job, and the names of the job there."""

    def __init__(self, env: Mapping[str, str]) -> None:
        """Raises EnvironmentFault where there is no such folder, and it cannot be made."""
        self.path = private_folder()
        if "RANK" in env:  # all ranks are children of one launcher
            about: list[Any] = [Process.find(os.getppid()) or os.getppid(), *(env.get(name) for name in OF_A_JOB)]
        else:  # each task may be in a container of its own
            about = [env.get(name) for name in OF_SLURM]
        self.key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        self.own = Mark(Process.find(os.getpid()) or Process(os.getpid(), "0"), place())

    def announcement(self, rank: int) -> Path:
        return self.path / f"{self.key}.rank-{rank}"

    @property
    def notice(self) -> Path:
        return self.path / f"{self.key}.notice"


_spot: Spot | None = None


def private_folder() -> Path:
    """TMPDIR/dspref-UID-HOST, by a descriptor that stays open. Raises EnvironmentFault where it is not this user's alone."""
    host = re.sub(r"[^A-Za-z0-9.-]", "-", os.uname().nodename)
    named = Path(tempfile.gettempdir()) / f"dspref-{os.geteuid()}-{host}"
    remedy = "remove it, or set TMPDIR to a folder of your own"
    try:
        with contextlib.suppress(FileExistsError):
            named.mkdir(mode=0o700)
        descriptor = os.open(named, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        reason = "it is a link, or no folder" if isinstance(error, NotADirectoryError) else error.strerror
        raise EnvironmentFault(f"{named}: ranks cannot meet there ({reason}); {remedy}") from None
    about = os.fstat(descriptor)
    if about.st_uid != os.geteuid() or stat.S_IMODE(about.st_mode) & 0o077:
        os.close(descriptor)
        whose = f"it belongs to user {about.st_uid}, mode {stat.S_IMODE(about.st_mode):o}"
        raise EnvironmentFault(f"{named}: ranks do not meet there, as others could join them ({whose}); {remedy}")
    return Path(f"/proc/self/fd/{descriptor}")


def announce(env: Mapping[str, str] = os.environ) -> None:
    """Say that this rank has been started, before it loads what takes long: who waits for it then sees it die."""
    global _spot
    world = read_environment(env)
    if world.size > 1 and world.is_one_machine:
        _spot = _spot or Spot(env)
        try:
            _write(_spot.announcement(world.rank), _spot.own)
        except OSError as error:
            raise _no_folder(_spot, error) from None


def meet(world: World, say: Callable[[str], None]) -> tuple[LocalStore, Path]:
    """The store of the job, and the file where its process groups meet, once all ranks are there.

    `say` is given a line where that takes long. Raises EnvironmentFault where one is dead, or does not come.
    """
    if _spot is None:
        raise RuntimeError("announce() comes first")
    spot, rank, store = _spot, world.rank, None
    waiting = Waiting(spot, world, say)
    try:
        if rank == 0:
            store, folder = _open(spot)
        else:
            store, folder = waiting.until(lambda: _join(spot, rank, waiting.seen.get(0)), lambda: [0])
        joined = store
        joined.set(f"here/{rank}", "1")

        def absent() -> list[int]:
            return [other for other in range(world.size) if not joined.check([f"here/{other}"])]

        waiting.until(lambda: not absent(), absent)
    except EnvironmentFault as fault:
        if store is not None and store.add("faults", 1) > 1:
            raise Relayed(fault.exit_code) from None
        raise
    spot.announcement(rank).unlink(missing_ok=True)
    if rank == 0:
        spot.notice.unlink(missing_ok=True)
    return joined, folder / "group"


def _open(spot: Spot) -> tuple[LocalStore, Path]:
    _sweep(spot)
    try:
        folder = Path(tempfile.mkdtemp(prefix="job-", dir=spot.path))
        store = serve(folder)
        _write(spot.notice, spot.own._replace(folder=folder.name))
    except OSError as error:
        raise _no_folder(spot, error) from None
    return store, folder


def _join(spot: Spot, rank: int, leader: Mark | None) -> tuple[LocalStore, Path] | None:
    """None as long as rank 0 is not there, or not for this process: a notice may be left from a job before."""
    notice = _read(spot.notice)
    if notice is None or notice.is_dead or (leader and leader.process != notice.process):
        return None
    folder = spot.path / Path(notice.folder).name
    try:
        store = LocalStore(folder)
    except OSError:
        return None
    own = json.dumps(spot.own)
    if store.compare_set(f"rank/{rank}", "", own) == own:
        return store, folder
    store.close()
    return None


def _no_folder(spot: Spot, error: OSError) -> EnvironmentFault:
    where = os.readlink(spot.path)
    return EnvironmentFault(
        f"{where}: ranks cannot meet there ({error.strerror}); set TMPDIR to another folder, on a local disk"
    )


class Waiting:
    """One rank that waits for others."""

    def __init__(self, spot: Spot, world: World, say: Callable[[str], None]) -> None:
        self._spot, self._world, self._say = spot, world, say
        self.seen: dict[int, Mark] = {}
        """The other ranks that have announced themselves."""
        self._launchers = launchers()
        self._began, self._told = time.monotonic(), False

    def until(self, done: Callable[[], Any], absent: Callable[[], list[int]]) -> Any:
        """What `done` gives, as soon as that is anything. `absent`: the ranks that it waits for."""
        pause = 0.005
        while not (found := done()):
            self._look()
            self._keep_time(absent())
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return found

    def _look(self) -> None:
        """Raise EnvironmentFault where another rank has died, or what started this one."""
        for rank in range(self._world.size):
            if rank == self._world.rank:
                continue
            if (mark := _read(self._spot.announcement(rank))) and self._is_of_this_job(mark):
                self.seen[rank] = mark
            if rank in self.seen and self.seen[rank].is_dead:
                raise EnvironmentFault(
                    f"rank {rank} (process {self.seen[rank].process.pid}) ended before the ranks met; see what it said, and "
                    "start all again"
                )
        if any(not launcher.is_alive for launcher in self._launchers):
            raise EnvironmentFault("the launcher ended before the ranks met; start all again")

    def _is_of_this_job(self, mark: Mark) -> bool:
        """It lives, or died after this one was started."""
        younger = int(mark.process.started) - int(self._spot.own.process.started)
        return not mark.is_dead or younger > -STALE_SECONDS * os.sysconf("SC_CLK_TCK")

    def _keep_time(self, missing: list[int]) -> None:
        waited = time.monotonic() - self._began
        unheard = [rank for rank in missing if rank not in self.seen]
        which, limit = (unheard, UNHEARD_MINUTES) if unheard else (missing, MEETING_MINUTES)
        ranks = f"rank{'s' * (len(which) > 1)} {', '.join(map(str, which[:8]))}{', ...' * (len(which) > 8)}"
        if waited > WORD_SECONDS and not self._told:
            self._told = True
            if self._world.rank < min(self.seen, default=self._world.size):  # one of those who wait speaks
                what = "nothing heard yet" if unheard else "started, and not ready yet"
                self._say(
                    f"rank {self._world.rank} waits for {ranks} of {self._world.size}: {what}; at most {limit} minutes"
                )
        if waited > 60 * limit:
            raise EnvironmentFault(
                f"{ranks} of {self._world.size} did not come within {limit} minutes; start one process for each rank, "
                "all by one launcher or shell, with the same WORLD_SIZE, MASTER_PORT and TMPDIR"
            )


def _sweep(spot: Spot) -> None:
    """Remove what the dead left."""
    for path in spot.path.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime < SWEEP_SECONDS:
                continue
            if path.is_dir():
                _sweep_job(path)
            elif (mark := _read(path)) is None or mark.is_dead:
                path.unlink()


def _sweep_job(folder: Path) -> None:
    with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
        LocalStore(folder).close()
        return
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _write(path: Path, mark: Mark) -> None:
    write_atomically(path, json.dumps(mark))


def _read(path: Path) -> Mark | None:
    """None where the file is not there."""
    try:
        (pid, started), where, folder = json.loads(path.read_text(encoding="utf-8"))
        return Mark(Process(int(pid), str(int(started))), str(where), str(folder))
    except (OSError, ValueError, TypeError):
        return None
