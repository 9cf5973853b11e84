"""What goes wrong in a rank of `Forked`, on purpose. Python's audit events see every file that Python code touches, so no
line of dspref knows of it. Each function is called on every rank before the run."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"}


def _file_operations(below: str, act: Any, flushes: bool = False) -> None:
    """Call act(n, event, path) before the n-th operation, from 1, that changes something below a folder of that name, or
    with `flushes` brings it to disk; the watch's look for wishes aside, which comes whenever it comes."""
    counter = itertools.count(1)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = (
                any(letter in mode for letter in "wxa+") if mode else bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            )
        elif event in CHANGES:
            path, writes = _whole(event, arguments), True
        else:
            return
        if (
            writes
            and isinstance(path, (str, os.PathLike))
            and below in str(path)
            and Path(path).name not in ("SAVE", "STOP")
        ):
            act(next(counter), event, str(path))

    sys.addaudithook(hook)
    plain = os.fsync

    def fsync(descriptor: int) -> None:
        """No event tells of it."""
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if flushes and below in path:
            act(next(counter), "fsync", path)
        plain(descriptor)

    os.fsync = fsync


def _whole(event: str, arguments: tuple) -> Any:
    """The path that changes; of a tree that is removed, names come with the descriptor of their folder."""
    at = {"os.mkdir": 2, "os.rename": 2, "os.remove": 1, "os.rmdir": 1}.get(event)
    descriptor = arguments[at] if at is not None and len(arguments) > at else -1
    if not isinstance(descriptor, int) or descriptor < 0:
        return arguments[0]
    return os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), arguments[0])


def count_operations(rank: int, below: str, into: str) -> None:
    """One line per file operation in `into`/RANK."""
    file = open(f"{into}/{rank}", "w", buffering=1)
    _file_operations(below, lambda n, event, path: file.write(f"{n} {event} {path}\n"))


