"""The figures of a finished run: means over its last steps, all of its starts, and what ended in ruins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dspref.report import console
from dspref.training import outcome


def write_run(folder: Path, losses: list[float | None], every: int = 1, starts: int = 1, **more: Any) -> Path:
    records: list[dict[str, Any]] = []
    for k, loss in enumerate(losses, start=1):
        right = None if loss is None else float(k % 4 == 0)
        records.append({"step": k * every, "loss": loss, "rewards/accuracies": right, "perf/seconds": 10.0} | more)
        if k in (1, len(losses)):
            records.append({"step": k * every, "eval_loss": 5.0 / k, "eval_rewards/accuracies": 0.75, "eval_x": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    events = [{"event": "start"}, {"event": "commit", "step": 1}] * starts
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


@pytest.mark.parametrize(("steps", "tail"), [(1, 1), (2, 1), (10, 1), (12, 2), (100, 10), (4000, 50)])
def test_the_last_value_is_the_mean_of_a_tail(steps, tail, tmp_path):
    losses: list[float | None] = [float(k) for k in range(steps)]
    table, found = outcome.learned(write_run(tmp_path, losses) / "metrics.jsonl")
    assert found == tail
    first, last = table["loss"]
    assert first == 0.0 and last == pytest.approx(steps - 1 - (tail - 1) / 2)
    if steps == 4000:
        assert table["rewards/accuracies"][1] == pytest.approx(0.26), "13 of 50; the last step alone says 1"
    assert table["eval_loss"] == (5.0 if steps > 1 else None, pytest.approx(5.0 / steps))
    assert not any(name.endswith("eval_x") for name in table)


def test_skipped_steps_are_in_no_mean(tmp_path):
    table, tail = outcome.learned(write_run(tmp_path, [None] + [1.0] * 18 + [3.0, None]) / "metrics.jsonl")
    assert tail == 2
    assert table["loss"] == (1.0, 2.0)
    assert outcome.learned(write_run(tmp_path, [None]) / "metrics.jsonl")[0].keys() == {
        "eval_loss",
        "eval_rewards/accuracies",
    }


@pytest.mark.parametrize(
    ("starts", "title"),
    [(1, "24 steps in 90 s"), (3, "24 steps, 240 s in them, over 3 starts; the last start took 90 s in all")],
)
def test_the_summary_counts_every_start_and_says_what_it_shows(starts, title, tmp_path, capsys):
    run = write_run(tmp_path, [0.5] * 12, every=2, starts=starts)
    found = json.loads(json.dumps(outcome.summary(run, 24, 90.0, 1000)))
    assert found["seconds_in_steps"] == 240 and found["warnings"] == []
    console.summary(found | {"speed": {}}, {"model": "x"}, ["next"])
    shown = capsys.readouterr().out
    assert shown.startswith(title)
    assert "mean of the last 2 logged; eval: the last" in shown
    card = outcome.of_card(run, found)["metrics"]
    assert card["loss (training, mean of the last 2 logged steps)"] == 0.5
    assert card["eval_loss"] == pytest.approx(5 / 12)
    best = {"step": 2, "metrics": {"eval_loss": 5.0, "eval_rewards/accuracies": 0.75}}
    assert outcome.of_card(run, found | {"weights_of": 2}) == best, "the card of other weights says what those did"


def test_a_summary_of_an_older_dspref_is_shown(capsys):
    console.summary({"step": 3, "seconds": 9.6, "learned": {"loss": (1.0, 0.5)}}, {}, ["next"])
    shown = capsys.readouterr().out
    assert shown.startswith("3 steps in 10 s") and " last" in shown


def test_a_run_in_ruins_ends_with_one_warning(tmp_path, capsys):
    run = write_run(tmp_path, [0.7] + [900.0] * 11)
    console.summary(outcome.summary(run, 12, 9.0, 1000) | {"speed": {}}, {}, ["next"])
    shown = capsys.readouterr().out
    assert shown.count("warning: ") == 1 and "the loss has run off, from 0.7 to 900; the model is ruined" in shown
