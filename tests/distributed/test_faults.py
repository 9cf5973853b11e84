"""A rank that dies, a rank that hangs: all leave soon, with the right exit code, and one line says why."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_preemption import FAR, _alive, _tree, arguments, committed
from tiny import write_run
from workers import ROOT

SECONDS_TO_DIE = 15
SLOW, SOAK = pytest.mark.slow, pytest.mark.soak


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    ("how", "victim"),
    [
        ("kill", 1),
        ("error", 0),
        *[pytest.param(how, victim, marks=SOAK) for how in ("exit", "segfault", "memory") for victim in (0, 1)],
        *[pytest.param("kill", 0, marks=SLOW), pytest.param("backend", 0, marks=SLOW), pytest.param("error", 1, marks=SOAK)],
    ],
)
def test_one_rank_dies_and_all_are_gone(how, victim, run_file, forked, tmp_path):
    run = tmp_path / "run"
    ranks = forked.start(2, arguments(run_file, run, *FAR), "hooks:die", victim=victim, step=5, how=how)
    codes: dict[int, float] = {}
    deadline = time.monotonic() + 120
    while len(codes) < 2 and time.monotonic() < deadline:
        for rank, pid in enumerate(ranks.pids):
            if rank not in codes and not _alive(pid):
                codes[rank] = time.monotonic()
        time.sleep(0.02)
    assert len(codes) == 2, ranks.said()
    assert abs(codes[0] - codes[1]) < SECONDS_TO_DIE
    assert all(forked.wait(ranks)), "none ends as if it were done"
    other = ranks.said(1 - victim)
    if how in ("error", "backend", "memory"):
        assert "Traceback" in ranks.said(victim) and "Traceback" not in other
    else:
        assert other.strip().splitlines()[-1].startswith(f"rank {victim} died without a word, in or after step 5")
        assert "Traceback" not in other
    assert committed(run)[0] == 2, "4 was on its way"
    assert how != "error" or committed(run) == [2, 4], "and had the time to end"


@pytest.mark.parametrize(
    ("launcher", "how"),
    [
        *[pytest.param("deepspeed", "kill", marks=SLOW), pytest.param("deepspeed", "error", marks=SOAK)],
        *[pytest.param("torchrun", "error", marks=SLOW), pytest.param("torchrun", "kill", marks=SOAK)],
    ],
)
def test_under_a_launcher_nothing_is_left(launcher, how, run_file, tmp_path):
    run = tmp_path / "run"
    start = {
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", "0", "tests/distributed/faulty.py"],
        "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2", "tests/distributed/faulty.py"],
    }
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    environment |= {"FAULT": f"die:1:3:{how}", "PYTHONPATH": f"{ROOT}:{ROOT}/tests:{ROOT}/tests/distributed"}
    command = [*start[launcher], *arguments(run_file, run, *FAR)]
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    tree: dict[int, str] = {}
    while process.poll() is None:
        tree |= _tree(process.pid)
        time.sleep(0.5)
    assert process.returncode
    assert not [pid for pid in tree if _alive(pid)]
    said = (tmp_path / "output").read_text()
    blame = "rank 1 died without a word" if how == "kill" else "ValueError: the deliberate fault of this test"
    assert said.count(blame) == 1


@pytest.mark.slow
def test_what_a_model_says_of_its_generation_may_be_wrong(run_file, forked, tmp_path):
    """Prompts are answered all the same."""
    shutil.copytree(run_file.parent / "model", tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"num_beams": "a"}')
    changes = (f"model.name_or_path={tmp_path}/model", "log.samples=1", "train.max_steps=1")
    ranks = forked.start(1, arguments(run_file, tmp_path / "run", *changes))
    assert forked.wait(ranks) == [0], ranks.said()
    assert "Traceback" not in ranks.said() and (tmp_path / "run/final/model.safetensors").exists()
    assert len((tmp_path / "run/samples.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("how", "victim"),
    [
        ("stopped", 1),
        *[pytest.param(how, 0, marks=SLOW) for how in ("asleep", "gil")],
        *[pytest.param(how, 1, marks=SOAK) for how in ("asleep", "gil")],
    ],
)
def test_a_hang_is_named_and_ended(how, victim, run_file, forked, tmp_path):
    run = tmp_path / "run"
    limit = "train.hang_timeout=6"
    count = 3 if how == "stopped" else 2  # of three, two wait, and neither is to blame
    step = 1 if how == "gil" else 3  # before the watch has looked at all
    ranks = forked.start(count, arguments(run_file, run, *FAR, limit), "hooks:hang", victim=victim, step=step, how=how)
    codes = forked.wait(ranks, seconds=150)
    assert all(code == 6 for rank, code in enumerate(codes) if rank != victim), ranks.said()
    assert codes[victim] in (6, 1, -signal.SIGKILL)
    (line,) = [line for line in ranks.said().splitlines() if "hung" in line]
    blamed = r"rank \d (is behind|does not answer|waits as all others do)"
    assert re.match(rf"step [{step}{step + 1}]: hung, {blamed}, last heard of after '\w+' in step", line), line
    if how != "asleep":
        assert f"rank {victim} does not answer" in line
    stacks = (run / "logs" / f"rank-{1 - victim}.stacks.txt").read_text()
    assert "MainThread" in stacks or "Thread 0x" in stacks
    if how == "asleep":
        assert "hooks.py" in (run / "logs" / f"rank-{victim}.stacks.txt").read_text()
    assert "Traceback" not in ranks.said()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_leaves_out_a_collective_ends_all(victim, run_file, forked, tmp_path):
    """Its next one meets the one that it left out: gloo calls that an error, or nobody moves any more."""
    limits = arguments(run_file, tmp_path / "run", *FAR, "train.hang_timeout=6")
    ranks = forked.start(2, limits, "hooks:hang", victim=victim, step=5, how="skips")
    codes = forked.wait(ranks, seconds=60)
    assert set(codes) <= {1, 6}, ranks.said()
    assert committed(tmp_path / "run")[0] == 2


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_no_false_alarm_in_two_hundred_clean_runs(run_file, forked, tmp_path):
    """With a limit just above a step's time, under load: two runs at a time."""
    for k in range(0, 200, 2):
        folders = [tmp_path / f"run-{k + i}" for i in range(2)]
        runs = [forked.start(2, arguments(run_file, folder, "train.hang_timeout=10")) for folder in folders]
        for folder, ranks in zip(folders, runs):
            assert forked.wait(ranks) == [0, 0], ranks.said()
            assert "hung" not in ranks.said() and not list((folder / "logs").glob("*.stacks.txt"))


@pytest.mark.slow
def test_a_clean_run_is_not_taken_for_hung(run_file, forked, tmp_path):
    """The limit is for standing still, not for the whole: a run of many steps takes longer."""
    ranks = forked.start(1, arguments(run_file, tmp_path / "run", "train.max_steps=60", "train.hang_timeout=5"))
    assert forked.wait(ranks) == [0]
    assert not list((tmp_path / "run/logs").glob("*.stacks.txt")), "empty files are not left"
