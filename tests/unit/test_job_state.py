"""`dspref status` where SLURM can be asked: what it says of a job, and what the run folder says, as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dspref.cli import app
from dspref.slurm import job_state
from dspref.slurm.job_state import FORGOTTEN, JobState

INVALID = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts commands with these bodies on an empty PATH."""

    def put(**bodies: str) -> None:
        for name, body in bodies.items():
            (tmp_path / "bin").mkdir(exist_ok=True)
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / "bin" / name).chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return put


@pytest.mark.parametrize(
    ("bodies", "found"),
    [
        ({}, None),
        ({"squeue": "echo 'PENDING|Resources'"}, JobState("PENDING", "Resources")),
        ({"squeue": "echo 'RUNNING|None'"}, JobState("RUNNING")),
        ({"squeue": "echo 'Unable to contact slurm controller' >&2; exit 1"}, None),
        ({"squeue": INVALID}, JobState(FORGOTTEN)),
        ({"squeue": INVALID, "sacct": "echo 'CANCELLED by 0|0:15'"}, JobState("CANCELLED", "exit code 0:15")),
        ({"squeue": INVALID, "sacct": "echo 'COMPLETED|0:0'"}, JobState("COMPLETED")),
        ({"squeue": INVALID, "sacct": "exit 1"}, JobState(FORGOTTEN)),
    ],
)
def test_what_slurm_says_of_a_job(bodies, found, commands):
    commands(**bodies)
    assert job_state.ask("7") == found


@pytest.mark.parametrize(
    ("own", "of_job", "state"),
    [
        ("submitted", JobState("PENDING", "Priority"), "submitted"),
        ("interrupted", JobState("PENDING", "BeginTime"), "requeued"),
        ("failed", JobState("PENDING", "BeginTime"), "requeued"),
        ("running", JobState("PENDING", "BeginTime"), "requeued"),  # its node was lost
        ("running", JobState("RUNNING"), "running"),
        ("scoring", JobState("RUNNING"), "scoring"),
        ("interrupted", JobState("RUNNING"), "starting"),
        ("interrupted", JobState("COMPLETING"), "interrupted"),
        ("interrupted", JobState("PENDING", "JobHeldUser"), "held"),
        ("submitted", JobState("REQUEUE_HOLD"), "held"),
        ("running", JobState("SUSPENDED"), "suspended"),
        ("running", JobState("NODE_FAIL"), "failed"),
        ("running", JobState(FORGOTTEN), "ended"),
        ("submitted", JobState("FAILED", "NonZeroExitCode"), "failed"),
        ("submitted", JobState("CANCELLED"), "cancelled"),
        ("interrupted", JobState("FAILED", "NonZeroExitCode"), "interrupted"),  # in its own words
        ("failed", JobState("FAILED"), "failed"),
        ("finished", JobState("RUNNING"), "finished"),
        ("running", None, "running"),
    ],
)
def test_run_and_job_as_one(own, of_job, state):
    about = {"state": own, "job": "7", "eta_seconds": 9.0, "scoring": None, "error": None, "log": None}
    told = job_state.joined(about, of_job)
    assert (told["state"], told["slurm"]) == (state, of_job and str(of_job))
    stands = of_job is not None and state in ("requeued", "suspended", "failed", "ended", "cancelled") and own != state
    assert told["eta_seconds"] is None or not stands


def submitted(folder: Path, log: str = "") -> Path:
    (folder / "submit").mkdir(parents=True)
    (folder / "submit/config.yaml").write_text("{}")
    (folder / "log.out").write_text(log)
    about = {"job": "7", "submitted": "2026-01-01T00:00:00+00:00", "log": f"{folder}/log.out"}
    (folder / "submit/job.json").write_text(json.dumps(about))
    return folder


def said(run: Path) -> str:
    return CliRunner().invoke(app, ["status", str(run)]).output


def test_a_job_that_can_never_run_shows_why(tmp_path, commands):
    commands(squeue="echo 'PENDING|BadConstraints'")
    assert "slurm     pending (BadConstraints)" in said(submitted(tmp_path / "run"))


def test_a_job_that_ended_before_the_run_spoke_shows_the_end_of_its_log(tmp_path, commands):
    commands(squeue="echo 'FAILED|NonZeroExitCode'")
    log = "dspref: job 7 on n1, restart 0, checkpoint of step 0\nModuleNotFoundError: x\n"
    shown = said(submitted(tmp_path / "a", log))
    assert "state     failed, job 7" in shown and "error     ModuleNotFoundError: x" in shown
    log += "dspref: failed with exit code 3: pairs.jsonl:3: no pair\nslurmstepd: cleaned up\n"
    assert "error     failed with exit code 3: pairs.jsonl:3: no pair" in said(submitted(tmp_path / "b", log))


def test_a_run_outside_of_slurm_belongs_to_no_job(tmp_path, commands):
    """Submitted once, and gone on with by hand."""
    commands(squeue=INVALID)
    run = submitted(tmp_path / "run")
    started = "2026-01-02T00:00:00+00:00"
    (run / "run.json").write_text(json.dumps({"run_id": "a", "state": "running", "started": started, "host": "h", "pid": 1}))
    (run / "events.jsonl").write_text(json.dumps({"time": started, "event": "start"}) + "\n")
    assert "state     running" in said(run)


def test_a_controller_that_is_down_is_asked_once_for_a_sweep_and_never_for_what_is_finished(tmp_path, commands):
    asked = tmp_path / "asked"
    commands(squeue=f"echo x >>{asked}; echo 'Unable to contact slurm controller' >&2; exit 1")
    runs = [submitted(tmp_path / "sweep" / str(k)) for k in range(3)]
    sweep = submitted(tmp_path / "all")
    about = json.loads((sweep / "submit/job.json").read_text())
    (sweep / "submit/job.json").write_text(json.dumps(about | {"runs": [str(run) for run in runs]}))
    assert said(sweep).count("submitted") == 3 and asked.read_text() == "x\n"
    (runs[0] / "run.json").write_text(json.dumps({"run_id": "a", "state": "finished", "job": "7", "host": "h", "pid": 1}))
    assert "finished" in said(runs[0]) and asked.read_text() == "x\n"
