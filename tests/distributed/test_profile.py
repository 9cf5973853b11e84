"""`train.profile`: some steps of a real run, read back from their traces; the run itself is as without it."""

from __future__ import annotations

import gzip
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from forked import Forked, until
from test_preemption import arguments, committed
from test_while_it_runs import records, trained, weights
from tiny import write_run

PHASES = {"data", "reference", "forward", "backward", "update", "record"}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of one or two packs, evaluated after the fourth and the last, a checkpoint every two."""
    train = {"max_steps": 6, "eval_every": 4}
    return write_run(tmp_path_factory.mktemp("profile"), train=train)


@pytest.fixture(scope="module")
def whole(run_file, forked: Forked, tmp_path_factory) -> Path:
    """A run that nobody looked at."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert forked.wait(forked.start(2, arguments(run_file, folder))) == [0, 0]
    return folder


def ranges(path: Path) -> list[dict[str, Any]]:
    """What a trace names itself, in the order of time."""
    with gzip.open(path, "rt") as file:
        found = [event for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    return sorted(found, key=lambda event: (event["ts"], -event["dur"]))


def phases_of_steps(path: Path) -> dict[int, list[str]]:
    """The phases within each step of a trace."""
    events, steps = ranges(path), {}
    for step in events:
        if named := re.fullmatch(r"step (\d+)", step["name"]):
            begins, ends = step["ts"], step["ts"] + step["dur"]
            within = [event for event in events if begins <= event["ts"] and event["ts"] + event["dur"] <= ends]
            steps[int(named[1])] = [event["name"] for event in within if event["name"] in PHASES]
    return steps


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("profile/*"))


def no_drafts(run: Path) -> bool:
    return not [path for path in run.glob("profile/**/*") if path.name.startswith(".")]


@pytest.mark.slow
def test_a_profile_names_the_phases_of_its_steps_and_changes_no_weight(run_file, whole, forked, tmp_path):
    """Over an evaluation, which is not in it, and checkpoints; in steps of several packs; up to the last step."""
    run = tmp_path / "run"
    ranks = forked.start(2, arguments(run_file, run, "train.profile=[2, 6]"))
    assert forked.wait(ranks) == [0, 0], ranks.said()
    assert folders(run) == ["steps-2-4", "steps-5-6"] and no_drafts(run)
    for folder, steps in (("steps-2-4", [2, 3, 4]), ("steps-5-6", [5, 6])):
        for rank in (0, 1):
            found = phases_of_steps(run / f"profile/{folder}/rank-{rank}.trace.json.gz")
            assert sorted(found) == steps
            assert all(set(phases) == PHASES and phases[-2:] == ["update", "record"] for phases in found.values())
            assert "aten::" in (run / f"profile/{folder}/rank-{rank}.operators.txt").read_text()
    packs = {record["step"]: record["perf/packs"] for record in records(whole) if "perf/packs" in record}
    assert max(packs.values()) > 1
    names = [event["name"] for event in ranges(run / "profile/steps-2-4/rank-0.trace.json.gz")]
    assert names.count("checkpoint") == 1, "that of step 2; the one of step 4 comes when nothing is recorded"
    assert names.count("backward") == sum(packs[step] for step in (2, 3, 4))
    assert trained(run) == trained(whole) and weights(run) == weights(whole)
    timed = [record["step"] for record in records(run) if "perf/seconds" in record]
    assert timed == [1], "what the profiler slows down is not told as the speed of the run"
    said = ranks.said(0)
    assert said.count("profile: steps 2 to 4 in") == said.count("profile: steps 5 to 6 in") == 1
    assert "rank-0.trace.json.gz in https://ui.perfetto.dev" in said and "profiler_start" not in ranks.said()


@pytest.mark.slow
def test_a_run_that_goes_on_behind_the_steps_says_so(run_file, forked, tmp_path):
    run = tmp_path / "run"
    ranks = forked.start(2, arguments(run_file, run, "train.max_steps=4", "train.profile=1"))
    assert forked.wait(ranks) == [0, 0], ranks.said()
    assert folders(run) == ["step-1"]
    ranks = forked.start(2, arguments(run_file, run, "train.max_steps=6", "train.profile=[2, 3]"))
    assert forked.wait(ranks) == [0, 0], ranks.said()
    line = "warning: train.profile: the run goes on after step 4, and has steps 2 to 3 behind it; nothing is profiled"
    assert ranks.said(0).count(line) == 1 and folders(run) == ["step-1"]
    ranks = forked.start(2, arguments(run_file, run, "train.num_train_epochs=3", "train.max_steps=null", "train.profile=12"))
    assert forked.wait(ranks) == [2, 2], ranks.said()
    assert ranks.said().count("train.profile.steps: there is no step 12, the run has 9; name earlier ones") == 1


@pytest.mark.slow
def test_a_stop_within_the_steps_keeps_what_was_recorded_and_the_rest_comes_later(run_file, whole, forked, tmp_path):
    run, marks, asked = tmp_path / "run", tmp_path / "marks", "train.profile=[1, 6]"
    marks.mkdir()
    ranks = forked.start(2, arguments(run_file, run, asked), "hooks:mark_phases", slow="step", seconds=1.0, into=str(marks))
    until(lambda: all((marks / f"step-{rank}").exists() for rank in (0, 1)))
    ranks.signal(signal.SIGTERM)
    assert forked.wait(ranks) == [75, 75], ranks.said()
    done = committed(run)[-1]
    first = "step-1" if done == 1 else f"steps-1-{done}"
    assert folders(run) == [first] and no_drafts(run) and done < 4
    assert sorted(phases_of_steps(run / f"profile/{first}/rank-1.trace.json.gz")) == list(range(1, done + 1))
    assert forked.wait(forked.start(2, arguments(run_file, run, asked))) == [0, 0]
    assert folders(run) == sorted([first, f"steps-{done + 1}-4" if done < 3 else "step-4", "steps-5-6"])
    assert weights(run) == weights(whole)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["all ranks", "one rank"])
def test_a_profile_that_cannot_be_written_is_one_line(where, run_file, whole, forked, tmp_path):
    run = tmp_path / "run"
    taken = run / "profile" if where == "all ranks" else run / "profile/steps-2-3/rank-1.trace.json.gz"
    way = {"path": str(taken), "folder": where == "one rank"}
    ranks = forked.start(2, arguments(run_file, run, "train.profile=[2, 3]"), "hooks:take_a_name", **way)
    assert forked.wait(ranks) == [0, 0], ranks.said()
    said = ranks.said(0)
    assert said.count("train.profile") == 1 and "Traceback" not in ranks.said()
    if where == "all ranks":
        assert "switched off on ranks 0, 1" in said and "steps 2 to 3: nothing is written, the run goes on" in said
    else:
        assert "switched off on rank 1" in said and sorted(phases_of_steps(run / "profile/steps-2-3/rank-0.trace.json.gz"))
    assert no_drafts(run) and weights(run) == weights(whole)
