"""`dspref status`: what run folders say, whole ones and damaged ones."""

from __future__ import annotations

import json
import os
import re
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dspref import cli, terminal
from dspref.errors import ConfigError
from dspref.run import finding, status

BEGIN = datetime(2026, 5, 1, 12, tzinfo=UTC)
NOW = BEGIN + timedelta(seconds=400)
GONE = 2**22 + 1  # above the largest pid


def after(seconds: float) -> str:
    return (BEGIN + timedelta(seconds=seconds)).isoformat(timespec="seconds")


def write_run(folder: Path, logged: int = 10, every: int = 1, **changes: Any) -> Path:
    """A run that began, was started again after a node was lost at 100 s, and stands at step 10 of 40."""
    folder.mkdir(exist_ok=True)
    run = {"state": "running", "host": "elsewhere", "pid": 7, "world_size": 2, "started": after(0), "steps": 40} | changes
    (folder / "run.json").write_text(json.dumps(run))
    events = [
        {"time": after(0), "event": "start", "world_size": 2}, {"time": after(80), "event": "commit", "step": 4},
        {"time": after(200), "event": "start", "world_size": 2}, {"time": after(210), "event": "resume", "step": 4},
        {"time": after(340), "event": "commit", "step": 8},
    ]  # fmt: skip
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    records = [{"step": n, "loss": 0.5, "perf/seconds": 20.0} for n in range(every, logged + 1, every)]
    records.insert(-1, {"step": logged, "eval_loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    os.utime(folder / "metrics.jsonl", (NOW.timestamp(), NOW.timestamp()))
    for step in (4, 8):
        (folder / f"checkpoints/step-{step:06d}").mkdir(parents=True, exist_ok=True)
        (folder / f"checkpoints/step-{step:06d}/manifest.json").write_text(json.dumps({"step": step}))
    (folder / "checkpoints/.saving-step-000010").mkdir(exist_ok=True)
    return folder


def test_a_run_that_goes_on(tmp_path):
    found = status.read(write_run(tmp_path / "run"), NOW)
    assert found["state"] == "running" and (found["step"], found["steps"]) == (10, 40)
    assert found["eta_seconds"] == 30 * 20 and found["seconds_per_step"] == 20
    assert (found["commit_step"], found["commit_age_seconds"]) == (8, 60)
    assert found["goodput"] == 10 * 20 / 400 and found["wall_seconds"] == 400
    assert found["restarts"] == 1 and found["error"] is None
    shown = status.show(found)
    assert "step      10 of 40 (25%), about 10 min left" in shown
    assert "commit    step 8, 1 min ago" in shown
    assert "goodput   50% of 6 min 40 s" in shown
    assert "state     running, on elsewhere, 2 ranks" in shown
    assert len({line.index(line[10:].lstrip()) for line in shown.splitlines()}) == 1  # aligned


def test_steps_without_a_line_of_their_own_count(tmp_path):
    assert status.read(write_run(tmp_path / "run", every=5), NOW)["goodput"] == 0.5


def test_a_run_that_is_silent_is_said_to_be(tmp_path):
    found = status.read(write_run(tmp_path / "run"), NOW + timedelta(hours=2))
    assert found["state"] == "running" and "no sign of life for 2 h" in status.show(found)


@pytest.mark.parametrize(("pid", "state"), [("own", "running"), (GONE, "stopped"), ("?", "running")])
def test_a_process_of_this_host_is_looked_for(pid, state, tmp_path):
    pid = os.getpid() if pid == "own" else pid
    found = status.read(write_run(tmp_path / "run", host=socket.gethostname(), pid=pid), NOW)
    assert found["state"] == state
    assert ("goes on from the newest checkpoint" in status.show(found)) == (state == "stopped")


@pytest.mark.parametrize("state", ["interrupted", "failed", "finished"])
def test_a_run_that_ended_counts_to_the_steps_behind_its_last_event(state, tmp_path):
    """Wherever its folder was copied to, and whenever."""
    run = write_run(tmp_path / "run", state=state, error="it\x1b[2J broke")
    os.utime(run / "metrics.jsonl")
    found = status.read(run, NOW + timedelta(days=1))
    assert found["state"] == state and found["eta_seconds"] is None
    assert found["wall_seconds"] == 340 + 2 * 20 and found["goodput"] == 10 * 20 / 380
    assert "error     it [2J broke" in status.show(found)


def test_a_submitted_run(tmp_path):
    submitted = tmp_path / "run" / "submit"
    submitted.mkdir(parents=True)
    (submitted / "config.yaml").write_text("train: {max_steps: 9}\n")
    assert status.read(tmp_path / "run", NOW)["state"] == "prepared"
    (submitted / "job.json").write_text(json.dumps({"job": "12", "submitted": after(0), "log": "run/logs/slurm-12.out"}))
    found = status.read(tmp_path / "run", NOW)
    assert (found["state"], found["step"], found["steps"], found["goodput"]) == ("submitted", 0, 9, None)
    assert "submitted, job 12" in status.show(found) and "log       run/logs/slurm-12.out" in status.show(found)


@pytest.mark.parametrize(("submitted", "state"), [(390, "submitted"), (-10, "interrupted")])
def test_a_job_that_is_newer_than_the_run_waits(submitted, state, tmp_path):
    run = write_run(tmp_path / "run", state="interrupted")
    (run / "submit").mkdir()
    (run / "submit/job.json").write_text(json.dumps({"job": "12", "submitted": after(submitted)}))
    assert status.read(run, NOW)["state"] == state


def test_any_file_may_be_missing_or_half_written(tmp_path):
    names = ["events.jsonl", "metrics.jsonl", "run.json", "checkpoints/step-000008/manifest.json"]
    for name in names:
        for keep in (0, 0.5, 0.97):
            run = write_run(tmp_path / "run")
            content = (run / name).read_bytes()
            (run / name).write_bytes(content[: int(keep * len(content))])
            (run / "submit").mkdir(exist_ok=True)
            (run / "submit/config.yaml").write_text("train: [half")
            assert status.show(status.read(run, NOW))
        (run / name).unlink()
        assert status.show(status.read(run, NOW))


def test_what_is_not_a_number_is_no_number(tmp_path):
    run = write_run(tmp_path / "run", steps="many", world_size=None, started="yesterday")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(
            '[1]\n{"step": "x", "loss": 1}\n{"step": 11, "loss": null, "perf/seconds": null}\nnull\n\n{"step": 12, "lo'
        )
    found = status.read(run, NOW)
    assert (found["step"], found["steps"]) == (11, None)
    assert "step      11\n" in status.show(found)


def test_the_command(tmp_path, capsys):
    def shown(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.app(["status", *words])
        return int(end.value.code or 0), *capsys.readouterr()

    write_run(tmp_path / "run", state="finished")
    assert json.loads(shown(str(tmp_path / "run"), "--json")[1])["state"] == "finished"
    assert "finished" in shown(str(tmp_path / "run"))[1]
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    code, out, err = shown(str(tmp_path / "empty"))
    assert (code, out) == (2, "") and err == f"{tmp_path / 'empty'}: holds no dspref run; give the output_dir of one\n"
    assert shown(str(tmp_path / "missing"))[0] == 2


def test_a_sweep_is_a_line_per_run(tmp_path, capsys):
    runs = [write_run(tmp_path / name, state=state) for name, state in (("0", "finished"), ("1", "interrupted"))]
    (tmp_path / "submit").mkdir()
    about = {"job": "12", "submitted": after(0), "runs": [str(run) for run in runs]}
    (tmp_path / "submit/job.json").write_text(json.dumps(about))
    with pytest.raises(SystemExit):
        cli.app(["status", str(tmp_path)])
    heads, first, second = capsys.readouterr().out.splitlines()
    assert heads.split()[:3] == ["run", "state", "step"]
    assert first.startswith("0    finished     10 of 40 (25%)") and second.startswith("1    interrupted")


def test_what_was_learned_is_told(tmp_path):
    """The last logged value, the mean of the last ones, and of every held-out set the last figure and the best."""
    run = write_run(tmp_path / "run")
    records = [{"step": n, "loss": n / 100, "rewards/accuracies": 1 - n / 100} for n in range(1, 41)]
    records += [{"step": 41, "loss": None, "rewards/accuracies": 0.25, "perf/tokens_per_second": 1234.5}]
    for step, loss, accuracy in ((10, 0.5, 0.6), (20, 0.3, 0.9), (30, 0.4, 0.8)):
        records.append({"step": step, "eval_a_loss": loss, "eval_a_rewards/accuracies": accuracy, "eval_a_nll_loss": 9.0})
        records.append({"step": step, "eval_b_loss": 2 * loss, "eval_b_rewards/accuracies": None})
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = status.read(run, NOW)
    assert (found["loss"], found["accuracy"], found["tokens_per_second"], found["tail"]) == (0.4, 0.25, 1234.5, 5)
    assert found["loss_mean"] == pytest.approx(0.385) and found["accuracy_mean"] == pytest.approx((4 - 1.54 + 0.25) / 5)
    assert list(found["evaluations"]) == ["eval_a", "eval_b"]
    assert found["evaluations"]["eval_a"] == {
        "loss": {"last": 0.4, "step": 30, "best": 0.3, "best_step": 20},
        "accuracy": {"last": 0.8, "step": 30, "best": 0.9, "best_step": 20},
    }
    assert found["evaluations"]["eval_b"]["accuracy"] is None and found["evaluations"]["eval_b"]["loss"]["best"] == 0.6
    shown = status.show(found)
    assert "commit    none, but for the final model" in status.show(found | {"state": "finished", "commit_step": None})
    assert "loss      0.4, 0.385 as mean of the last 5 logged" in shown
    assert "eval_a    loss 0.4 at step 30 (best 0.3 at 20), accuracy 0.8 at step 30 (best 0.9 at 20)" in shown


def test_a_folder_of_runs_is_a_table(tmp_path, capsys):
    """Those of a sweep among them, each run once; what was set aside, notes and empty folders are none."""
    write_run(tmp_path / "done", state="finished")
    write_run(tmp_path / "going")
    write_run(tmp_path / "previous-20260501-120000")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/run.json").write_text("{half")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/metrics.jsonl").write_text('{"step": 3, "loss": 0.25}\n')
    inner = write_run(tmp_path / "elsewhere-0")
    (tmp_path / "sweep/submit").mkdir(parents=True)
    (tmp_path / "sweep/submit/job.json").write_text(json.dumps({"runs": [str(inner), str(tmp_path / "gone")]}))
    with pytest.raises(SystemExit) as end:
        cli.app(["status", str(tmp_path)])
    heads, *rows = capsys.readouterr().out.splitlines()
    assert not end.value.code and [row.split()[0] for row in rows] == ["damaged", "done", "elsewhere-0", "going", "old"]
    table = [dict(zip(status.COLUMNS, re.split(r"  +", row))) for row in rows]
    assert re.split(r"  +", heads) == list(status.COLUMNS)
    assert [row["state"] for row in table] == ["damaged", "finished", "running", "running", "damaged"]
    assert table[3] | {"left": ""} == {
        "run": "going", "state": "running", "step": "10 of 40 (25%)", "loss": "0.5", "acc": "-", "eval loss": "1",
        "eval acc": "-", "tok/s": "-", "left": "", "checkpoint": "8",
    }  # fmt: skip
    assert table[3]["left"] == "10 min" and table[4]["loss"] == "0.25"
    with pytest.raises(SystemExit):
        cli.app(["status", str(tmp_path), "--json"])
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 5


@pytest.mark.parametrize(
    ("names", "foreign"),
    [
        ([], False),
        (["submit", "logs"], False),
        (["notes.txt"], True),
        (["submit", "notes.txt"], True),
        (["run.json"], False),
    ],
)
def test_a_folder_of_somebody_else(names, foreign, tmp_path):
    for name in names:
        (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).write_text("")
    assert finding.is_foreign(tmp_path) == foreign


def test_a_run_begins_where_its_job_was_written(tmp_path):
    from dspref.run.folder import RunFolder

    (tmp_path / "submit").mkdir()
    (tmp_path / "logs").mkdir()
    RunFolder(tmp_path).refuse_foreign()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError):
        RunFolder(tmp_path).refuse_foreign()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (-3, "0 s"), (59.6, "1 min"), (90, "1 min 30 s"), (3600, "1 h"), (90061, "1 d 1 h")]
)
def test_durations(seconds, words):
    assert terminal.duration(seconds) == words
