"""By which evaluations a run ends, and which of them was the best."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from dspref.config import lower_is_better
from dspref.run.best import Best, Rule

NAN = float("nan")


@pytest.mark.parametrize(
    ("lower", "min_delta", "values", "ends", "best"),
    [
        (True, 0.0, [3, 2, 1, 1, 1], 5, 3),
        (True, 0.0, [3, 2, 3, 1, 2, 3], 6, 4),
        (False, 0.0, [0.5, 0.6, 0.6, 0.6], 4, 2),
        (True, 0.5, [3, 2.9, 2.8], 3, 3),  # each is the best, and too little
        (True, 0.5, [3, 2.8, 2.4, 2.3, 2.2], 5, 5),  # progress adds up: 2.4 is 0.6 below 3
        (True, 0.0, [NAN, NAN], 2, 0),
        (True, 0.0, [NAN, 5, NAN, 4, float("inf")], None, 4),
        (False, 0.0, [float("inf"), 1, 2], None, 3),
    ],
)
def test_patience_is_counted_in_evaluations_and_goes_through_a_checkpoint(lower, min_delta, values, ends, best):
    rule, state, ended = Rule("eval_loss", lower, min_delta, patience=2), Best(), None
    for step, value in enumerate(values, start=1):
        state = Best(**asdict(rule.judge(state, step, {"eval_loss": float(value)})))
        ended = ended or (step if rule.is_over(state) else None)
    assert (ended, state.step) == (ends, best)


def test_another_metric_begins_anew():
    seen = Rule("eval_loss", True, patience=1).judge(Best("eval_rewards/margins", 9.0, 3, 9.0, 7), 4, {"eval_loss": 5.0})
    assert seen == Best("eval_loss", 5.0, 4, 5.0, 0)
    assert not Rule("eval_loss", True).is_over(Best("eval_loss", 1.0, 1, 1.0, 99)), "without patience it goes on"


@pytest.mark.parametrize(
    ("metric", "lower"),
    [
        ("eval_loss", True), ("eval_x_loss", True), ("eval_nll_loss", True), ("eval_loss/sigmoid", True),
        ("eval_lossy_rewards/margins", False), ("eval_rewards/accuracies", False), ("eval_rewards/chosen", False),
        ("eval_rewards/rejected", None), ("eval_closs", None),
    ],
)  # fmt: skip
def test_a_name_tells_which_way_is_better(metric, lower):
    assert lower_is_better(metric) is lower


def test_a_metric_that_an_evaluation_has_not_is_no_progress() -> None:
    """As of single answers of which none is desirable: there is no margin."""
    rule = Rule("eval_rewards/margins", False, patience=1)
    seen = rule.judge(rule.judge(Best("eval_rewards/margins"), 2, {"eval_rewards/margins": 0.5}), 4, {"eval_loss": 0.5})
    assert (seen.value, seen.step, seen.waited) == (0.5, 2, 1)
    assert rule.is_over(seen)
