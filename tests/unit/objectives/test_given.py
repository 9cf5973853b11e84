"""What rows give of their pairs: weights, target margins and scores, in values, gradients and metrics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_objectives import (
    CASES,
    COUPLED,
    TARGETED,
    Case,
    counts_of,
    golden_point,
    gradients,
    leaves,
    moved,
    named,
    objective_of,
    packs_of,
    part,
    random_pairs,
)
from torch import Tensor

from dspref.objectives import OBJECTIVES, build_objective, needs_scores
from dspref.objectives.families import PairLogps, PairLoss, total

UNORDERED = [case for case in CASES if case[1] not in ("aot", "aot_pair")]
every_case = pytest.mark.parametrize("case", UNORDERED, ids=named)


def tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def in_type(dtype: torch.dtype, *models: PairLogps) -> list[PairLogps]:
    return [pairs.map(lambda x: x.to(dtype) if x.is_floating_point() else x) for pairs in models]


def same(left: PairLoss, right: PairLoss) -> bool:
    terms = all(torch.equal(term.values, right.terms[name].values) for name, term in left.terms.items())
    return terms and all(torch.equal(left.metrics[name], values) for name, values in right.metrics.items())


@every_case
def test_weights_multiply_what_compares_and_not_the_likelihoods(case: Case) -> None:
    policy, reference = random_pairs(6, seed=2)
    objective, weight = objective_of(case), tensor([0.0, 0.5, 1.0, 2.0, 3.5, 10.0])
    plain, weighed = (objective(p, reference, 0.05) for p in (policy, replace(policy, weight=weight)))
    assert weighed.metrics["pair_weight"].tolist() == weight.tolist()
    assert plain.metrics.keys() == weighed.metrics.keys() - {"pair_weight"}
    for name, term in plain.terms.items():
        own = 1.0 if name in ("nll", "sft") else weight
        torch.testing.assert_close(weighed.terms[name].values, own * term.values)
        assert (term.per, term.weight) == (weighed.terms[name].per, weighed.terms[name].weight)


@every_case
def test_weights_of_1_and_margins_of_0_give_the_bits_of_none(case: Case) -> None:
    for dtype in (torch.float32, torch.float64):
        policy, reference = in_type(dtype, *random_pairs(6, seed=3))
        neutral = replace(policy, weight=torch.ones(6), margin=torch.zeros(6))
        objective = objective_of(case)
        assert same(objective(neutral, reference, 0.05), objective(policy, reference, 0.05))


@pytest.mark.parametrize("case", [case for case in UNORDERED if case[1] not in COUPLED], ids=named)
def test_a_weight_of_0_leaves_a_pair_out_of_the_sum_and_not_of_the_count(case: Case) -> None:
    """The gradient of the preference terms is that of the step without the pair, times (n - 1) / n."""
    policy, reference = random_pairs(7, seed=4)
    objective, others = objective_of(case), [0, 1, 2, 4, 5, 6]
    weight = tensor([1.0, 1, 1, 0, 1, 1, 1])

    def preference(loss: PairLoss, pairs: int) -> Tensor:
        terms = {name: term for name, term in loss.terms.items() if name not in ("nll", "sft")}
        counts = {"pairs": pairs, "lists": pairs, "answers": 2 * pairs}
        return total(PairLoss(terms, {}), counts) + 0 * sum(t.values.sum() for t in loss.terms.values())

    found = gradients(lambda p: preference(objective(replace(p, weight=weight), reference), 7), policy)
    less = gradients(lambda p: preference(objective(p, part(reference, others)), 6), part(policy, others))
    for name, gradient in found.items():
        assert not gradient[3].any()
        torch.testing.assert_close(gradient[others], less[name] * 6 / 7)


@pytest.mark.parametrize("case", [case for case in UNORDERED if case[1] not in COUPLED], ids=named)
def test_shares_of_weighed_pairs_add_up(case: Case) -> None:
    objective = objective_of(case)
    policy, reference = random_pairs(9, seed=5)
    draws = np.random.default_rng(5)
    policy = replace(policy, weight=tensor(draws.uniform(0, 3, 9)), margin=tensor(draws.normal(0, 1, 9)))
    counts, packs = {**counts_of(policy), "answers": 18}, packs_of(5)
    whole = gradients(lambda p: total(objective(p, reference), counts), policy)

    def shares(p: PairLogps) -> Tensor:
        return torch.stack([total(objective(part(p, m), part(reference, m)), counts) for m in packs]).sum()

    for name, gradient in gradients(shares, policy).items():
        torch.testing.assert_close(gradient, whole[name])


# Target margins m of the golden point's pairs, and the losses that they make: -log sigma(x - m), by hand.
MARGINS = [1.0, 0.0, -0.5]
GOLDEN: list[tuple[str, str, dict[str, Any], list[float]]] = [
    ("dpo", "sigmoid", {}, [1.205865, 0.744397, 0.474077]),  # x = 0.15, -0.1, 0
    ("dpo", "sigmoid", {"label_smoothing": 0.1}, [1.120865, 0.734397, 0.524077]),
    ("dpo", "sigmoid_norm", {"beta": 1.0}, [1.151068, 0.735062, 0.484960]),  # 0.229167 - 1, -0.082143, -0.028571 + 0.5
    ("cpo", "sigmoid", {}, [1.103186, 0.825939, 0.394960]),  # x = 0.3, -0.25, 0.225
    ("simpo", "simpo", {"beta": 2.0, "simpo_gamma": 0.5}, [1.910224, 0.493249, 0.790309]),  # x = -0.25, 0.95, -0.185714
]


def test_every_loss_that_takes_a_target_is_here() -> None:
    assert {(name, loss) for name, loss, *_ in GOLDEN} | {("cpo", "simpo")} == set(TARGETED)


@pytest.mark.parametrize(("name", "loss_type", "keys", "expected"), GOLDEN)
def test_golden_values_with_target_margins(name: str, loss_type: str, keys: Any, expected: list[float]) -> None:
    policy, reference = golden_point()
    loss = build_objective(name, loss_type, **keys)(replace(policy, margin=tensor(MARGINS)), reference)
    np.testing.assert_allclose(loss.terms[loss_type].values.numpy(), expected, atol=1e-6, rtol=0)
    assert loss.metrics["target_margin"].tolist() == MARGINS


@pytest.mark.parametrize(("name", "loss_type"), TARGETED)
def test_gradients_with_weights_and_margins_are_those_of_finite_differences(name: str, loss_type: str) -> None:
    policy, reference = random_pairs(5, seed=1)
    policy = replace(policy, weight=tensor([0.0, 1, 2, 0.3, 5]), margin=tensor([-2.0, 0, 0.5, 1, 3]))
    objective = build_objective(name, loss_type, label_smoothing=0.1)

    def loss(*values: Tensor) -> Tensor:
        return total(objective(moved(policy, values), reference), counts_of(policy))

    assert torch.autograd.gradcheck(loss, leaves(policy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "loss_type"), TARGETED)
def test_margins_of_500_stay_finite(name: str, loss_type: str, dtype: torch.dtype) -> None:
    policy, reference = in_type(dtype, *random_pairs(4, seed=6))
    policy = replace(policy, margin=torch.tensor([500.0, -500.0, 1e4, 0.0], dtype=dtype))
    objective = build_objective(name, loss_type, label_smoothing=0.1)
    assert objective(policy, reference).terms[loss_type].values.isfinite().all()
    for gradient in gradients(lambda p: total(objective(p, reference), counts_of(p)), policy).values():
        assert gradient.isfinite().all()


def test_the_squared_rpo_of_scores_that_are_the_rewards_is_0() -> None:
    """Where the implicit rewards have the gap of the scores, all three are at their minimum, 0, with slope 0."""
    policy, reference = random_pairs(6, seed=7)
    gap = 0.1 * (policy.chosen - reference.chosen - policy.rejected + reference.rejected)
    policy = replace(policy, score_chosen=3 * gap, score_rejected=gap)
    for loss_type in ("rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"):
        objective = build_objective("dpo", loss_type, rpo_eta=0.5)
        torch.testing.assert_close(objective(policy, reference).terms[loss_type].values, 0 * gap)
        found = gradients(lambda p: total(objective(p, reference), counts_of(p)), policy)  # noqa: B023
        torch.testing.assert_close(found["chosen"], 0 * gap)


def test_a_pair_whose_scores_say_the_contrary_is_turned_round() -> None:
    policy, _ = random_pairs(6, seed=8)
    turned = replace(policy, score_chosen=policy.score_rejected, score_rejected=policy.score_chosen)
    for loss_type in ("rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"):
        objective = build_objective("dpo", loss_type)
        right, wrong = (
            gradients(lambda p: total(objective(p, policy), counts_of(p)), one)["chosen"]  # noqa: B023
            for one in (policy, turned)
        )
        assert (right < 0).all() and (wrong > 0).all()


def test_who_needs_scores() -> None:
    found = {(name, loss) for name, family in OBJECTIVES.items() for loss in family.losses if needs_scores(name, loss)}
    assert found == {("dpo", "rpo_sq"), ("dpo", "rpo_bwd_kl"), ("dpo", "rpo_fwd_kl")}
    assert needs_scores("dpo", ["sigmoid", "rpo_sq"], beta=0.1) and not needs_scores("dpo", ["sigmoid", "sft"])
