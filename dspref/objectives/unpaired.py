"""Losses of answers that stand alone, each with a label: KTO, BCO and APO-zero for unpaired data; and their families.

A answers; s is 1 for a desirable answer and -1 for an undesirable one, log u = S - R. An example has one answer, or two, of
which the chosen one is desirable and the rejected one is not. The keyword-only arguments are YAML keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dspref.objectives import weights
from dspref.objectives.families import Part
from dspref.objectives.losses import NonNegative, Positive, logsigmoid
from dspref.objectives.terms import PairLogps, PairLoss, Term

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def kto(log_ratio: Float[Tensor, "A"], s: int, point: float, *, beta: Positive = 0.1) -> Float[Tensor, "A"]:
    """KTO (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8): a value of gains and losses against a reference point.

    1 - sigma(s beta (log u - z));  z = max(0, mean over the step of log u of answers to other prompts), without gradient
    """
    return 1 - (s * beta * (log_ratio - point)).sigmoid()


def apo_zero_unpaired(log_ratio: Float[Tensor, "A"], s: int, point: float, *, beta: Positive = 0.1) -> Float[Tensor, "A"]:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7) of answers that stand alone: KTO with z = 0.

    1 - sigma(s beta log u)
    """
    return 1 - (s * beta * log_ratio).sigmoid()


def bco(log_ratio: Float[Tensor, "A"], s: int, point: float, *, beta: Positive = 0.1) -> Float[Tensor, "A"]:
    """BCO (Jung et al. 2024, arXiv:2404.04656): a binary classifier whose threshold is the running mean of the rewards.

    -log sigma(s (beta log u - delta));  delta = mean over steps of the mean reward
    """
    return -logsigmoid(s * (beta * log_ratio - point))


def of_answers(
    parts: Sequence[Part],
    policy: PairLogps,
    reference: PairLogps | None,
    delta: float,
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> PairLoss:
    """Losses of single answers: each is desirable or not, and counts by the weight of its label, and by that of its row
    (`columns.weight`); their mean is over all answers of the step. Choose the weights so that desirable answers count for 1
    to 4/3 times as much as undesirable ones in all (the paper, eq. 9); a run advises one where they do not. `delta`: the
    reference point, in nats, or BCO's mean reward."""
    assert reference is not None
    (part,) = parts
    sides = {
        "chosen": (1, desirable_weight, policy.chosen - reference.chosen, policy.counts("chosen_answers")),
        "rejected": (-1, undesirable_weight, policy.rejected - reference.rejected, policy.counts("rejected_answers")),
    }
    # A reward beyond the threshold counts as told apart.
    threshold = delta if part.loss.running_mean else beta * delta
    values = right = 0.0 * policy.chosen
    logged: dict[str, Tensor] = {}
    for name, (s, weight, log_ratio, there) in sides.items():
        values = values + weight * there * part.loss.function(log_ratio, s, delta, **part.keys)
        right = right + there * (s * (beta * log_ratio - threshold) > 0)
        logged |= {f"rewards/{name}": beta * log_ratio, f"logps/{name}": getattr(policy, name), f"kl/{name}": log_ratio}
    logged["rewards/accuracies"] = right
    if part.loss.running_mean:
        logged["bco_delta"] = 0 * policy.chosen + delta
    if part.loss.mismatched:
        logged["kl"] = 0 * policy.chosen + delta
    logged |= weights.logged(policy.weight, policy.margin)
    terms = {part.component: Term(weights.weighed(policy.weight) * values, per="answers", weight=part.weight)}
    return PairLoss(terms, {name: value.detach() for name, value in logged.items()}, policy.counts("answers"))


def bco_of_answers(
    parts: Sequence[Part], policy: PairLogps, reference: PairLogps | None, delta: float, *, beta: Positive = 0.1
) -> PairLoss:
    """BCO of single answers, all of the same weight."""
    return of_answers(parts, policy, reference, delta, beta=beta)
