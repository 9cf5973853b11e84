"""`dspref train --ranks N`: the ranks of a machine started by the command itself, and ended with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_launchers import assert_trained, clean_environment, folder, run
from test_preemption import _alive, _tree, committed, steps_of, until

from dspref.ranks.starting import code_of

__all__ = ["folder"]
DSPREF = str(Path(sys.executable).parent / "dspref")
FAR = ("train.max_steps=2000",)


@pytest.mark.slow
def test_two_ranks_of_one_command(folder, tmp_path):
    done = run([DSPREF, "train", f"{folder}/run.yaml", "--ranks", "2"], tmp_path / "run")
    assert_trained(done, tmp_path / "run", ranks=2)
    lines = done.stdout.splitlines()
    assert not done.stderr and not [line for line in lines if "[INFO]" in line or "[WARNING]" in line]
    first_step = next(i for i, line in enumerate(lines) if "step 1/2" in line)
    assert first_step <= 12 and "model " in "\n".join(lines[:first_step]), "\n".join(lines[:first_step])


def test_what_is_wrong_is_said_once_and_before_ranks_are_started(folder, tmp_path):
    done = run([DSPREF, "train", f"{folder}/run.yaml", "--ranks=2", "train.lerning_rate=1"], tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "did you mean 'learning_rate'" in done.stderr
    command = [DSPREF, "train", f"{folder}/run.yaml", "--ranks=2"]
    done = run(command, tmp_path / "run", RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    assert done.returncode == 2 and "--ranks: this process is a rank of a launcher already" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("who", "name", "code"),
    [
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("terminal", "INT", 130), ("command", "TERM", 75))),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("command", "KILL", -9), ("rank", "KILL", 1))),
        *(pytest.param("command", *case, marks=pytest.mark.soak) for case in (("INT", 130), ("USR1", 75))),
        pytest.param("rank", "TERM", 75, marks=pytest.mark.soak),
    ],
)
def test_no_rank_outlives_it_and_its_exit_code_is_theirs(who, name, code, folder, tmp_path):
    folder_of_run = tmp_path / "run"
    command = subprocess.Popen(
        [DSPREF, "train", f"{folder}/run.yaml", "--ranks=2", f"output_dir={folder_of_run}", *FAR], start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=clean_environment(),
    )  # fmt: skip
    try:
        metrics = folder_of_run / "metrics.jsonl"
        until(lambda: command.poll() is not None or (metrics.exists() and metrics.read_text()), 120)
        assert command.poll() is None, command.communicate()[1]
        tree = _tree(command.pid)
        ranks = [pid for pid in tree if pid != command.pid and "launch/train.py" in tree[pid]]
        assert len(ranks) >= 2
        number = getattr(signal, f"SIG{name}")
        if who == "terminal":
            os.killpg(command.pid, number)
        else:
            os.kill(command.pid if who == "command" else max(ranks[:2]), number)
        until(lambda: command.poll() is not None and not any(_alive(pid) for pid in tree), 90)
        said = command.stderr.read() if command.stderr else ""
        assert command.returncode == code, said
        assert "Traceback" not in said and said.count("\n") <= 1, said
        if (who, name) != ("rank", "KILL"):
            assert committed(folder_of_run)[-1] == steps_of(folder_of_run)[-1]
    finally:
        if command.poll() is None:
            os.killpg(command.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0),
        ([0, 75], 75),
        ([3, 1], 3),
        ([-9, 1], 1),
        ([-9, -9], 137),
        ([0, -15], 75),
        ([-10, -2], 75),
        ([-2, -2], 130),
        ([-15, 3], 3),
    ],
)
def test_one_exit_code_for_all_ranks(codes, code):
    assert code_of(codes) == code
