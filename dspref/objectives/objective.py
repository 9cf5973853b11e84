"""An objective: what a YAML section makes of the table, (policy, reference) -> loss; and what it keeps from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspref.objectives import own
from dspref.objectives.families import PairLogps, PairLoss, Part
from dspref.objectives.table import OBJECTIVES, Family, as_list, keys_of
from dspref.own_code import Source


@dataclass(frozen=True)
class Objective:
    """(policy, reference) -> PairLoss, with every key bound. The reference is None where none is needed."""

    family: Family
    parts: tuple[Part, ...]
    keys: Mapping[str, Any]
    point: Any = None
    """The reference point of a step, where the loss has one."""

    def __call__(self, policy: PairLogps, reference: PairLogps | None, delta: float = 0.0) -> PairLoss:
        """`delta`: the running mean of the rewards, for losses that read it."""
        return self.family.assemble(self.parts, policy, reference, delta if self.point is None else self.point, **self.keys)

    @property
    def couples(self) -> bool:
        """Whether the loss is a function of the whole step, not a sum over its pairs."""
        return any(part.loss.couples for part in self.parts)

    @property
    def reads_twice(self) -> bool:
        """Whether a step takes one more forward pass, over as many tokens."""
        return self.couples or self.has_mismatched

    @property
    def has_running_mean(self) -> bool:
        return any(part.loss.running_mean for part in self.parts)

    @property
    def has_mismatched(self) -> bool:
        """Whether its reference point is an estimate from mismatched pairs."""
        return any(part.loss.mismatched for part in self.parts)

    @property
    def scores_prompt(self) -> bool:
        return bool(self.keys.get("nll_on_prompt"))

    @property
    def needs_collision(self) -> bool:
        return bool(self.keys.get("use_weighting"))


def needs_reference(name: str, reference_free: bool = False, **_: Any) -> bool:
    """Whether an objective section asks for reference log-probs."""
    return OBJECTIVES[name].needs_reference and not reference_free


def needs_scores(name: str, loss_type: str | Sequence[str], **_: Any) -> bool:
    """Whether an objective section asks for the scores of both answers."""
    return any(OBJECTIVES[name].loss(one).scores for one in as_list(loss_type))


def own_sources(loss_type: str | Sequence[str], **_: Any) -> dict[str, Source]:
    """The losses of an objective section that are the user's own, with the files that they are in."""
    return {name: own.source(name) for name in as_list(loss_type) if own.is_own(name)}


def build_objective(
    name: str, loss_type: str | Sequence[str], loss_weights: Sequence[float] | None = None, **keys: Any
) -> Objective:
    """The objective of a YAML section: `name`, `loss_type` and their keys. Keys that are None keep their defaults."""
    family = OBJECTIVES[name]
    names = as_list(loss_type)
    given = {key: value for key, value in keys.items() if value is not None}

    def part(loss_name: str, weight: float) -> Part:
        loss = family.loss(loss_name)
        bound = {key: given.get(key, parameter.default) for key, parameter in keys_of(loss.function).items()}
        return Part(loss_name, loss, weight, bound)

    parts = tuple(part(n, w) for n, w in zip(names, loss_weights or [1.0] * len(names)))
    shared = {key: given.get(key, parameter.default) for key, parameter in keys_of(family.assemble).items()}
    return Objective(family, parts, shared)


@dataclass(frozen=True)
class RunningMean:
    """Cumulative mean over steps, exact in a checkpoint: BCO's delta."""

    total: float = 0.0
    steps: int = 0

    @property
    def value(self) -> float:
        return self.total / self.steps if self.steps else 0.0

    def updated(self, value: float) -> RunningMean:
        return RunningMean(self.total + value, self.steps + 1)
