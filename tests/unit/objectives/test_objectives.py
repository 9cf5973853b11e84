"""Every loss against its published numbers, its finite differences, and the law that shares add up."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dspref.data.loader import Step
from dspref.objectives import OBJECTIVES, Objective, RunningMean, build_objective, describe, needs_reference, resolved
from dspref.objectives.families import PairLogps, PairLoss, Term, total
from dspref.objectives.losses import expm1, log1mexp, logsigmoid
from dspref.training.gradient import slopes_of

LOSSES = [(name, loss) for name, family in OBJECTIVES.items() for loss in family.losses]
ALIASES = {"dpo_norm": "sigmoid_norm", "aot_unpaired": "aot_pair"}

Case = tuple[str, str, dict[str, Any]]
"""(objective.name, loss_type, further keys)"""

# Which losses take which modifier: the specification's words, not read from the table under test.
DIVERGENCES = ("forward_kl", "js_divergence", "chi_squared")
DIVERGENT = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
RPO = ("rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl")
TARGETED = [("dpo", "sigmoid"), ("dpo", "sigmoid_norm"), ("cpo", "sigmoid"), ("cpo", "simpo"), ("simpo", "simpo")]
SMOOTHED = ("sigmoid", "sigmoid_norm", "exo_pair", "robust", "aot", "aot_pair")
COUPLED = ("bco_pair", "aot", "aot_pair", "bco")
OF_DPO = [loss for loss in OBJECTIVES["dpo"].losses if loss not in ALIASES]

CASES: list[Case] = [
    *((name, loss, {}) for name, loss in LOSSES if loss not in ALIASES),
    *(("dpo", loss, {"f_divergence_type": kind}) for loss in DIVERGENT for kind in DIVERGENCES),
    *(
        ("dpo", loss, {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha})
        for loss in DIVERGENT
        for alpha in (0.3, 0.7)
    ),
    *(("dpo", loss, {"ld_alpha": 0.4}) for loss in OF_DPO),
    *(("dpo", loss, {"use_weighting": True}) for loss in OF_DPO if loss not in ("aot", "aot_pair")),
    *(("dpo", loss, {"rpo_alpha": 0.7}) for loss in OF_DPO),
    *(("dpo", loss, {"reference_free": True}) for loss in OF_DPO),
    *(("dpo", loss, {"label_smoothing": 0.2}) for loss in SMOOTHED),
    ("dpo", "ipo", {"ipo_length_normalize": False}),
    ("dpo", "discopop", {"discopop_tau": 2.0}),
    *(("dpo", loss, {"rpo_eta": 0.3}) for loss in RPO),
    ("cpo", "sigmoid", {"label_smoothing": 0.2, "cpo_alpha": 0.3}),
    ("cpo", "hinge", {"cpo_alpha": 0.0}),
    ("cpo", "simpo", {"label_smoothing": 0.2, "simpo_gamma": 1.5}),
    ("cpo", "simpo", {"alpha": 0.25}),
    ("cpo", "ipo", {"alpha": 0.25}),
    ("cpo", "ipo", {"alpha": -0.5}),
    ("simpo", "simpo", {"gamma_beta_ratio": 0.8, "label_smoothing": 0.1}),
    ("simpo", "simpo", {"alpha": 0.25}),
    ("simpo", "simpo", {"alpha": -0.5}),
    ("simpo", "repo", {"repo_gamma": 1.5, "alpha": 0.25}),
    ("orpo", "orpo", {"nll_on_prompt": False}),
    ("kto", "kto", {"desirable_weight": 1.5, "undesirable_weight": 0.25}),
    ("kto", "apo_zero_unpaired", {"undesirable_weight": 0.0}),
    ("listwise", "lipo_lambda", {"score_scale": 0.3}),
    ("tpo", "sigmoid", {"label_smoothing": 0.2, "tpo_alpha": 0.3}),
    ("tpo", "tpo_l", {"label_smoothing": 0.2, "tpo_l_gamma": 1.5}),
]


def named(case: Case) -> str:
    name, loss_type, keys = case
    return " ".join([name, loss_type, *(f"{key}={value}" for key, value in keys.items())])


every_case = pytest.mark.parametrize("case", CASES, ids=named)

# ---------------------------------------------------------------------------------------------------- golden numbers

ALPHA = {"f_divergence_type": "alpha_divergence"}
SIMPO = {"beta": 2.0, "simpo_gamma": 0.5}
WEIGHTS = {"desirable_weight": 2.0, "undesirable_weight": 0.5}

# (name, loss_type, keys, delta) -> loss of each pair at the point below, in float64, to six decimals.
GOLDEN: list[tuple[str, str, dict[str, Any], float, list[float]]] = [
    ("dpo", "sigmoid", {}, 0.0, [0.620957, 0.744397, 0.693147]),
    ("dpo", "sigmoid", {"label_smoothing": 0.1}, 0.0, [0.635957, 0.734397, 0.693147]),
    ("dpo", "robust", {"label_smoothing": 0.1}, 0.0, [0.602207, 0.756897, 0.693147]),
    ("dpo", "robust", {}, 0.0, [0.620957, 0.744397, 0.693147]),  # without smoothing it is DPO
    ("dpo", "hinge", {}, 0.0, [0.85, 1.1, 1.0]),
    ("dpo", "ipo", {}, 0.0, [22.760851, 25.828176, 25.286531]),
    ("dpo", "ipo", {"ipo_length_normalize": False}, 0.0, [12.25, 36.0, 25.0]),
    ("dpo", "exo_pair", {}, 0.0, [2.505517, 2.935004, 2.761231]),
    ("dpo", "exo_pair", {"label_smoothing": 1e-3}, 0.0, [2.505517, 2.935004, 2.761231]),
    ("dpo", "nca_pair", {}, 0.0, [1.350825, 1.413168, 1.386919]),
    ("dpo", "bco_pair", {}, 0.0, [1.312856, 1.439417, 1.386919]),
    ("dpo", "bco_pair", {}, 0.025, [1.312700, 1.438324, 1.387700]),
    ("dpo", "sppo_hard", {}, 0.0, [36.25, 62.5, 50.5]),
    ("dpo", "aot", {}, 0.0, [0.744397, 0.656350, 0.656350]),  # in sorted order
    ("dpo", "aot", {"label_smoothing": 0.1}, 0.0, [0.734397, 0.663850, 0.663850]),
    ("dpo", "aot_pair", {}, 0.0, [0.693147, 0.644397, 0.718460]),
    ("dpo", "aot_unpaired", {}, 0.0, [0.693147, 0.644397, 0.718460]),
    ("dpo", "apo_zero", {}, 0.0, [0.962523, 1.024932, 1.000000]),
    ("dpo", "apo_down", {}, 0.0, [0.987549, 1.037477, 0.987503]),
    ("dpo", "discopop", {}, 0.0, [0.849338, 0.787402, 0.846574]),
    ("dpo", "discopop", {"discopop_tau": 0.05}, 0.0, [0.849338, 0.787402, 0.846574]),
    ("dpo", "sigmoid_norm", {}, 0.0, [0.681754, 0.697263, 0.694577]),
    ("dpo", "dpo_norm", {}, 0.0, [0.681754, 0.697263, 0.694577]),
    ("dpo", "sft", {}, 0.0, [12.0, 30.5, 7.25]),
    ("dpo", "dpop", {}, 0.0, [0.620957, 0.744397, 2.57889]),
    ("dpo", "dpop", {"dpop_lambda": 5.0}, 0.0, [0.620957, 0.744397, 0.825939]),
    ("dpo", "rpo_sq", {}, 0.0, [1.8225, 0.16, 4.0]),
    ("dpo", "rpo_sq", {"rpo_eta": 0.5}, 0.0, [0.36, 0.0225, 1.0]),
    ("dpo", "rpo_bwd_kl", {}, 0.0, [0.173269, 0.019303, 0.327813]),
    ("dpo", "rpo_bwd_kl", {"rpo_eta": 0.5}, 0.0, [0.041593, 0.002784, 0.110944]),
    ("dpo", "rpo_fwd_kl", {}, 0.0, [0.204926, 0.019689, 0.433781]),
    ("dpo", "rpo_fwd_kl", {"rpo_eta": 0.5}, 0.0, [0.043456, 0.002796, 0.120115]),
    ("dpo", "sigmoid", {"f_divergence_type": "chi_squared"}, 0.0, [0.528778, 0.903049, 0.693147]),
    ("dpo", "sigmoid", {"f_divergence_type": "reverse_kl"}, 0.0, [0.620957, 0.744397, 0.693147]),
    ("dpo", "sigmoid", {"f_divergence_type": "js_divergence"}, 0.0, [0.660652, 0.706873, 0.693147]),
    ("dpo", "sigmoid", {"f_divergence_type": "forward_kl"}, 0.0, [0.631154, 0.712501, 0.693147]),
    ("dpo", "sigmoid", ALPHA, 0.0, [0.627691, 0.724260, 0.693147]),
    ("dpo", "sigmoid", ALPHA | {"f_alpha_divergence_coef": 0.5}, 0.0, [0.627691, 0.724260, 0.693147]),
    ("dpo", "sigmoid", ALPHA | {"f_alpha_divergence_coef": 0.3}, 0.0, [0.625438, 0.731018, 0.693147]),
    ("dpo", "sigmoid", ALPHA | {"f_alpha_divergence_coef": 0.7}, 0.0, [0.629425, 0.718807, 0.693147]),
    ("cpo", "sigmoid", {}, 0.0, [0.554355, 0.825939, 0.586962]),
    ("cpo", "hinge", {}, 0.0, [0.70, 1.25, 0.775]),
    ("cpo", "ipo", {}, 0.0, [26.265625, 20.475625, 25.937194]),
    ("cpo", "simpo", SIMPO, 0.0, [1.136871, 0.493249, 1.093663]),
    ("simpo", "simpo", SIMPO, 0.0, [1.136871, 0.493249, 1.093663]),
    ("simpo", "simpo", {"gamma_beta_ratio": 0.25}, 0.0, [1.136871, 0.493249, 1.093663]),
    ("simpo", "simpo", SIMPO | {"alpha": 0.25}, 0.0, [1.245286, 0.319537, 1.146252]),
    ("cpo", "simpo", SIMPO | {"alpha": 0.25}, 0.0, [1.245286, 0.319537, 1.146252]),
    ("simpo", "simper", {}, 0.0, [0.01802, -0.082286, 0.022825]),
    ("cpo", "simper", {}, 0.0, [0.01802, -0.082286, 0.022825]),
    ("simpo", "repo", {}, 0.0, [0.725, 0.125, 0.692857]),
    ("cpo", "repo", {"repo_gamma": 0.2}, 0.0, [0.325, 0, 0.292857]),
    ("simpo", "repo", {"alpha": 0.25}, 0.0, [0.802903, 0, 0.731891]),
    ("orpo", "orpo", {}, 0.0, [0.768842, 0.446417, 0.756606]),
    # Both answers of a pair by themselves: the sum of two; delta is the reference point, in nats.
    ("kto", "kto", {}, 0.0, [0.962523, 1.024932, 1.0]),  # as apo_zero
    ("kto", "kto", {}, 0.25, [0.962518, 1.02496, 1.0]),
    ("kto", "kto", {}, 2.0, [0.962803, 1.024932, 1.0]),
    ("kto", "kto", {"beta": 0.5}, 0.25, [0.814667, 1.120145, 1.0]),
    ("kto", "kto", WEIGHTS, 0.25, [1.203147, 1.253105, 1.278112]),
    ("kto", "apo_zero_unpaired", {}, 0.0, [0.962523, 1.024932, 1.0]),
    ("kto", "apo_zero_unpaired", {}, 0.25, [0.962523, 1.024932, 1.0]),  # has no reference point
    ("kto", "apo_zero_unpaired", WEIGHTS, 0.0, [1.193793, 1.24372, 1.268746]),
    # delta is the mean of the rewards
    ("bco", "bco", {}, 0.0, [1.312856, 1.439417, 1.386919]),
    ("bco", "bco", {}, 0.025, [1.312700, 1.438324, 1.387700]),
    ("bco", "bco", {"beta": 0.2}, 0.4, [1.272216, 1.498752, 1.448154]),
    # Each pair is a list of two; of the second one the rejected answer has the higher score.
    ("listwise", "plackett_luce", {}, 0.0, [0.620957, 0.644397, 0.693147]),
    ("listwise", "plackett_luce", {"beta": 0.5}, 0.0, [0.386871, 0.474077, 0.693147]),
    ("listwise", "lipo_lambda", {}, 0.0, [28.917570, 0.833985, 0.553605]),
    ("listwise", "lipo_lambda", {"beta": 0.1, "score_scale": 0.1}, 0.0, [0.053040, 0.014389, 0.051205]),
    ("tpo", "sigmoid", {}, 0.0, [0.678260, 0.705725, 0.681960]),
    ("tpo", "sigmoid", {"beta": 0.1, "label_smoothing": 0.1}, 0.0, [0.584355, 0.800939, 0.609462]),
    ("tpo", "hinge", {"beta": 0.1}, 0.0, [0.70, 1.25, 0.775]),  # as cpo
    ("tpo", "ipo", {"beta": 0.1}, 0.0, [26.265625, 20.475625, 25.937194]),
    ("tpo", "tpo_l", {"beta": 2.0}, 0.0, [1.136871, 0.493249, 1.093663]),  # SimPO with this gamma
    ("tpo", "tpo_l", {"beta": 2.0, "tpo_l_gamma": 1.0, "label_smoothing": 0.2}, 0.0, [1.251929, 0.708460, 1.215179]),
]
LOG_ODDS = [-0.146060, 0.575003, -0.123130]


def logps(chosen: Any, rejected: Any, chosen_tokens: Any = None, rejected_tokens: Any = None, **more: Any) -> PairLogps:
    def sums(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float64)

    counts = [torch.tensor(n or [1] * len(chosen)) for n in (chosen_tokens, rejected_tokens)]
    counts_too = ("prompt_tokens", "list", "opens", "gold")
    given = {key: torch.as_tensor(value) if key in counts_too else sums(value) for key, value in more.items()}
    return PairLogps(sums(chosen), sums(rejected), *counts, **given)


def golden_point() -> tuple[PairLogps, PairLogps]:
    """The specification's point; the sums over the first 6, 14 and 5 tokens and over the prompts are added here."""
    counts = [6, 20, 5], [8, 14, 7]
    more = {"prompt": [-4, -2.5, 0], "prompt_tokens": [3, 2, 0]}
    more |= {"chosen_collision": [2, 3, 4], "rejected_collision": [1, 1, 1]}
    more |= {"score_chosen": [7, 2.5, 1], "score_rejected": [5.5, 3, -1], **of_pairs(3)}
    common = {"chosen_common": [-12, -20, -7.25], "rejected_common": [-11, -28, -7]}
    reference_common = {"chosen_common": [-13, -21, -6.75], "rejected_common": [-11.5, -29.5, -6.5]}
    policy = logps([-12, -30.5, -7.25], [-15, -28, -9.5], *counts, **common, **more)
    return policy, logps([-13, -31, -6.75], [-14.5, -29.5, -9], *counts, **reference_common)


