"""When the numbers go wrong: the first step's check, steps that are skipped, and the end of a run that skips too many."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dspref import distributed
from dspref.data.store import PairStore
from dspref.errors import NumericFault
from dspref.objectives.families import PairLoss
from dspref.run import curves
from dspref.run.folder import RunFolder

# Pairs that a message names.
NAMED = 3


@dataclass
class Suspects:
    """Which pairs of a step have a loss that is not finite. Nothing waits for the device before `rows`."""

    _seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def clear(self) -> None:
        """A new step begins."""
        self._seen.clear()

    def add(self, pair_ids: Tensor, loss: PairLoss) -> None:
        """`pair_ids` [P]: the rows of the data set whose loss this is."""
        finite = torch.stack([term.values.detach().isfinite() for term in loss.terms.values()]).all(dim=0)
        self._seen.append((pair_ids, ~finite))

    def rows(self) -> list[int]:
        """Of all ranks, in order."""
        own = [row for ids, bad in self._seen for row in ids[bad].tolist()]
        return sorted({row for rows in distributed.gather_objects(own) for row in rows})


def with_faults(share: Tensor, loss: PairLoss) -> Tensor:
    """A share of the step's loss whose gradient is NaN where the loss of any pair is not finite, whatever its slope is.

    Such a step is skipped. Nothing waits for the device.
    """
    finite = torch.stack([term.values.detach().isfinite().all() for term in loss.terms.values()]).all()
    return share * torch.where(finite, 1.0, float("nan"))


@dataclass
class Skips:
    """Counts the steps in a row that changed nothing because their numbers were wrong."""

    limit: int
    scales_loss: bool
    """In fp16 an overflow lowers the loss scale, and belongs to the method."""
    in_a_row: int = 0

    def judge(self, step: int, applied: bool, suspects: Suspects, pairs: PairStore, run: RunFolder) -> bool:
        """True where the run must end: more than `limit` steps in a row were skipped. Called alike on all ranks."""
        if applied:
            self.in_a_row = 0
            return False
        rows = suspects.rows()
        if not rows and self.scales_loss:
            return False
        self.in_a_row += 1
        where = [pairs.where(row) for row in rows[:NAMED]]
        run.event("skip", step=step, rows=rows, where=where)
        named = ", ".join(where) + (f" and {len(rows) - NAMED} more" if len(rows) > NAMED else "")
        cause = f"the loss of {named}" if rows else "the gradient"
        distributed.log(f"warning: step {step} skipped, {cause} is not finite ({self.in_a_row} in a row)", stamp=True)
        return self.in_a_row > self.limit

    def fault(self, step: int, sound: int) -> NumericFault:
        """The end of the run; `sound`: the step whose weights are kept."""
        return NumericFault(
            f"step {step}: {self.in_a_row} steps in a row were skipped, for a loss or gradient that is not finite "
            f"(train.max_skipped_steps: {self.limit}); the weights of step {sound} are kept; lower train.learning_rate, or "
            "mend the pairs that events.jsonl names"
        )


def judge_overfit(metrics: Path) -> None:
    """Say how the loss over the same pairs has fallen, by metrics.jsonl. Raises NumericFault where it has not."""

    def losses() -> tuple[float, float] | None:
        found = [value for value in curves.read(metrics).trained("loss").values if value is not None]
        return (found[0], found[-1]) if found else None

    ends = distributed.broadcast_object(losses() if distributed.world().rank == 0 else None)
    if ends is None or not ends[1] < ends[0]:
        said = f"from {ends[0]:.4g} to {ends[1]:.4g}" if ends else "no step has a finite one"
        raise NumericFault(
            f"train.overfit: on the same pairs again and again the loss does not fall ({said}); look at the pairs "
            "(dspref inspect), at train.learning_rate and at the objective"
        )
    distributed.log(f"overfit: on the same pairs again and again the loss fell from {ends[0]:.4g} to {ends[1]:.4g}")


class Spikes:
    """Watches the logged losses for one more than `sigmas` standard deviations above the mean of those before it.

    What stood out is not taken into the mean.
    """

    WINDOW, LEAST = 128, 32

    def __init__(self, sigmas: float | None) -> None:
        self._sigmas = sigmas
        self._seen: deque[float] = deque(maxlen=self.WINDOW)

    def watch(self, step: int, loss: float) -> str | None:
        """A warning, where this loss is a spike."""
        if not self._sigmas or not math.isfinite(loss):
            return None
        if len(self._seen) >= self.LEAST:
            mean, deviation = statistics.fmean(self._seen), statistics.stdev(self._seen)
            limit = mean + self._sigmas * max(deviation, 1e-6 * abs(mean))
            if loss > limit:
                return (
                    f"warning: step {step}: loss {loss:.4g} stands out, {self._sigmas:g} standard deviations above the "
                    f"{len(self._seen)} before it are {limit:.4g} (train.spike_sigmas); touch RUN/STOP to end the run here"
                )
        self._seen.append(loss)
        return None


def check_loss(step: int, loss: float, applied: bool) -> None:
    """Raise NumericFault for a loss that is not a number though its gradient is: nothing of it can be believed."""
    if applied and not math.isfinite(loss):
        raise NumericFault(f"step {step}: loss {loss} with a finite gradient; lower train.learning_rate and start anew")


def check_first_step(means: dict[str, float], tolerance: float | None, applied: bool = True) -> None:
    """Where policy and reference start equal, they agree on every answer, and the first loss is the objective's value at
    log-ratios of 0. Removes `gap` from `means`; raises NumericFault where it is more than `tolerance`, in nats per token
    (None: the two are not one model)."""
    gap = means.pop("gap", None)
    if gap is not None and applied and tolerance is not None and not gap <= tolerance:
        raise NumericFault(
            f"step 1: policy and reference are one model, but differ by {gap:.2g} nats per token (allowed: {tolerance:g}); "
            "usual causes: dropout that is still on, weights missing from the checkpoint, a kernel that leaks between "
            "sequences"
        )


# What `ran_off` looks at, beside the loss.
TELLING = ("logps/chosen", "lengths/chosen")
# A loss of so many times the first one, and so large; log-probs of so many times the first ones.
LOSS_TIMES, LOSS_LEAST, LOGPS_TIMES = 10.0, 10.0, 1.5


def ran_off(table: Mapping[str, tuple[float | None, float]], vocabulary: int) -> str | None:
    """A warning, where a run has ended with a model that is worse than nothing; `table`: (first, mean of the last) of the
    logged losses and of `TELLING`.

    Two signs, neither of which a run shows that only learns little: a loss of more than ten times the first one, and
    preferred answers that are less likely than random tokens would be, and by far less than at first. The loss alone does
    not tell: where one side happens to be longer, ruined log-probs may give a loss of 0.
    """
    first, last = table.get("loss", (None, 0.0))
    if first is not None and last > max(LOSS_TIMES * first, LOSS_LEAST):
        return f"the loss has run off, from {first:.4g} to {last:.4g}; {REMEDY}"
    sums, lengths = (table.get(name, (None, 0.0)) for name in TELLING)
    at_random = -math.log(vocabulary)
    if sums[0] is None or not lengths[0] or not lengths[1]:
        return None
    began, ended = sums[0] / lengths[0], sums[1] / lengths[1]
    if ended < at_random and ended < LOGPS_TIMES * began:
        return (
            f"chosen answers have become less likely than random tokens: {ended:.4g} nats per token, {began:.4g} at first "
            f"({at_random:.4g} at random); {REMEDY}"
        )
    return None


REMEDY = "the model is ruined: lower train.learning_rate and start anew"
