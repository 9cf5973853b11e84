"""Asked to stop, a run commits the step that it is in, leaves with 75, and ends later as if nobody had asked."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import Forked, Run, until
from safetensors.numpy import load_file
from test_resume import training_records
from tiny import write_run
from workers import ROOT

from dspref.run import status

USR1, TERM = signal.SIGUSR1, signal.SIGTERM
FAR = ("train.max_steps=2000", "train.eval_every=1000000")


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("preemption"), checkpoint={"save_every": None}, train={"num_train_epochs": 1})


@pytest.fixture(scope="module")
def whole(run_file, forked: Forked, tmp_path_factory) -> Path:
    """A run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert forked.wait(forked.start(2, arguments(run_file, folder))) == [0, 0]
    return folder


def arguments(run_file: Path, folder: Path, *overrides: str) -> list[str]:
    return ["--config", str(run_file), f"output_dir={folder}", *overrides]


def in_phase(phase: str, run: Run, marks: Path, ranks: int = 2):
    until(lambda: all((marks / f"{phase}-{rank}").exists() for rank in range(ranks)))


def committed(folder: Path) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*/manifest.json"))


def events(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def steps_of(folder: Path) -> list[int]:
    records = training_records(folder) if (folder / "metrics.jsonl").exists() else []
    return [record["step"] for record in records if "loss" in record]


WHO = {"rank 0": (0,), "rank 1": (1,), "both": (0, 1)}
FAST = {("step", "rank 1", "USR1")}
IN_CI = {(phase, "rank 1", "TERM") for phase in ("evaluation", "scoring", "save", "data")}


def marks_of(*case: str) -> list[pytest.MarkDecorator]:
    return [] if case in FAST else [pytest.mark.slow if case in IN_CI else pytest.mark.soak]


CASES = [
    pytest.param(phase, who, name, marks=marks_of(phase, who, name))
    for phase in ("step", "evaluation", "save", "scoring", "data")
    for who in WHO
    for name in ("TERM", "USR1")
]


@pytest.mark.parametrize(("phase", "who", "name"), CASES)
def test_a_signal_to_any_rank_in_any_phase(phase, who, name, run_file, whole, forked, tmp_path):
    run, marks = tmp_path / "run", tmp_path / "marks"
    marks.mkdir()
    slow = {"slow": phase, "seconds": 1.0, "into": str(marks)}
    quick = ("checkpoint.save_every=2", f"reference.store={tmp_path}/store")
    caches = {"DSPREF_CACHE": str(tmp_path / "cache")} if phase == "data" else {}
    ranks = forked.start(2, arguments(run_file, run, *quick), "hooks:mark_phases", caches, **slow)
    in_phase(phase, ranks, marks, 1 if phase in ("data",) else 2)
    ranks.signal(getattr(signal, f"SIG{name}"), *WHO[who])
    assert forked.wait(ranks) == [75, 75], ranks.said()
    assert f"stopped by SIG{name}" in ranks.said() and "Traceback" not in ranks.said()
    done = (
        [record["step"] for record in training_records(run) if "loss" in record] if (run / "metrics.jsonl").exists() else []
    )
    assert committed(run)[-1:] == done[-1:], "nothing that was done is lost"
    if run.exists():
        assert json.loads((run / "run.json").read_text())["state"] == "interrupted"
        assert not (run / ".lock").exists()
    assert forked.wait(forked.start(2, arguments(run_file, run, *quick))) == [0, 0]
    assert training_records(run) == training_records(whole)
    assert (run / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("what", "name", "code"),
    [("AutoConfig", "TERM", 75), ("AutoTokenizer", "INT", 130), ("AutoModelForCausalLM", "USR1", 75)],
)
def test_a_signal_within_what_loads_a_model_is_no_fault_of_the_model(what, name, code, run_file, forked, tmp_path):
    """What catches the libraries' errors, each of its own kind, must not take this for one."""
    run, mark = tmp_path / "run", tmp_path / "mark"
    ranks = forked.start(1, arguments(run_file, run), "hooks:load_for_ever", what=what, into=str(mark))
    until(mark.exists)
    ranks.signal(getattr(signal, f"SIG{name}"))
    assert forked.wait(ranks) == [code], ranks.said()
    said = ranks.said()
    assert f"stopped by SIG{name} before the first step; the same command goes on" in said and "Traceback" not in said
    if what == "AutoModelForCausalLM":
        assert json.loads((run / "run.json").read_text())["state"] == "interrupted" and not (run / ".lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "who", "code"), [("INT", (0, 1), 130), ("TERM", (1,), 75), ("STOP file", (), 75)])
def test_what_was_scored_before_a_signal_is_kept(name, who, code, run_file, forked, tmp_path):
    """And until then `dspref status` says how far the scoring is."""
    run, packs = tmp_path / "run", "reference.tokens_per_pack=1"
    held = [f"reference.store={tmp_path}/store", packs]
    ranks = forked.start(2, arguments(run_file, run, *held), "hooks:slow_scoring", seconds=0.5)
    until(lambda: len(list((tmp_path / "store").rglob("*.safetensors"))) > 1)
    found = status.read(run)
    assert found["state"] == "scoring" and found["scoring"]["total"] > 8
    (run / "STOP").touch() if not who else ranks.signal(getattr(signal, f"SIG{name}"), *who)
    assert forked.wait(ranks) == [code, code], ranks.said()
    assert "before the first step" in ranks.said() and "Traceback" not in ranks.said()
    assert status.read(run)["state"] == "interrupted" and not (run / status.SCORING).exists()
    kept = sum(len(load_file(path)["keys"]) for path in (tmp_path / "store").rglob("*.safetensors"))
    assert forked.wait(forked.start(2, arguments(run_file, run, *held))) == [0, 0]
    told = re.findall(r"scored (\d+) of (\d+) pairs, kept", (run / "logs/rank-0.log").read_text())
    assert int(told[-1][0]) < int(told[-1][1]) == found["scoring"]["total"] and kept > 2
    other = tmp_path / "other"
    assert forked.wait(forked.start(2, arguments(run_file, other, packs, f"reference.store={tmp_path}/anew"))) == [0, 0]
    assert (run / "final/model.safetensors").read_bytes() == (other / "final/model.safetensors").read_bytes()


def test_files_in_the_run_folder_ask_too(run_file, forked, tmp_path):
    run = tmp_path / "run"
    ranks = forked.start(2, arguments(run_file, run, *FAR))
    until(lambda: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) > 2)
    (run / "SAVE").touch()
    until(lambda: committed(run))
    first = committed(run)
    (run / "STOP").touch()
    assert forked.wait(ranks) == [75, 75]
    assert len(committed(run)) == 2 and committed(run)[0] == first[0]
    assert not (run / "STOP").exists() and not (run / "SAVE").exists()
    assert "STOP" in events(run, "stop")[0]["cause"]


@pytest.mark.slow
def test_a_signal_after_a_wish_to_save_is_a_first_one(run_file, forked, tmp_path):
    run = tmp_path / "run"
    ranks = forked.start(2, arguments(run_file, run, *FAR))
    until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text())
    (run / "SAVE").touch()
    until(lambda: committed(run))
    time.sleep(3.2)
    ranks.signal(TERM, 1)
    assert forked.wait(ranks) == [75, 75]
    assert committed(run)[-1] == steps_of(run)[-1]
    assert events(run, "stop")[0]["cause"].startswith("stopped by SIGTERM after step")


