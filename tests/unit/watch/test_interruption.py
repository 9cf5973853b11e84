"""A signal before a run has its watch: the exit code of an interruption, whatever the process is in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dspref.watch.interruption import STOPPING, first_rank, leaving_at_once

ROOT = Path(__file__).resolve().parents[3]
CODES = {"TERM": 75, "USR1": 75, "INT": 130}
# What an import may be in when the signal comes.
STAND_INS = {
    "python": "time.sleep(100)",
    "in C, where no handler of Python's runs": "ctypes.CDLL(None).sleep(100)",
    "in what catches all": "exec('while True:\\n  try: time.sleep(100)\\n  except BaseException: pass')",
}
CASES = [
    *(("pydantic", "python", name) for name in CODES),
    *(("torch", how, name) for how in STAND_INS for name in ("TERM", "INT")),
    ("torch", "python", "USR1"),
]


def started(folder: Path, module: str, how: str, command: list[str], **environment: str) -> subprocess.Popen[str]:
    """A command that stands in the import of `module`."""
    (folder / "instead").mkdir(exist_ok=True)
    mark = folder / "mark"
    text = f"import ctypes, time\nopen({str(mark)!r}, 'w').close()\n{STAND_INS[how]}\n"
    (folder / "instead" / f"{module}.py").write_text(text)
    (folder / "run.yaml").write_text("model: {name_or_path: m}\ndata: {train: p}\noutput_dir: out\n")
    paths = os.pathsep.join([str(folder / "instead"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    process = subprocess.Popen([sys.executable, *command], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    while not mark.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    return process


def ended(process: subprocess.Popen[str], name: str) -> tuple[int, str]:
    process.send_signal(getattr(signal, f"SIG{name}"))
    try:
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    return process.returncode, said


@pytest.mark.parametrize(("module", "how", "name"), CASES)
def test_a_signal_while_modules_are_loaded(module, how, name, tmp_path) -> None:
    process = started(tmp_path, module, how, [str(ROOT / "launch/train.py"), "--config", "run.yaml"])
    line = f"stopped by SIG{name} before the run began; the same command begins it\n"
    assert ended(process, name) == (CODES[name], line)
    assert not (tmp_path / "out").exists()


LATER = """
import os, threading, time
from dspref.watch import interruption

held = threading.Event()

def end():
    interruption._leaving.acquire()
    held.set()
    time.sleep(0.3)
    os._exit(75)

threading.Thread(target=end).start()
held.wait()
interruption._leave(15)
print("went on")
"""


def test_the_main_thread_does_not_go_on_while_the_other_ends_the_process() -> None:
    """A signal cuts a call in C short: an import that fails by that would be told behind the interruption."""
    done = subprocess.run([sys.executable, "-c", LATER], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (75, "")


def test_a_signal_ends_a_process_whose_reader_has_gone(tmp_path) -> None:
    process = started(tmp_path, "torch", "python", [str(ROOT / "launch/train.py"), "--config", "run.yaml"])
    assert process.stderr is not None
    process.stderr.close()
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(timeout=60) == 75
    finally:
        process.kill()


def test_one_rank_speaks(tmp_path) -> None:
    where = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TMPDIR": str(tmp_path)}
    process = started(tmp_path, "torch", "python", [str(ROOT / "launch/train.py"), "--config", "run.yaml"], **where)
    assert ended(process, "TERM") == (75, "")


@pytest.mark.parametrize(
    ("environment", "speaks"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, False),
        ({"SLURM_PROCID": "0"}, True),
        # None of these is a rank of a job, and nobody else would say so.
        ({"RANK": "x", "WORLD_SIZE": "2"}, True),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1"}, True),
        ({"RANK": "2", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "x"}, True),
    ],
)
def test_who_speaks(environment, speaks) -> None:
    assert first_rank(environment) is speaks


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["train", "run.yaml"], "before the run began; the same command begins it"),
        (["score", "run.yaml"], "while it scored; the same command goes on"),
        (["export", "step-1", "--to", "out"], "before it was done; the same command begins anew"),
    ],
)
def test_the_commands_too(command, words, tmp_path) -> None:
    """Those without a watch as well, in whatever they load for their work."""
    late = {"train": "torch", "score": "deepspeed", "export": "safetensors"}[command[0]]
    process = started(tmp_path, late, "python", ["-m", "dspref", *command])
    code, said = ended(process, "TERM")
    assert (code, said.splitlines()[-1]) == (75, f"stopped by SIGTERM {words}")
    assert not (tmp_path / "out").exists()


AT_AN_END = """
import ctypes, sys
from dspref.watch.interruption import catch_to_the_end, decided
catch_to_the_end(), decided(4)
libc, text = ctypes.CDLL(None), ctypes.create_string_buffer(b"down")
for call, argument in (libc.pause, None), (libc.puts, text), (libc.setlinebuf, ctypes.c_void_p.in_dll(libc, "stdout")):
    getattr(libc, "__cxa_atexit")(call, argument, None)  # the last comes first
sys.exit(4)
"""


@pytest.mark.parametrize("name", CODES)
def test_no_signal_while_libraries_are_taken_down(name) -> None:
    """A second in which python's handlers are gone, and the exit code would be that of the signal."""
    process = subprocess.Popen(
        [sys.executable, "-c", AT_AN_END], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    try:
        said = process.stdout.readline() if process.stdout else ""
        assert said == "down\n"
        process.send_signal(getattr(signal, f"SIG{name}"))
        time.sleep(0.2)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_signals_are_given_back() -> None:
    before = {number: signal.getsignal(number) for number in STOPPING}
    with leaving_at_once():
        assert all(signal.getsignal(number) is not before[number] for number in STOPPING)
        with leaving_at_once():
            pass
        assert all(signal.getsignal(number) is not before[number] for number in STOPPING)
    assert {number: signal.getsignal(number) for number in STOPPING} == before


FORKS = """
import os, signal, time
from dspref.watch.interruption import leaving_at_once
with leaving_at_once():
    for wait in [True] * 3 + [False] * 30:
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            os.write(writer, b"x")
            time.sleep(100)
            os._exit(0)
        if wait:
            os.read(reader, 1)
        os.kill(pid, signal.SIGTERM)
        if not wait:  # it may come before the fork has any handler, and is lost then
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == -signal.SIGTERM if wait else code in (-signal.SIGTERM, -signal.SIGKILL), code
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(100)
"""


def test_a_fork_ends_by_a_signal_to_it_and_alone() -> None:
    """Pools of processes are ended by it."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS]  # Python 3.12: there are threads
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    line = "stopped by SIGUSR1 before the run began; the same command begins it\n"
    assert (done.returncode, done.stderr) == (75, line)
