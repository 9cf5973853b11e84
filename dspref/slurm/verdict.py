"""The last word of a job: its ranks are done, have failed and why, or were interrupted and the job is queued again.

Runs on the job's first node, behind the ranks, without torch.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from dspref.errors import ExitCode
from dspref.files import end_of, read_lines, read_object, write_atomically
from dspref.reading import is_count
from dspref.run import manifest
from dspref.run.status import moment
from dspref.slurm import asking
from dspref.terminal import printable

# Starts in a row without a step that was committed, or a pair that was scored, after which nothing speaks for another.
IDLE_STARTS = 3
# How long a controller that does not answer is asked again, and how often.
PATIENCE_SECONDS, PAUSE_SECONDS = 300.0, 5.0
# Signals that ask: a rank that they ended before it could hear them was interrupted.
ASKING = (signal.SIGTERM, signal.SIGUSR1)
# What a run says where it was stopped, and is not to go on by itself.
FOR_GOOD = ("stopped by the file ", "stopped by the loss ", "stopped by another run")
IDLE = "idle.json"
# What srun says of a rank that failed, or was killed; what is said where ranks are ended from outside or because of another;
# and what the job script says before it starts them.
TASK_ENDED = re.compile(
    r"^srun: error: (\S+): task(s? [\d,-]+): (?:Exited with exit code (\d+)|((?!Terminated|User defined)[A-Z][\w ]+).*)$",
    re.M,
)
DEATHS = {"Segmentation fault": signal.SIGSEGV, "Aborted": signal.SIGABRT, "Bus error": signal.SIGBUS}
ENDED_BY_SLURM = re.compile(r"_step_signal: Terminating|\*\*\* (?:STEP|JOB) .* CANCELLED AT")
BEGINNING = re.compile(r"^dspref: (?:job |the libraries could not be read ahead).*$", re.MULTILINE)
TAIL_BYTES = 1 << 18


class Start(NamedTuple):
    """What the job script knows of one start of the job, behind its ranks."""

    run: Path
    job: str
    """Its number, of an array's task with the task's."""
    code: int
    """The exit code of srun."""
    asked: bool
    """Whether the script was asked to stop."""
    since: float
    """When it began; in seconds since 1970, by the clock of the job's first node, where rank 0 runs too."""
    committed: int
    """The step of the newest checkpoint at that time."""
    restarts: int
    max_requeue: int


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    kinds: dict[str, Callable[[str], Any]] = {"run": Path, "job": str, "asked": lambda text: text == "1", "since": float}
    for name in Start._fields:
        parser.add_argument(f"--{name.replace('_', '-')}", required=True, type=kinds.get(name, int))
    return judge(Start(**vars(parser.parse_args(arguments))))


def judge(start: Start) -> int:
    """Say what became of a start, queue the job again where it was only interrupted, and return the job's exit code."""
    if start.code == 0:
        return int(ExitCode.DONE)
    stop = last_stop(start)
    code, cause = stop.get("exit_code"), str(stop.get("cause") or "")
    if not is_count(code) or code == ExitCode.INTERRUPTED:
        code, cause = behind_interruption(start, cause)
    if code != ExitCode.INTERRUPTED:
        say(f"failed with exit code {code}: {cause or in_words(code)}")
        return code
    step = committed(start.run)
    if reason := why_not(start, cause, step):
        say(f"interrupted and not queued again: {reason}")
    else:
        requeue(start.job, step)
    return int(ExitCode.INTERRUPTED)


def committed(run: Path) -> int:
    """The step of the newest checkpoint that is whole; 0 where there is none."""
    found = [folder for folder in manifest.committed(run / "checkpoints") if (folder / manifest.NAME).is_file()]
    return (manifest.step_of(found[-1]) if found else None) or 0


def last_stop(start: Start) -> dict[str, Any]:
    """What the run says of its end in this start; {} where it does not speak."""
    events = [event for event in read_lines(start.run / "events.jsonl") if event.get("event") == "stop"]
    when = moment(events[-1].get("time")) if events else None
    return events[-1] if when and when.timestamp() >= start.since else {}


