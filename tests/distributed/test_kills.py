"""A run folder is a run's whatever the instant of a kill: before every file operation, from the first mkdir to the last, of
a start, a resume and a start anew, on either rank. The same command then goes on, and ends as if nothing had been."""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Forked, until
from test_preemption import arguments, events
from test_resume import forget_everything_after, training_records
from tiny import write_run

SIMPO = ("deepspeed={zero_optimization: {stage: 1}}", "objective={name: simpo}", "data.eval=null", "train.eval_every=null")
RUN = (*SIMPO, "train.max_steps=3", "checkpoint.keep_last=1", "model.init=random")
ANEW = (*RUN, "checkpoint.resume=never")
# What each kind of start finds, and what it is asked to do.
KINDS = {"start": RUN, "resume": RUN, "anew": ANEW}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def whole(run_file, forked: Forked, tmp_path_factory) -> Path:
    """A run that nobody killed, with checkpoints of steps 2 and 3."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert forked.wait(forked.start(2, arguments(run_file, folder, *RUN, "checkpoint.keep_last=9"))) == [0, 0]
    return folder


def found_by(kind: str, whole: Path, run: Path) -> Path:
    """The folder as that kind of start finds it."""
    if kind != "start":
        shutil.copytree(whole, run)
    if kind == "resume":
        forget_everything_after(run, 2)
    return run


@pytest.fixture(scope="module")
def operations(run_file, whole, forked: Forked, tmp_path_factory) -> Callable[[str], dict[int, list[str]]]:
    """What each rank does to the files of its run, by kind of start."""

    @functools.cache
    def of(kind: str) -> dict[int, list[str]]:
        scratch = tmp_path_factory.mktemp(kind)
        run = found_by(kind, whole, scratch / "run")
        command = arguments(run_file, run, *KINDS[kind])
        ranks = forked.start(2, command, "hooks:count_all", below=str(run), into=str(scratch))
        assert forked.wait(ranks) == [0, 0], ranks.said()
        return {rank: (scratch / str(rank)).read_text().splitlines() for rank in (0, 1)}

    return of


def kill_and_go_on(kind: str, victim: int, point: int, run_file: Path, whole: Path, forked: Forked, folder: Path) -> None:
    run = found_by(kind, whole, folder / "run")
    command = arguments(run_file, run, *KINDS[kind])
    ranks = forked.start(2, command, "hooks:kill_at", below=str(run), victim=victim, point=point)
    codes = {}
    while victim not in codes:
        codes |= {ranks.pids.index(pid): code for pid, code in forked._ask("reap", [ranks.pids[victim]]).items()}
        ranks.codes |= {ranks.pids[rank]: code for rank, code in codes.items()}
        time.sleep(0.02)
    if victim == 0:  # the other would only notice; rank 0 has something to say when rank 1 dies
        forked.end(ranks)
    # Threads take turns as they like: a point near the end may not be reached.
    assert forked.wait(ranks)[victim] in (-9, 0), ranks.said()
    again = forked.start(2, command)
    assert forked.wait(again) == [0, 0], again.said()
    assert (run / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()
    assert training_records(run) == training_records(whole), "each step once"
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    left = [path.name for path in (*run.iterdir(), *(run / "checkpoints").iterdir()) if path.name.startswith(".")]
    assert not [name for name in left if not name.startswith(".lock-")], left
    if kind == "anew":
        before = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and path.suffix == ".safetensors"}
        kept = {path.relative_to(aside) for aside in run.glob("previous-*") for path in aside.rglob("*") if path.is_file()}
        assert before <= kept, "an old run is set aside and not lost"
    if kind == "resume":
        assert events(run, "resume"), "what was committed is used"


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_start_locks_nobody_out(run_file, whole, operations, forked, tmp_path):
    lines = operations("start")[0]
    opens = [n for n, line in enumerate(line for line in lines if " fsync " not in line) if " open " in line]
    for point in opens[:4]:
        run = tmp_path / f"run-{point}"
        full = {"below": str(run), "victim": 0, "point": point + 1, "what": "full"}
        ranks = forked.start(2, arguments(run_file, run, *RUN), "hooks:at_operation", **full)
        assert forked.wait(ranks) == [7, 7], ranks.said()
        assert ranks.said().count("No space left on device") == 1 and "Traceback" not in ranks.said()
    assert forked.wait(forked.start(2, arguments(run_file, run, *RUN))) == [0, 0]
    assert (run / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_folder_that_is_moved_away_ends_the_run_soon(run_file, whole, forked, tmp_path):
    """And nothing is written where it was; put back, it goes on."""
    run, away = tmp_path / "run", tmp_path / "away"
    far = arguments(run_file, run, *RUN, "train.max_steps=100000", "checkpoint.save_every=null")
    ranks = forked.start(2, far)
    until(lambda: len(training_records(run)) > 2 if (run / "metrics.jsonl").exists() else False)
    run.rename(away)
    assert forked.wait(ranks) == [7, 7], ranks.said()
    (line,) = [line for line in ranks.said().splitlines() if line.startswith(f"{run}: was deleted or moved")]
    assert "put it back, and the same command goes on" in line and "Traceback" not in ranks.said()
    assert not run.exists()
    away.rename(run)
    assert forked.wait(forked.start(2, arguments(run_file, run, *RUN))) == [0, 0]
    assert (run / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()


def test_a_kill_before_the_first_run_json_locks_nobody_out(run_file, whole, operations, forked, tmp_path):
    """The file with the lock is there, and no more."""
    lines = operations("start")[0]
    point = next(int(line.split()[0]) for line in lines if "/.draft-" in line and " open " in line)
    kill_and_go_on("start", 0, point, run_file, whole, forked, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_at_some_file_operations(kind, victim, run_file, whole, operations, forked, tmp_path):
    lines = operations(kind)[victim]
    for point in sorted({len(lines) * part // 5 + 1 for part in range(5)}):
        kill_and_go_on(kind, victim, point, run_file, whole, forked, tmp_path / str(point))


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_at_every_file_operation(kind, victim, run_file, whole, operations, forked, tmp_path):
    failed = []
    for point in range(1, len(operations(kind)[victim]) + 1):
        try:
            kill_and_go_on(kind, victim, point, run_file, whole, forked, tmp_path / str(point))
        except AssertionError as error:
            failed.append(f"{operations(kind)[victim][point - 1]}: {error}")
    assert not failed, "\n".join(failed)
