"""Long-lived ranks for tests: started once, given many cases, ended as a process group when one takes too long.

`Workers(2).run("module:function", key=value, ...)` calls the function on every rank, as a launcher would have started them,
and returns what each rank returned, by rank.
"""

from __future__ import annotations

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
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parents[2]
SECONDS_PER_CASE = 240
# A rank that holds more after a case is ended: allocators keep what they had, and other tests need the memory.
MOST_BYTES = 1.5e9


class Failed(AssertionError):
    """A rank raised, died, or did not answer in time."""


class Workers:
    def __init__(self, size: int, **environment: str) -> None:
        self.size = size
        self._environment = environment
        self._ranks: list[subprocess.Popen] = []
        self._scratch = ""

    def run(self, function: str, *, seconds: float = SECONDS_PER_CASE, **arguments: Any) -> list[Any]:
        if not self._ranks:
            self._start()
        deadline = time.monotonic() + seconds
        try:
            for rank in self._ranks:
                send(rank.stdin, (function, arguments))  # type: ignore[arg-type]
            answers = [self._receive(rank, process, deadline) for rank, process in enumerate(self._ranks)]
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
        for process in self._ranks:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self._ranks:
            process.wait()
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._ranks = []

    def _start(self) -> None:
        self._scratch = tempfile.mkdtemp(prefix="dspref-ranks-")
        for rank in range(self.size):
            environment = {
                **os.environ,
                **{"RANK": str(rank), "WORLD_SIZE": str(self.size)},
                **{"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(self.size)},
                **{"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                **{"TORCH_EXTENSIONS_DIR": f"{self._scratch}/extensions", "TMPDIR": self._scratch},
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]),
                **self._environment,
            }
            command = [sys.executable, "-u", __file__]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
            self._ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True, **pipes))

    def _receive(self, rank: int, process: subprocess.Popen, deadline: float) -> tuple[bool, Any]:
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise Failed(f"rank {rank} did not answer in time; the whole group was ended")
        try:
            return receive(process.stdout)  # type: ignore[arg-type]
        except EOFError:
            raise Failed(f"rank {rank} died; its output is above") from None


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


def serve() -> None:
    """The loop of one rank. Standard output is kept for answers; what cases print goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    out, err = sys.stdout, sys.stderr
    while True:
        try:
            name, arguments = receive(sys.stdin.buffer)
        except EOFError:
            return
        module, function = name.split(":")
        try:
            answer = True, getattr(importlib.import_module(module), function)(**arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        sys.stdout, sys.stderr = out, err
        send(answers, answer)


if __name__ == "__main__":
    serve()