@pytest.mark.slow
@pytest.mark.parametrize(("save_every", "codes"), [("2", [75, 75]), ("null", [0, 0])])
def test_a_signal_during_the_export(save_every, codes, run_file, whole, forked, tmp_path):
    """What is committed may be left; what is not is finished."""
    run, marks = tmp_path / "run", tmp_path / "marks"
    marks.mkdir()
    more = f"checkpoint.save_every={save_every}"
    ranks = forked.start(2, arguments(run_file, run, more), "hooks:mark_phases", slow="export", seconds=1.0, into=str(marks))
    in_phase("export", ranks, marks)
    ranks.signal(TERM)
    assert forked.wait(ranks) == codes, ranks.said()
    assert forked.wait(forked.start(2, arguments(run_file, run, more))) == [0, 0]
    assert (run / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_second_signal_leaves_at_once_and_the_last_commit_is_whole(run_file, forked, tmp_path):
    run, marks = tmp_path / "run", tmp_path / "marks"
    marks.mkdir()
    stuck = {"slow": "save", "seconds": 60.0, "into": str(marks)}
    ranks = forked.start(2, arguments(run_file, run, *FAR), "hooks:mark_phases", **stuck)
    until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text())
    ranks.signal(TERM)
    in_phase("save", ranks, marks)
    time.sleep(3.2)
    started = time.monotonic()
    ranks.signal(TERM)
    assert forked.wait(ranks) == [75, 75]
    assert time.monotonic() - started < 15 and committed(run) == []
    again = forked.start(2, arguments(run_file, run, *FAR))
    until(lambda: len((run / "metrics.jsonl").read_text().splitlines()) > 2)
    again.signal(USR1, 1)
    assert forked.wait(again) == [75, 75]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "told", "first", "then", "code"),
    [
        ("train.max_steps=2000", "stopped by SIGTERM after step", TERM, TERM, 75),
        ("train.max_steps=2000", "stopped by SIGINT after step", signal.SIGINT, signal.SIGINT, 130),
        ("train.max_steps=2", "next    dspref report", None, TERM, 0),
    ],
)
def test_a_signal_to_a_run_that_has_ended_changes_no_exit_code(steps, told, first, then, code, run_file, tmp_path):
    """While the interpreter is taken down: a job would be queued again for nothing, or be taken for killed."""
    run = tmp_path / "run"
    command = [sys.executable, "-u", "launch/train.py", *arguments(run_file, run, *FAR, steps)]
    ran = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ran.stdout
    if first:
        until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text(), 120)
        ran.send_signal(first)
    said = []
    for line in ran.stdout:
        said.append(line)
        if told in line:
            ran.send_signal(then)
    assert ran.wait() == code, said
    assert sum("stopped by" in line for line in said) == (1 if first else 0), said
    assert json.loads((run / "run.json").read_text())["state"] == ("interrupted" if first else "finished")