def of_pairs(count: int) -> dict[str, Tensor]:
    """Each pair is a list of two, and none is a gold answer."""
    numbers = torch.arange(count)
    return {"list": numbers, "opens": torch.ones_like(numbers), "gold": 0 * numbers}


def random_pairs(count: int, seed: int) -> tuple[PairLogps, PairLogps]:
    """Log-probs of plausible size under two models that differ by a few nats; every answer has 1 to 29 tokens."""
    draws = np.random.default_rng(seed)
    tokens = draws.integers(1, 30, (2, count))
    prompts = draws.integers(0, 20, count)

    def model(policy: np.ndarray | None = None) -> dict[str, Any]:
        # A share of each sum lies in the length that both answers have; all of it where the answer is the shorter one.
        sums = -draws.uniform(0.5, 3.0, (2, count)) * tokens if policy is None else policy + draws.normal(0, 4, (2, count))
        share = np.minimum(tokens.min(axis=0) / tokens * draws.uniform(0.8, 1.2, (2, count)), 1.0)
        common = np.where(tokens == tokens.min(axis=0), sums, share * sums)
        return {"chosen": sums[0], "rejected": sums[1], "chosen_common": common[0], "rejected_common": common[1]}

    ours = model()
    theirs = model(np.stack([ours["chosen"], ours["rejected"]]))
    more = {"prompt": -draws.uniform(0.5, 3.0, count) * prompts, "prompt_tokens": prompts.tolist()}
    entropies = draws.uniform(0.3, 2.5, (2, count)) * tokens
    more |= {"chosen_collision": entropies[0], "rejected_collision": entropies[1]}
    worse = draws.normal(0, 2, count)
    more |= {"score_chosen": worse + draws.uniform(0.2, 3, count), "score_rejected": worse, **of_pairs(count)}
    counts = {"chosen_tokens": tokens[0].tolist(), "rejected_tokens": tokens[1].tolist()}
    return logps(**ours, **more, **counts), logps(**theirs, **counts)


