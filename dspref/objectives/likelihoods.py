"""Losses of the policy's own scores of answers, without a reference: CPO, SimPO and their kin, ORPO.

P pairs; w is the chosen answer, l the rejected one. S is the sum of an answer's log-probs, n its scored tokens, A = S / n;
what a loss sees of both is `chosen` and `rejected`. The keyword-only arguments of a loss are its YAML keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspref.objectives.losses import (
    NonNegative,
    OptionalNonNegative,
    Positive,
    Smoothing,
    expm1,
    log1mexp,
    logsigmoid,
    smoothed,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def cpo_sigmoid(
    chosen: Float[Tensor, "P"],
    rejected: Float[Tensor, "P"],
    target: Float[Tensor, "P"] | float = 0.0,
    *,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
) -> Float[Tensor, "P"]:
    """CPO (Xu et al. 2024, arXiv:2401.08417, eq. 3): DPO against a uniform reference.

    Where rows give a target margin m (`columns.margin`), beta (S_w - S_l) - m stands for beta (S_w - S_l).

    -(1 - e) log sigma(beta (S_w - S_l)) - e log sigma(-beta (S_w - S_l)),  e = label_smoothing
    """
    return smoothed(beta * (chosen - rejected) - target, label_smoothing)


def cpo_hinge(chosen: Float[Tensor, "P"], rejected: Float[Tensor, "P"], *, beta: Positive = 0.1) -> Float[Tensor, "P"]:
    """Hinge loss of the log-likelihoods (after SLiC, Zhao et al. 2023, arXiv:2305.10425): zero from a margin of 1 / beta on.

    max(0, 1 - beta (S_w - S_l))
    """
    return (1 - beta * (chosen - rejected)).clamp(min=0)


def cpo_ipo(chosen: Float[Tensor, "P"], rejected: Float[Tensor, "P"], *, beta: Positive = 0.1) -> Float[Tensor, "P"]:
    """IPO's square (Azar et al. 2023, arXiv:2310.12036) on the mean log-probs of the policy.

    (A_w - A_l - 1 / (2 beta))^2
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo(
    chosen: Float[Tensor, "P"],
    rejected: Float[Tensor, "P"],
    target: Float[Tensor, "P"] | float = 0.0,
    *,
    beta: Positive = 2.0,
    simpo_gamma: OptionalNonNegative = None,
    gamma_beta_ratio: NonNegative = 0.5,
    label_smoothing: Smoothing = 0.0,
) -> Float[Tensor, "P"]:
    """SimPO (Meng et al. 2024, arXiv:2405.14734, eq. 6): mean log-probs with a target margin.

    What rows give (`columns.margin`) is added to gamma.

    -(1 - e) log sigma(x) - e log sigma(-x),  x = beta (A_w - A_l) - gamma;  gamma = simpo_gamma, or gamma_beta_ratio beta
    """
    gamma = gamma_beta_ratio * beta if simpo_gamma is None else simpo_gamma
    return smoothed(beta * (chosen - rejected) - gamma - target, label_smoothing)


def simper(chosen: Float[Tensor, "P"], rejected: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """SimPER (Xiao et al. 2025, arXiv:2502.00883): inverse perplexities, without a key to tune.

    exp(A_l) - exp(A_w)
    """
    return rejected.exp() - chosen.exp()


def repo(chosen: Float[Tensor, "P"], rejected: Float[Tensor, "P"], *, repo_gamma: Positive = 0.6) -> Float[Tensor, "P"]:
    """RePO (Wu et al. 2025, arXiv:2503.07426): SimPO for beta -> infinity; pairs beyond the margin count for nothing.

    max(0, gamma - (A_w - A_l));  0.6 is the authors' for Llama-3-8B-Instruct
    """
    return (repo_gamma - (chosen - rejected)).clamp(min=0)


def power_reward(mean_logp: Float[Tensor, "P"], alpha: float) -> Float[Tensor, "P"]:
    """AlphaPO's reward shape (Gupta et al. 2025, arXiv:2501.03884): (1 - p^-alpha) / alpha with p = e^A; A for alpha = 0.

    In log space, and for averages only: p of a whole answer underflows.
    """
    return mean_logp if alpha == 0 else -expm1(-alpha * mean_logp) / alpha


# ---------------------------------------------------------------------------------------------------------------------
# ORPO


def log_odds_ratio(chosen: Float[Tensor, "P"], rejected: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """log(odds_w / odds_l), odds = p / (1 - p) of the mean log-probs A (Hong et al. 2024, arXiv:2403.07691, eq. 4)."""
    return chosen - rejected - (log1mexp(chosen) - log1mexp(rejected))


def orpo(chosen: Float[Tensor, "P"], rejected: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """ORPO's odds-ratio term (Hong et al. 2024, arXiv:2403.07691, eq. 7); it stands beside the NLL with weight beta.

    -log sigma(log(odds_w / odds_l)),  odds = e^A / (1 - e^A)
    """
    return -logsigmoid(log_odds_ratio(chosen, rejected))
