"""Lists of answers: values, gradients and metrics against loops over single comparisons, in any order and any table."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from dspref.objectives import build_objective, lists
from dspref.objectives.families import PairLogps, PairLoss, total

LOSSES: list[tuple[str, dict[str, Any]]] = [
    ("plackett_luce", {}),
    ("plackett_luce", {"beta": 0.7}),
    ("lipo_lambda", {}),
    ("lipo_lambda", {"beta": 0.4, "score_scale": 2.5}),
]
every_loss = pytest.mark.parametrize(("loss_type", "keys"), LOSSES)


def of(log_u: Any, labels: Any, numbers: Any) -> tuple[PairLogps, PairLogps]:
    """Answers of lists as examples of one answer, of which the best of each list are chosen ones; a reference of 0."""
    log_u, labels = (torch.as_tensor(x, dtype=torch.float64) for x in (log_u, labels))
    numbers = torch.as_tensor(numbers)
    best = torch.stack([label == labels[numbers == number].max() for label, number in zip(labels, numbers)])
    first = torch.tensor([number not in numbers[:i].tolist() for i, number in enumerate(numbers.tolist())])
    marks = {"score_chosen": labels, "score_rejected": labels, "list": numbers, "opens": first.long()}
    policy = PairLogps(log_u * best, log_u * ~best, best.long(), (~best).long(), **marks)
    return policy, policy.map(lambda x: 0 * x if x.is_floating_point() else x)


def drawn(seed: int, sizes: list[int]) -> tuple[PairLogps, PairLogps, list[list[int]]]:
    """Lists of some sizes, whose answers lie in any order, with equal labels among them; and where each list lies."""
    draws = np.random.default_rng(seed)
    numbers = draws.permutation(np.repeat(np.arange(len(sizes)) * 3, sizes))
    labels = draws.integers(0, 4, len(numbers)) / 3
    for number in np.unique(numbers):
        labels[np.flatnonzero(numbers == number)[0]] = 1.5  # some answer is the best one
    places = [np.flatnonzero(numbers == number).tolist() for number in np.unique(numbers)]
    return *of(draws.normal(0, 6, len(numbers)), labels, numbers), places


def value(loss: PairLoss, lists_counted: int) -> float:
    return total(loss, {"lists": lists_counted}).item()


def log_ratios(policy: PairLogps) -> Tensor:
    return policy.chosen + policy.rejected


@every_loss
def test_values_and_gradients_are_those_of_a_loop(loss_type: str, keys: dict[str, Any]) -> None:
    policy, reference, places = drawn(1, [2, 5, 3, 8, 2])
    beta = keys.get("beta", 0.05 if loss_type == "lipo_lambda" else 0.1)
    log_u = log_ratios(policy).requires_grad_()
    by_hand = [
        oracle.list_loss(loss_type, list(log_u[own]), policy.score_chosen[own].tolist(), beta, keys.get("score_scale", 1.0))  # type: ignore[index]
        for own in places
    ]
    best = policy.chosen_tokens.bool()
    moved = PairLogps(**{**vars(policy), "chosen": log_u * best, "rejected": log_u * ~best})
    found = build_objective("listwise", loss_type, **keys)(moved, reference)
    term = found.terms[loss_type]
    assert (term.per, policy.count("lists")) == ("lists", 5)
    for own, expected in zip(places, by_hand, strict=True):
        torch.testing.assert_close(term.values[own].sum(), expected)
    ours, theirs = (torch.autograd.grad(x, log_u)[0] for x in (term.values.sum(), torch.stack(by_hand).sum()))
    torch.testing.assert_close(ours, theirs)
    assert total(found, {"lists": 5}).item() == pytest.approx(sum(x.item() for x in by_hand) / 5)


def test_three_answers_by_hand() -> None:
    """s = 0.3, -0.1, 0.2 and labels 1, 0.5, 0: places 1, 3, 2."""
    policy, reference = of([3.0, -1.0, 2.0], [1.0, 0.5, 0.0], [0, 0, 0])
    exp = math.exp
    first = math.log((exp(0.3) + exp(-0.1) + exp(0.2)) / exp(0.3))
    second = math.log((exp(-0.1) + exp(0.2)) / exp(-0.1))
    found = build_objective("listwise", "plackett_luce")(policy, reference).terms["plackett_luce"].values
    assert found.tolist() == pytest.approx([first, second, 0.0])
    discounts, gains = [1 / math.log(2), 1 / math.log(4), 1 / math.log(3)], [1.0, 2**0.5 - 1, 0.0]

    def pair(i: int, j: int, apart: float) -> float:
        return abs(gains[i] - gains[j]) * abs(discounts[i] - discounts[j]) * math.log1p(exp(-apart))

    found = build_objective("listwise", "lipo_lambda", beta=0.1)(policy, reference).terms["lipo_lambda"].values
    assert found.tolist() == pytest.approx([pair(0, 1, 0.4) + pair(0, 2, 0.1), pair(1, 2, -0.3), 0.0])


def test_of_two_answers_plackett_luce_is_dpo() -> None:
    log_u = torch.tensor([2.0, -3.0, 0.5, 4.0], dtype=torch.float64)
    policy, reference = of(log_u, [1, 0, 1, 0], [0, 0, 1, 1])
    found = build_objective("listwise", "plackett_luce", beta=0.3)(policy, reference).terms["plackett_luce"].values
    pairs = PairLogps(log_u[::2], log_u[1::2], *[torch.ones(2, dtype=torch.int64)] * 2)
    dpo = build_objective("dpo", "sigmoid", beta=0.3)(pairs, pairs.map(lambda x: 0 * x)).terms["sigmoid"].values
    torch.testing.assert_close(found[::2], dpo)


@every_loss
def test_neither_the_order_of_answers_nor_the_table_changes_a_bit_of_meaning(
    loss_type: str, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one row, or a row for each list; lists that lie apart or are mixed, in one call or in two."""
    policy, reference, places = drawn(2, [2, 4, 3, 6])
    objective = build_objective("listwise", loss_type, **keys)
    whole = objective(policy, reference)
    shuffled = torch.as_tensor(np.random.default_rng(0).permutation(len(policy.chosen)))
    moved = objective(policy.map(lambda x: x[shuffled]), reference.map(lambda x: x[shuffled]))
    torch.testing.assert_close(moved.terms[loss_type].values, whole.terms[loss_type].values[shuffled])
    own = torch.tensor(places[1] + places[3])
    part = objective(policy.map(lambda x: x[own]), reference.map(lambda x: x[own]))
    torch.testing.assert_close(part.terms[loss_type].values, whole.terms[loss_type].values[own])
    monkeypatch.setattr(lists, "ONE_ROW", 0)
    rows = objective(policy, reference)
    torch.testing.assert_close(rows.terms[loss_type].values, whole.terms[loss_type].values)
    assert rows.judged is not None and whole.judged is not None and torch.equal(rows.judged, whole.judged)
    for name, values in whole.metrics.items():
        torch.testing.assert_close(rows.metrics[name], values)


