"""SLURM is asked by its own commands: lists of arguments, never text for a shell."""

from __future__ import annotations

import shutil
import subprocess

from dspref.terminal import shown

# An answer that takes longer will not come.
ANSWER_SECONDS = 30


def answer(command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    """What a command says; of one that is not there, or does not end, the exit code 127 or 124."""
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, errors="replace", timeout=ANSWER_SECONDS)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]}: no such command")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {ANSWER_SECONDS} s")


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What a command had to say, on one line."""
    return shown(" ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}")


def is_here() -> bool:
    """Whether SLURM can be asked from this machine."""
    return shutil.which("squeue") is not None


def state_of(job: str) -> str | None:
    """The state of a job that has not ended, in SLURM's words; None where SLURM does not answer."""
    found = answer(["squeue", "--noheader", "--format=%T", f"--jobs={job}"])
    words = found.stdout.split()
    return words[0] if found.returncode == 0 and words else None


def requeue(job: str) -> str:
    """Queue a job again; what went wrong, empty where nothing did."""
    done = answer(["scontrol", "requeue", job])
    return said(done) if done.returncode else ""
