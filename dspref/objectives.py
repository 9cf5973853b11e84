"""Preference objectives: log-probs of pairs in, unreduced losses out.

One pure function per loss, one line per loss in `OBJECTIVES`. The keyword-only arguments of a loss are its YAML keys,
and their annotations are the ranges that the config checks. P is the number of pairs.

The module imports no torch (tensor methods suffice), so that a config is checked on a login node in a moment.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

# Ranges, in pydantic's words; `config` turns them into checks and into the JSON Schema.
Positive = Annotated[float, {"gt": 0.0}]
NonNegative = Annotated[float, {"ge": 0.0}]
Smoothing = Annotated[float, {"ge": 0.0, "lt": 0.5}]


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of P pairs under one model: sums over each answer's scored tokens in nats, and the token counts."""

    chosen: Float[Tensor, "P"]
    rejected: Float[Tensor, "P"]
    chosen_tokens: Int[Tensor, "P"]
    rejected_tokens: Int[Tensor, "P"]

    def detach(self) -> PairLogps:
        return PairLogps(self.chosen.detach(), self.rejected.detach(), self.chosen_tokens, self.rejected_tokens)


@dataclass(frozen=True)
class Term:
    """One summand of a loss: `values` [P] unreduced, to be summed and divided by the *global* count named `per`."""

    values: Float[Tensor, "P"]
    per: str = "pairs"
    weight: float = 1.0


@dataclass(frozen=True)
class PairLoss:
    """What an objective says of P pairs: its terms by component name, and the implicit rewards (detached)."""

    terms: Mapping[str, Term]
    chosen_rewards: Float[Tensor, "P"]
    rejected_rewards: Float[Tensor, "P"]


def total(loss: PairLoss, counts: Mapping[str, int]) -> Float[Tensor, ""]:
    """The share of these pairs in the loss of the whole step: sum of weight x sum(values) / global count.

    `counts` holds the counts of the *step* over all ranks (`pairs`, `chosen_tokens`, ...); shares of packs and ranks
    therefore add up to the loss, whatever the layout.
    """
    return sum(term.weight * term.values.sum() / counts[term.per] for term in loss.terms.values())  # type: ignore[return-value]


def logsigmoid(x: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """log sigma(x) = -log(1 + e^-x), finite with finite gradient for any float x."""
    return -x.new_zeros(()).logaddexp(-x)


# ---------------------------------------------------------------------------------------------------------------------
# DPO family: `policy` and `reference` are the same pairs under two models


def sigmoid(policy: PairLogps, reference: PairLogps, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0) -> PairLoss:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7); with `label_smoothing` e > 0 conservative DPO (Mitchell 2023).

    loss = -(1 - e) log sigma(beta d) - e log sigma(-beta d),  d = (S_w - R_w) - (S_l - R_l), sums over answer tokens.
    """
    chosen = beta * (policy.chosen - reference.chosen)
    rejected = beta * (policy.rejected - reference.rejected)
    margin = chosen - rejected
    loss = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return PairLoss({"sigmoid": Term(loss)}, chosen.detach(), rejected.detach())


# ---------------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Family:
    """A family of losses under one `objective.name`.

    `losses` maps each `loss_type` to its function; `nll_weight` names the YAML key that adds the chosen answer's
    negative log-likelihood (its tokens' global mean), or is None.
    """

    losses: Mapping[str, Callable[..., PairLoss]]
    needs_reference: bool
    nll_weight: str | None = None


OBJECTIVES: dict[str, Family] = {
    # rpo_alpha: loss + alpha x NLL of the chosen answer (Pang et al. 2024, arXiv:2404.19733, eq. 2; TRL's token mean)
    "dpo": Family({"sigmoid": sigmoid}, needs_reference=True, nll_weight="rpo_alpha"),
}


def loss_keys(family: Family, loss_type: str) -> dict[str, inspect.Parameter]:
    """Keyword-only arguments of one loss: the keys that apply to it, with annotation and default."""
    parameters = inspect.signature(family.losses[loss_type]).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


# (policy, reference) -> loss; the reference is None where the objective needs none
Objective = Callable[["PairLogps", "PairLogps | None"], PairLoss]


def build_objective(name: str, loss_type: str, **keys: float | None) -> Objective:
    """The objective `name`/`loss_type` with its keys bound: (policy, reference) -> PairLoss.

    Keys that are None are left at the loss's own default.
    """
    family = OBJECTIVES[name]
    loss = family.losses[loss_type]
    nll_weight = keys.pop(family.nll_weight, None) if family.nll_weight else None
    options = {key: value for key, value in keys.items() if value is not None}

    def evaluate(policy: PairLogps, reference: PairLogps | None) -> PairLoss:
        result = loss(policy, reference, **options)
        if nll_weight is None:
            return result
        nll = Term(-policy.chosen, per="chosen_tokens", weight=nll_weight)
        return PairLoss({**result.terms, "nll": nll}, result.chosen_rewards, result.rejected_rewards)

    return evaluate
