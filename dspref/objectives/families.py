"""The losses of a family with what is known of them, and the families that feed and weigh the losses of pairs.

A family (`dpo`, `cpo`, ...) gives the losses (`losses`) what they see of policy and reference; its keyword-only arguments
are YAML keys. P is the number of pairs. No torch is imported (tensor methods suffice).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dspref.objectives import likelihoods, losses, weights
from dspref.objectives.key import Key
from dspref.objectives.losses import (
    Divergence,
    LossFunction,
    NonNegative,
    OpenShare,
    OptionalNonNegative,
    OptionalShare,
    Positive,
    Ratios,
    logsigmoid,
)
from dspref.objectives.terms import PairLogps, PairLoss, Term
from dspref.objectives.terms import total as total

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


# ---------------------------------------------------------------------------------------------------------------------
# The losses of a family, and one of them with its keys bound


@dataclass(frozen=True)
class Loss:
    """One row of the table: a loss, and what must be known of it beyond its equation."""

    function: LossFunction
    normaliser: str = "sum"
    """What it sees of an answer's log-prob: `sum`, `mean` (per token), or `tokens`: it is a mean over the step's tokens."""
    couples: bool = False
    """A pair's value depends on the other pairs of the step: the whole step is looked at before any gradient."""
    ordered: bool = False
    """Its values are ordered by size: they belong to no pair, and no pair can be weighed."""
    running_mean: bool = False
    """It reads the running mean of the rewards."""
    mismatched: bool = False
    """Its reference point is the KL estimate from mismatched pairs, answers to other prompts, of the step."""
    shaped: bool = False
    """It has a reward of its own shape, which no other may replace."""
    targeted: bool = False
    """The target margin that a row gives has a place in it."""
    scores: bool = False
    """It needs the scores of both answers."""
    divergent: bool = False
    """Built on the margin, so that another f-divergence may take the place of the log-ratios."""
    keys: Mapping[str, Key] = field(default_factory=dict, hash=False)
    """Of the keys that it alone has."""


def component(loss_type: str) -> str:
    """The name of a loss in metrics, `loss/<component>`: of one `module:function` the function's."""
    return loss_type.rpartition(":")[2]


@dataclass(frozen=True)
class Part:
    """A loss within an objective: its name, weight and keys."""

    name: str
    loss: Loss
    weight: float
    keys: Mapping[str, Any]

    @property
    def component(self) -> str:
        """What it is called among the terms and in metrics: of a loss `module:function` the function."""
        return component(self.name)

    def term(self, *inputs: Any, scale: Float[Tensor, "P"] | float = 1.0) -> Term:
        """The loss of these inputs as a term; `scale` weighs the pairs of a preference term."""
        if self.loss.normaliser == "tokens":
            return Term(self.loss.function(*inputs), per="chosen_tokens", weight=self.weight)
        return Term(scale * self.loss.function(*inputs, **self.keys), weight=self.weight)


# ---------------------------------------------------------------------------------------------------------------------
# Families


def dpo(
    parts: Sequence[Part],
    policy: PairLogps,
    reference: PairLogps | None,
    delta: float,
    *,
    beta: Positive = 0.1,
    reference_free: bool = False,
    f_divergence_type: Divergence = "reverse_kl",
    f_alpha_divergence_coef: OpenShare = 0.5,
    rpo_alpha: OptionalNonNegative = None,
    use_weighting: bool = False,
    ld_alpha: OptionalShare = None,
) -> PairLoss:
    """Direct preference optimization and its kin: losses of the ratios between policy and reference.

    `reference_free`: log u = S, a uniform reference. `ld_alpha`: S and R count the tokens beyond the shorter answer's length
    by this share (LD-DPO). `f_divergence_type`: f'(u) takes the place of log u. `use_weighting`: pairs are weighed by the
    policy's own probability of them (WPO). `rpo_alpha`: adds the chosen answer's NLL with this weight (RPO). Weights that
    rows give (`columns.weight`) multiply the values of all losses but the NLLs, and the mean stays that over all pairs.
    """
    if reference_free or reference is None:
        reference = policy.map(lambda values: 0 * values.detach())
    seen, base = policy, reference
    if ld_alpha is not None:
        seen, base = desensitized(policy, ld_alpha), desensitized(reference, ld_alpha)
    ratios = log_ratios(seen, base, delta)
    chosen, rejected = (
        losses.divergence(x, f_divergence_type, f_alpha_divergence_coef) for x in (ratios.chosen, ratios.rejected)
    )
    scores = replace(ratios, chosen=chosen, rejected=rejected)
    own = own_probability(policy) if use_weighting else 1.0
    scale = weights.weighed(policy.weight, own)
    terms = {
        part.component: part.term(policy.chosen if part.loss.normaliser == "tokens" else scores, scale=scale)
        for part in parts
    }
    if rpo_alpha is not None:
        terms["nll"] = Term(losses.negative_log_likelihood(policy.chosen), per="chosen_tokens", weight=rpo_alpha)
    logged = {
        "rewards/chosen": beta * ratios.chosen,
        "rewards/rejected": beta * ratios.rejected,
        "logps/chosen": seen.chosen,
        "logps/rejected": seen.rejected,
        "kl/chosen": ratios.chosen,
        "kl/rejected": ratios.rejected,
    }
    if any(part.loss.running_mean for part in parts):
        logged["bco_delta"] = 0 * ratios.chosen + delta
    if use_weighting:
        logged["wpo_weight"] = 0 * ratios.chosen + own
    return PairLoss(terms, _detached(logged | weights.logged(policy.weight, policy.margin)))


