"""Long-lived ranks for tests: started once, given many cases, ended as a process group when one takes too long.

`Workers(2).run("module:function", key=value, ...)` calls the function on every rank, as a launcher would have started them,
and returns what each rank returned, by rank. Given a server (`Forked`), ranks are forked from it, which takes no time; else
they are processes that share nothing, with an environment of their own.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from forked import Forked

ROOT = Path(__file__).resolve().parents[2]
SECONDS_PER_CASE = 240
# A rank that holds more after a case is ended: allocators keep what they had, and other tests need the memory.
MOST_BYTES = 1.5e9
QUIET = {
    **{"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]),
}


class Failed(AssertionError):
    """A rank raised, died, or did not answer in time."""


@dataclass
class Rank:
    pid: int
    cases: BinaryIO
    answers: BinaryIO
    reap: Callable[[], Any]


class Workers:
    def __init__(self, size: int, server: Forked | None = None, **environment: str) -> None:
        assert not (server and environment), "what allocators read as a process starts comes too late for a fork"
        self.size = size
        self._server = server
        self._environment = environment
        self._ranks: list[Rank] = []
        self._scratch = ""

    def run(self, function: str, *, seconds: float = SECONDS_PER_CASE, **arguments: Any) -> list[Any]:
        if not self._ranks:
            self._start()
        deadline = time.monotonic() + seconds
        try:
            for rank in self._ranks:
                send(rank.cases, (function, arguments))
            answers = [self._receive(number, rank, deadline) for number, rank in enumerate(self._ranks)]
        except BaseException:
            self.stop()  # a test's own time limit too: the next case would be given this one's answer
            raise
        broken = [f"rank {rank}:\n{text}" for rank, (fine, text) in enumerate(answers) if not fine]
        if broken:
            self.stop()  # ranks that failed apart would meet the next case apart
            raise Failed("\n".join(broken))
        if any(_resident_bytes(rank.pid) > MOST_BYTES for rank in self._ranks):
            self.stop()
        return [value for _, value in answers]

    def stop(self) -> None:
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
        for rank in self._ranks:
            rank.reap()
            rank.cases.close()
            rank.answers.close()
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._ranks = []

    def _start(self) -> None:
        self._scratch = tempfile.mkdtemp(prefix="dspref-ranks-")
        for rank in range(self.size):
            environment = {
                **{"RANK": str(rank), "WORLD_SIZE": str(self.size)},
                **{"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(self.size)},
                **{"TORCH_EXTENSIONS_DIR": f"{self._scratch}/extensions", "TMPDIR": self._scratch},
            }
            if self._server is not None:
                self._ranks.append(self._server.rank(environment, f"{self._scratch}/{rank}"))
                continue
            environment = {**os.environ, **QUIET, **environment, **self._environment}
            command = [sys.executable, "-u", __file__]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
            process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True, **pipes)
            self._ranks.append(Rank(process.pid, process.stdin, process.stdout, process.wait))  # type: ignore[arg-type]

    def _receive(self, number: int, rank: Rank, deadline: float) -> tuple[bool, Any]:
        ready, _, _ = select.select([rank.answers], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise Failed(f"rank {number} did not answer in time; the whole group was ended")
        try:
            return receive(rank.answers)
        except EOFError:
            raise Failed(f"rank {number} died; its output is above") from None


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def send(stream: BinaryIO, value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    return pickle.loads(_exactly(stream, struct.unpack("<Q", _exactly(stream, 8))[0]))


def _exactly(stream: BinaryIO, size: int) -> bytes:
    parts = []
    while size:
        part = stream.read(size)
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def serve(cases: BinaryIO, answers: BinaryIO) -> None:
    """The loop of one rank."""
    out, err = sys.stdout, sys.stderr
    while True:
        try:
            name, arguments = receive(cases)
        except EOFError:
            return
        module, function = name.split(":")
        try:
            answer = True, getattr(importlib.import_module(module), function)(**arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        sys.stdout, sys.stderr = out, err
        send(answers, answer)


def own_output() -> BinaryIO:
    """Standard output, kept for answers; what cases print goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    serve(sys.stdin.buffer, own_output())
