"""Every loss against its published numbers, its finite differences, and the law that shares add up."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dspref.objectives import (
    OBJECTIVES,
    PairLogps,
    PairLoss,
    Term,
    build_objective,
    logsigmoid,
    total,
)

LOSSES = [(name, loss) for name, row in OBJECTIVES.items() for loss in row.losses]

# (name, loss_type, keys) -> loss of each pair at the point below, in float64, to six decimals.
GOLDEN: list[tuple[str, str, dict[str, float], list[float]]] = [
    ("dpo", "sigmoid", {"beta": 0.1}, [0.620957, 0.744397, 0.693147]),
    ("dpo", "sigmoid", {"beta": 0.1, "label_smoothing": 0.1}, [0.635957, 0.734397, 0.693147]),
]


def logps(chosen: Any, rejected: Any, chosen_tokens: Any = None, rejected_tokens: Any = None) -> PairLogps:
    sums = [torch.as_tensor(x, dtype=torch.float64) for x in (chosen, rejected)]
    counts = [
        torch.ones(len(sums[0]), dtype=torch.int64) if n is None else torch.tensor(n)
        for n in (chosen_tokens, rejected_tokens)
    ]
    return PairLogps(*sums, *counts)


def golden_point() -> tuple[PairLogps, PairLogps]:
    counts = [6, 20, 5], [8, 14, 7]
    return logps([-12, -30.5, -7.25], [-15, -28, -9.5], *counts), logps([-13, -31, -6.75], [-14.5, -29.5, -9], *counts)


def random_pairs(count: int, seed: int) -> tuple[PairLogps, PairLogps]:
    """Log-probs of plausible size under two models that differ by a few nats; every answer has 1 to 29 tokens."""
    draws = np.random.default_rng(seed)
    tokens = draws.integers(1, 30, (2, count))
    policy = -draws.uniform(0.5, 3.0, (2, count)) * tokens
    reference = policy + draws.normal(0, 2, (2, count))
    counts = tokens[0].tolist(), tokens[1].tolist()
    return logps(*policy, *counts), logps(*reference, *counts)


def only_sum(loss: PairLoss) -> torch.Tensor:
    """Weighted sum over pairs and terms, whatever the terms are divided by."""
    return sum(term.weight * term.values.sum() for term in loss.terms.values())  # type: ignore[return-value]


def part(pairs: PairLogps, members: np.ndarray) -> PairLogps:
    return PairLogps(*(getattr(pairs, name)[members] for name in PairLogps.__dataclass_fields__))


def gradients(function: Callable[[PairLogps], torch.Tensor], policy: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, rejected = (x.detach().clone().requires_grad_() for x in (policy.chosen, policy.rejected))
    value = function(PairLogps(chosen, rejected, policy.chosen_tokens, policy.rejected_tokens))
    return torch.autograd.grad(value, (chosen, rejected))  # type: ignore[return-value]


def test_every_loss_has_a_golden_row() -> None:
    assert {(name, loss) for name, loss, *_ in GOLDEN} == set(LOSSES)


@pytest.mark.parametrize(("name", "loss_type", "keys", "expected"), GOLDEN)
def test_golden_values(name: str, loss_type: str, keys: dict[str, float], expected: list[float]) -> None:
    policy, reference = golden_point()
    loss = build_objective(name, loss_type, **keys)(policy, reference)
    (term,) = loss.terms.values()
    np.testing.assert_allclose(term.values.numpy(), expected, atol=1e-6, rtol=0)
    assert term.per == "pairs"
    assert total(loss, {"pairs": 3}).item() == pytest.approx(sum(expected) / 3, abs=1e-6)


def test_golden_dpo_rewards() -> None:
    """beta (S - R), in sums, without gradient."""
    policy, reference = golden_point()
    policy.chosen.requires_grad_(), policy.rejected.requires_grad_()
    loss = build_objective("dpo", "sigmoid", beta=0.1)(policy, reference)
    np.testing.assert_allclose(loss.chosen_rewards.numpy(), [0.1, 0.05, -0.05], atol=1e-12)
    np.testing.assert_allclose(loss.rejected_rewards.numpy(), [-0.05, 0.15, -0.05], atol=1e-12)
    assert not loss.chosen_rewards.requires_grad
    assert not loss.rejected_rewards.requires_grad


@pytest.mark.parametrize(("name", "loss_type"), LOSSES)
def test_gradients_are_those_of_finite_differences(name: str, loss_type: str) -> None:
    policy, reference = random_pairs(5, seed=1)
    objective = build_objective(name, loss_type)

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        moved = PairLogps(chosen, rejected, policy.chosen_tokens, policy.rejected_tokens)
        return only_sum(objective(moved, reference))

    assert torch.autograd.gradcheck(loss, (policy.chosen.requires_grad_(), policy.rejected.requires_grad_()))


@pytest.mark.parametrize("keys", [keys for name, loss, keys, _ in GOLDEN if (name, loss) == ("dpo", "sigmoid")])
def test_sigmoid_gradient_is_the_papers(keys: dict[str, float]) -> None:
    """d loss / d S_w = -beta (sigma(-beta d) - e), written out pair by pair."""
    policy, reference = random_pairs(6, seed=2)
    objective = build_objective("dpo", "sigmoid", **keys)
    chosen, rejected = gradients(lambda p: only_sum(objective(p, reference)), policy)
    beta, smoothing = keys["beta"], keys.get("label_smoothing", 0.0)
    for k in range(6):
        d = (policy.chosen[k] - reference.chosen[k] - policy.rejected[k] + reference.rejected[k]).item()
        expected = -beta * (1 / (1 + math.exp(beta * d)) - smoothing)
        assert chosen[k].item() == pytest.approx(expected, abs=1e-12)
        assert rejected[k].item() == pytest.approx(-expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "loss_type"), LOSSES)
def test_extreme_log_ratios_stay_finite(name: str, loss_type: str, dtype: torch.dtype) -> None:
    """Log-ratios of +-500 on either side, and answers that are equal under both models."""
    chosen, rejected = (
        torch.tensor(x, dtype=dtype) for x in zip((500, -500), (-500, 500), (500, 500), (-500, -500), (0, 0))
    )
    count = torch.ones(5, dtype=torch.int64)
    policy, reference = PairLogps(chosen, rejected, count, count), PairLogps(0 * chosen, 0 * rejected, count, count)
    for beta in (0.1, 2.0):
        objective = build_objective(name, loss_type, beta=beta)
        assert torch.isfinite(only_sum(objective(policy, reference)))
        for gradient in gradients(lambda p: only_sum(objective(p, reference)), policy):  # noqa: B023
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("name", "loss_type"), LOSSES)
def test_a_step_raises_chosen_and_lowers_rejected(name: str, loss_type: str) -> None:
    """Where policy = reference, as at the first step."""
    policy, _ = random_pairs(20, seed=3)
    objective = build_objective(name, loss_type)
    chosen, rejected = gradients(lambda p: only_sum(objective(p, policy)), policy)
    assert (chosen < 0).all()
    assert (rejected > 0).all()


def test_identical_models_lose_ln_2() -> None:
    policy, _ = random_pairs(4, seed=4)
    for smoothing in (0.0, 0.3):
        loss = build_objective("dpo", "sigmoid", beta=0.7, label_smoothing=smoothing)(policy, policy)
        np.testing.assert_allclose(loss.terms["sigmoid"].values.numpy(), math.log(2), rtol=1e-14)


def test_smoothing_is_a_mixture_of_a_pair_and_its_mirror() -> None:
    policy, reference = random_pairs(5, seed=5)
    mirrored = [PairLogps(p.rejected, p.chosen, p.rejected_tokens, p.chosen_tokens) for p in (policy, reference)]
    plain = build_objective("dpo", "sigmoid", beta=0.3)
    smooth = build_objective("dpo", "sigmoid", beta=0.3, label_smoothing=0.2)(policy, reference)
    mixture = 0.8 * plain(policy, reference).terms["sigmoid"].values + 0.2 * plain(*mirrored).terms["sigmoid"].values
    torch.testing.assert_close(smooth.terms["sigmoid"].values, mixture)


def test_logsigmoid_is_torchs() -> None:
    x = torch.tensor([-1e4, -500.0, -3.0, 0.0, 1e-9, 3.0, 500.0, 1e4], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(logsigmoid(x), torch.nn.functional.logsigmoid(x))
    (ours,) = torch.autograd.grad(logsigmoid(x).sum(), x)
    torch.testing.assert_close(ours, torch.sigmoid(-x.detach()))


def test_absent_keys_leave_the_defaults() -> None:
    policy, reference = golden_point()
    left = build_objective("dpo", "sigmoid", beta=None, label_smoothing=None, rpo_alpha=None)(policy, reference)
    right = build_objective("dpo", "sigmoid", beta=0.1, label_smoothing=0.0)(policy, reference)
    assert left.terms.keys() == {"sigmoid"}
    torch.testing.assert_close(left.terms["sigmoid"].values, right.terms["sigmoid"].values)


def test_rpo_adds_the_token_mean_of_the_chosen_answers() -> None:
    """By hand: mean of the pair losses over the step's pairs + alpha x chosen NLL over the step's chosen tokens."""
    policy, reference = golden_point()
    loss = build_objective("dpo", "sigmoid", beta=0.1, rpo_alpha=2.0)(policy, reference)
    counts = {"pairs": 8, "chosen_tokens": 100, "rejected_tokens": 7, "tokens": 9}  # of the whole step: more than these
    expected = (0.620957 + 0.744397 + 0.693147) / 8 + 2.0 * (12 + 30.5 + 7.25) / 100
    assert total(loss, counts).item() == pytest.approx(expected, abs=1e-6)
    chosen, _ = gradients(lambda p: total(build_objective("dpo", "sigmoid", rpo_alpha=2.0)(p, reference), counts), policy)
    plain, _ = gradients(lambda p: total(build_objective("dpo", "sigmoid")(p, reference), counts), policy)
    torch.testing.assert_close(chosen, plain - 2.0 / 100)


def test_total_weighs_and_divides_each_term_by_its_own_count() -> None:
    terms = {"a": Term(torch.tensor([1.0, 2.0])), "b": Term(torch.tensor([3.0]), per="chosen_tokens", weight=0.5)}
    loss = PairLoss(terms, torch.zeros(2), torch.zeros(2))
    assert total(loss, {"pairs": 4, "chosen_tokens": 10}).item() == pytest.approx(3 / 4 + 0.5 * 3 / 10)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("name", "loss_type"), LOSSES)
def test_shares_over_any_split_of_the_pairs_add_up(name: str, loss_type: str, seed: int) -> None:
    """Layout invariance: packs and ranks of any size, fillers included, give the loss and gradient of the step."""
    policy, reference = random_pairs(9, seed)
    counts = {
        "pairs": 9,
        "chosen_tokens": int(policy.chosen_tokens.sum()),
        "rejected_tokens": int(policy.rejected_tokens.sum()),
    }
    nll = OBJECTIVES[name].nll_weight
    objective = build_objective(name, loss_type, **({nll: 0.7} if nll else {}))
    draws = np.random.default_rng(seed)
    cuts = np.sort(draws.integers(0, 10, 4))  # equal cuts leave empty packs
    packs = np.split(draws.permutation(9), cuts)

    def whole(p: PairLogps) -> torch.Tensor:
        return total(objective(p, reference), counts)

    def shares(p: PairLogps) -> torch.Tensor:
        return torch.stack([total(objective(part(p, m), part(reference, m)), counts) for m in packs]).sum()

    torch.testing.assert_close(shares(policy), whole(policy))
    for ours, theirs in zip(gradients(shares, policy), gradients(whole, policy)):
        torch.testing.assert_close(ours, theirs)


def test_detach_keeps_values_and_drops_the_graph() -> None:
    policy, _ = golden_point()
    policy.chosen.requires_grad_(), policy.rejected.requires_grad_()
    detached = policy.detach()
    assert not detached.chosen.requires_grad
    assert not detached.rejected.requires_grad
    torch.testing.assert_close(detached.chosen, policy.chosen.detach())
    assert torch.equal(detached.rejected_tokens, policy.rejected_tokens)


def test_importing_the_objectives_loads_no_torch() -> None:
    code = "import dspref.objectives, sys; assert 'torch' not in sys.modules, 'torch was loaded'"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
