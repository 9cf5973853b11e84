"""What goes into an objective and comes out of it: log-probs of pairs, and the terms of a loss.

P pairs. No torch is imported (tensor methods suffice).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of P pairs under one model: sums over each answer's scored tokens in nats, and the token counts.

    Where answers stand alone (unpaired data, lists, gold answers) an example has one of the two: the other has no token, and
    a sum of 0. What only some objectives ask for is None where it was not computed.
    """

    chosen: Float[Tensor, "P"]
    rejected: Float[Tensor, "P"]
    chosen_tokens: Int[Tensor, "P"]
    rejected_tokens: Int[Tensor, "P"]
    chosen_common: Float[Tensor, "P"] | None = None
    """Sum over the first min(n_w, n_l) tokens: the length that both answers have in common."""
    rejected_common: Float[Tensor, "P"] | None = None
    prompt: Float[Tensor, "P"] | None = None
    """Sum over the prompt's tokens 2..n, scored once per pair."""
    prompt_tokens: Int[Tensor, "P"] | None = None
    chosen_collision: Float[Tensor, "P"] | None = None
    """Sum of the collision entropies -log sum_v p(v)^2 at the answer's tokens, without gradient."""
    rejected_collision: Float[Tensor, "P"] | None = None
    weight: Float[Tensor, "P"] | None = None
    """Of rows that give it, as the three below: what the preference terms of the pair are multiplied by; 1 elsewhere."""
    margin: Float[Tensor, "P"] | None = None
    """The target margin of the reward; 0 elsewhere."""
    score_chosen: Float[Tensor, "P"] | None = None
    score_rejected: Float[Tensor, "P"] | None = None
    list: Int[Tensor, "P"] | None = None
    """Examples with the same number are answers of one list."""
    opens: Int[Tensor, "P"] | None = None
    """1 for one example of each list, else 0: their sum is the number of lists, wherever its answers are."""
    gold: Int[Tensor, "P"] | None = None
    """1 where the chosen answer is a gold answer, of which the pair is another example; else 0."""

    def map(self, function: Callable[[Tensor], Tensor]) -> PairLogps:
        """The same with `function` applied to every tensor that is there."""
        return replace(self, **{name: function(value) for name, value in vars(self).items() if value is not None})

    def detach(self) -> PairLogps:
        return self.map(lambda values: values.detach())

    def count(self, what: str) -> Tensor | int:
        """How many `pairs`, `lists`, `answers`, `chosen_answers`, `chosen_tokens`, `chosen_and_prompt_tokens` or
        `gold_tokens` these are. Gold answers count as neither pairs nor chosen answers."""
        return len(self.chosen) if what == "pairs" and self.gold is None else self.counts(what).sum()

    def counts(self, what: str) -> Int[Tensor, "P"]:
        """The same of each example."""
        ours = 1 if self.gold is None else 1 - self.gold
        if what == "pairs":
            return self.chosen_tokens.new_ones(len(self.chosen)) * ours
        if what == "lists":
            assert self.opens is not None
            return self.opens
        if what == "gold_tokens":
            assert self.gold is not None
            return self.chosen_tokens * self.gold
        if what == "answers":
            return self.counts("chosen_answers") + self.counts("rejected_answers")
        if what in ("chosen_answers", "rejected_answers"):
            return (self.counts(what.replace("answers", "tokens")) > 0).to(self.chosen_tokens.dtype)
        if what == "chosen_and_prompt_tokens":
            assert self.prompt_tokens is not None
            return self.chosen_tokens + self.prompt_tokens
        return self.chosen_tokens * ours if what == "chosen_tokens" else getattr(self, what)


@dataclass(frozen=True)
class Term:
    """One summand of a loss: `values` [P] unreduced, to be summed and divided by the *global* count named `per`."""

    values: Float[Tensor, "P"]
    per: str = "pairs"
    weight: float = 1.0


@dataclass(frozen=True)
class PairLoss:
    """What an objective says of P pairs: its terms by component name, and what is logged as means over pairs, detached."""

    terms: Mapping[str, Term]
    metrics: Mapping[str, Float[Tensor, "P"]]
    """`rewards/chosen`, `rewards/rejected` (implicit rewards), `logps/chosen`, `logps/rejected`, and more by objective; what
    ends in `/chosen` or `/rejected` is a mean over such answers."""
    judged: Int[Tensor, "P"] | None = None
    """Where not each example is one comparison: how many judgements it stands for, and `rewards/accuracies` is how many of
    them are right. Of answers that stand alone, one or two of each pair; of a list, its answers below this one."""


def total(loss: PairLoss, counts: Mapping[str, int]) -> Float[Tensor, ""]:
    """The share of these pairs in the loss of the whole step: sum of weight x sum(values) / global count.

    `counts` holds the counts of the *step* over all ranks (`pairs`, `answers`, `chosen_tokens`, ...); shares of packs and
    ranks therefore add up to the loss, whatever the layout.
    """
    return sum(term.weight * term.values.sum() / counts[term.per] for term in loss.terms.values())  # type: ignore[return-value]
