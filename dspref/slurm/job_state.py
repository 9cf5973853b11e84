"""What SLURM knows of a run's job, beside what the run folder says: for `dspref status`, where SLURM can be asked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dspref.files import end_of
from dspref.run import finding, status
from dspref.run.status import ALIVE
from dspref.slurm import asking

# States of a job that is to come, that is there, and that is there and stands still. Of one that has ended, the rest.
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
THERE = ("RUNNING", "COMPLETING", "CONFIGURING", "RESIZING", "SIGNALING", "STAGE_OUT")
STILL = ("SUSPENDED", "STOPPED")
# Of those to come, the ones that wait for somebody's word: states, and reasons of one that is pending.
HELD = ("REQUEUE_HOLD", "SPECIAL_EXIT", "JobHeldUser", "JobHeldAdmin", "job_requeued_in_held_state")
# What a job of which SLURM has no record any more has come to.
FORGOTTEN = "no longer known"
# Bytes of the end of a job's log in which its last word is looked for.
TAIL = 8192


class JobState(NamedTuple):
    """A job in SLURM's words; `reason` may be empty."""

    state: str
    reason: str = ""

    def __str__(self) -> str:
        return self.state.lower().replace("_", " ") + (f" ({self.reason})" if self.reason else "")


def ask(job: str) -> JobState | None:
    """None where SLURM is not here, or does not answer."""
    if not asking.is_here():
        return None
    # Some minutes long SLURM knows a job that has ended, and for good where it keeps accounts.
    queued = asking.answer(["squeue", "--noheader", "--states=all", "--format=%T|%r", f"--jobs={job}"])
    if queued.returncode and "Invalid job id" not in queued.stderr:
        return None
    if lines := queued.stdout.strip().splitlines():
        state, _, reason = lines[0].partition("|")
        return JobState(state, "" if reason == "None" else reason)
    words = ["sacct", "--noheader", "--allocations", "--parsable2", "--format=State,ExitCode", f"--jobs={job}"]
    account = asking.answer(words)
    if account.returncode == asking.NO_ANSWER:
        return None
    line = account.stdout.strip().splitlines()[:1] if not account.returncode else []
    state, _, code = line[0].partition("|") if line else (FORGOTTEN, "", "")
    return JobState(state.split()[0] if line else state, f"exit code {code}" if code and code != "0:0" else "")


def known(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is known of a run, and of the runs of a sweep or in a folder of runs. Raises ConfigError where there is none."""
    if not finding.is_run(folder) and (runs := finding.runs_in(folder)):
        about: dict[str, Any] = {"run": str(folder)}
    else:
        about = _with_job(status.read(folder))
        runs = [Path(run) for run in about["runs"] or [] if Path(run).exists()]
    found, answers = [], about.get("slurm", "") is not None
    for run in runs:
        # A controller that did not answer once is not waited for at each run.
        found.append(_with_job(status.read(run), answers))
        asked = found[-1]["job"] and found[-1]["state"] != "finished"
        answers = answers and not (asked and found[-1]["slurm"] is None)
    return about, found


def _with_job(about: dict[str, Any], asks: bool = True) -> dict[str, Any]:
    asks = bool(asks and about["job"] and about["state"] != "finished")
    return joined(about, ask(about["job"]) if asks else None)


def joined(about: dict[str, Any], job: JobState | None) -> dict[str, Any]:
    """What `status.read` says of a run, and what SLURM says of its job, as one."""
    if job is None or not about.get("job"):
        return about | {"slurm": None}
    about = about | {"slurm": str(job)}
    own, no_time = about["state"], {"eta_seconds": None}
    if own == "finished":
        return about
    if job.state in WAITING:
        began = own not in ("submitted", "prepared")
        held = job.state in HELD or job.reason in HELD
        return about | no_time | ({"state": "held" if held else "requeued", "scoring": None} if began or held else {})
    if job.state in STILL:
        return about | no_time | {"state": "suspended"}
    if job.state in THERE:
        return about if own in (*ALIVE, "submitted") or job.state == "COMPLETING" else about | {"state": "starting"}
    if own not in (*ALIVE, "submitted", "stopped"):
        return about  # it has said itself how it ended
    ended = {"CANCELLED": "cancelled", "COMPLETED": "ended", FORGOTTEN: "ended"}.get(job.state, "failed")
    return about | no_time | {"state": ended, "scoring": None, "error": about["error"] or last_word(about)}


def last_word(about: Mapping[str, Any]) -> str | None:
    """dspref's last line in the log of a job, else the last line; None where there is no log."""
    log = end_of(Path(about["log"]), TAIL) if about.get("log") else None
    lines = [line.strip() for line in (log or "").splitlines() if line.strip()]
    began = max((n for n, line in enumerate(lines) if line.startswith("dspref: job ")), default=0)
    lines = lines[began:]
    own = [
        line.removeprefix("dspref: ")
        for line in lines
        if re.match(r"dspref: (failed|interrupted|the job ended|--setup)", line)
    ]
    return [*lines, *own][-1] if lines else None
