"""Losses that see the scores of both answers: reward-aware preference optimization (RPO), which asks for their gap.

P pairs; log u = S - R as in `losses`, d = log u_w - log u_l. g = s_w - s_l is the gap of the scores that the rows give
(`Ratios.score_gap`), of a reward model or of people; where it is negative, the rejected answer is the better one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspref.objectives.families import Key, Loss
from dspref.objectives.losses import Positive, Ratios, logsigmoid

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def rpo_sq(ratios: Ratios, *, beta: Positive = 0.1, rpo_eta: Positive = 1.0) -> Float[Tensor, "P"]:
    """RPO, squared distance (Sun et al. 2025, arXiv:2502.00203; `rpo_sq` of NeMo-Aligner, with its gt_reward_scale for eta).

    (beta d - eta g)^2,  d = log u_w - log u_l,  g = score_chosen - score_rejected
    """
    return (beta * ratios.margin - rpo_eta * _gap(ratios)) ** 2


def rpo_bwd_kl(ratios: Ratios, *, beta: Positive = 0.1, rpo_eta: Positive = 1.0) -> Float[Tensor, "P"]:
    """RPO, backward KL (Sun et al. 2025, arXiv:2502.00203; Nemotron-4, arXiv:2406.11704): from the scores' preference to the
    model's.

    sigma(z) (log sigma(z) - log sigma(x)) + sigma(-z) (log sigma(-z) - log sigma(-x)),  x = beta (log u_w - log u_l),
    z = eta (score_chosen - score_rejected)
    """
    return _divergence(rpo_eta * _gap(ratios), beta * ratios.margin)


def rpo_fwd_kl(ratios: Ratios, *, beta: Positive = 0.1, rpo_eta: Positive = 1.0) -> Float[Tensor, "P"]:
    """RPO, forward KL (Sun et al. 2025, arXiv:2502.00203; `rpo_fwd_kl` of NeMo-Aligner): from the model's preference to the
    scores'.

    sigma(x) (log sigma(x) - log sigma(z)) + sigma(-x) (log sigma(-x) - log sigma(-z)),  x = beta (log u_w - log u_l),
    z = eta (score_chosen - score_rejected)
    """
    return _divergence(beta * ratios.margin, rpo_eta * _gap(ratios))


def _divergence(of: Float[Tensor, "P"], other: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """KL divergence of two Bernoulli distributions by their log-odds, from the first to the second."""
    right = of.sigmoid() * (logsigmoid(of) - logsigmoid(other))
    return right + (-of).sigmoid() * (logsigmoid(-of) - logsigmoid(-other))


def _gap(ratios: Ratios) -> Float[Tensor, "P"]:
    assert ratios.score_gap is not None, "the data section reads scores where a loss needs them"
    return ratios.score_gap


_ETA = {"rpo_eta": Key("RPO: how much of a log-odds one point of the scores' gap is (NeMo-Aligner's gt_reward_scale).")}
LOSSES = {function.__name__: Loss(function, scores=True, keys=_ETA) for function in (rpo_sq, rpo_bwd_kl, rpo_fwd_kl)}
"""The rows of the table."""
