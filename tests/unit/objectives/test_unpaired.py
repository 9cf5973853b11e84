"""Losses of answers that stand alone: pairs and single answers in one step, the reference point, the threshold."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dspref.objectives import Objective, RunningMean, build_objective
from dspref.objectives.families import PairLogps, PairLoss, total
from dspref.training.gradient import _with_step

# The specification's point, of which the second example has no rejected answer and the third no chosen one: log u of the
# answers is 1, -0.5; 0.5; -0.5.
THERE = [True, True, False], [True, False, True]
LOG_RATIOS = [1.0, 0.5, 0.0], [-0.5, 0.0, -0.5]
LOSSES = [("kto", "kto"), ("kto", "apo_zero_unpaired"), ("bco", "bco")]


def mixed() -> tuple[PairLogps, PairLogps]:
    chosen, rejected = (torch.tensor(side) for side in THERE)
    sums = ([-12, -30.5, -7.25], [-15, -28, -9.5]), ([-13, -31, -6.75], [-14.5, -29.5, -9])
    counts = torch.tensor([6, 20, 5]) * chosen, torch.tensor([8, 14, 7]) * rejected
    policy, reference = (
        PairLogps(*(torch.tensor(x, dtype=torch.float64) * there for x, there in zip(of, (chosen, rejected))), *counts)
        for of in sums
    )
    return policy, reference


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# (name, loss_type, keys, delta) -> loss of each example, to six decimals: 1 - sigma(.1 x .75) + 1 - sigma(.1 x .75), ...
GOLDEN: list[tuple[str, str, dict[str, Any], float, list[float]]] = [
    ("kto", "kto", {}, 0.0, [0.962523, 0.487503, 0.487503]),
    ("kto", "kto", {}, 0.25, [0.962518, 0.493750, 0.481259]),
    ("kto", "kto", {"desirable_weight": 2.0, "undesirable_weight": 0.5}, 0.25, [1.203147, 0.987501, 0.240629]),
    ("kto", "kto", {"desirable_weight": 0.0}, 0.25, [0.481259, 0.0, 0.481259]),
    ("kto", "apo_zero_unpaired", {}, 0.25, [0.962523, 0.487503, 0.487503]),
    ("kto", "apo_zero_unpaired", {"undesirable_weight": 0.0}, 0.0, [0.475021, 0.487503, 0.0]),
    ("bco", "bco", {}, 0.0, [1.312856, 0.668460, 0.668460]),
    ("bco", "bco", {}, 0.025, [1.312700, 0.680725, 0.656350]),
]


@pytest.mark.parametrize(("name", "loss_type", "keys", "delta", "expected"), GOLDEN)
def test_golden_values_of_pairs_and_single_answers(
    name: str, loss_type: str, keys: dict[str, Any], delta: float, expected: list[float]
) -> None:
    """The mean is over the four answers, not over three examples nor over the weights."""
    policy, reference = mixed()
    loss = build_objective(name, loss_type, **keys)(policy, reference, delta)
    np.testing.assert_allclose(loss.terms[loss_type].values.numpy(), expected, atol=1e-6, rtol=0)
    counts = {"answers": int(policy.count("answers"))}
    assert counts == {"answers": 4}
    assert total(loss, counts).item() == pytest.approx(sum(expected) / 4, abs=2e-6)


def test_the_golden_rows_are_the_papers_formulas() -> None:
    """In plain floats, answer by answer."""
    for name, loss_type, keys, delta, expected in GOLDEN:
        good, bad = keys.get("desirable_weight", 1.0), keys.get("undesirable_weight", 1.0)
        point = 0.0 if loss_type == "apo_zero_unpaired" else delta
        for k, value in enumerate(expected):
            own = 0.0
            if THERE[0][k]:
                x = 0.1 * LOG_RATIOS[0][k]
                own += -math.log(sigma(x - delta)) if name == "bco" else good * (1 - sigma(x - 0.1 * point))
            if THERE[1][k]:
                x = 0.1 * LOG_RATIOS[1][k]
                own += -math.log(sigma(delta - x)) if name == "bco" else bad * (1 - sigma(0.1 * point - x))
            assert own == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(("name", "loss_type"), LOSSES)
def test_gradients_reach_the_answers_that_are_there_and_no_others(name: str, loss_type: str) -> None:
    policy, reference = mixed()
    objective = build_objective(name, loss_type, beta=0.3)

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        moved = replace(policy, chosen=chosen, rejected=rejected)
        return total(objective(moved, reference, 0.4), {"answers": 4})

    leaves = [x.clone().requires_grad_() for x in (policy.chosen, policy.rejected)]
    assert torch.autograd.gradcheck(loss, leaves)
    chosen, rejected = torch.autograd.grad(loss(*leaves), leaves)
    assert (chosen < 0).tolist() == THERE[0] and (chosen != 0).tolist() == THERE[0]
    assert (rejected > 0).tolist() == THERE[1] and (rejected != 0).tolist() == THERE[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "loss_type"), LOSSES)
def test_single_answers_far_out_stay_finite(name: str, loss_type: str, dtype: torch.dtype) -> None:
    """Log-ratios of +-500, on one side alone, against points of +-500."""
    sums = torch.tensor([0.0, -1000.0, -500.0], dtype=dtype, requires_grad=True)
    none, counts = torch.zeros(3, dtype=dtype, requires_grad=True), torch.tensor([4, 4, 4])
    base = torch.full((3,), -500.0, dtype=dtype)
    for ours, theirs in (
        (PairLogps(sums, none, counts, 0 * counts), PairLogps(base, 0 * base, counts, 0 * counts)),
        (PairLogps(none, sums, 0 * counts, counts), PairLogps(0 * base, base, 0 * counts, counts)),
    ):
        for beta in (0.1, 2.0):
            for point in (0.0, 500.0, -500.0):
                loss = build_objective(name, loss_type, beta=beta)(ours, theirs, point)
                values = loss.terms[loss_type].values
                assert values.dtype == dtype and torch.isfinite(values).all()
                assert all(torch.isfinite(of).all() for of in loss.metrics.values())
                for slope in torch.autograd.grad(values.sum(), (sums, none)):
                    assert torch.isfinite(slope).all()


# (name, loss_type, delta) -> answers of each example on the right side of the threshold
RIGHT: list[tuple[str, str, float, list[int]]] = [
    ("kto", "kto", 0.0, [2, 1, 1]),
    ("kto", "kto", 0.75, [2, 0, 1]),  # log u = 0.5 is no longer above it
    ("kto", "kto", 0.5, [2, 0, 1]),  # a tie is not
    ("kto", "kto", 1.0, [1, 0, 1]),
    ("bco", "bco", 0.04, [2, 1, 1]),  # of rewards: 0.1, 0.05 and -0.05
    ("bco", "bco", 0.075, [2, 0, 1]),
    ("bco", "bco", -0.1, [1, 1, 0]),
]


@pytest.mark.parametrize(("name", "loss_type", "delta", "expected"), RIGHT)
def test_accuracy_counts_answers_beyond_the_threshold(name: str, loss_type: str, delta: float, expected: list[int]) -> None:
    """An answer that is not there is on no side, wherever the threshold is."""
    loss = build_objective(name, loss_type)(*mixed(), delta)
    assert loss.metrics["rewards/accuracies"].tolist() == expected
    assert loss.judged is not None and loss.judged.tolist() == [2, 1, 1]


def test_the_point_of_a_step_takes_the_place_of_delta_and_has_no_gradient() -> None:
    policy, reference = mixed()
    plain = build_objective("kto", "kto")
    point = torch.tensor(0.25, dtype=torch.float64)
    found = replace(plain, point=point)(policy, reference, 7.0)
    expected = plain(policy, reference, 0.25)
    torch.testing.assert_close(found.terms["kto"].values, expected.terms["kto"].values)
    assert found.metrics["kl"].tolist() == [0.25] * 3
    assert (found.metrics["kl/chosen"].tolist(), found.metrics["kl/rejected"].tolist()) == LOG_RATIOS


def test_what_each_loss_asks_of_a_step() -> None:
    def asks(objective: Objective) -> list[bool]:
        return [objective.has_mismatched, objective.has_running_mean, objective.couples, objective.reads_twice]

    assert asks(build_objective("kto", "kto")) == [True, False, False, True]
    assert asks(build_objective("kto", "apo_zero_unpaired")) == [False] * 4
    assert asks(build_objective("bco", "bco")) == [False, True, True, True]
    assert asks(build_objective("dpo", "sigmoid")) == [False] * 4


def test_bcos_delta_is_the_mean_over_answers() -> None:
    """Of a step with four answers in three examples: .1 (1 - .5 + .5 - .5) / 4; then the mean over steps."""
    policy, reference = mixed()
    objective = build_objective("bco", "bco")
    first = _with_step(RunningMean(), objective, policy, reference)
    assert (first.value, first.steps) == (pytest.approx(0.1 * 0.5 / 4), 1)
    second = _with_step(RunningMean(0.7, 1), objective, policy, reference)
    assert second.value == pytest.approx((0.7 + 0.0125) / 2)
    assert _with_step(RunningMean(0.7, 1), build_objective("kto", "kto"), policy, reference) == RunningMean(0.7, 1)


def test_counts_of_examples_with_one_answer() -> None:
    policy, _ = mixed()
    counts = {name: int(policy.count(name)) for name in ("pairs", "answers", "chosen_answers", "rejected_answers")}
    assert counts == {"pairs": 3, "answers": 4, "chosen_answers": 2, "rejected_answers": 2}
    assert (int(policy.count("chosen_tokens")), int(policy.count("rejected_tokens"))) == (26, 15)


def test_shares_of_single_answers_add_up() -> None:
    """Whatever packs they lie in, empty ones too."""
    policy, reference = mixed()
    for name, loss_type in LOSSES:
        objective = build_objective(name, loss_type)

        def share(members: list[int]) -> Tensor:
            loss: PairLoss = objective(*(p.map(lambda x: x[members]) for p in (policy, reference)), 0.3)  # noqa: B023
            return total(loss, {"answers": 4})

        whole = share([0, 1, 2])
        for packs in ([[0], [1], [2]], [[2, 0], [], [1]]):
            torch.testing.assert_close(torch.stack([share(members) for members in packs]).sum(), whole)
