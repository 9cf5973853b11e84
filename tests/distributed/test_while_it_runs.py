"""What a run does of itself between its steps: it evaluates before the first, stops early, exports its best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_preemption import arguments, committed, events
from tiny import write_run


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(
        tmp_path_factory.mktemp("while"),
        train={"max_steps": 6, "eval_every": 1, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "learning_rate": 1e-2},
        checkpoint={"save_every": None},
    )


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trained(run: Path) -> list[dict[str, Any]]:
    """What training says, but for the time that it took."""
    lines = (record for record in records(run) if "loss" in record)
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def weights(run: Path) -> bytes:
    return (run / "final/model.safetensors").read_bytes()


STOP = "train.stop_when={metric: eval_loss, patience: 2, min_delta: 1000.0}"  # which no evaluation gets beyond


def stopped_at(run: Path) -> list[int]:
    return [event["step"] for event in events(run, "early_stop")]


def test_a_run_evaluates_before_its_first_step_stops_early_and_exports_its_best(run_file, forked, tmp_path):
    """All of it in one run, of which the slow tests take each by itself."""
    run, asked = tmp_path / "run", ("log.samples=1", "log.sample_every=100", "log.generation.max_new_tokens=2")
    before = ("train.eval_at_start=true", "train.dry_run=true", "export=best")
    ranks = forked.start(2, arguments(run_file, run, STOP, *asked, *before))
    assert forked.wait(ranks) == [0, 0], ranks.said()
    first, *_ = records(run)
    assert first["step"] == 0 and first["epoch"] == 0 and "loss" not in first and first["eval_loss"] > 0
    assert (run / "logs/rank-0.log").read_text().count("the largest pack fits") == 1
    assert [record["step"] for record in trained(run)] == [1, 2, 3] and stopped_at(run) == [3]
    assert "stopped after step 3: eval_loss has not improved by more than 1000 for 2 evaluations" in ranks.said(0)
    answered = [json.loads(line)["step"] for line in (run / "samples.jsonl").read_text().splitlines()]
    assert answered == [0, 3], "where it stops is its end"
    about = json.loads((run / "run.json").read_text())
    assert about["state"] == "finished" and about["steps"] == 3 and "eval_loss" in about["summary"]["stopped"]
    assert about["summary"]["learned"]["eval_loss"][0] == first["eval_loss"], "the summary has a before"
    losses = {record["step"]: record["eval_loss"] for record in records(run) if "eval_loss" in record and record["step"]}
    step = about["summary"]["weights_of"]
    assert step == min(losses, key=lambda number: losses[number]) and step in committed(run)
    card = (run / "final/README.md").read_text()
    assert f"| steps | {step} of " in card and f"| eval_loss | {losses[step]:.4f} |" in card


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_evaluation_of_step_0_and_a_dry_run_change_nothing(stage, run_file, forked, tmp_path):
    common = ("train.max_steps=2", "train.eval_every=null", f"deepspeed={{zero_optimization: {{stage: {stage}}}}}")
    for name in ("true", "false"):
        before = (f"train.eval_at_start={name}", f"train.dry_run={name}")
        ranks = forked.start(2, arguments(run_file, tmp_path / name, *common, *before))
        assert forked.wait(ranks) == [0, 0], ranks.said()
    said = [(tmp_path / name / "logs/rank-0.log").read_text().count("the largest pack fits") for name in ("true", "false")]
    assert said == [1, 0]
    assert trained(tmp_path / "true") == trained(tmp_path / "false")
    assert weights(tmp_path / "true") == weights(tmp_path / "false")


@pytest.mark.slow
def test_an_early_stop_is_that_of_a_run_that_was_killed_before_it(run_file, forked, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ranks = forked.start(2, arguments(run_file, whole, STOP))
    assert forked.wait(ranks) == [0, 0], ranks.said()
    # What was waited for goes with a checkpoint: the second start has one evaluation to go.
    ranks = forked.start(
        2, arguments(run_file, broken, STOP, "checkpoint.save_every=2"), "hooks:die", victim=1, step=3, how="kill"
    )
    assert 0 not in forked.wait(ranks)
    ranks = forked.start(2, arguments(run_file, broken, STOP, "checkpoint.save_every=2"))
    assert forked.wait(ranks) == [0, 0], ranks.said()
    assert stopped_at(broken) == [3] and weights(broken) == weights(whole) and trained(broken) == trained(whole)


@pytest.mark.slow
def test_the_best_weights_are_exported(run_file, forked, tmp_path):
    run, short = tmp_path / "run", tmp_path / "short"
    common = ("train.learning_rate=0.3", "objective.beta=1.0", "checkpoint.keep_last=1")
    best = ("export=best", "checkpoint.keep_best=eval_loss")
    ranks = forked.start(2, arguments(run_file, run, *common, *best))
    assert forked.wait(ranks) == [0, 0], ranks.said()
    losses = {record["step"]: record["eval_loss"] for record in records(run) if "eval_loss" in record and record["step"]}
    step = min(losses, key=lambda number: losses[number])
    assert step < 6, "else it shows nothing"
    assert f"export: the weights of step {step}, where eval_loss was best" in ranks.said(0)
    assert step in committed(run) and len(committed(run)) <= 2, "retention keeps it"
    card = (run / "final/README.md").read_text()
    assert f"| steps | {step} of " in card and f"| eval_loss | {losses[step]:.4f} |" in card
    ranks = forked.start(2, arguments(run_file, short, *common, f"train.max_steps={step}"))
    assert forked.wait(ranks) == [0, 0], ranks.said()
    assert weights(run) == weights(short)


@pytest.mark.parametrize(("rate", "codes"), [pytest.param("1e-3", [0, 0], marks=pytest.mark.slow), ("1e-12", [5, 5])])
def test_overfit_takes_one_steps_pairs_again_and_says_whether_the_loss_fell(rate, codes, run_file, forked, tmp_path):
    only = ("train.max_steps=null", "data.eval=null", "train.eval_every=null", "model.disable_dropout=true")
    common = ("train.overfit=3", *only, f"train.learning_rate={rate}")
    ranks = forked.start(2, arguments(run_file, tmp_path / "run", *common))
    assert forked.wait(ranks) == codes, ranks.said()
    assert ("the loss fell from" if codes == [0, 0] else "the loss does not fall") in ranks.said()
    assert len({record["lengths/chosen"] for record in trained(tmp_path / "run")}) == 1