LOG_PROBS = ("chosen", "rejected", "chosen_common", "rejected_common", "prompt")
"""The fields of a policy's PairLogps through which gradients flow."""


def leaves(policy: PairLogps) -> list[Tensor]:
    return [getattr(policy, name).detach().clone().requires_grad_() for name in LOG_PROBS]


def moved(policy: PairLogps, values: Sequence[Tensor]) -> PairLogps:
    return replace(policy, **dict(zip(LOG_PROBS, values)))


def gradients(function: Callable[[PairLogps], Tensor], policy: PairLogps) -> dict[str, Tensor]:
    """d function / d log-prob, by field; 0 where the function does not look."""
    values = leaves(policy)
    found = torch.autograd.grad(function(moved(policy, values)), values, allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for n, x, g in zip(LOG_PROBS, values, found)}


def counts_of(pairs: PairLogps) -> dict[str, int]:
    names = ("pairs", "lists", "answers", "chosen_tokens", "rejected_tokens", "chosen_and_prompt_tokens")
    return {name: int(pairs.count(name)) for name in names} | {"gold_tokens": 1}


def only_sum(loss: PairLoss) -> Tensor:
    """Weighted sum over pairs and terms, whatever the terms are divided by."""
    return sum(term.weight * term.values.sum() for term in loss.terms.values())  # type: ignore[return-value]


def part(pairs: PairLogps, members: Any) -> PairLogps:
    return pairs.map(lambda values: values[members])


def objective_of(case: Case) -> Objective:
    name, loss_type, keys = case
    return build_objective(name, loss_type, **keys)


def test_every_loss_has_a_golden_row() -> None:
    assert {(name, loss) for name, loss, *_ in GOLDEN} == set(LOSSES)


@pytest.mark.parametrize(("name", "loss_type", "keys", "delta", "expected"), GOLDEN)
def test_golden_values(name: str, loss_type: str, keys: dict[str, Any], delta: float, expected: list[float]) -> None:
    policy, reference = golden_point()
    loss = build_objective(name, loss_type, **keys)(policy, reference if OBJECTIVES[name].needs_reference else None, delta)
    term = loss.terms[loss_type]
    np.testing.assert_allclose(term.values.numpy(), expected, atol=1e-6, rtol=0)
    units = {"pairs": "pairs", "gold": "pairs", "answers": "answers", "list": "lists"}
    per = "chosen_tokens" if loss_type == "sft" else units[OBJECTIVES[name].takes]
    weight = 0.1 if name == "orpo" else 1.0
    assert (term.per, term.weight) == (per, weight)
    alone = PairLoss({loss_type: term}, {})
    mean = weight * sum(expected) / {"chosen_tokens": 31, "answers": 6, "pairs": 3, "lists": 3}[per]  # 6 + 20 + 5 tokens
    assert total(alone, counts_of(policy)).item() == pytest.approx(mean, abs=1e-6)


def test_golden_log_odds() -> None:
    policy, _ = golden_point()
    metrics = build_objective("orpo", "orpo")(policy, None).metrics
    np.testing.assert_allclose(metrics["log_odds_chosen"].numpy(), LOG_ODDS, atol=1e-6, rtol=0)
    np.testing.assert_allclose(metrics["log_odds_ratio"].numpy(), [-0.768842, -0.446417, -0.756606], atol=1e-6, rtol=0)


def test_simpo_asks_for_half_of_beta_unless_told_otherwise() -> None:
    policy, _ = golden_point()
    margin = 2.0 * (policy.chosen / policy.chosen_tokens - policy.rejected / policy.rejected_tokens)
    for name in ("simpo", "cpo"):
        values = build_objective(name, "simpo")(policy, None).terms["simpo"].values
        torch.testing.assert_close(values, -torch.nn.functional.logsigmoid(margin - 1.0))


def test_the_tables_words_about_each_loss() -> None:
    """Which losses look beyond their own pair, and which take another divergence: the specification's sets."""
    dpo = OBJECTIVES["dpo"].losses

    def those(flag: str) -> set[str]:
        return {ALIASES.get(name, name) for name, loss in dpo.items() if getattr(loss, flag)}

    assert those("couples") == set(COUPLED) - {"bco"}
    assert those("ordered") == {"aot", "aot_pair"}
    assert those("running_mean") == {"bco_pair"}
    assert those("scores") == set(RPO)
    targeted = [(name, kind) for name, of in OBJECTIVES.items() for kind, loss in of.losses.items() if loss.targeted]
    assert [(name, kind) for name, kind in targeted if kind not in ALIASES] == TARGETED
    assert those("divergent") - {"sft"} == set(DIVERGENT)
    assert OBJECTIVES["bco"].losses["bco"].couples and OBJECTIVES["bco"].losses["bco"].running_mean
    others = [loss for name, family in OBJECTIVES.items() for loss in family.losses.values() if name not in ("dpo", "bco")]
    assert not any(loss.couples or loss.ordered or loss.running_mean for loss in others)
    assert [about for about in LOSSES if OBJECTIVES[about[0]].losses[about[1]].mismatched] == [("kto", "kto")]
    assert [name for name in OBJECTIVES if needs_reference(name)] == ["dpo", "kto", "bco", "listwise"]
    taken = {name: family.takes for name, family in OBJECTIVES.items() if family.takes != "pairs"}
    assert taken == {"kto": "answers", "bco": "answers", "listwise": "list", "tpo": "gold"}
    assert [name for name, family in OBJECTIVES.items() if family.by_rows] == ["listwise", "tpo"]
    assert not needs_reference("dpo", reference_free=True, beta=0.1)


@pytest.mark.parametrize(("alias", "loss_type"), ALIASES.items())
def test_aliases_are_the_same_loss(alias: str, loss_type: str) -> None:
    assert OBJECTIVES["dpo"].losses[alias] == OBJECTIVES["dpo"].losses[loss_type]
    policy, reference = random_pairs(6, seed=11)
    left, right = (
        build_objective("dpo", loss, beta=0.3, label_smoothing=0.1)(policy, reference) for loss in (alias, loss_type)
    )
    assert left.terms.keys() == {alias}, "logged under the name that the user wrote"
    assert torch.equal(left.terms[alias].values, right.terms[loss_type].values)


# --------------------------------------------------------------------------------------------------------- gradients


@every_case
def test_gradients_are_those_of_finite_differences(case: Case) -> None:
    """In every log-prob that a forward gives. WPO's weight is held: it carries no gradient (see the test below)."""
    policy, reference = random_pairs(5, seed=1)
    objective = objective_of(case)
    if case[2].get("use_weighting"):  # so likely that the weight is clamped to 1, here and in the neighbourhood
        policy = replace(policy, chosen_collision=0 * policy.chosen + 1e3, rejected_collision=0 * policy.chosen + 1e3)

    def loss(*values: Tensor) -> Tensor:
        return only_sum(objective(moved(policy, values), reference, 0.05))

    assert torch.autograd.gradcheck(loss, leaves(policy))


@pytest.mark.parametrize("loss_type", [loss for loss in OF_DPO if loss not in ("aot", "aot_pair")])
def test_wpo_weighs_values_and_gradients_by_a_constant(loss_type: str) -> None:
    policy, reference = random_pairs(6, seed=2)
    plain = build_objective("dpo", loss_type, beta=0.3, rpo_alpha=0.5)
    weighted = build_objective("dpo", loss_type, beta=0.3, rpo_alpha=0.5, use_weighting=True)
    weight = weighted(policy, reference).metrics["wpo_weight"]
    assert 0 < weight.min() < 1 == weight.max(), "the clamp must bite on some of these pairs, and not on others"

    def by_hand(moving: PairLogps) -> Tensor:
        terms = plain(moving, reference, 0.05).terms
        own = terms[loss_type].values * (1.0 if loss_type == "sft" else weight)
        return own.sum() + 0.5 * terms["nll"].values.sum()

    torch.testing.assert_close(only_sum(weighted(policy, reference, 0.05)), by_hand(policy))
    expected = gradients(by_hand, policy)
    for name, gradient in gradients(lambda p: only_sum(weighted(p, reference, 0.05)), policy).items():
        torch.testing.assert_close(gradient, expected[name])