def test_pairs_and_single_answers_are_one_list() -> None:
    """A pair brings two answers of its list; what has no token is in none."""
    marks = {"list": torch.tensor([4, 4, 9]), "opens": torch.tensor([1, 0, 1])}
    scores = {"score_chosen": torch.tensor([3.0, 2.0, 1.0]), "score_rejected": torch.tensor([1.0, 2.0, 0.0])}
    chosen, rejected = (torch.tensor(x, dtype=torch.float64) for x in ([1.0, -2.0, 0.5], [2.0, 0.0, 1.5]))
    policy = PairLogps(chosen, rejected, torch.tensor([1, 1, 1]), torch.tensor([1, 0, 1]), **marks, **scores)
    found = build_objective("listwise", "plackett_luce", beta=1.0)(policy, policy.map(lambda x: 0 * x))
    first = oracle.list_loss("plackett_luce", [chosen[0], chosen[1], rejected[0]], [3, 2, 1], 1.0)
    second = oracle.list_loss("plackett_luce", [chosen[2], rejected[2]], [1, 0], 1.0)
    assert value(found, 2) == pytest.approx((first + second).item() / 2)
    assert found.judged is not None and found.judged.tolist() == [2, 1, 1]


def test_at_the_first_step_lipo_ranks_by_labels_whatever_the_rounding() -> None:
    """Policy and reference are one model, but for rounding errors: these must not draw the order that weighs the pairs."""
    labels, numbers = [0.2, 1.0, 0.6, 0.6, 0.0], [0] * 5
    objective = build_objective("listwise", "lipo_lambda")
    found = []
    for errors in ([0.0] * 5, [3e-4, -2e-4, 1e-4, -4e-4, 2e-3]):
        policy, reference = of(errors, labels, numbers)
        log_u = policy.chosen.clone().requires_grad_()
        loss = objective(PairLogps(**{**vars(policy), "chosen": log_u}), reference)
        assert torch.autograd.grad(loss.terms["lipo_lambda"].values.sum(), log_u)[0][1] < 0, "the best answer is to rise"
        found.append(value(loss, 1))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_loss
def test_extremes_stay_finite(loss_type: str, keys: dict[str, Any], dtype: torch.dtype) -> None:
    policy, reference = of([500, -500, 0, 500, -500, 499], [1, 0.5, 0, 0, 1, 0.5], [0] * 6)
    ours, theirs = (x.map(lambda t: t.to(dtype) if t.is_floating_point() else t) for x in (policy, reference))
    leaves = [side.clone().requires_grad_() for side in (ours.chosen, ours.rejected)]
    loss = build_objective("listwise", loss_type, **keys)(
        PairLogps(**{**vars(ours), "chosen": leaves[0], "rejected": leaves[1]}), theirs
    )
    values = loss.terms[loss_type].values
    assert values.dtype == dtype and torch.isfinite(values).all()
    assert all(torch.isfinite(slope).all() for slope in torch.autograd.grad(values.sum(), leaves))


def test_metrics_are_of_the_best_answers_and_of_the_others() -> None:
    policy, reference, places = drawn(3, [3, 4])
    found = build_objective("listwise", "plackett_luce", beta=0.5)(policy, reference)
    labels, log_u = policy.score_chosen.tolist(), log_ratios(policy).tolist()  # type: ignore[union-attr]
    pairs = [(i, j) for own in places for i in own for j in own if labels[i] > labels[j]]
    assert found.judged is not None and found.judged.sum() == len(pairs)
    right = sum(log_u[i] > log_u[j] for i, j in pairs)
    assert found.metrics["rewards/accuracies"].sum() == right and 0 < right < len(pairs)
    for side, kept in (("chosen", policy.chosen_tokens), ("rejected", policy.rejected_tokens)):
        expected = [0.5 * u if n else 0.0 for u, n in zip(log_u, kept.tolist())]
        assert found.metrics[f"rewards/{side}"].tolist() == pytest.approx(expected)


def test_a_longer_list_of_equal_labels_below_adds_one_answer_at_a_time() -> None:
    """Of equal answers each is compared with those below it, and none with its equals."""
    losses = []
    for count in (1, 2, 3):
        policy, reference = of([0.0] * (count + 1), [1.0, *[0.0] * count], [0] * (count + 1))
        losses.append(value(build_objective("listwise", "plackett_luce")(policy, reference), 1))
    assert losses == pytest.approx([math.log(2), math.log(3), math.log(4)])
    assert all(less < more for less, more in pairwise(losses))
