"""What is told of a profile, and what becomes of one that fails."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from dspref.report.profiling import Profile, told

CPU = torch.device("cpu")


def steps_of(run: Path, steps: tuple[int, int] | None, taken: range, say: list[str]) -> Profile:
    """A profile of a few steps, each with one operator."""
    profile = Profile(run, steps, CPU, say.append)
    for step in taken:
        profile.write()
        profile.begin(step)
        profile.phase("forward")
        torch.ones(3).sin()
        profile.end()
    return profile


def names(path: Path) -> list[str]:
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    return [event["name"] for event in events if event.get("cat") in ("user_annotation", "cpu_op")]


def test_only_the_steps_that_are_asked_for_are_recorded(tmp_path):
    said: list[str] = []
    steps_of(tmp_path, (2, 3), range(1, 6), said).close(over=True)
    (folder,) = tmp_path.glob("profile/*")
    assert folder.name == "steps-2-3" and len(said) == 1 and str(folder) in said[0]
    found = names(folder / "rank-0.trace.json.gz")
    assert found.count("aten::sin") == found.count("forward") == 2 and {"step 2", "step 3"} <= set(found)
    assert not {"step 1", "step 4"} & set(found)
    assert "aten::sin" in (folder / "rank-0.operators.txt").read_text()


def test_what_is_due_between_steps_begins_another_trace(tmp_path):
    said: list[str] = []
    profile = steps_of(tmp_path, (1, 2), range(1, 2), said)
    profile.pause()
    torch.ones(3).cos()
    profile.write()
    profile.begin(2)
    profile.end()
    profile.close(over=True)
    assert sorted(path.name for path in tmp_path.glob("profile/*")) == ["step-1", "step-2"] and len(said) == 2
    assert not [path for path in tmp_path.glob("profile/*/*.gz") if "aten::cos" in names(path)]


def test_without_steps_nothing_is_done(tmp_path):
    said: list[str] = []
    steps_of(tmp_path, None, range(1, 4), said).close(over=True)
    assert not said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("over", [True, False])
def test_a_run_that_ends_before_the_steps_says_so_if_it_is_over(over, tmp_path):
    said: list[str] = []
    steps_of(tmp_path, (5, 6), range(1, 4), said).close(over=over)
    assert said == ["warning: train.profile: the run ended before steps 5 to 6; nothing is profiled"] * over


def test_a_stop_keeps_what_was_recorded_and_a_fault_keeps_nothing(tmp_path):
    said: list[str] = []
    steps_of(tmp_path / "a", (1, 9), range(1, 1), said)
    for name in ("stopped", "faulty"):
        (tmp_path / name).mkdir()
        profile = steps_of(tmp_path / name, (1, 9), range(1, 4), said)
        profile.close() if name == "stopped" else profile.drop()
        profile.close()
    assert [path.name for path in tmp_path.glob("*/profile/*")] == ["steps-1-3"] and len(said) == 1


@pytest.mark.parametrize("taken", ["profile", "profile/steps-1-2", "profile/steps-1-2/rank-0.operators.txt/x"])
def test_a_profile_that_cannot_be_written_is_told_once(taken, tmp_path):
    said: list[str] = []
    (tmp_path / taken).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / taken).touch()
    steps_of(tmp_path, (1, 2), range(1, 5), said).close(over=True)
    assert len(said) == 1 and said[0].startswith("warning: train.profile: switched off (")
    assert said[0].endswith("steps 1 to 2: nothing is written, the run goes on")
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".draft")]


def test_a_trace_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path, monkeypatch):
    """The profiler then says nothing, and leaves its own draft behind."""

    def cut(self, path: str) -> None:
        Path(f"{path}.tmp").write_text('{"traceEvents": [')

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", cut)
    said: list[str] = []
    steps_of(tmp_path, (1, 2), range(1, 5), said)
    assert len(said) == 1 and "is the disk full?" in said[0] and not list(tmp_path.glob("profile/*"))


def test_what_is_told_names_the_ranks_that_failed():
    assert told(Path("r"), 5, 8, ["", ""], []) == (
        "profile: steps 5 to 8 in r: open rank-0.trace.json.gz in https://ui.perfetto.dev"
    )
    line = told(Path("r"), 5, 5, ["no room", "", "x"], ["no snapshot"])
    assert line == (
        "warning: train.profile: step 5 in r: open rank-1.trace.json.gz in https://ui.perfetto.dev; no snapshot; "
        "switched off on ranks 0, 2 (no room)"
    )
    assert told(Path("r"), 5, 5, ["no room"], []).startswith("warning: train.profile: switched off (no room); step 5:")