def at_operation(rank: int, below: str, victim: int, point: int, what: str, times: int = 1, gate: str = "") -> None:
    """At its `point`-th file operation the victim is killed, meets a full disk `times` times, sleeps for 3 s, or waits for a
    file `gate`."""
    if rank != victim:
        return

    def act(n: int, event: str, path: str) -> None:
        if what == "full" and point <= n < point + times and event in ("open", "os.mkdir", "os.rename"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if n == point and what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if n == point and what == "slow":
            time.sleep(3)
        while n == point and what == "held" and not Path(gate).exists():
            time.sleep(0.02)

    _file_operations(below, act)


def count_all(rank: int, below: str, into: str) -> None:
    """`count_operations`, flushes included."""
    file = open(f"{into}/{rank}", "w", buffering=1)
    _file_operations(below, lambda n, event, path: file.write(f"{n} {event} {path}\n"), flushes=True)


def kill_at(rank: int, below: str, victim: int, point: int) -> None:
    """The victim is killed before its `point`-th file operation, flushes included."""
    if rank == victim:
        kill = DEATHS["kill"]
        _file_operations(below, lambda n, event, path: kill() if n == point else None, flushes=True)


def fail_to_flush(rank: int, victim: int, below: str, step: int) -> None:
    """The disk is found full when a file of a step's save is flushed, once: no audit event tells of that."""
    if rank != victim:
        return
    plain = os.fsync

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if below in path and f"step-{step:06d}" in path and path.endswith("optim_states.pt"):
            os.fsync = plain
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(descriptor)

    os.fsync = fsync


def write_elsewhere(rank: int, victim: int, below: str, into: str) -> None:
    """The victim's files are moved away when they are flushed, as if it wrote to a disk of its own."""
    from dspref.run import saving

    saving.SEEN_SECONDS = 1.0
    if rank != victim:
        return
    plain = os.fsync

    def fsync(descriptor: int) -> None:
        plain(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if below in str(path) and path.is_file():
            Path(into).mkdir(exist_ok=True)
            os.link(path, Path(into, path.name + str(time.monotonic_ns())))
            path.unlink()

    os.fsync = fsync


def _after_step(step: int, act: Any) -> None:
    """Call `act` when the optimizer has made so many steps."""
    from dspref.engine.engine import Engine

    counter, plain = itertools.count(1), Engine.step

    def counted(self: Engine) -> float:
        norm = plain(self)
        if next(counter) == step:
            act()
        return norm

    Engine.step = counted  # type: ignore[method-assign]


def die(rank: int, victim: int, step: int, how: str) -> None:
    if rank == victim:
        _after_step(step, DEATHS[how])


def _run_out_of_memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (2**20, 2**20))
    bytearray(2**30)


def _segfault() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _raise() -> None:
    raise ValueError("the deliberate fault of this test")


def _fail_in_the_backend() -> None:
    """As NCCL does, with all ranks there."""
    raise RuntimeError("NCCL error: the deliberate fault of this test")


DEATHS = {
    "exit": lambda: os._exit(1),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": _segfault,
    "memory": _run_out_of_memory,
    "error": _raise,
    "backend": _fail_in_the_backend,
}


def hang(rank: int, victim: int, step: int, how: str) -> None:
    if rank == victim:
        _after_step(step, HANGS[how])


def _hold_the_gil() -> None:
    import ctypes

    ctypes.PyDLL(None).sleep(600)


def _skip_a_collective() -> None:
    from dspref import distributed

    plain = distributed.largest

    def alone(value: int) -> int:
        distributed.largest = plain
        return value

    distributed.largest = alone


HANGS = {
    "skips": _skip_a_collective,
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "asleep": lambda: time.sleep(600),
    "gil": _hold_the_gil,
}


def poison(rank: int, victim: int, steps: list[int], what: str) -> None:
    """A loss, a gradient or one logit that is not a number, on one rank in some steps (from 1)."""
    import torch

    from dspref.training import gradient

    plain, counter = gradient.accumulate, itertools.count(1)

    def accumulate(step: Any, policy: Any, *rest: Any) -> Any:
        number = next(counter)
        if rank != victim or number not in steps:
            return plain(step, policy, *rest)
        forward = policy.forward

        def poisoned(batch: Any, **asked: Any) -> Any:
            tokens, routing = forward(batch, **asked)
            values = tokens.logps
            if what == "gradient":
                values.register_hook(lambda slope: slope * float("nan"))
                return tokens, routing
            at = torch.zeros_like(values)
            at[0] = float("nan") if what == "loss" else float("inf")
            return tokens._replace(logps=values + at), routing

        policy.forward = poisoned
        try:
            return plain(step, policy, *rest)
        finally:
            del policy.forward

    gradient.accumulate = accumulate


def mark_phases(rank: int, into: str, slow: str = "", seconds: float = 0.0) -> None:
    """Write a file `into`/PHASE-RANK when a phase begins, and stay in the phase `slow` a little."""
    from dspref.engine.engine import Engine
    from dspref.reference import filling
    from dspref.run import checkpoint
    from dspref.training import closing, evaluate, preparation

    def mark(name: str) -> None:
        Path(into, f"{name}-{rank}").touch()
        if name == slow:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                time.sleep(0.02)

    def wrap(owner: Any, attribute: str, name: str) -> None:
        plain = getattr(owner, attribute)

        def marked(*arguments: Any, **more: Any) -> Any:
            mark(name)
            return plain(*arguments, **more)

        setattr(owner, attribute, marked)

    wrap(Engine, "step", "step")
    wrap(evaluate, "sweep", "evaluation")
    wrap(filling, "score", "scoring")
    wrap(checkpoint, "save_rng", "save")
    wrap(preparation, "load_pairs", "data")
    wrap(closing, "export", "export")


def take_a_name(rank: int, path: str, folder: bool) -> None:
    """Before the first step is applied, something else takes a name in the run folder."""
    from dspref.engine.engine import Engine

    plain = Engine.step

    def taking(self: Any) -> float:
        if rank == 0 and not os.path.exists(path):
            os.makedirs(path if folder else os.path.dirname(path), exist_ok=True)
            if not folder:
                Path(path).touch()
        return plain(self)

    Engine.step = taking


def load_for_ever(rank: int, what: str, into: str) -> None:
    """A class of transformers stands in `from_pretrained`, once the file `into` is there."""
    import transformers

    def from_pretrained(*arguments: Any, **more: Any) -> Any:
        Path(into).touch()
        while True:
            time.sleep(0.02)

    getattr(transformers, what).from_pretrained = from_pretrained


def slow_scoring(rank: int, seconds: float) -> None:
    """Every pack of a scoring takes so long, and is committed at once."""
    from dspref.reference import filling

    filling.COMMIT_SECONDS = filling.FIRST_COMMIT_SECONDS = -1.0
    plain = filling._Tally.is_due

    def is_due(tally: Any) -> bool:
        time.sleep(seconds)
        return plain(tally)

    filling._Tally.is_due = is_due


def slow_answers(rank: int, into: str, first: bool) -> None:
    """Every token of an answer takes its time: of the reference's, before the first step, or else of the policy's at the
    first evaluation; a file `into`/answers-RANK is there by then."""
    from dspref.model import generation

    plain, passes = generation.generate, []

    def generate(forward: Any, *arguments: Any, **more: Any) -> Any:
        passes.append(None)

        def slow(passage: Any) -> Any:
            Path(into, f"answers-{rank}").touch()
            time.sleep(0.4)
            return forward(passage)

        return plain(slow if len(passes) == (1 if first else 2) else forward, *arguments, **more)

    generation.generate = generate
