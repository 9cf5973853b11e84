"""Triple preference optimization (TPO): losses of a pair, and the likelihood of a third answer, better than both.

P examples; S is the sum of an answer's log-probs, A their mean per token, w the chosen answer and l the rejected one. The
keyword-only arguments are YAML keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dspref.objectives import likelihoods, losses
from dspref.objectives.families import Part, cpo
from dspref.objectives.losses import NonNegative, Positive, Smoothing
from dspref.objectives.terms import PairLogps, PairLoss, Term

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def tpo_sigmoid(
    chosen: Float[Tensor, "P"], rejected: Float[Tensor, "P"], *, beta: Positive = 0.01, label_smoothing: Smoothing = 0.0
) -> Float[Tensor, "P"]:
    """TPO's preference term (Saeidi et al. 2024, arXiv:2405.16681; the authors' code, equation 3 of the paper by its words).

    -(1 - e) log sigma(beta (S_w - S_l)) - e log sigma(-beta (S_w - S_l)),  e = label_smoothing
    """
    return likelihoods.cpo_sigmoid(chosen, rejected, beta=beta, label_smoothing=label_smoothing)


def tpo_hinge(chosen: Float[Tensor, "P"], rejected: Float[Tensor, "P"], *, beta: Positive = 0.01) -> Float[Tensor, "P"]:
    """Hinge loss of the log-likelihoods, as TRL's TPO trainer has it.

    max(0, 1 - beta (S_w - S_l))
    """
    return likelihoods.cpo_hinge(chosen, rejected, beta=beta)


def tpo_ipo(chosen: Float[Tensor, "P"], rejected: Float[Tensor, "P"], *, beta: Positive = 0.01) -> Float[Tensor, "P"]:
    """IPO's square on the mean log-probs, as TRL's TPO trainer has it.

    (A_w - A_l - 1 / (2 beta))^2
    """
    return likelihoods.cpo_ipo(chosen, rejected, beta=beta)


def tpo_l(
    chosen: Float[Tensor, "P"],
    rejected: Float[Tensor, "P"],
    *,
    beta: Positive = 0.01,
    tpo_l_gamma: NonNegative = 0.5,
    label_smoothing: Smoothing = 0.0,
) -> Float[Tensor, "P"]:
    """TPO-L (Saeidi et al. 2024, arXiv:2405.16681, the authors' code): mean log-probs with a target margin.

    -(1 - e) log sigma(x) - e log sigma(-x),  x = beta (A_w - A_l) - gamma
    """
    return losses.smoothed(beta * (chosen - rejected) - tpo_l_gamma, label_smoothing)


def tpo(
    parts: Sequence[Part],
    policy: PairLogps,
    reference: PairLogps | None,
    delta: float,
    *,
    tpo_alpha: Positive = 1.0,
) -> PairLoss:
    """Triple preference optimization: a loss of the policy's own scores of both answers, and the NLL of the gold answer, a
    mean over tokens, with the weight `tpo_alpha`. A gold answer is an example of its own, and no metric counts it as
    chosen."""
    assert policy.gold is not None
    # The pair of a gold answer has no rejected one, and no mean of it.
    counted = replace(policy, rejected_tokens=policy.rejected_tokens.clamp(min=1))
    of_pairs = cpo(parts, counted, None, delta, cpo_alpha=0.0)
    is_pair = (1 - policy.gold).bool()
    terms = {
        name: replace(term, values=term.values.where(is_pair, 0.0)) for name, term in of_pairs.terms.items() if name != "nll"
    }
    gold = losses.negative_log_likelihood(policy.chosen.where(~is_pair, 0.0))
    terms["nll"] = Term(gold, per="gold_tokens", weight=tpo_alpha)
    metrics = {name: value.where(is_pair, 0.0) for name, value in of_pairs.metrics.items()}
    right = (is_pair & (metrics["rewards/chosen"] > metrics["rewards/rejected"])).to(policy.chosen.dtype)
    return PairLoss(terms, metrics | {"rewards/accuracies": right}, policy.counts("pairs"))
