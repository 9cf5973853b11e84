"""SLURM is asked by its own commands: lists of arguments, never text for a shell."""

from __future__ import annotations

import os
import shutil
import subprocess

from dspref.errors import EnvironmentFault
from dspref.terminal import shown

# An answer that takes longer will not come.
ANSWER_SECONDS = 30
NO_COMMAND, NO_ANSWER = 127, 124
# Variables that change what the commands of SLURM ask and answer: filters that a user has set for the eye, and what a job
# that this is started from was given, which one that it submits is not. Behind them, what says which SLURM is meant.
FILTERS = ("SQUEUE_", "SACCT_", "SCONTROL_", "SBATCH_ARRAY_INX", "SBATCH_NO_REQUEUE", "SLURM_")
MEANT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SACCT_CLUSTERS", "SQUEUE_CLUSTERS")


def answer(command: list[str], text: str = "", seconds: float = ANSWER_SECONDS) -> subprocess.CompletedProcess[str]:
    """What a command says; of one that is not there, or does not end, the exit code NO_COMMAND or NO_ANSWER."""
    unfiltered = {name: value for name, value in os.environ.items() if name in MEANT or not name.startswith(FILTERS)}
    try:
        return subprocess.run(
            command, input=text, capture_output=True, text=True, errors="replace", timeout=seconds, env=unfiltered
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, NO_COMMAND, "", f"{command[0]}: no such command")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, NO_ANSWER, "", f"no answer within {seconds:.0f} s")


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What a command had to say, on one line."""
    return shown(" ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}")


def is_here() -> bool:
    """Whether SLURM can be asked from this machine."""
    return shutil.which("squeue") is not None


def state_of(job: str) -> str | None:
    """The state of a job that has not ended, in SLURM's words; None where SLURM does not answer."""
    found = _in_queue(job)
    return _state_in(found) if found.returncode == 0 else None


def queued(job: str) -> str | None:
    """The state of a job that has not ended; None for one that has, and where there is no SLURM. Raises EnvironmentFault
    where SLURM does not answer."""
    if not is_here():
        return None
    found = _in_queue(job)
    if found.returncode and "Invalid job id" not in found.stderr:
        raise EnvironmentFault(f"squeue: {said(found)}: whether job {job} has ended is not known; try again")
    return _state_in(found)


def _in_queue(job: str) -> subprocess.CompletedProcess[str]:
    return answer(["squeue", "--noheader", "--format=%T", f"--jobs={job}"])


def _state_in(found: subprocess.CompletedProcess[str]) -> str | None:
    return (found.stdout.split() or [None])[0]


def requeue(job: str) -> str:
    """Queue a job again; what went wrong, empty where nothing did."""
    done = answer(["scontrol", "requeue", job])
    return said(done) if done.returncode else ""
