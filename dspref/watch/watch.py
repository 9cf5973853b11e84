"""What ends a run from outside, and how every rank learns of it: a signal, a file in the run folder, a launcher or a rank
that died, a step that hangs.

Python runs a signal handler only when the main thread comes back from C, and a collective is C for as long as another rank
lets it wait. So each rank has a thread that only looks, and tells the others through the job's key-value store. The main
threads then agree, between two steps, on what to do; before the first step there is nothing to finish, and they leave.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from threading import Lock as ThreadLock
from threading import Thread, current_thread, main_thread
from typing import Any, NamedTuple

from dspref import distributed
from dspref.distributed import Relayed
from dspref.errors import ExitCode, Interrupted, exit_code_of
from dspref.processes import Process, launchers, place
from dspref.terminal import shown
from dspref.watch.interruption import STOPPING
from dspref.watch.lock import Lock

# Wakes the main thread where another rank was asked to stop.
POKE = signal.SIGUSR2
LOOK_SECONDS = 0.25
TALK_SECONDS = 1.0
# A launcher passes on the signal that the whole process group has had: only one that comes later asks again.
AGAIN_SECONDS = 3.0
# How long after the verdict of another rank this one may take to leave by itself.
GRACE_SECONDS = 5.0
# How much longer than the watch, which needs Python's lock, the timer in C waits.
GIL_SECONDS = 8.0


OnEnd = Callable[[int, str, int], None]


class Ask(IntEnum):
    """What the ranks are asked to do at the next boundary; the largest wish of all counts."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


class Pace(NamedTuple):
    """Where a rank is. `tick` counts its looks: it stands still when the whole process does."""

    beats: int = 0
    step: int = 0
    phase: str = "start"
    tick: int = 0


@contextlib.contextmanager
def watching(folder: Path, on_end: OnEnd = lambda code, message, step: None) -> Iterator[Watch]:
    """Watch over what is done inside, on all ranks; `folder`: the run's.

    An error of one rank ends all with its exit code, and only that rank speaks: the others raise `Relayed`. Rank 0 calls
    `on_end` with the exit code, the message and the step.
    """
    watch = Watch(folder, on_end)
    try:
        yield watch
    except BaseException as error:
        watch.report(error)
        if isinstance(error, Relayed) or watch.was_first:
            raise
        raise Relayed(watch.exit_code) from error
    finally:
        watch.end()


