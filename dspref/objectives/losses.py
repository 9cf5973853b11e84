"""Losses of ratios between policy and reference, each a pure function with its equation; and what all losses are made of.

P pairs; w is the chosen answer, l the rejected one. S is the sum of an answer's log-probs under the policy, R under the
reference, n its scored tokens, A = S / n. log u = S - R. The keyword-only arguments of a loss are its YAML keys, and their
annotations are the ranges that the config checks.

The module imports no torch (tensor methods suffice), so that a config is checked on a login node in a moment.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

# Types of the keys. Ranges are in pydantic's words; `sections` turns them into checks and into the JSON Schema.
Positive = Annotated[float, {"gt": 0.0}]
NonNegative = Annotated[float, {"ge": 0.0}]
Smoothing = Annotated[float, {"ge": 0.0, "lt": 0.5}]
PositiveSmoothing = Annotated[float, {"gt": 0.0, "lt": 0.5}]
OpenShare = Annotated[float, {"gt": 0.0, "lt": 1.0}]
OptionalNonNegative = Annotated[float | None, {"ge": 0.0}]
OptionalShare = Annotated[float | None, {"ge": 0.0, "le": 1.0}]
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence", "chi_squared"]

# Bounds of a key's range, in pydantic's words.
BOUNDS = {
    "gt": (operator.gt, "greater than"),
    "ge": (operator.ge, "at least"),
    "lt": (operator.lt, "less than"),
    "le": (operator.le, "at most"),
}


def exceeded(value: Any, bounds: Mapping[str, float]) -> str | None:
    """The first of these bounds that a value breaks, in words; None if it lies within."""
    broken = (key for key, (holds, _) in BOUNDS.items() if key in bounds and not holds(value, bounds[key]))
    return next((f"{BOUNDS[key][1]} {bounds[key]:g}" for key in broken), None)


# exp(x) goes on as a straight line beyond this: its square still fits float32.
STEEPEST = 32.0


@dataclass(frozen=True)
class Ratios:
    """What a DPO loss sees of P pairs: log u of both answers, or f'(u) where another divergence takes its place."""

    chosen: Float[Tensor, "P"]
    rejected: Float[Tensor, "P"]
    chosen_tokens: Int[Tensor, "P"]
    rejected_tokens: Int[Tensor, "P"]
    reference_margin: Float[Tensor, "P"]
    """R_w - R_l."""
    delta: float = 0.0
    """BCO's running mean of the rewards."""
    target: Float[Tensor, "P"] | float = 0.0
    """The target margin that the row gives (`columns.margin`)."""
    score_gap: Float[Tensor, "P"] | None = None
    """score_chosen - score_rejected, of losses that need it."""

    @property
    def margin(self) -> Float[Tensor, "P"]:
        return self.chosen - self.rejected

    @property
    def margin_per_token(self) -> Float[Tensor, "P"]:
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


