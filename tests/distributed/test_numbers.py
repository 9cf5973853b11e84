"""Numbers that go wrong: the step changes nothing, the pairs are named, and a run that does not recover ends with its last
good step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_preemption import arguments, committed, events
from tiny import write_run

SLOW, SOAK = pytest.mark.slow, pytest.mark.soak


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # One epoch of three steps; no dropout, so that a run without one of them draws nothing else.
    return write_run(
        tmp_path_factory.mktemp("numbers"),
        model={"disable_dropout": True},
        train={"max_steps": 3, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "eval_every": None},
        checkpoint={"save_every": None},
        data={"shuffle": False, "eval": None},
    )


def stage(number: int) -> str:
    return f"deepspeed={{zero_optimization: {{stage: {number}}}}}"


CASES = [(0, "float32", "loss", 1), (3, "float32", "gradient", 0)]
CASES += [(number, "float32", what, 1) for number in range(4) for what in ("loss", "gradient", "logit")]
CASES += [(number, "bfloat16", "loss", 0) for number in (1, 2, 3)]
IN_CI = {(0, "float32", "logit", 1), (1, "float32", "logit", 1), (2, "bfloat16", "loss", 0), (3, "float32", "logit", 1)}
PARAMETERS = [
    pytest.param(*case, marks=[] if k < 1 else SLOW if k < 2 or case in IN_CI else SOAK) for k, case in enumerate(CASES)
]


@pytest.mark.parametrize(("number", "dtype", "what", "victim"), PARAMETERS)
def test_a_bad_step_changes_nothing(number, dtype, what, victim, run_file, forked, tmp_path):
    """The end is that of a run on the data without the second step's pairs."""
    run, without = tmp_path / "run", tmp_path / "without"
    common = (stage(number), f"model.dtype={dtype}", "checkpoint.save_every=2")
    ranks = forked.start(2, arguments(run_file, run, *common), "hooks:poison", victim=victim, steps=[2], what=what)
    assert forked.wait(ranks) == [0, 0], ranks.said()
    rows = (run_file.parent / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rest.jsonl").write_text("".join(rows[:4] + rows[8:]))
    fewer = ("train.max_steps=2", f"data.train.path={tmp_path}/rest.jsonl")
    assert forked.wait(forked.start(2, arguments(run_file, without, *common, *fewer))) == [0, 0]
    assert (run / "final/model.safetensors").read_bytes() == (without / "final/model.safetensors").read_bytes()
    (skip,) = events(run, "skip")
    assert skip["step"] == 2
    states = [json.loads(path.read_text()) for path in sorted(run.glob("checkpoints/*/state.json"))]
    assert [state["skipped"] for state in states] == [1, 0], "a restart does not forget it"
    assert "warning: step 2 skipped" in ranks.said(0) and "Traceback" not in ranks.said()
    if what == "gradient":
        assert skip["rows"] == []
    else:
        assert set(skip["rows"]) <= {4, 5, 6, 7} and skip["where"][0] in ranks.said(0)
        assert skip["where"][0].startswith(f"{run_file.parent}/pairs.jsonl:")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]


@pytest.mark.parametrize("number", [*[pytest.param(stage, marks=SOAK) for stage in (0, 1, 2)], pytest.param(3, marks=SLOW)])
def test_too_many_in_a_row_end_the_run_with_the_last_good_step(number, run_file, forked, tmp_path):
    run = tmp_path / "run"
    long = ("train.max_steps=9", "train.max_skipped_steps=2", stage(number))
    ranks = forked.start(2, arguments(run_file, run, *long), "hooks:poison", victim=1, steps=[2, 4, 5, 6, 7], what="loss")
    assert forked.wait(ranks) == [5, 5], ranks.said()
    assert [event["step"] for event in events(run, "skip")] == [2, 4, 5, 6]
    assert ranks.said().count("3 steps in a row were skipped") == 1 and "Traceback" not in ranks.said()
    assert committed(run) == [3], "the last good one"
    assert json.loads((run / "run.json").read_text())["state"] == "failed"
    # Nothing is wrong any more: it goes on and ends like a run with the same steps left out.
    assert forked.wait(forked.start(2, arguments(run_file, run, *long))) == [0, 0]
    whole = tmp_path / "whole"
    ranks = forked.start(2, arguments(run_file, whole, *long), "hooks:poison", victim=1, steps=[2], what="loss")
    assert forked.wait(ranks) == [0, 0]
    assert (run / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()


def test_an_overflow_in_fp16_lowers_the_scale_and_nothing_else(run_file, forked, tmp_path):
    run = tmp_path / "run"
    half = ("model.dtype=float16", "train.max_skipped_steps=0", stage(2))
    ranks = forked.start(1, arguments(run_file, run, *half), "hooks:poison", victim=0, steps=[2], what="gradient")
    codes = forked.wait(ranks)
    if "is not supported on this device" in ranks.said():
        pytest.skip("this device has no float16")
    assert codes == [0], ranks.said()
    assert not events(run, "skip")