class Watch:
    """The thread of this rank that looks, and what it knows. Made on all ranks at the same time."""

    def __init__(self, folder: Path, on_end: OnEnd) -> None:
        self._folder = folder
        self._on_end: OnEnd | None = on_end
        self._world = distributed.world()
        self._store: Any = distributed.own_store("watch")
        own = Process.find(os.getpid())
        present = distributed.gather_objects((place(), own))
        self._peers = {
            rank: Process(*process)
            for rank, (where, process) in enumerate(present)
            if where == present[self._world.rank][0] and rank != self._world.rank and process
        }
        self._launchers = launchers()
        self._ask, self._cause, self._signalled_at = Ask.NOTHING, "", 0.0
        self._exit_code = ExitCode.INTERRUPTED
        self._at_once, self._where = True, "before the first step"
        self._verdict: dict[str, Any] | None = None
        self._verdict_at = self._talked_at = 0.0
        self._limit, self._idle, self._looked_at, self._pace = 0.0, 0.0, time.monotonic(), Pace()
        self._stacks: Any = None
        self.lock: Lock | None = None
        """Of the run folder, on rank 0, once it is claimed."""
        self.was_first = False
        """Whether an error of this rank's main thread is why all leave."""
        self._timer = ThreadLock()
        self._over = False
        self._thread = Thread(target=self._look, name="watch", daemon=True)
        self._handlers: dict[Any, Any] = {}
        self._catch_signals()
        self._thread.start()

    # -----------------------------------------------------------------------------------------------------------------
    # For the main thread

    def steps_begin(self, limit: float) -> None:
        """From now on a wish to stop waits for `agreed`, and a rank that does not move for `limit` seconds is hung.

        0: never.
        """
        self._at_once = False
        if limit:
            with contextlib.suppress(OSError):
                (self._folder / "logs").mkdir(parents=True, exist_ok=True)
                self._stacks = open(self._folder / "logs" / f"rank-{self._world.rank}.stacks.txt", "w", encoding="utf-8")
        self.beat("start")
        self._limit = limit
        self._set_timer()

    def steps_end(self, may_leave: bool) -> None:
        """What follows may take as long as it takes. `may_leave`: all is committed, and a wish to stop ends this at once."""
        with self._timer:
            self._limit = 0.0
            faulthandler.cancel_dump_traceback_later()
        self._at_once, self._where = may_leave, "after the last step"

    def beat(self, phase: str, step: int | None = None) -> None:
        """This rank moves: it has just finished `phase`."""
        self._pace = Pace(self._pace.beats + 1, self._pace.step if step is None else step, phase, self._pace.tick)
        self._idle = 0.0

    def agreed(self, wish: Ask = Ask.NOTHING) -> Ask:
        """What any rank was asked to do, or wishes itself, the same answer on all. A collective of eight bytes."""
        self.beat("agreement")
        return Ask(distributed.largest(int(max(self._ask, wish))))

    def granted(self) -> None:
        """A checkpoint was saved: nobody waits for one any more."""
        if self._ask is Ask.SAVE:
            self._ask, self._cause = Ask.NOTHING, ""

    def interruption(self, where: str) -> Interrupted:
        """The end of a run that was asked to stop, to be raised."""
        causes = distributed.gather_objects((self._cause, int(self._exit_code)))
        cause, code = next(((cause, code) for cause, code in causes if cause), ("", ExitCode.INTERRUPTED))
        return Interrupted(f"stopped by {cause} {where}; the same command goes on", ExitCode(code))

    def report(self, error: BaseException) -> None:
        """Tell the others that this rank leaves, and why, unless one of them was first."""
        self._at_once = False  # no signal ends this
        if _is_broken_contact(error) and self._world.size > 1:
            deadline = time.monotonic() + GRACE_SECONDS  # somebody else has gone, and the watch will know why
            while self._verdict is None and time.monotonic() < deadline:
                time.sleep(LOOK_SECONDS)
        if self._verdict is None and not isinstance(error, Relayed):
            self.was_first = self._judge(exit_code_of(error), str(error).split("\n", 1)[0] or type(error).__name__)
        self._tell_end()

    @property
    def has_verdict(self) -> bool:
        """Whether all ranks leave."""
        return self._verdict is not None

    @property
    def exit_code(self) -> int:
        return self._verdict["exit_code"] if self._verdict else int(ExitCode.BUG)

    def end(self) -> None:
        """Look no more, and give the signals back."""
        self._over = True
        if current_thread() is not self._thread:
            os.write(self._pipe[1], b"\0")
            self._thread.join(timeout=GRACE_SECONDS)
        if self._verdict and self._world.rank == 0:
            self._await_readers()  # rank 0 serves the store
        faulthandler.cancel_dump_traceback_later()
        self._release_signals()
        self._release_lock()
        if self._stacks:
            self._stacks.close()
            path = Path(self._stacks.name)
            with contextlib.suppress(OSError):
                if path.stat().st_size == 0:
                    path.unlink()

    # -----------------------------------------------------------------------------------------------------------------
    # Signals

    def _catch_signals(self) -> None:
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        if current_thread() is not main_thread():
            return  # under a debugger or a notebook: the files still work
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in (*STOPPING, POKE):
            self._handlers[number] = signal.signal(number, self._in_main_thread)

    def _release_signals(self) -> None:
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        for end in self._pipe:
            os.close(end)

    def _in_main_thread(self, number: int, frame: Any) -> None:
        if self._at_once and not self._over:
            if number in STOPPING:
                self._wish(Ask.STOP, signal.Signals(number).name, STOPPING[signal.Signals(number)])
            raise Interrupted(f"stopped by {self._cause} {self._where}; the same command goes on", self._exit_code)

    def _wish(self, ask: Ask, cause: str, code: ExitCode = ExitCode.INTERRUPTED) -> None:
        if ask > self._ask:
            self._ask, self._cause, self._exit_code = ask, cause, code
            if ask is Ask.STOP:
                self._tell("wish", {"cause": cause, "exit_code": int(code)})

    # -----------------------------------------------------------------------------------------------------------------
    # The thread

    def _look(self) -> None:
        while not self._over:
            ready, _, _ = select.select([self._pipe[0]], [], [], LOOK_SECONDS)
            for number in os.read(self._pipe[0], 64) if ready else b"":
                if number in {*STOPPING}:
                    self._on_signal(signal.Signals(number))
            if self._over:
                return
            self._tick()
            if self.lock:
                self._look_at_files(self.lock)
            self._look_at_launchers()
            if self._limit:
                self._keep_time()
            if self._store is not None and time.monotonic() - self._talked_at >= TALK_SECONDS:
                self._talked_at = time.monotonic()
                self._talk()
            self._look_at_peers()
            if self._verdict and time.monotonic() - self._verdict_at > GRACE_SECONDS:
                self._leave(self._verdict["exit_code"])

    def _tick(self) -> None:
        """Count this look, and the time since the last one, but no more of it than a look takes: the job may have been
        suspended."""
        now = time.monotonic()
        self._idle += min(now - self._looked_at, TALK_SECONDS)
        self._looked_at = now
        self._pace = self._pace._replace(tick=self._pace.tick + 1)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._signalled_at and time.monotonic() - self._signalled_at > AGAIN_SECONDS:
            self._judge(STOPPING[number], f"ended by a second {number.name}, without the step that it was in")
            self._leave(int(STOPPING[number]))
        self._signalled_at = self._signalled_at or time.monotonic()
        self._wish(Ask.STOP, number.name, STOPPING[number])

    def _look_at_files(self, lock: Lock) -> None:
        """`touch RUN/SAVE` and `touch RUN/STOP`: they work where no signal gets through. And is the folder still ours?"""
        for ask in (Ask.SAVE, Ask.STOP):
            with contextlib.suppress(OSError):
                (self._folder / ask.name).unlink()
                self._wish(ask, f"the file {self._folder / ask.name}")
                self._poke()
        gone = lock.has_gone
        if gone or not lock.keep():
            self.lock = None
            self._wish(Ask.STOP, f"the loss of {self._folder}" if gone else f"another run, which has taken {self._folder}")
            self._poke()

    def _look_at_launchers(self) -> None:
        if any(not launcher.is_alive for launcher in self._launchers):
            self._launchers = []
            self._wish(Ask.STOP, "the end of its launcher")
            self._poke()

    def _keep_time(self) -> None:
        """Has this rank moved lately?"""
        self._set_timer()
        if self._verdict is None and self._limit and self._idle > self._limit:
            message = self._blame()
            if self._idle > self._limit and self._limit and self._judge(ExitCode.HANG, message):
                print(shown(message), file=sys.__stderr__, flush=True)

    def _set_timer(self) -> None:
        """One in C stands behind, for a main thread that holds Python's lock."""
        with self._timer:
            if self._stacks and self._limit:
                faulthandler.dump_traceback_later(self._limit + GIL_SECONDS, exit=True, file=self._stacks)

    def _talk(self) -> None:
        """Tell the others where this rank is; hear what they wish, and whether one has left."""
        try:
            if self._world.size > 1:
                self._tell(f"pace/{self._world.rank}", self._pace)
            wish = self._heard("wish")
            if wish and self._ask is not Ask.STOP:
                self._wish(Ask.STOP, wish["cause"], ExitCode(wish["exit_code"]))
                self._poke()
            if self._verdict is None and (verdict := self._heard("verdict")):
                self._accept(verdict)
        except Exception:  # the store is served by rank 0
            self._store = None
            if 0 not in self._peers:
                self._died(0)

    def _look_at_peers(self) -> None:
        dead = [rank for rank, process in self._peers.items() if not process.is_alive]
        if not dead or self._verdict is not None or self._over:
            return
        time.sleep(TALK_SECONDS)  # it may have said why
        if self._store is not None:
            self._talk()
        if self._verdict is None:
            self._died(dead[0])

    def _died(self, rank: int) -> None:
        message = f"rank {rank} died without a word, in or after step {self._pace.step}: killed, or out of memory"
        first = self._judge(ExitCode.BUG, message)
        # With rank 0 the store is gone, and every rank is the first: one of each machine speaks.
        if first and (rank != 0 or all(r > self._world.rank for r, p in self._peers.items() if p.is_alive)):
            print(shown(message), file=sys.__stderr__, flush=True)

    def _judge(self, code: ExitCode | int, message: str) -> bool:
        """Publish why all ranks leave; True for the rank that says so first."""
        verdict = {"rank": self._world.rank, "exit_code": int(code), "message": message}
        if self._store is not None:
            try:
                verdict = json.loads(self._store.compare_set("verdict", "", json.dumps(verdict)))
            except Exception:  # rank 0 is gone, and with it the store
                self._store = None
        self._accept(verdict)
        return verdict["rank"] == self._world.rank

    def _accept(self, verdict: dict[str, Any]) -> None:
        if self._verdict is None:
            self._verdict, self._verdict_at = verdict, time.monotonic()
            if verdict["exit_code"] == ExitCode.HANG and self._stacks:
                faulthandler.dump_traceback(self._stacks, all_threads=True)
            if self._store is not None and verdict["rank"] != self._world.rank:
                with contextlib.suppress(Exception):
                    self._store.add("readers", 1)

    def _tell_end(self) -> None:
        if self._world.rank == 0 and self._verdict and self._on_end:
            on_end, self._on_end = self._on_end, None
            with contextlib.suppress(Exception):  # what it says is of use, but the end comes anyway
                on_end(self._verdict["exit_code"], self._verdict.get("message", "another rank is gone"), self._pace.step)

    def _release_lock(self) -> None:
        if self.lock:
            self.lock.release()

    def _leave(self, code: int) -> None:
        """End this process now, and those of this machine that cannot end themselves."""
        self._tell_end()
        if code == ExitCode.HANG:
            for process in self._peers.values():
                if process.is_alive and process.is_stopped:
                    with contextlib.suppress(OSError):
                        os.kill(process.pid, signal.SIGKILL)
        self._release_lock()
        with contextlib.suppress(Exception):
            sys.__stdout__.flush()  # type: ignore[union-attr]
        os._exit(code)

    # -----------------------------------------------------------------------------------------------------------------
    # Between ranks

    def _blame(self) -> str:
        """Which rank holds up the others: the one whose process stands still, else the one that is behind."""
        seen = self._paces()
        for _ in range(3):
            time.sleep(TALK_SECONDS)
            self._tick()
            self._tell(f"pace/{self._world.rank}", self._pace)  # those who look at the same time must see this rank move
        now = self._paces() | {self._world.rank: self._pace}
        others = seen.keys() & now.keys() - {self._world.rank}
        still = sorted((rank for rank in others if seen[rank].tick == now[rank].tick), key=lambda rank: now[rank].beats)
        behind = min(now, key=lambda rank: now[rank].beats)
        if not still and now[behind].beats == self._pace.beats:
            rank, what = self._world.rank, "waits"
        else:
            rank, what = (still[0], "does not answer") if still else (behind, "is behind")
        last = now[rank]
        return (
            f"step {self._pace.step}: hung, rank {rank} {what}, last heard of after {last.phase!r} in step {last.step}; "
            f"nothing moved for {self._limit:g} s (train.hang_timeout); stacks of all ranks in {self._folder / 'logs'}"
        )

    def _paces(self) -> dict[int, Pace]:
        found: dict[int, Pace] = {}
        for rank in range(self._world.size if self._store is not None else 0):
            with contextlib.suppress(Exception):
                if told := self._heard(f"pace/{rank}"):
                    found[rank] = Pace(*told)
        return found

    def _tell(self, key: str, value: Any) -> None:
        if self._store is not None:
            with contextlib.suppress(Exception):
                self._store.set(key, json.dumps(value))

    def _heard(self, key: str) -> Any:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _poke(self) -> None:
        """Make the main thread look, where it may leave at once."""
        if self._at_once and self._ask is Ask.STOP:
            os.kill(os.getpid(), POKE)

    def _await_readers(self) -> None:
        deadline = time.monotonic() + GRACE_SECONDS
        with contextlib.suppress(Exception):
            while self._store.add("readers", 0) < self._world.size - 1 and time.monotonic() < deadline:
                time.sleep(LOOK_SECONDS)


def _is_broken_contact(error: BaseException) -> bool:
    """Whether an error says that another rank has gone, rather than that this one is wrong."""
    words = ("connection", "gloo", "nccl", "broken pipe", "socket", "store")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
