"""What ends a run from outside, and how every rank learns of it: a signal, a file in the run folder, a launcher or a rank
that died, a step that hangs.

Python runs a signal handler only when the main thread comes back from C, and a collective is C for as long as another rank
lets it wait. So each rank has a thread that only looks, and tells the others through the job's key-value store. The main
threads then agree, between two steps, on what to do; before the first step there is nothing to finish, and they leave.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread, current_thread
from typing import Any

from dspref import distributed
from dspref.distributed import Relayed
from dspref.errors import ExitCode, Interrupted, exit_code_of
from dspref.processes import launchers
from dspref.terminal import shown
from dspref.watch.interruption import STOPPING, decided
from dspref.watch.lock import Lock
from dspref.watch.pace import HangTimer
from dspref.watch.peers import GRACE_SECONDS, TALK_SECONDS, Peers
from dspref.watch.request import Request, Requests
from dspref.watch.signals import Signals

LOOK_SECONDS = 0.25
# A launcher passes on the signal that the whole process group has had: only one that comes later asks again.
AGAIN_SECONDS = 3.0

OnEnd = Callable[[int, str, int], None]


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
        decided(watch.exit_code if watch.has_verdict else int(exit_code_of(error)))
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
        self._rank = distributed.world().rank
        self._timer = HangTimer(folder / "logs" / f"rank-{self._rank}.stacks.txt")
        self._peers = Peers(self._timer)
        self._requests, self._signalled_at = Requests(), 0.0
        self._at_once, self._where = True, "before the first step"
        self.lock: Lock | None = None
        """Of the run folder, on rank 0, once it is claimed."""
        self.was_first = False
        """Whether an error of this rank's main thread is why all leave."""
        self._over, self._launchers = False, launchers()
        self._thread = Thread(target=self._look, name="watch", daemon=True)
        self._signals = Signals(self._in_main_thread)
        self._thread.start()

    # -----------------------------------------------------------------------------------------------------------------
    # For the main thread

    def steps_begin(self, limit: float) -> None:
        """From now on a wish to stop waits for `agreed`, and a rank that does not move for `limit` seconds is hung.

        0: never.
        """
        self._at_once = False
        self._timer.begin(limit)

    def steps_end(self, may_leave: bool) -> None:
        """What follows may take its time. `may_leave`: all is committed, and a wish to stop ends this at once."""
        self._timer.stop()
        self._at_once, self._where = may_leave, "after the last step"

    def run_ends(self) -> None:
        """All is done and said in the run folder: nothing is left that a signal could stop."""
        self._at_once = False
        decided(int(ExitCode.DONE))

    def beat(self, phase: str, step: int | None = None) -> None:
        """This rank moves: it has just finished `phase`."""
        self._timer.beat(phase, step)

    def agreed(self, wish: Request = Request.NOTHING) -> Request:
        """What any rank was asked to do, or wishes itself, the same answer on all. A collective of eight bytes."""
        self.beat("agreement")
        return Request(distributed.largest(int(max(self._requests.largest, wish))))

    def granted(self) -> None:
        """A checkpoint was saved: nobody waits for one any more."""
        self._requests.granted(Request.SAVE)

    def interruption(self, where: str) -> Interrupted:
        """The end of a run that was asked to stop, to be raised."""
        causes = distributed.gather_objects((self._requests.cause, int(self._requests.exit_code)))
        cause, code = next(((cause, code) for cause, code in causes if cause), ("", ExitCode.INTERRUPTED))
        return _interrupted(cause, where, ExitCode(code))

    def report(self, error: BaseException) -> None:
        """Tell the others that this rank leaves, and why, unless one of them was first."""
        self._at_once = False  # no signal ends this
        if _is_broken_contact(error):
            self._peers.await_verdict(error, self._folder / "logs")
        if not self.has_verdict and not isinstance(error, Relayed):
            message = str(error).split("\n", 1)[0] or type(error).__name__
            self.was_first = self._peers.judge(exit_code_of(error), message)
        self._tell_end()

    @property
    def has_verdict(self) -> bool:
        """Whether all ranks leave."""
        return self._peers.verdict is not None

    @property
    def exit_code(self) -> int:
        return self._peers.verdict["exit_code"] if self._peers.verdict else int(ExitCode.BUG)

    def end(self) -> None:
        """Look no more, and give the signals back."""
        self._over = True
        if current_thread() is not self._thread:
            self._signals.wake()
            self._thread.join(timeout=GRACE_SECONDS)
        if self.has_verdict and self._rank == 0:
            self._peers.await_readers()
        self._timer.close()
        self._signals.release()
        if self.lock:
            self.lock.release()

    # -----------------------------------------------------------------------------------------------------------------
    # The thread goes round

    def _look(self) -> None:
        while not self._over:
            for number in self._signals.heard(LOOK_SECONDS):
                self._on_signal(number)
            if self._over:
                return
            self._timer.look()
            if self.lock:
                self._look_at_files(self.lock)
            self._look_at_launchers()
            self._look_for_a_hang()
            self._look_at_peers()
            if self._peers.grace_is_over:
                self._leave(self.exit_code)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._signalled_at and time.monotonic() - self._signalled_at > AGAIN_SECONDS:
            self._peers.judge(STOPPING[number], f"ended by a second {number.name}, without the step that it was in")
            self._leave(int(STOPPING[number]))
        self._signalled_at = self._signalled_at or time.monotonic()
        self._wish(Request.STOP, number.name, STOPPING[number])

    def _look_at_files(self, lock: Lock) -> None:
        """`touch RUN/SAVE` and `touch RUN/STOP`: they work where no signal gets through. And is the folder still ours?"""
        for request in (Request.SAVE, Request.STOP):
            with contextlib.suppress(OSError):
                (self._folder / request.name).unlink()
                self._ask(request, f"the file {self._folder / request.name}")
        gone = lock.has_gone
        if gone or not lock.keep():
            self.lock = None
            cause = f"the loss of {self._folder}" if gone else f"another run, which has taken {self._folder}"
            self._ask(Request.STOP, cause)

    def _look_at_launchers(self) -> None:
        if any(not launcher.is_alive for launcher in self._launchers):
            self._launchers = []
            self._ask(Request.STOP, "the end of its launcher")

    def _look_for_a_hang(self) -> None:
        self._timer.set()
        if self.has_verdict or not self._timer.is_hung:
            return
        rank, what, last = self._peers.blame()
        message = (
            f"step {self._timer.pace.step}: hung, rank {rank} {what}, "
            f"last heard of after {last.phase!r} in step {last.step}; "
            f"nothing moved for {self._timer.limit:g} s (train.hang_timeout); stacks of all ranks in {self._folder / 'logs'}"
        )
        # It may have moved while others were looked at.
        if self._timer.is_hung and self._peers.judge(ExitCode.HANG, message):
            print(shown(message), file=sys.__stderr__, flush=True)

    def _look_at_peers(self) -> None:
        self._peers.talk(self._on_wish)
        dead = self._peers.dead
        if not dead or self.has_verdict or self._over:
            return
        time.sleep(TALK_SECONDS)  # it may have said why
        self._peers.talk(self._on_wish, now=True)
        if not self.has_verdict:
            self._peers.died(dead[0])

    # -----------------------------------------------------------------------------------------------------------------
    # Wishes, and the end

    def _in_main_thread(self, number: signal.Signals) -> None:
        if self._at_once and not self._over:
            if number in STOPPING:
                self._wish(Request.STOP, number.name, STOPPING[number])
            raise _interrupted(self._requests.cause, self._where, self._requests.exit_code)

    def _wish(self, request: Request, cause: str, code: ExitCode = ExitCode.INTERRUPTED) -> None:
        if self._requests.add(request, cause, code) and request is Request.STOP:
            self._peers.tell("wish", {"cause": cause, "exit_code": int(code)})

    def _on_wish(self, wish: dict[str, Any]) -> None:
        """Another rank was asked to stop."""
        if self._requests.largest is not Request.STOP:
            self._ask(Request.STOP, wish["cause"], ExitCode(wish["exit_code"]))

    def _ask(self, request: Request, cause: str, code: ExitCode = ExitCode.INTERRUPTED) -> None:
        """A wish that the main thread has not heard of: make it look, where it may leave at once."""
        self._wish(request, cause, code)
        if self._at_once and self._requests.largest is Request.STOP:
            self._signals.poke_main_thread()

    def _tell_end(self) -> None:
        verdict = self._peers.verdict
        if self._rank == 0 and verdict and self._on_end:
            on_end, self._on_end = self._on_end, None
            with contextlib.suppress(Exception):  # what it says is of use, but the end comes anyway
                on_end(verdict["exit_code"], verdict.get("message", "another rank is gone"), self._timer.pace.step)

    def _leave(self, code: int) -> None:
        """End this process now."""
        self._tell_end()
        if code == ExitCode.HANG:
            self._peers.kill_stopped()
        if self.lock:
            self.lock.release()
        with contextlib.suppress(Exception):
            sys.__stdout__.flush()  # type: ignore[union-attr]
        os._exit(code)


def _interrupted(cause: str, where: str, code: ExitCode) -> Interrupted:
    return Interrupted(f"stopped by {cause} {where}; the same command goes on", code)


def _is_broken_contact(error: BaseException) -> bool:
    """Whether an error says that another rank has gone, rather than that this one is wrong."""
    words = ("connection", "gloo", "nccl", "broken pipe", "socket", "store")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