def test_wpo_weights_by_hand() -> None:
    """w = min(1, exp((S_w + H_w) / n_w + (S_l + H_l) / n_l)), H the sum of collision entropies."""
    policy = logps([-4, -6, -1], [-3, -2, -1], [2, 3, 1], [1, 2, 1],
                   chosen_collision=[3, 3, 2], rejected_collision=[2.5, 1, 2])  # fmt: skip
    reference = logps([-4, -5, -2], [-2, -3, -1])
    objective = build_objective("dpo", ["hinge", "sft"], beta=0.1, use_weighting=True, rpo_alpha=0.5)
    loss = objective(policy, reference)
    # (-4 + 3) / 2 + (-3 + 2.5) / 1, (-6 + 3) / 3 + (-2 + 1) / 2, and 1 + 1, clamped
    weights = [math.exp(-1.0), math.exp(-1.5), 1.0]
    assert loss.metrics["wpo_weight"].tolist() == pytest.approx(weights)
    margins = [0 - -1, -1 - 1, 1 - 0]
    assert loss.terms["hinge"].values.tolist() == pytest.approx([w * (1 - 0.1 * m) for w, m in zip(weights, margins)])
    assert loss.terms["sft"].values.tolist() == [4, 6, 1], "likelihood terms are no preference terms"
    assert loss.terms["nll"].values.tolist() == [4, 6, 1]
    assert loss.metrics["rewards/chosen"].tolist() == pytest.approx([0, -0.1, 0.1]), "nor are rewards"
    assert objective.needs_collision
    assert not build_objective("dpo", "hinge").needs_collision


@pytest.mark.parametrize("keys", [keys for name, loss, keys, *_ in GOLDEN if loss == "sigmoid" and name == "dpo"][:2])
def test_sigmoid_gradient_is_the_papers(keys: dict[str, float]) -> None:
    """d loss / d S_w = -beta (sigma(-beta d) - e), written out pair by pair."""
    policy, reference = random_pairs(6, seed=2)
    objective = build_objective("dpo", "sigmoid", **keys)
    found = gradients(lambda p: only_sum(objective(p, reference)), policy)
    beta, smoothing = 0.1, keys.get("label_smoothing", 0.0)
    for k in range(6):
        d = (policy.chosen[k] - reference.chosen[k] - policy.rejected[k] + reference.rejected[k]).item()
        expected = -beta * (1 / (1 + math.exp(beta * d)) - smoothing)
        assert found["chosen"][k].item() == pytest.approx(expected, abs=1e-12)
        assert found["rejected"][k].item() == pytest.approx(-expected, abs=1e-12)


