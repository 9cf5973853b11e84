"""Losses of ranked lists of answers to one prompt: Plackett-Luce DPO and LiPO-lambda; and the family of them.

Every answer is computed once, whatever the number of comparisons that it is in. The losses see answers as tables: L rows of
K places, s = beta log u of each, log u = S - R, and psi its label, higher is better. `same` [L, K, K] says which two places
of a row are answers of one list. The value of a list is spread over its answers. The keyword-only arguments are YAML keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dspref.objectives import weights
from dspref.objectives.families import Part
from dspref.objectives.losses import Positive, logsigmoid
from dspref.objectives.terms import PairLogps, PairLoss, Term

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

# Log-ratios as close as this, in nats, count as equal where answers are ranked by them: rounding errors are not to decide.
RESOLUTION = 0.01
# So many answers are one row of a table, whatever lists they are of: to find these would wait for the device.
ONE_ROW = 1024


def plackett_luce(
    log_ratio: Float[Tensor, "L K"],
    label: Float[Tensor, "L K"],
    same: Bool[Tensor, "L K K"],
    *,
    beta: Positive = 0.1,
) -> Float[Tensor, "L K"]:
    """Plackett-Luce DPO (Rafailov et al. 2023, arXiv:2305.18290, appendix A.3): the likelihood of the whole order, each
    answer chosen among itself and those below it. Equal labels are not compared. Of two answers it is DPO.

    sum_i (log sum_j e^(s_j) - s_i),  j = i or psi_j < psi_i
    """
    score = beta * log_ratio
    among = (label[:, None, :] < label[:, :, None]) & same | _itself(same)
    return score[:, None, :].expand(same.shape).masked_fill(~among, -math.inf).logsumexp(dim=-1) - score


def lipo_lambda(
    log_ratio: Float[Tensor, "L K"],
    label: Float[Tensor, "L K"],
    same: Bool[Tensor, "L K K"],
    *,
    beta: Positive = 0.05,
    score_scale: Positive = 1.0,
) -> Float[Tensor, "L K"]:
    """LiPO-lambda (Liu et al. 2024, arXiv:2402.01878, eq. 8): all pairs of a list, weighed by what it would cost in DCG to
    swap them. r_i is the place of answer i in the model's own order, from 1; where log-ratios are equal to 0.01 nats, the
    better answer comes first, and equal answers share their places. The weights have no gradient.

    sum over psi_i > psi_j of |2^(psi_i) - 2^(psi_j)| |1 / log(1 + r_i) - 1 / log(1 + r_j)| log(1 + e^(s_j - s_i));
    psi = score_scale x score
    """
    gain, discount = 2 ** (score_scale * label), _discount(log_ratio.detach(), label, same)
    weight = (gain[:, :, None] - gain[:, None, :]) * (discount[:, :, None] - discount[:, None, :]).abs()
    below = (label[:, None, :] < label[:, :, None]) & same
    apart = beta * (log_ratio[:, :, None] - log_ratio[:, None, :])
    return -(weight * logsigmoid(apart)).where(below, 0.0).sum(dim=-1)


def _discount(
    log_ratio: Float[Tensor, "L K"], label: Float[Tensor, "L K"], same: Bool[Tensor, "L K K"]
) -> Float[Tensor, "L K"]:
    """1 / log(1 + r) of each answer, the mean over its places where it shares some."""
    place = (log_ratio / RESOLUTION).round()
    level = (place[:, None, :] == place[:, :, None]) & same
    before = (place[:, None, :] > place[:, :, None]) & same | level & (label[:, None, :] > label[:, :, None])
    tied = level & (label[:, None, :] == label[:, :, None]) | _itself(same)
    ranks = log_ratio.new_ones(same.shape[-1]).cumsum(dim=0)
    # Of the first 0, 1, 2, ... places.
    sums = log_ratio.new_zeros(len(ranks) + 1).index_copy(0, ranks.long(), (1 / (1 + ranks).log()).cumsum(dim=0))
    ahead, sharing = before.sum(dim=-1), tied.sum(dim=-1)
    return (sums[ahead + sharing] - sums[ahead]) / sharing


def _itself(same: Bool[Tensor, "L K K"]) -> Bool[Tensor, "K K"]:
    places = same.new_ones(same.shape[-1]).cumsum(dim=0)
    return places[:, None] == places[None, :]


def of_lists(parts: Sequence[Part], policy: PairLogps, reference: PairLogps | None, delta: float) -> PairLoss:
    """Losses of lists: the mean is over lists, whatever their length, and weights that rows give (`columns.weight`)
    multiply the value of a list. In metrics the best answers of a list are chosen ones, and all others are rejected;
    accuracies are over all pairs of answers with different labels."""
    assert reference is not None
    (part,) = parts
    answers = _Answers.of(policy, reference)
    index, real = answers.table()
    log_ratio, label, number = (x[index] for x in (answers.log_ratio, answers.label, answers.list))
    same = (number[:, :, None] == number[:, None, :]) & real[:, :, None] & real[:, None, :]
    values = part.loss.function(log_ratio, label, same, **part.keys)
    below = (label[:, None, :] < label[:, :, None]) & same
    right = below & (log_ratio[:, None, :] < log_ratio[:, :, None])
    each = {"values": values, "judged": below.sum(dim=-1), "right": right.sum(dim=-1)}
    found = {name: answers.by_example(x, index, real, len(policy.chosen)) for name, x in each.items()}
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    beta = part.keys["beta"]
    logged = {
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
        "kl/chosen": chosen,
        "kl/rejected": rejected,
        "rewards/accuracies": found["right"].to(chosen.dtype),
        **weights.logged(policy.weight, None),
    }
    terms = {part.component: Term(weights.weighed(policy.weight) * found["values"], per="lists", weight=part.weight)}
    return PairLoss(terms, {name: value.detach() for name, value in logged.items()}, found["judged"])


@dataclass(frozen=True)
class _Answers:
    """The chosen answers of P examples, and behind them the rejected ones, A = 2P, whether they are there or not."""

    log_ratio: Float[Tensor, "A"]
    label: Float[Tensor, "A"]
    list: Int[Tensor, "A"]
    there: Bool[Tensor, "A"]

    @classmethod
    def of(cls, policy: PairLogps, reference: PairLogps) -> _Answers:
        from torch import cat

        assert policy.list is not None and policy.score_chosen is not None and policy.score_rejected is not None
        return cls(
            cat([policy.chosen - reference.chosen, policy.rejected - reference.rejected]),
            cat([policy.score_chosen, policy.score_rejected]).to(policy.chosen.dtype),
            cat([policy.list, policy.list]),
            cat([policy.chosen_tokens, policy.rejected_tokens]) > 0,
        )

    def table(self) -> tuple[Int[Tensor, "L K"], Bool[Tensor, "L K"]]:
        """Where the answers of a table lie among these, and which of its places hold one: where they are few, one row, else
        a row for each list."""
        count = len(self.list)
        every = self.list.new_ones(count).cumsum(dim=0) - 1
        if count <= ONE_ROW:
            return every[None], self.there[None]
        listed = every[self.there]
        listed = listed[self.list[listed].argsort(stable=True)]
        _, row, sizes = self.list[listed].unique_consecutive(return_inverse=True, return_counts=True)
        within = every[: len(listed)] - (sizes.cumsum(dim=0) - sizes)[row]
        index = listed.new_zeros(len(sizes), int(sizes.max()))
        index[row, within] = listed
        return index, every[: index.shape[1]] < sizes[:, None]

    @staticmethod
    def by_example(values: Tensor, index: Int[Tensor, "L K"], real: Bool[Tensor, "L K"], examples: int) -> Tensor:
        """A table's values [L, K], summed over the answers of each example: [P]."""
        flat = values.new_zeros(2 * examples).index_add(0, index.flatten(), values.where(real, 0).flatten())
        return flat.view(2, -1).sum(dim=0)