@pytest.mark.slow
def test_control_c_saves_and_says_130(run_file, forked, tmp_path):
    run = tmp_path / "run"
    ranks = forked.start(1, arguments(run_file, run, *FAR))
    until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text())
    ranks.signal(signal.SIGINT)
    assert forked.wait(ranks) == [130]
    assert committed(run) and "Traceback" not in ranks.said()


@pytest.mark.parametrize(
    "how",
    [
        *[pytest.param(how, marks=pytest.mark.slow) for how in ("launcher TERM", "runner KILL")],
        *[pytest.param(how, marks=pytest.mark.soak) for how in ("launcher USR1", "runner TERM", "group TERM")],
    ],
)
def test_no_rank_outlives_the_deepspeed_launcher(how, run_file, tmp_path):
    run = tmp_path / "run"
    command = ["deepspeed", "--num_gpus", "2", "--master_port", "0", "launch/train.py", *arguments(run_file, run, *FAR)]
    runner = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text(), 120)
    tree = _tree(runner.pid)
    launcher = next(
        pid for pid, words in tree.items() if "launcher/launch.py" in words or "deepspeed.launcher.launch" in words
    )
    who, name = how.split()
    number = getattr(signal, f"SIG{name}")
    if who == "group":
        os.killpg(runner.pid, number)
    else:
        os.kill(launcher if who == "launcher" else runner.pid, number)
    runner.poll()
    until(lambda: runner.poll() is not None and not any(_alive(pid) for pid in tree), 60)
    assert committed(run), "the step was saved"
    assert committed(run)[-1] == steps_of(run)[-1]


def _tree(root: int) -> dict[int, str]:
    """All processes below one, with their command lines."""
    found, parents = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, IndexError):
            continue
    below = {root}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return {pid: found.get(pid, "") for pid in below}


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def test_two_runs_do_not_share_a_folder(run_file, forked, tmp_path):
    run = tmp_path / "run"
    first = forked.start(1, arguments(run_file, run, *FAR))
    until(lambda: (run / "metrics.jsonl").exists())
    second = forked.start(1, arguments(run_file, run, *FAR))
    assert forked.wait(second) == [4]
    assert "is in use by process" in second.said() and len(second.said().splitlines()) < 30
    assert (run / ".lock").exists(), "it is the first one's"
    third = forked.start(1, arguments(run_file, run, *FAR))
    assert forked.wait(third) == [4]
    first.signal(TERM)
    assert forked.wait(first) == [75]
    # A lock whose holder is gone is no lock.
    shutil.copy(run / "run.json", tmp_path / "kept.json")
    third = forked.start(1, arguments(run_file, run, *FAR))
    until(lambda: (run / ".lock").exists())
    third.signal(signal.SIGKILL)
    assert forked.wait(third) == [-9] and (run / ".lock").exists()
    fourth = forked.start(1, arguments(run_file, run, *FAR))
    until(lambda: len(events(run, "resume")) >= 1)
    fourth.signal(TERM)
    assert forked.wait(fourth) == [75]
