"""Gold answers: in the likelihood alone, and in no metric of chosen answers."""

from __future__ import annotations

import pytest
import torch

from dspref.objectives import build_objective
from dspref.objectives.families import PairLogps, total


def rows() -> PairLogps:
    """Two pairs, each followed by its gold answer."""
    chosen = torch.tensor([-4.0, -6.0, -9.0, -2.0], dtype=torch.float64)
    rejected = torch.tensor([-6.0, 0.0, -7.0, 0.0], dtype=torch.float64)
    tokens = torch.tensor([4, 3, 3, 1]), torch.tensor([2, 0, 7, 0])
    return PairLogps(chosen, rejected, *tokens, gold=torch.tensor([0, 1, 0, 1]))


COUNTS = {"pairs": 2, "gold_tokens": 4}


def test_counts_tell_gold_answers_from_pairs() -> None:
    found = {
        name: int(rows().count(name)) for name in ("pairs", "chosen_answers", "chosen_tokens", "gold_tokens", "answers")
    }
    assert found == {"pairs": 2, "chosen_answers": 2, "chosen_tokens": 7, "gold_tokens": 4, "answers": 4}


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "tpo_l"])
def test_the_loss_is_that_of_the_pairs_and_the_mean_of_gold_tokens(loss_type: str) -> None:
    policy = rows()
    leaves = [side.clone().requires_grad_() for side in (policy.chosen, policy.rejected)]
    moved = PairLogps(**{**vars(policy), "chosen": leaves[0], "rejected": leaves[1]})
    found = build_objective("tpo", loss_type, beta=0.5, tpo_alpha=0.25)(moved, None)
    pairs = policy.map(lambda x: x[::2])
    alone = build_objective("tpo", loss_type, beta=0.5)(pairs, None).terms[loss_type].values
    loss = total(found, COUNTS)
    assert loss.item() == pytest.approx((alone.sum() / 2 + 0.25 * 8 / 4).item())
    of_chosen, of_rejected = torch.autograd.grad(loss, leaves)
    assert of_chosen[1::2].tolist() == pytest.approx([-0.25 / 4] * 2) and not of_rejected[1::2].any()
    assert of_chosen.isfinite().all() and of_rejected.isfinite().all() and of_rejected[::2].any()
    assert found.judged is not None and found.judged.tolist() == [1, 0, 1, 0]
    assert not any(values[1::2].any() for values in found.metrics.values())


def test_weights_are_those_of_the_comparison() -> None:
    policy = rows()
    weighed = PairLogps(**{**vars(policy), "weight": torch.tensor([2.0, 2.0, 0.5, 0.5])})
    plain, found = (build_objective("tpo", "sigmoid")(x, None) for x in (policy, weighed))
    torch.testing.assert_close(
        found.terms["sigmoid"].values[::2], plain.terms["sigmoid"].values[::2] * torch.tensor([2, 0.5])
    )
    torch.testing.assert_close(found.terms["nll"].values, plain.terms["nll"].values)