def log_ratios(policy: PairLogps, reference: PairLogps, delta: float) -> Ratios:
    """log u = S - R of both answers."""
    return Ratios(
        policy.chosen - reference.chosen,
        policy.rejected - reference.rejected,
        policy.chosen_tokens,
        policy.rejected_tokens,
        reference.chosen - reference.rejected,
        delta,
        0.0 if policy.margin is None else policy.margin,
        weights.score_gap(policy.score_chosen, policy.score_rejected),
    )


def desensitized(logps: PairLogps, alpha: float) -> PairLogps:
    """LD-DPO (Liu et al. 2024, arXiv:2409.06411): tokens beyond the shorter answer's length count by `alpha`."""
    assert logps.chosen_common is not None and logps.rejected_common is not None
    chosen = logps.chosen_common + alpha * (logps.chosen - logps.chosen_common)
    rejected = logps.rejected_common + alpha * (logps.rejected - logps.rejected_common)
    return replace(logps, chosen=chosen, rejected=rejected)


def own_probability(policy: PairLogps) -> Float[Tensor, "P"]:
    """WPO's weight of a pair (Zhou et al. 2024, arXiv:2406.11827, eq. 2), at most 1 as in the authors' code.

    w = min(1, w_w w_l),  w_y = exp(mean over tokens of log p(y_t) - log sum_v p(v)^2); without gradient.
    """
    assert policy.chosen_collision is not None and policy.rejected_collision is not None
    chosen = (policy.chosen + policy.chosen_collision) / policy.chosen_tokens
    rejected = (policy.rejected + policy.rejected_collision) / policy.rejected_tokens
    return (chosen + rejected).clamp(max=0).exp().detach()


def cpo(
    parts: Sequence[Part],
    policy: PairLogps,
    reference: PairLogps | None,
    delta: float,
    *,
    cpo_alpha: NonNegative = 1.0,
    alpha: float = 0.0,
) -> PairLoss:
    """Contrastive preference optimization: losses of the policy's own scores, and the chosen answer's NLL.

    The score of an answer is its sum S, or its mean A for losses per token. `cpo_alpha`: weight of the NLL (a mean over
    tokens, as in the authors' code). `alpha`: AlphaPO, where (1 - e^(-alpha A)) / alpha takes the place of A.
    """
    (part,) = parts
    averages = policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens
    logps = averages if part.loss.normaliser == "mean" else (policy.chosen, policy.rejected)
    scores = [likelihoods.power_reward(x, alpha) for x in logps]
    target = (policy.margin,) if part.loss.targeted and policy.margin is not None else ()
    terms = {
        part.component: part.term(*scores, *target, scale=weights.weighed(policy.weight)),
        "nll": Term(losses.negative_log_likelihood(policy.chosen), per="chosen_tokens", weight=cpo_alpha),
    }
    rewards = [part.keys.get("beta", 1.0) * score for score in scores]
    return PairLoss(terms, _logged(rewards, logps) | weights.logged(policy.weight, policy.margin))


def simpo(
    parts: Sequence[Part],
    policy: PairLogps,
    reference: PairLogps | None,
    delta: float,
    *,
    alpha: float = 0.0,
) -> PairLoss:
    """Simple preference optimization: CPO's losses per token alone; the NLL is logged, with weight 0.

    `alpha`: AlphaPO, where (1 - e^(-alpha A)) / alpha takes the place of A.
    """
    return cpo(parts, policy, reference, delta, cpo_alpha=0.0, alpha=alpha)


def orpo(
    parts: Sequence[Part],
    policy: PairLogps,
    reference: PairLogps | None,
    delta: float,
    *,
    beta: Positive = 0.1,
    nll_on_prompt: bool = True,
) -> PairLoss:
    """Odds-ratio preference optimization: NLL of the chosen side + beta x the odds-ratio term (the paper's lambda).

    `nll_on_prompt`: the NLL covers prompt and answer, as the paper's results have it, not the answer alone.
    """
    (part,) = parts
    averages = policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens
    likelihood = policy.chosen
    if nll_on_prompt:
        assert policy.prompt is not None
        likelihood = policy.chosen + policy.prompt
    counted = "chosen_and_prompt_tokens" if nll_on_prompt else "chosen_tokens"
    terms = {
        part.component: replace(part.term(*averages, scale=weights.weighed(policy.weight)), weight=beta),
        "nll": Term(losses.negative_log_likelihood(likelihood), per=counted),
    }
    log_odds = likelihoods.log_odds_ratio(*averages)
    rewards = [beta * average for average in averages]
    odds = {"log_odds_chosen": log_odds, "log_odds_ratio": logsigmoid(log_odds)}
    return PairLoss(terms, _logged(rewards, averages) | _detached(odds) | weights.logged(policy.weight, policy.margin))


def _logged(rewards: Sequence[Tensor], logps: Sequence[Tensor]) -> dict[str, Tensor]:
    names = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
    return _detached(dict(zip(names, (*rewards, *logps))))


def _detached(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items()}