def logsigmoid(x: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """log sigma(x) = -log(1 + e^-x), finite with finite gradient for any float x."""
    return -x.new_zeros(()).logaddexp(-x)


def smoothed(x: Float[Tensor, "P"], label_smoothing: float) -> Float[Tensor, "P"]:
    """-(1 - e) log sigma(x) - e log sigma(-x): the label is wrong with probability e."""
    return -(1 - label_smoothing) * logsigmoid(x) - label_smoothing * logsigmoid(-x)


def expm1(x: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """e^x - 1, and its tangent beyond x = 32: neither value nor gradient overflows or vanishes there."""
    bounded = x.clamp(max=STEEPEST)
    return bounded.expm1() + bounded.exp() * (x - bounded)


def log1mexp(x: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """log(1 - e^x) for x <= 0 (Maechler 2012, eq. 7); x closer to 0 than rounding counts as that far away."""
    # The smallest step below 1 in x's own type, without importing torch for finfo.
    x = x.clamp(max=-1e-7 if x.element_size() < 8 else -1e-15)
    return (-x.expm1()).log().where(x > -math.log(2), (-x.exp()).log1p())


# ---------------------------------------------------------------------------------------------------------------------
# DPO: ratios of policy and reference


def sigmoid(ratios: Ratios, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0) -> Float[Tensor, "P"]:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7); with e > 0 conservative DPO (Mitchell 2023, cDPO note).

    Where rows give a target margin m (`columns.margin`), beta d - m stands for beta d: ODPO (Amini et al. 2024,
    arXiv:2402.10571).

    -(1 - e) log sigma(beta d) - e log sigma(-beta d),  d = log u_w - log u_l,  e = label_smoothing
    """
    return smoothed(beta * ratios.margin - ratios.target, label_smoothing)


def sigmoid_norm(ratios: Ratios, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0) -> Float[Tensor, "P"]:
    """Length-normalised DPO (Lambert et al. 2024, Tulu 3, arXiv:2411.15124, eq. 6); `dpo_norm` in open-instruct.

    Where rows give a target margin m (`columns.margin`), beta d - m stands for beta d.

    -(1 - e) log sigma(beta d) - e log sigma(-beta d),  d = log u_w / n_w - log u_l / n_l
    """
    return smoothed(beta * ratios.margin_per_token - ratios.target, label_smoothing)


def hinge(ratios: Ratios, *, beta: Positive = 0.1) -> Float[Tensor, "P"]:
    """Hinge loss on the normalised likelihood (RSO, Liu et al. 2024, arXiv:2309.06657): zero from a margin of 1 / beta on.

    max(0, 1 - beta d),  d = log u_w - log u_l
    """
    return (1 - beta * ratios.margin).clamp(min=0)


def ipo(ratios: Ratios, *, beta: Positive = 0.1, ipo_length_normalize: bool = True) -> Float[Tensor, "P"]:
    """IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17, with beta for tau); per token as its authors ran it, or as printed.

    (d - 1 / (2 beta))^2,  d = log u_w / n_w - log u_l / n_l;  ipo_length_normalize: false: d = log u_w - log u_l
    """
    margin = ratios.margin_per_token if ipo_length_normalize else ratios.margin
    return (margin - 1 / (2 * beta)) ** 2


def exo_pair(ratios: Ratios, *, beta: Positive = 0.1, label_smoothing: PositiveSmoothing = 1e-3) -> Float[Tensor, "P"]:
    """EXO (Ji et al. 2024, arXiv:2402.00856, eq. 16): the reverse KL to the smoothed label, which must not be certain.

    sigma(x) (log sigma(x) - log(1 - e)) + sigma(-x) (log sigma(-x) - log e),  x = beta (log u_w - log u_l)
    """
    x = beta * ratios.margin
    right, wrong = math.log1p(-label_smoothing), math.log(label_smoothing)
    return x.sigmoid() * (logsigmoid(x) - right) + (-x).sigmoid() * (logsigmoid(-x) - wrong)


def nca_pair(ratios: Ratios, *, beta: Positive = 0.1) -> Float[Tensor, "P"]:
    """NCA (Chen et al. 2024, arXiv:2402.05369): rewards are pushed on their own, not against each other.

    -log sigma(beta log u_w) - 1/2 log sigma(-beta log u_w) - 1/2 log sigma(-beta log u_l)
    """
    chosen, rejected = beta * ratios.chosen, beta * ratios.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def robust(ratios: Ratios, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0) -> Float[Tensor, "P"]:
    """Robust DPO (Ray Chowdhury et al. 2024, arXiv:2403.00409): unbiased where labels are flipped with probability e.

    (-(1 - e) log sigma(beta d) + e log sigma(-beta d)) / (1 - 2 e),  d = log u_w - log u_l
    """
    x = beta * ratios.margin
    return (label_smoothing * logsigmoid(-x) - (1 - label_smoothing) * logsigmoid(x)) / (1 - 2 * label_smoothing)


def bco_pair(ratios: Ratios, *, beta: Positive = 0.1) -> Float[Tensor, "P"]:
    """BCO (Jung et al. 2024, arXiv:2404.04656): a binary classifier whose threshold is the running mean of the rewards.

    -log sigma(beta log u_w - delta) - log sigma(-(beta log u_l - delta)),  delta = mean over steps of the mean reward
    """
    return -logsigmoid(beta * ratios.chosen - ratios.delta) - logsigmoid(ratios.delta - beta * ratios.rejected)


def sppo_hard(ratios: Ratios, *, beta: Positive = 0.1) -> Float[Tensor, "P"]:
    """SPPO (Wu et al. 2024, arXiv:2405.00675, eq. 4.7), the winner winning for certain; the paper's 1 / eta is beta.

    (log u_w - 1 / (2 beta))^2 + (log u_l + 1 / (2 beta))^2
    """
    return (ratios.chosen - 1 / (2 * beta)) ** 2 + (ratios.rejected + 1 / (2 * beta)) ** 2


def aot(ratios: Ratios, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0) -> Float[Tensor, "P"]:
    """AOT for paired data (Melnyk et al. 2024, arXiv:2406.05882): margins ordered over all pairs of the step.

    -(1 - e) log sigma(z) - e log sigma(-z),  z_i = beta (sort(S_w - S_l)_i - sort(R_w - R_l)_i)
    """
    policy_margin = ratios.margin + ratios.reference_margin
    return smoothed(beta * (policy_margin.sort().values - ratios.reference_margin.sort().values), label_smoothing)


def aot_pair(ratios: Ratios, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0) -> Float[Tensor, "P"]:
    """AOT for unpaired data (Melnyk et al. 2024, arXiv:2406.05882): ratios ordered over all pairs of the step.

    -(1 - e) log sigma(z) - e log sigma(-z),  z_i = beta (sort(log u_w)_i - sort(log u_l)_i)
    """
    return smoothed(beta * (ratios.chosen.sort().values - ratios.rejected.sort().values), label_smoothing)


def apo_zero(ratios: Ratios, *, beta: Positive = 0.1) -> Float[Tensor, "P"]:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7, plus 1): for chosen answers better than the model's.

    1 - sigma(beta log u_w) + sigma(beta log u_l)
    """
    return 1 - (beta * ratios.chosen).sigmoid() + (beta * ratios.rejected).sigmoid()


def apo_down(ratios: Ratios, *, beta: Positive = 0.1) -> Float[Tensor, "P"]:
    """APO-down (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8, plus 1): for chosen answers worse than the model's.

    sigma(beta log u_w) + 1 - sigma(beta (log u_w - log u_l))
    """
    return (beta * ratios.chosen).sigmoid() + 1 - (beta * ratios.margin).sigmoid()


def discopop(ratios: Ratios, *, beta: Positive = 0.1, discopop_tau: Positive = 0.05) -> Float[Tensor, "P"]:
    """DiscoPOP (Lu et al. 2024, arXiv:2406.08414, eq. 5): a loss found by a language model.

    Below tau = 0.102 its slope at a margin of 0 is positive: it has a second valley, at negative margins.

    -log sigma(x) (1 - m) + exp(-x) m,  m = sigma(x / tau),  x = beta (log u_w - log u_l)
    """
    x = beta * ratios.margin
    # e^-x overflows where m underflows: their product is taken in log space.
    exponential = 1 + expm1(logsigmoid(x / discopop_tau) - x)
    return exponential - logsigmoid(x) * (-x / discopop_tau).sigmoid()


def dpop(ratios: Ratios, *, beta: Positive = 0.1, dpop_lambda: NonNegative = 50.0) -> Float[Tensor, "P"]:
    """DPO-Positive (Pal et al. 2024, Smaug, arXiv:2402.13228, eq. 3): a chosen answer that falls costs more than its margin.

    -log sigma(beta (d - lambda max(0, -log u_w))),  d = log u_w - log u_l
    """
    return -logsigmoid(beta * (ratios.margin - dpop_lambda * (-ratios.chosen).clamp(min=0)))


# ---------------------------------------------------------------------------------------------------------------------
# f-divergences: what takes the place of log u


DERIVATIVES = {
    "reverse_kl": "log u",
    "forward_kl": "1 - 1/u",
    "js_divergence": "log(2u / (1 + u))",
    "alpha_divergence": "(1 - u^-alpha) / alpha",
    "chi_squared": "log u + u - 1",
}


def divergence(log_ratio: Float[Tensor, "P"], kind: Divergence, alpha: float) -> Float[Tensor, "P"]:
    """f-DPO (Wang et al. 2023, arXiv:2309.16240): f'(u), up to a constant that makes f'(1) = 0, takes the place of log u.

    reverse_kl: log u; forward_kl: 1 - 1/u; js_divergence: log(2u / (1 + u)); alpha_divergence: (1 - u^-alpha) / alpha, with
    the paper's alpha in (0, 1), the YAML's f_alpha_divergence_coef: towards 0 reverse KL, towards 1 forward KL. (TRL's
    coefficient since 0.29 is 1 - alpha.) chi_squared: log u + u - 1, of the KL and the chi-squared divergence together: the
    link function of chi-PO (Huang et al. 2024, arXiv:2407.13399, algorithm 1), whose clipping at 2 R_max is left out.
    """
    match kind:
        case "reverse_kl":
            return log_ratio
        case "forward_kl":
            return -expm1(-log_ratio)
        case "js_divergence":
            return math.log(2) + logsigmoid(log_ratio)
        case "alpha_divergence":
            return -expm1(-alpha * log_ratio) / alpha
        case "chi_squared":
            return log_ratio + expm1(log_ratio)


# ---------------------------------------------------------------------------------------------------------------------
# Token terms


def negative_log_likelihood(chosen: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """Negative log-likelihood of the chosen answer (RPO, Pang et al. 2024, arXiv:2404.19733), as a mean over tokens.

    -S_w, summed over the step and divided by the sum of its n_w
    """
    return -chosen


LossFunction = Callable[..., "Float[Tensor, 'P']"]