# (S_w, S_l, R_w, R_l): log-ratios of +-500 on either side, equal answers, answers that are certain (S = 0) or all but,
# and answers that are all but impossible.
EXTREMES = [
    (0, -1000, -500, -500),
    (-1000, 0, -500, -500),
    (0, 0, -500, -500),
    (-1000, -1000, -500, -500),
    (-3, -3, -3, -3),
    (0, 0, 0, 0),
    (0, -3, -1, -1),
    (-3, 0, -1, -1),
    (-1e-9, -1e-6, 0, -1e-9),
    (-1e4, -0.1, -1e4, -1e4),
    (-0.1, -1e4, -0.1, -2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@every_case
def test_extremes_stay_finite(case: Case, dtype: torch.dtype) -> None:
    """Values, metrics and gradients of every loss under every modifier, for answers of one token and of several."""
    name, loss_type, keys = case
    columns = [torch.tensor(x, dtype=dtype) for x in zip(*EXTREMES)]
    for tokens in (1, 7):
        for beta in (0.01, 0.1, 2.0):
            count = torch.full((len(EXTREMES),), tokens)
            more = {"prompt": columns[0], "prompt_tokens": 0 * count}
            more |= {"score_chosen": columns[1], "score_rejected": columns[0], **of_pairs(len(EXTREMES))}
            policy, reference = (
                # half of each answer lies in the common length
                PairLogps(w, r, count, count, w / 2, r / 2, **more, chosen_collision=-w / 3, rejected_collision=0 * r)
                for w, r in (columns[:2], columns[2:])
            )
            objective = build_objective(name, loss_type, beta=beta, **keys)
            loss = objective(policy, reference, 0.5)
            for of in (*(term.values for term in loss.terms.values()), *loss.metrics.values()):
                assert of.dtype == dtype
                assert torch.isfinite(of).all()
            for field, gradient in gradients(lambda p: only_sum(objective(p, reference, 0.5)), policy).items():  # noqa: B023
                assert torch.isfinite(gradient).all(), (field, gradient)


# Signs of (d loss / d S_w, d loss / d S_l) where policy = reference, as at the first step.
SIGNS: dict[str, tuple[int, int]] = {
    "sft": (-1, 0),  # has no rejected answer
    "apo_down": (0, 1),  # chosen falls once the margin has grown: see below
    "discopop": (1, -1),  # not convex: below the dip at x = 0 lies a hill, and this is its slope (the paper's figure 1)
}


@pytest.mark.parametrize(("name", "loss_type"), LOSSES)
def test_a_step_raises_chosen_and_lowers_rejected(name: str, loss_type: str) -> None:
    policy, _ = random_pairs(20, seed=3)
    chosen, rejected = SIGNS.get(loss_type, (-1, 1))
    objective = build_objective(name, loss_type, beta=0.01, repo_gamma=1e3)  # no margin is beyond it
    found = gradients(lambda p: only_sum(objective(p, policy)), policy)
    assert (found["chosen"].sign() == chosen).all()
    assert (found["rejected"].sign() == rejected).all()


def test_apo_down_lowers_the_chosen_answer_as_the_margin_grows() -> None:
    policy, reference = logps([-4, -4, -4], [-8, -30, -100]), logps([-5, -4, -3], [-5, -5, -5])
    objective = build_objective("dpo", "apo_down")
    found = gradients(lambda p: only_sum(objective(p, reference)), with_everything(policy))
    assert (found["chosen"] > 0).all()
    assert (found["rejected"] > 0).all()


def test_discopop_pulls_towards_a_margin_beyond_its_hill() -> None:
    """Where DPO would have a step widen the margin, and discopop does: at x = beta d of a nat or two."""
    policy, reference = logps([-1, -1], [-11, -26]), logps([-1, -1], [-1, -1])
    objective = build_objective("dpo", "discopop")
    found = gradients(lambda p: only_sum(objective(p, reference)), with_everything(policy))
    assert (found["chosen"] < 0).all()
    assert (found["rejected"] > 0).all()


def with_everything(pairs: PairLogps) -> PairLogps:
    """The fields that `gradients` looks at, for pairs that were written down by hand."""
    return replace(
        pairs, chosen_common=pairs.chosen, rejected_common=pairs.rejected, prompt=0 * pairs.chosen,
        prompt_tokens=0 * pairs.chosen_tokens,
    )  # fmt: skip


def test_identical_models_lose_ln_2() -> None:
    policy, _ = random_pairs(4, seed=4)
    for loss_type in ("sigmoid", "sigmoid_norm", "aot", "aot_pair"):
        for smoothing in (0.0, 0.3):
            loss = build_objective("dpo", loss_type, beta=0.7, label_smoothing=smoothing)(policy, policy)
            np.testing.assert_allclose(loss.terms[loss_type].values.numpy(), math.log(2), rtol=1e-14)


@pytest.mark.parametrize(
    ("name", "loss_type", "keys"),
    [("dpo", "sigmoid", {}), ("dpo", "sigmoid_norm", {}), ("cpo", "sigmoid", {})],
)
def test_smoothing_is_a_mixture_of_a_pair_and_its_mirror(name: str, loss_type: str, keys: dict[str, Any]) -> None:
    policy, reference = random_pairs(5, seed=5)
    mirrored = [PairLogps(p.rejected, p.chosen, p.rejected_tokens, p.chosen_tokens) for p in (policy, reference)]
    plain = build_objective(name, loss_type, beta=0.3, **keys)
    smooth = build_objective(name, loss_type, beta=0.3, label_smoothing=0.2, **keys)(policy, reference)
    left, right = (plain(*models).terms[loss_type].values for models in ((policy, reference), mirrored))
    torch.testing.assert_close(smooth.terms[loss_type].values, 0.8 * left + 0.2 * right)


def test_robust_is_unbiased_under_flipped_labels() -> None:
    """(1 - e) robust(pair) + e robust(mirror) = DPO's loss of the pair: what the paper built it for."""
    policy, reference = random_pairs(5, seed=6)
    mirrored = [PairLogps(p.rejected, p.chosen, p.rejected_tokens, p.chosen_tokens) for p in (policy, reference)]
    robust = build_objective("dpo", "robust", beta=0.3, label_smoothing=0.2)
    left, right = (robust(*models).terms["robust"].values for models in ((policy, reference), mirrored))
    torch.testing.assert_close(
        0.8 * left + 0.2 * right, build_objective("dpo", "sigmoid", beta=0.3)(policy, reference).terms["sigmoid"].values
    )


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence", "chi_squared"])
@pytest.mark.parametrize("loss_type", DIVERGENT)
def test_divergences_by_hand(loss_type: str, kind: str) -> None:
    """f'(u), written as the paper does, takes the place of log u in every loss of the margin, per token too. There
    constants do not cancel: f'(1) = 0, so that equal models have a margin of 0 whatever their answers' lengths."""
    policy, reference = golden_point()

    def slope(policy_sum: Tensor, reference_sum: Tensor) -> Tensor:
        u = (policy_sum - reference_sum).exp()
        slopes = {"forward_kl": 1 - 1 / u, "js_divergence": (2 * u / (1 + u)).log(), "alpha_divergence": 2 * (1 - u**-0.5)}
        return (slopes | {"chi_squared": u.log() + u - 1})[kind]

    scores = {side: slope(getattr(policy, side), getattr(reference, side)) for side in ("chosen", "rejected")}
    by_hand = build_objective("dpo", loss_type)(replace(policy, **scores), reference.map(lambda x: 0 * x))
    found = build_objective("dpo", loss_type, f_divergence_type=kind)(policy, reference)
    torch.testing.assert_close(found.terms[loss_type].values, by_hand.terms[loss_type].values)


@pytest.mark.parametrize(("alpha", "kind"), [(1e-7, "reverse_kl"), (1 - 1e-7, "forward_kl")])
def test_the_alpha_divergence_lies_between_reverse_and_forward_kl(alpha: float, kind: str) -> None:
    """The paper's alpha; TRL's coefficient is 1 - alpha, and would exchange the two ends."""
    policy, reference = random_pairs(5, seed=7)
    left = build_objective("dpo", "sigmoid", **ALPHA, f_alpha_divergence_coef=alpha)(policy, reference)
    right = build_objective("dpo", "sigmoid", f_divergence_type=kind)(policy, reference)
    torch.testing.assert_close(left.terms["sigmoid"].values, right.terms["sigmoid"].values, rtol=1e-4, atol=1e-4)


def test_alphapo_without_alpha_is_simpo() -> None:
    policy, _ = random_pairs(5, seed=8)
    left, right = (build_objective("simpo", "simpo", alpha=alpha)(policy, None) for alpha in (1e-9, 0.0))
    torch.testing.assert_close(left.terms["simpo"].values, right.terms["simpo"].values, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ pieces


def test_logsigmoid_is_torchs() -> None:
    x = torch.tensor([-1e4, -500.0, -3.0, 0.0, 1e-9, 3.0, 500.0, 1e4], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(logsigmoid(x), torch.nn.functional.logsigmoid(x))
    (ours,) = torch.autograd.grad(logsigmoid(x).sum(), x)
    torch.testing.assert_close(ours, torch.sigmoid(-x.detach()))


def test_expm1_goes_on_as_its_tangent() -> None:
    """Up to its steepest point it is expm1; from there the straight line that leaves no step and no kink."""
    x = torch.tensor([-700.0, -1.0, -1e-12, 0.0, 1e-12, 1.0, 20.0], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(expm1(x), x.expm1(), rtol=1e-15, atol=0)
    (slope,) = torch.autograd.grad(expm1(x).sum(), x)
    torch.testing.assert_close(slope, x.detach().exp())
    far = torch.tensor([100.0, 500.0, 1e4], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(expm1(far).sum(), far)
    assert (slope == slope[0]).all()
    start = math.log(slope[0].item())  # where the line leaves the curve
    torch.testing.assert_close(expm1(far), math.expm1(start) + math.exp(start) * (far - start))
    around = torch.tensor([start - 1e-6, start + 1e-6], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(expm1(around), around.expm1(), rtol=1e-10, atol=0)
    assert torch.autograd.gradcheck(lambda z: expm1(z) / math.exp(start), around)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_to_the_last_digits(dtype: torch.dtype) -> None:
    """Against 60 decimal digits, on both sides of -ln 2, where either branch alone loses them all."""
    smallest = 1e-6 if dtype == torch.float32 else 1e-14
    x = torch.tensor([-smallest, -1e-3, -0.5, -0.69, -0.7, -1.0, -5.0, -30.0, -80.0], dtype=dtype, requires_grad=True)
    with localcontext() as context:
        context.prec = 60
        values = [(1 - Decimal(v).exp()).ln() for v in x.tolist()]
        slopes = [-Decimal(v).exp() / (1 - Decimal(v).exp()) for v in x.tolist()]
    tolerance = 4 * torch.finfo(dtype).eps
    np.testing.assert_allclose(log1mexp(x).tolist(), [float(v) for v in values], rtol=tolerance)
    (ours,) = torch.autograd.grad(log1mexp(x).sum(), x)
    np.testing.assert_allclose(ours.tolist(), [float(v) for v in slopes], rtol=3 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_of_a_certain_answer_is_finite(dtype: torch.dtype) -> None:
    """A = 0, and A > 0 by rounding: as if a rounding error away from it, so that odds are large and not infinite."""
    x = torch.tensor([0.0, 1e-8, -1e-30], dtype=dtype, requires_grad=True)
    values = log1mexp(x)
    assert (values < (-15 if dtype == torch.float32 else -30)).all()
    assert torch.isfinite(values).all()
    (gradient,) = torch.autograd.grad(values.sum(), x)
    assert torch.isfinite(gradient).all()


# ----------------------------------------------------------------------------------------------- rewards and metrics

BY_SUMS = [0.1, 0.05, -0.05], [-0.05, 0.15, -0.05]  # beta (S - R) at beta 0.1
SUMS = [-12, -30.5, -7.25], [-15, -28, -9.5]
AVERAGES = [-2.0, -1.525, -1.45], [-1.875, -2.0, -19 / 14]


def scaled(values: tuple[list[float], ...], factor: float) -> tuple[list[float], ...]:
    return tuple([factor * value for value in side] for side in values)


def power(values: tuple[list[float], ...], alpha: float) -> tuple[list[float], ...]:
    """AlphaPO's (1 - p^-alpha) / alpha, as the paper prints it."""
    return tuple([(1 - math.exp(value) ** -alpha) / alpha for value in side] for side in values)


# (name, loss_type, keys) -> (rewards, logps), each of (chosen, rejected) at the golden point
REWARDS: list[tuple[str, str, dict[str, Any], tuple[list[float], ...], tuple[list[float], ...]]] = [
    *(("dpo", loss, {}, BY_SUMS, SUMS) for loss in OF_DPO),  # sums, for losses per token too
    *(("dpo", "sigmoid", {"f_divergence_type": kind}, BY_SUMS, SUMS) for kind in ("forward_kl", "js_divergence")),
    ("dpo", "ipo", ALPHA, BY_SUMS, SUMS),
    ("dpo", "sigmoid", {"beta": 0.5, "label_smoothing": 0.1}, scaled(BY_SUMS, 5), SUMS),
    ("dpo", "sigmoid", {"use_weighting": True, "rpo_alpha": 1.0}, BY_SUMS, SUMS),
    *(("dpo", loss, {"reference_free": True}, scaled(SUMS, 0.1), SUMS) for loss in ("sigmoid", "bco_pair", "aot")),
    # Beyond the first 6, 14 and 5 tokens half counts: -20 - 5.25 for -30.5, and so on, in both models.
    ("dpo", "sigmoid", {"ld_alpha": 0.5}, ([0.1, 0.075, -0.05], [0.0, 0.15, -0.05]),
     ([-12, -25.25, -7.25], [-13, -28, -8.25])),
    ("dpo", "sigmoid", {"ld_alpha": 0.0}, ([0.1, 0.1, -0.05], [0.05, 0.15, -0.05]), ([-12, -20, -7.25], [-11, -28, -7])),
    ("dpo", "sigmoid", {"ld_alpha": 1.0}, BY_SUMS, SUMS),
    ("cpo", "sigmoid", {}, scaled(SUMS, 0.1), SUMS),
    ("cpo", "hinge", {"beta": 0.2}, scaled(SUMS, 0.2), SUMS),
    ("cpo", "ipo", {}, scaled(AVERAGES, 0.1), AVERAGES),
    ("cpo", "simpo", {}, scaled(AVERAGES, 2.0), AVERAGES),
    ("cpo", "ipo", {"alpha": 0.25}, scaled(power(AVERAGES, 0.25), 0.1), AVERAGES),
    ("simpo", "simpo", {"beta": 2.5}, scaled(AVERAGES, 2.5), AVERAGES),
    ("simpo", "simpo", {"alpha": 0.25}, scaled(power(AVERAGES, 0.25), 2.0), AVERAGES),
    ("simpo", "simpo", {"alpha": -0.5}, scaled(power(AVERAGES, -0.5), 2.0), AVERAGES),
    ("simpo", "simper", {}, AVERAGES, AVERAGES),
    ("cpo", "repo", {"alpha": 0.25}, power(AVERAGES, 0.25), AVERAGES),
    ("orpo", "orpo", {}, scaled(AVERAGES, 0.1), AVERAGES),
    ("kto", "kto", {}, BY_SUMS, SUMS),
    ("kto", "apo_zero_unpaired", {"beta": 0.5, "desirable_weight": 3.0}, scaled(BY_SUMS, 5), SUMS),  # no weight is in them
    ("bco", "bco", {"beta": 0.2}, scaled(BY_SUMS, 2), SUMS),
    ("listwise", "plackett_luce", {"beta": 0.2}, scaled(BY_SUMS, 2), SUMS),
    ("listwise", "lipo_lambda", {}, scaled(BY_SUMS, 0.5), SUMS),
    ("tpo", "sigmoid", {}, scaled(SUMS, 0.01), SUMS),
    ("tpo", "tpo_l", {"beta": 2.0}, scaled(AVERAGES, 2.0), AVERAGES),
]  # fmt: skip


@pytest.mark.parametrize(("name", "loss_type", "keys", "rewards", "sums"), REWARDS)
def test_rewards_and_logps(name: str, loss_type: str, keys: dict[str, Any], rewards: Any, sums: Any) -> None:
    """Per pair, without a graph: metrics must not keep one alive."""
    policy, reference = golden_point()
    policy = policy.map(lambda x: x.requires_grad_() if x.is_floating_point() else x)
    metrics = build_objective(name, loss_type, **keys)(policy, reference).metrics
    for kind, expected in (("rewards", rewards), ("logps", sums)):
        for side, values in zip(("chosen", "rejected"), expected):
            np.testing.assert_allclose(metrics[f"{kind}/{side}"].numpy(), values, rtol=1e-12, atol=1e-12)
    assert not any(values.requires_grad for values in metrics.values())
    assert all(values.shape == (3,) for values in metrics.values())


@pytest.mark.parametrize(
    ("keys", "chosen", "rejected"),
    [
        ({"beta": 0.5, "f_divergence_type": "forward_kl"}, [1, 0.5, -0.5], [-0.5, 1.5, -0.5]),
        ({"reference_free": True}, *SUMS),
        ({"ld_alpha": 0.5}, [1, 0.75, -0.5], [0, 1.5, -0.5]),
    ],
)
def test_kl_is_the_log_ratio(keys: dict[str, Any], chosen: list[float], rejected: list[float]) -> None:
    policy, reference = golden_point()
    metrics = build_objective("dpo", "sigmoid", **keys)(policy, reference).metrics
    np.testing.assert_allclose(metrics["kl/chosen"].numpy(), chosen, atol=1e-12)
    np.testing.assert_allclose(metrics["kl/rejected"].numpy(), rejected, atol=1e-12)


def test_metrics_that_only_some_objectives_have() -> None:
    policy, reference = golden_point()
    always = {f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected")}
    kl = {"kl/chosen", "kl/rejected"}
    expected: dict[tuple[str, str], set[str]] = {
        ("dpo", "sigmoid"): kl,
        ("dpo", "bco_pair"): kl | {"bco_delta"},
        ("cpo", "simpo"): set(),
        ("simpo", "simpo"): set(),
        ("orpo", "orpo"): {"log_odds_chosen", "log_odds_ratio"},
        ("kto", "kto"): kl | {"kl", "rewards/accuracies"},
        ("kto", "apo_zero_unpaired"): kl | {"rewards/accuracies"},
        ("bco", "bco"): kl | {"bco_delta", "rewards/accuracies"},
    }
    for (name, loss_type), more in expected.items():
        assert build_objective(name, loss_type)(policy, reference).metrics.keys() == always | more
    logged = build_objective("dpo", ["sigmoid", "bco_pair"])(policy, reference, 0.25).metrics["bco_delta"]
    assert logged.tolist() == [0.25] * 3
    assert build_objective("dpo", ["sigmoid", "bco_pair"]).has_running_mean
    assert not build_objective("dpo", ["sigmoid", "aot"]).has_running_mean


def test_bco_compares_with_delta_and_hands_it_no_gradient() -> None:
    """-log sigma(x - delta) - log sigma(delta - y): rewards above delta are chosen's, below it rejected's."""
    policy, reference = random_pairs(5, seed=9)
    objective = build_objective("dpo", "bco_pair", beta=0.4)
    found = gradients(lambda p: only_sum(objective(p, reference, 0.7)), policy)
    for k in range(5):
        x = 0.4 * (policy.chosen - reference.chosen)[k].item()
        y = 0.4 * (policy.rejected - reference.rejected)[k].item()
        assert found["chosen"][k].item() == pytest.approx(-0.4 / (1 + math.exp(x - 0.7)))
        assert found["rejected"][k].item() == pytest.approx(0.4 / (1 + math.exp(0.7 - y)))


# ---------------------------------------------------------------------------------------------- lists and likelihoods


def test_absent_keys_leave_the_defaults() -> None:
    policy, reference = golden_point()
    left = build_objective("dpo", "sigmoid", beta=None, label_smoothing=None, rpo_alpha=None)(policy, reference)
    right = build_objective("dpo", "sigmoid", beta=0.1, label_smoothing=0.0)(policy, reference)
    assert left.terms.keys() == {"sigmoid"}
    torch.testing.assert_close(left.terms["sigmoid"].values, right.terms["sigmoid"].values)


def test_a_list_is_the_weighted_sum_of_its_losses() -> None:
    """MPO, with a weight of 0 among them; each loss has its own default where the list gives no value."""
    policy, reference = random_pairs(6, seed=10)
    counts = counts_of(policy)
    names, weights = ["sigmoid", "bco_pair", "exo_pair", "aot", "sft"], [0.8, 0.2, 0.5, 0.0, 1.5]
    together = build_objective("dpo", names, weights, beta=0.2)(policy, reference, 0.1)
    alone = {name: build_objective("dpo", name, beta=0.2)(policy, reference, 0.1) for name in names}
    assert list(together.terms) == names
    for name in names:
        torch.testing.assert_close(together.terms[name].values, alone[name].terms[name].values)
    expected = sum(w * total(alone[name], counts) for name, w in zip(names, weights))
    torch.testing.assert_close(total(together, counts), expected)
    assert torch.equal(together.metrics["rewards/chosen"], alone["sigmoid"].metrics["rewards/chosen"])


def test_a_list_without_weights_is_a_plain_sum() -> None:
    policy, reference = random_pairs(6, seed=10)
    both = build_objective("dpo", ["hinge", "ipo"])(policy, reference)
    assert [term.weight for term in both.terms.values()] == [1.0, 1.0]
    assert build_objective("dpo", ["hinge"], [0.25])(policy, reference).terms["hinge"].weight == 0.25


# (name, loss_type, keys) -> (term, weight, per, values at the golden point)
LIKELIHOODS: list[tuple[str, str | list[str], dict[str, Any], str, float, str, list[float]]] = [
    ("dpo", "sigmoid", {"rpo_alpha": 0.7}, "nll", 0.7, "chosen_tokens", [12, 30.5, 7.25]),
    ("dpo", "sigmoid", {"rpo_alpha": 0.0}, "nll", 0.0, "chosen_tokens", [12, 30.5, 7.25]),
    ("dpo", "sigmoid", {"rpo_alpha": 1.0, "ld_alpha": 0.0}, "nll", 1.0, "chosen_tokens", [12, 30.5, 7.25]),
    ("dpo", ["sigmoid", "sft"], {"loss_weights": [1.0, 0.3]}, "sft", 0.3, "chosen_tokens", [12, 30.5, 7.25]),
    ("dpo", "sft", {"ld_alpha": 0.0, "reference_free": True}, "sft", 1.0, "chosen_tokens", [12, 30.5, 7.25]),
    ("cpo", "sigmoid", {}, "nll", 1.0, "chosen_tokens", [12, 30.5, 7.25]),
    ("cpo", "ipo", {"cpo_alpha": 0.05, "alpha": 0.25}, "nll", 0.05, "chosen_tokens", [12, 30.5, 7.25]),
    ("cpo", "simpo", {"cpo_alpha": 0.0}, "nll", 0.0, "chosen_tokens", [12, 30.5, 7.25]),
    ("simpo", "simpo", {}, "nll", 0.0, "chosen_tokens", [12, 30.5, 7.25]),
    ("orpo", "orpo", {"beta": 0.3}, "nll", 1.0, "chosen_and_prompt_tokens", [16, 33, 7.25]),
    ("orpo", "orpo", {"nll_on_prompt": False}, "nll", 1.0, "chosen_tokens", [12, 30.5, 7.25]),
]


@pytest.mark.parametrize(("name", "loss_type", "keys", "term", "weight", "per", "values"), LIKELIHOODS)
def test_likelihood_terms(name: str, loss_type: Any, keys: Any, term: str, weight: float, per: str, values: Any) -> None:
    policy, reference = golden_point()
    found = build_objective(name, loss_type, **keys)(policy, reference).terms[term]
    assert found.values.tolist() == values
    assert (found.weight, found.per) == (weight, per)


def test_orpo_scores_prompts_only_where_its_likelihood_covers_them() -> None:
    policy, _ = golden_point()
    assert build_objective("orpo", "orpo").scores_prompt
    assert not build_objective("orpo", "orpo", nll_on_prompt=False).scores_prompt
    assert not build_objective("dpo", "sft").scores_prompt
    counts = counts_of(policy)
    ratio = 0.5 * (0.768842 + 0.446417 + 0.756606) / 3
    loss = build_objective("orpo", "orpo", beta=0.5)(policy, None)
    assert total(loss, counts).item() == pytest.approx((16 + 33 + 7.25) / (31 + 5) + ratio, abs=1e-6)
    without = build_objective("orpo", "orpo", beta=0.5, nll_on_prompt=False)
    loss = without(replace(policy, prompt=None, prompt_tokens=None), None)
    assert total(loss, counts).item() == pytest.approx((12 + 30.5 + 7.25) / 31 + ratio, abs=1e-6)


def test_counts_of_pairs() -> None:
    policy, reference = golden_point()
    assert policy.count("pairs") == 3
    assert policy.count("chosen_tokens") == 31
    assert policy.count("rejected_tokens") == 29
    assert policy.count("chosen_and_prompt_tokens") == 36
    assert reference.prompt is None


def test_ld_dpo_by_hand() -> None:
    """Beyond the shorter answer's length tokens count by alpha, in both models; likelihood terms stay whole."""
    policy, reference = golden_point()
    objective = build_objective("dpo", "hinge", ld_alpha=0.5)
    # c: -12 + 13, (-20 - 5.25) - (-21 - 5), -7.25 + 6.75
    # j: (-11 - 2) - (-11.5 - 1.5), -28 + 29.5, (-7 - 1.25) - (-6.5 - 1.25)
    margins = [1.0 - 0.0, 0.75 - 1.5, -0.5 - -0.5]
    assert objective(policy, reference).terms["hinge"].values.tolist() == pytest.approx([1 - 0.1 * m for m in margins])
    found = gradients(lambda p: only_sum(objective(p, reference)), policy)
    # S and its common part both move the loss: d / d S is alpha, d / d common 1 - alpha.
    assert found["chosen"].tolist() == pytest.approx([-0.1 * 0.5] * 3)
    assert found["chosen_common"].tolist() == pytest.approx([-0.1 * 0.5] * 3)
    assert found["rejected"].tolist() == pytest.approx([0.1 * 0.5] * 3)


@pytest.mark.parametrize("loss_type", OF_DPO)
def test_ld_alpha_1_is_no_ld_and_0_sees_the_common_length_alone(loss_type: str) -> None:
    policy, reference = random_pairs(5, seed=12)
    whole, common, plain = (build_objective("dpo", loss_type, ld_alpha=alpha) for alpha in (1.0, 0.0, None))
    torch.testing.assert_close(only_sum(whole(policy, reference)), only_sum(plain(policy, reference)))
    if loss_type != "sft":
        short = [replace(p, chosen=p.chosen_common, rejected=p.rejected_common) for p in (policy, reference)]
        torch.testing.assert_close(only_sum(common(policy, reference)), only_sum(plain(*short)))


@pytest.mark.parametrize("loss_type", OF_DPO)
def test_reference_free_is_a_reference_of_zeros(loss_type: str) -> None:
    """In values, gradients and metrics; no reference need be given, and one that is given is not looked at."""
    policy, reference = random_pairs(5, seed=13)
    free, plain = (build_objective("dpo", loss_type, reference_free=flag) for flag in (True, False))
    zeros = reference.map(lambda x: 0 * x)
    expected = plain(policy, zeros, 0.1)
    for given in (None, reference):
        loss = free(policy, given, 0.1)
        torch.testing.assert_close(loss.terms[loss_type].values, expected.terms[loss_type].values)
        for name, values in expected.metrics.items():
            torch.testing.assert_close(loss.metrics[name], values)
        left = gradients(lambda p: only_sum(free(p, given, 0.1)), policy)  # noqa: B023
        right = gradients(lambda p: only_sum(plain(p, zeros, 0.1)), policy)
        for name in LOG_PROBS:
            torch.testing.assert_close(left[name], right[name])


def test_rpo_adds_the_token_mean_of_the_chosen_answers() -> None:
    """By hand: mean of the pair losses over the step's pairs + alpha x chosen NLL over the step's chosen tokens."""
    policy, reference = golden_point()
    loss = build_objective("dpo", "sigmoid", beta=0.1, rpo_alpha=2.0)(policy, reference)
    counts = {"pairs": 8, "chosen_tokens": 100, "rejected_tokens": 7, "tokens": 9}  # of the whole step: more than these
    expected = (0.620957 + 0.744397 + 0.693147) / 8 + 2.0 * (12 + 30.5 + 7.25) / 100
    assert total(loss, counts).item() == pytest.approx(expected, abs=1e-6)
    chosen = gradients(lambda p: total(build_objective("dpo", "sigmoid", rpo_alpha=2.0)(p, reference), counts), policy)
    plain = gradients(lambda p: total(build_objective("dpo", "sigmoid")(p, reference), counts), policy)
    torch.testing.assert_close(chosen["chosen"], plain["chosen"] - 2.0 / 100)


def test_total_weighs_and_divides_each_term_by_its_own_count() -> None:
    terms = {"a": Term(torch.tensor([1.0, 2.0])), "b": Term(torch.tensor([3.0]), per="chosen_tokens", weight=0.5)}
    assert total(PairLoss(terms, {}), {"pairs": 4, "chosen_tokens": 10}).item() == pytest.approx(3 / 4 + 0.5 * 3 / 10)


# ---------------------------------------------------------------------------------------------------- the step's law


def packs_of(seed: int) -> list[np.ndarray]:
    """Nine pairs over five packs in any order, some of them empty."""
    draws = np.random.default_rng(seed)
    return np.split(draws.permutation(9), np.sort(draws.integers(0, 10, 4)))


@pytest.mark.parametrize("case", [case for case in CASES if case[1] not in COUPLED], ids=named)
def test_shares_over_any_split_of_the_pairs_add_up(case: Case) -> None:
    """Layout invariance: packs and ranks of any size, fillers included, give the loss and gradient of the step."""
    objective = objective_of(case)
    assert not objective.couples
    for seed in range(3):
        policy, reference = random_pairs(9, seed)
        counts, packs = counts_of(policy), packs_of(seed)

        def whole(p: PairLogps) -> Tensor:
            return total(objective(p, reference), counts)  # noqa: B023

        def shares(p: PairLogps) -> Tensor:
            return torch.stack([total(objective(part(p, m), part(reference, m)), counts) for m in packs]).sum()  # noqa: B023

        torch.testing.assert_close(shares(policy), whole(policy))
        expected = gradients(whole, policy)
        for name, gradient in gradients(shares, policy).items():
            torch.testing.assert_close(gradient, expected[name])


def test_some_packs_are_empty() -> None:
    """The tests that split would say nothing about fillers otherwise."""
    assert any(len(members) == 0 for seed in range(3) for members in packs_of(seed))


@pytest.mark.parametrize("loss_type", COUPLED)
def test_coupled_losses_do_not_add_up_over_packs(loss_type: str) -> None:
    """Which is why they say so: the whole step is looked at first. BCO's delta is then a mean over the step."""
    policy, reference = random_pairs(9, seed=0)
    objective = build_objective("bco" if loss_type == "bco" else "dpo", loss_type)
    assert objective.couples

    def loss(members: Any) -> Tensor:
        ours, theirs = part(policy, members), part(reference, members)
        metrics = objective(ours, theirs).metrics
        delta = torch.cat([metrics["rewards/chosen"], metrics["rewards/rejected"]]).mean().item()
        return only_sum(objective(ours, theirs, delta))

    halves = loss(slice(0, 4)) + loss(slice(4, 9))
    assert (halves - loss(slice(0, 9))).abs() > 1e-3


MIXED: list[Case] = [
    *(case for case in CASES if case[1] in COUPLED),
    ("dpo", ["sigmoid", "bco_pair", "sft"], {"loss_weights": [0.8, 0.2, 1.0], "use_weighting": True, "rpo_alpha": 0.3}),  # type: ignore[list-item]
    ("dpo", ["aot", "hinge", "sft"], {"loss_weights": [0.5, 0.3, 0.2], "ld_alpha": 0.4}),  # type: ignore[list-item]
    ("orpo", "orpo", {}),  # the router loss asks for two passes of any objective
    ("cpo", "ipo", {"alpha": 0.25}),
]


@pytest.mark.parametrize("case", MIXED, ids=str)
def test_slopes_carry_the_gradient_of_the_whole_step(case: Case) -> None:
    """The sum over packs of slope x log-prob has the gradient of the loss of the step, in the weights of a model whose
    forward gives the log-probs of each pack anew."""
    objective = objective_of(case)
    policy, reference = random_pairs(9, seed=14)
    step = Step(number=1, epoch=0.0, num_packs=5, packs=iter(()), counts=counts_of(policy), fill=1.0)
    slopes = slopes_of(objective, policy, reference, 0.05, step)
    assert not any(getattr(slopes, field.name).any() for field in fields(slopes) if "tokens" in field.name)
    draws = np.random.default_rng(0)
    weights = torch.zeros(len(LOG_PROBS), 9, dtype=torch.float64, requires_grad=True)
    layer = torch.as_tensor(draws.normal(0, 1, (len(LOG_PROBS), 9, 9)))

    def forward() -> PairLogps:
        outputs = (layer @ weights[..., None])[..., 0].tanh()  # 0 at these weights, with a slope of its own everywhere
        return moved(policy, [getattr(policy, name) + outputs[k] for k, name in enumerate(LOG_PROBS)])

    (expected,) = torch.autograd.grad(total(objective(forward(), reference, 0.05), step.counts), weights)
    for members in packs_of(14):
        pack, slope = part(forward(), members), part(slopes, members)
        sum((getattr(slope, name) * getattr(pack, name)).sum() for name in LOG_PROBS).backward()
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(weights.grad, expected)


def test_a_running_mean_is_that_of_all_steps() -> None:
    """Each step counts alike, however many came before: what a checkpoint keeps is the sum, not the mean."""
    values = [0.1, -0.4, 2.5, 1e-3]
    mean = RunningMean()
    assert mean.value == 0.0
    for k, value in enumerate(values, 1):
        before, mean = mean, mean.updated(value)
        assert mean.value == pytest.approx(sum(values[:k]) / k, abs=1e-15)
        assert before.steps == mean.steps - 1
    assert RunningMean(**vars(mean)) == mean
    assert RunningMean(mean.total, mean.steps).updated(1.0) == mean.updated(1.0)


def test_detach_keeps_values_and_drops_the_graph() -> None:
    policy, _ = golden_point()
    policy = replace(policy, weight=torch.ones(3), margin=torch.zeros(3))
    for name in LOG_PROBS:
        getattr(policy, name).requires_grad_()
    detached = policy.detach()
    for field in fields(policy):
        before, after = getattr(policy, field.name), getattr(detached, field.name)
        assert not after.requires_grad
        assert torch.equal(before.detach(), after)
    assert replace(policy, prompt=None).detach().prompt is None


# ---------------------------------------------------------------------------------------------------------- the keys

# section -> what `resolved` makes of it, whole
SECTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"name": "dpo", "loss_type": "sigmoid"},
        {"beta": 0.1, "label_smoothing": 0.0, "reference_free": False, "f_divergence_type": "reverse_kl",
         "use_weighting": False},
    ),
    (
        {"name": "dpo", "loss_type": "exo_pair", "rpo_alpha": 0.5, "ld_alpha": 0.3},
        {"beta": 0.1, "label_smoothing": 1e-3, "reference_free": False, "f_divergence_type": "reverse_kl",
         "use_weighting": False, "rpo_alpha": 0.5, "ld_alpha": 0.3},
    ),
    (
        {"name": "dpo", "loss_type": "ipo", **ALPHA, "beta": 0.4, "label_smoothing": None},
        {"beta": 0.4, "ipo_length_normalize": True, "reference_free": False, "f_divergence_type": "alpha_divergence",
         "f_alpha_divergence_coef": 0.5, "use_weighting": False},
    ),
    # The defaults of label_smoothing differ: the key is left out, and each loss keeps its own.
    (
        {"name": "dpo", "loss_type": ["sigmoid", "exo_pair", "discopop"], "loss_weights": [1.0, 0.5, 0.1]},
        {"beta": 0.1, "discopop_tau": 0.05, "reference_free": False, "f_divergence_type": "reverse_kl",
         "use_weighting": False, "loss_weights": [1.0, 0.5, 0.1]},
    ),
    (
        {"name": "dpo", "loss_type": ["sigmoid", "exo_pair"], "label_smoothing": 0.1},
        {"beta": 0.1, "label_smoothing": 0.1, "reference_free": False, "f_divergence_type": "reverse_kl",
         "use_weighting": False},
    ),
    ({"name": "cpo", "loss_type": "sigmoid"}, {"beta": 0.1, "label_smoothing": 0.0, "cpo_alpha": 1.0, "alpha": 0.0}),
    ({"name": "cpo", "loss_type": "hinge"}, {"beta": 0.1, "cpo_alpha": 1.0, "alpha": 0.0}),
    (
        {"name": "cpo", "loss_type": "simpo"},
        {"beta": 2.0, "gamma_beta_ratio": 0.5, "label_smoothing": 0.0, "cpo_alpha": 1.0, "alpha": 0.0},
    ),
    # simpo_gamma takes the place of the ratio.
    (
        {"name": "simpo", "loss_type": "simpo", "simpo_gamma": 1.0},
        {"beta": 2.0, "simpo_gamma": 1.0, "label_smoothing": 0.0, "alpha": 0.0},
    ),
    ({"name": "orpo", "loss_type": "orpo"}, {"beta": 0.1, "nll_on_prompt": True}),
    ({"name": "kto", "loss_type": "kto"}, {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}),
    ({"name": "bco", "loss_type": "bco"}, {"beta": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("section", "expected"), SECTIONS)
def test_resolved_sections(section: dict[str, Any], expected: dict[str, Any]) -> None:
    assert resolved(**section) == {"name": section["name"], "loss_type": section["loss_type"], **expected}


@pytest.mark.parametrize("case", [*CASES, *MIXED, ("dpo", ["sigmoid", "exo_pair"], {})], ids=str)
def test_a_resolved_section_is_the_same_objective(case: Case) -> None:
    """It is what a run folder keeps: built again from it, a run goes on with the same loss."""
    name, loss_type, keys = case
    written = resolved(name, loss_type, **keys)
    assert resolved(**written) == written
    assert all(written[key] == value for key, value in keys.items())
    assert None not in written.values()
    policy, reference = random_pairs(5, seed=15)
    first = build_objective(name, loss_type, **keys)(policy, reference, 0.1)
    second = build_objective(**written)(policy, reference, 0.1)
    assert first.terms.keys() == second.terms.keys()
    for component, term in first.terms.items():
        again = second.terms[component]
        assert torch.equal(term.values, again.values)
        assert (term.per, term.weight) == (again.per, again.weight)
    for metric, values in first.metrics.items():
        assert torch.equal(values, second.metrics[metric])


@pytest.mark.parametrize("module", ["objectives", "objectives.losses"])
def test_importing_the_objectives_loads_no_torch(module: str) -> None:
    code = f"import dspref.{module}, sys; assert 'torch' not in sys.modules, 'torch was loaded'"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_an_objective_is_described_in_one_line() -> None:
    """For the banner and the model card: every key in force, in the YAML's words."""
    assert describe("cpo", "simpo", cpo_alpha=0.05, simpo_gamma=5.4, beta=10.0) == (
        "cpo / simpo  beta 10.0, simpo_gamma 5.4, label_smoothing 0.0, cpo_alpha 0.05, alpha 0.0"
    )
    mixture = describe("dpo", ["sigmoid", "bco_pair"], loss_weights=[0.8, 0.2], use_weighting=True, rpo_alpha=None)
    assert mixture.startswith("dpo / sigmoid + bco_pair  ")
    assert "loss_weights [0.8, 0.2]" in mixture and "use_weighting true" in mixture and "None" not in mixture
    assert describe("dpo", "ipo", f_divergence_type="forward_kl").endswith("; f'(u) = 1 - 1/u for log u")