def behind_interruption(start: Start, cause: str) -> tuple[int, str]:
    """The exit code of a start whose run says that it was interrupted, or nothing; and why.

    srun's is the highest of the ranks': of one that failed, or of those that srun, having seen that, interrupted.
    """
    interrupted = int(ExitCode.INTERRUPTED)
    if start.asked or cause.startswith(FOR_GOOD):
        return interrupted, cause
    failed = first_failure(start)
    if failed or start.code in (interrupted, *(128 + number for number in ASKING)):
        return failed or (interrupted, cause)
    return (interrupted, cause) if cause else (start.code, "")


def first_failure(start: Start) -> tuple[int, str] | None:
    """(exit code, cause) of the first rank that failed, as the job's log tells it; None where none did before SLURM, or srun
    because of it, ended the others."""
    log = end_of(start.run / "logs" / f"slurm-{start.job}.out", TAIL_BYTES) or ""
    ranks = ENDED_BY_SLURM.split(BEGINNING.split(log)[-1])[0]
    for found in TASK_ENDED.finditer(ranks):
        host, which, code, killed = found.groups()
        if killed:
            number = next((number for words, number in DEATHS.items() if killed.startswith(words)), signal.SIGKILL)
            return 128 + number, f"rank{which} on {host}: {killed}"
        if int(code) != ExitCode.INTERRUPTED:
            lines = [line.strip() for line in ranks[: found.start()].splitlines() if not line.startswith("srun: ")]
            return int(code), next(filter(None, reversed(lines)), "")
    return None


def in_words(code: int) -> str:
    """An exit code, where no rank has told what happened."""
    if code > 128:
        with suppress(ValueError):
            return f"a rank was ended by {signal.Signals(code - 128).name}; what it printed stands above"
    return "what the ranks printed stands above"


def why_not(start: Start, cause: str, step: int) -> str:
    """Why an interrupted job is not to start again; empty where it is."""
    idle = idle_starts(start, moved=step > start.committed or has_scored(start))
    if cause.startswith(FOR_GOOD):
        return cause
    if idle >= IDLE_STARTS:
        return f"{idle} starts in a row committed no step after step {step}; raise --time or --signal-seconds"
    if start.restarts >= start.max_requeue:
        return f"started again {start.restarts} times (--max-requeue); submit again to go on from step {step}"
    return ""


def idle_starts(start: Start, moved: bool) -> int:
    """Starts of this job in a row that came to nothing, this one included; kept beside the job script."""
    path = start.run / "submit" / IDLE
    known = read_object(path)
    before = known["idle"] if known.get("job") == start.job and is_count(known.get("idle")) else 0
    idle = 0 if moved else before + 1
    with suppress(OSError):  # then it is told by what must be written
        write_atomically(path, json.dumps({"job": start.job, "idle": idle}))
    return idle


def has_scored(start: Start) -> bool:
    """Whether the reference scored pairs in this start, which are kept."""
    events = [event for event in read_lines(start.run / "events.jsonl") if event.get("event") == "scored"]
    when = moment(events[-1].get("time")) if events else None
    return bool(when and when.timestamp() >= start.since and events[-1].get("pairs"))


def requeue(job: str, step: int) -> None:
    """Queue the job again, unless SLURM has done so, or ended it; a controller that is down is asked for minutes."""
    deadline, told = time.monotonic() + PATIENCE_SECONDS, False
    while True:
        state = asking.state_of(job)
        if state not in (None, "RUNNING"):
            # Queueing it would call a job back that was cancelled.
            say(f"interrupted at step {step}; SLURM says {state}, and what follows is up to it")
            return
        failure = asking.requeue(job) if state else "the controller does not answer"
        if not failure:
            say(f"queued again at step {step}; SLURM lets a job that does so wait for about 2 minutes")
            return
        if time.monotonic() > deadline:
            say(f"interrupted and not queued again: {failure}; submit again to go on from step {step}")
            return
        if not told:
            say(f"cannot be queued again yet ({failure}); trying for {PATIENCE_SECONDS / 60:.0f} minutes")
            told = True
        time.sleep(PAUSE_SECONDS)


def say(text: str) -> None:
    print(f"dspref: {printable(text, limit=1000)}", file=sys.stderr, flush=True)
