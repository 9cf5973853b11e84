"""Ranks as processes of their own, started in a fraction of a second: a server that has everything imported forks them.

What dies must be a whole process, and importing torch and DeepSpeed takes longer than a tiny run.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers import QUIET, ROOT, Rank, own_output, receive, send, serve

LATE = ("dspref.training.trainer", "transformers.models.qwen2.modeling_qwen2", "peft.tuners", "torch._inductor.compile_fx")


@dataclass
class Run:
    """Some ranks, and where each writes."""

    pids: list[int]
    output: Path
    codes: dict[int, int] = field(default_factory=dict)

    def said(self, rank: int | None = None) -> str:
        """What the ranks, or one of them, printed."""
        files = [self.output / f"{r}.txt" for r in range(len(self.pids)) if rank in (None, r)]
        return "".join(file.read_text(errors="replace") for file in files)

    def signal(self, number: int, *ranks: int) -> None:
        for rank in ranks or range(len(self.pids)):
            os.kill(self.pids[rank], number)


class Forked:
    """The server, started with the first run. Runs may overlap."""

    def __init__(self) -> None:
        self._server: subprocess.Popen | None = None
        self._scratch = ""

    def start(
        self, ranks: int, arguments: Sequence[str], hook: str = "", environment: dict[str, str] | None = None, **given: Any
    ) -> Run:
        """`launch/train.py` with these arguments on some ranks. `hook`: "module:function" to call first on every rank."""
        self._serve()
        output = Path(tempfile.mkdtemp(dir=self._scratch))
        pids = self._ask("fork", (ranks, list(arguments), str(output), hook, given, environment or {}))
        return Run(pids, output)

    def rank(self, environment: dict[str, str], pipes: str) -> Rank:
        """One of `Workers`, by two pipes of these names."""
        self._serve()
        names = f"{pipes}.cases", f"{pipes}.answers"
        for name in names:
            os.mkfifo(name)
        pid = self._ask("rank", (environment, *names))
        # In the order of the rank's own: opening waits for the other end.
        cases, answers = open(names[0], "wb", buffering=0), open(names[1], "rb", buffering=0)
        return Rank(pid, cases, answers, lambda: self._ask("wait", pid))

    def _serve(self) -> None:
        if self._server is not None:
            return
        self._scratch = tempfile.mkdtemp(prefix="dspref-forked-")
        # As the launcher has the level, which comes after the server's imports.
        own = {"TORCH_CPP_LOG_LEVEL": "ERROR", "TORCH_EXTENSIONS_DIR": f"{self._scratch}/extensions"}
        self._server = subprocess.Popen(
            [sys.executable, "-u", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=ROOT,
            env={**os.environ, **QUIET, **own}, start_new_session=True,
        )  # fmt: skip

    def wait(self, run: Run, seconds: float = 120) -> list[int]:
        """The exit codes, minus the signal for a rank that one ended. AssertionError where one is still there."""
        deadline = time.monotonic() + seconds
        while len(run.codes) < len(run.pids):
            run.codes |= self._ask("reap", [pid for pid in run.pids if pid not in run.codes])
            if time.monotonic() > deadline:
                left = [rank for rank, pid in enumerate(run.pids) if pid not in run.codes]
                self.end(run)
                raise AssertionError(f"ranks {left} are still there after {seconds} s\n{run.said()}")
            time.sleep(0.02)
        return [run.codes[pid] for pid in run.pids]

    def end(self, run: Run) -> None:
        for pid in run.pids:
            if pid not in run.codes:
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()

    def _ask(self, what: str, value: Any) -> Any:
        assert self._server is not None
        send(self._server.stdin, (what, value))  # type: ignore[arg-type]
        return receive(self._server.stdout)  # type: ignore[arg-type]


def until(found: Callable[[], Any], seconds: float = 90) -> Any:
    """What `found` gives, as soon as that is anything."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)
    return value


def serve_forks() -> None:
    answers = own_output()
    import_what_ranks_need()
    do = {"fork": lambda value: fork(*value), "rank": lambda value: fork_rank(*value), "reap": reap, "wait": wait}
    while True:
        try:
            what, value = receive(sys.stdin.buffer)
        except EOFError:
            return
        send(answers, do[what](value))


def import_what_ranks_need() -> None:
    """Also what a run imports late, or makes once; it would be most of the time of a tiny run.

    Without the freeze ZeRO-3, which collects garbage whenever an engine starts, would walk all that the imports made.
    """
    gc.disable()
    for name in LATE:
        importlib.import_module(name)
    with contextlib.suppress(ImportError, AttributeError):  # its regular expressions, which a newer one may keep elsewhere
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("qwen2")
    gc.enable()
    gc.freeze()


def fork(ranks: int, arguments: list[str], output: str, hook: str, given: dict, environment: dict[str, str]) -> list[int]:
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _be_a_rank(rank, ranks, arguments, output, hook, given, environment)
        pids.append(pid)
    return pids


def _be_a_rank(
    rank: int, ranks: int, arguments: list[str], output: str, hook: str, given: dict, environment: dict[str, str]
) -> None:
    import faulthandler

    from dspref import launcher

    os.setpgid(0, 0)
    file = os.open(f"{output}/{rank}.txt", os.O_WRONLY | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    where = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "TMPDIR": output}
    os.environ.update({key: str(value) for key, value in where.items()} | environment)
    tempfile.tempdir = None  # the server's
    code = 1
    try:
        if hook:
            module, function = hook.split(":")
            getattr(importlib.import_module(module), function)(rank, **given)
        code = launcher.main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fork_rank(environment: dict[str, str], cases: str, answers: str) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.environ.update(environment)
            tempfile.tempdir = None  # the server's
            serve(open(cases, "rb", buffering=0), open(answers, "wb", buffering=0))
        finally:
            os._exit(0)
    return pid


def wait(pid: int) -> None:
    os.waitpid(pid, 0)


def reap(pids: list[int]) -> dict[int, int]:
    found = {}
    for pid in pids:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            found[pid] = os.waitstatus_to_exitcode(status)
    return found


if __name__ == "__main__":
    serve_forks()
