"""The best evaluation of a run: when it is time to stop, and which weights are the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Best:
    """What a run knows of a held-out metric; a checkpoint has it."""

    metric: str = ""
    value: float | None = None
    """The best so far."""
    step: int = 0
    """At which it was found, the first of several."""
    bar: float | None = None
    """What an evaluation has to better by `min_delta` to count as progress."""
    waited: int = 0
    """Evaluations since one did."""


@dataclass(frozen=True)
class Rule:
    """By which metric evaluations are judged, and what follows."""

    metric: str
    lower_is_better: bool
    min_delta: float = 0.0
    patience: int | None = None
    """Evaluations without progress that end the run; None: it goes to its end."""
    exports: bool = False
    """Whether the best weights are exported, so that their checkpoint must be there."""

    def judge(self, best: Best, step: int, found: Mapping[str, float]) -> Best:
        """With the evaluation of a step. A value that is not finite is no progress, nor is none."""
        best = best if best.metric == self.metric else Best(self.metric)
        value = found.get(self.metric, float("nan"))
        if self._is_better(value, best.value, 0.0):
            best = replace(best, value=value, step=step)
        if self._is_better(value, best.bar, self.min_delta):
            return replace(best, bar=value, waited=0)
        return replace(best, waited=best.waited + 1)

    def is_over(self, best: Best) -> bool:
        return self.patience is not None and best.metric == self.metric and best.waited >= self.patience

    def in_words(self, best: Best, step: int) -> str:
        """Why a run ended at a step."""
        by = f" by more than {self.min_delta:g}" if self.min_delta else ""
        found = f"{best.value:.4g} at step {best.step}" if best.value is not None else "none"
        return (
            f"after step {step}: {self.metric} has not improved{by} for {best.waited} evaluations (the best: {found}; "
            "train.stop_when)"
        )

    def _is_better(self, value: float, than: float | None, by: float) -> bool:
        if than is None:
            return abs(value) < float("inf")  # nor is NaN
        return value < than - by if self.lower_is_better else value > than + by
