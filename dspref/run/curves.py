"""metrics.jsonl as a table: what each step and each evaluation said, once.

Any line may be damaged, and the last half-written. A run that was cut off and went on from a checkpoint may have said some
steps twice: the later word holds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from dspref.files import lines_of
from dspref.reading import is_count, is_number

# The share of the logged steps that a last value is the mean of, and the most of them: a single step is a few pairs.
TAIL_SHARE, TAIL_MOST = 0.1, 50
# What is larger is as good as infinite.
LARGEST = 1e100
EVALUATION = "eval_"
ACCURACY = "rewards/accuracies"
Records = dict[int, dict[str, Any]]


class Column(NamedTuple):
    """A metric over the steps that have it; None where it is no finite number."""

    steps: list[int]
    values: list[float | None]

    @property
    def gaps(self) -> int:
        return self.values.count(None)


@dataclass(frozen=True)
class Curves:
    """Step -> what it said, in the order of the steps."""

    training: Records = field(default_factory=dict)
    evaluations: Records = field(default_factory=dict)
    bad_lines: int = 0
    """That hold no object, or one without a step."""
    repeated: int = 0
    """Steps of training that were said before, or had been done when the run went back; the later word holds."""
    _columns: dict[tuple[bool, str], Column] = field(default_factory=dict, compare=False, repr=False)

    def trained(self, key: str) -> Column:
        return self._column(False, key)

    def evaluated(self, key: str) -> Column:
        return self._column(True, key)

    def _column(self, held_out: bool, key: str) -> Column:
        if (held_out, key) not in self._columns:
            self._columns[held_out, key] = column(self.evaluations if held_out else self.training, key)
        return self._columns[held_out, key]

    @cached_property
    def training_keys(self) -> list[str]:
        return keys_of(self.training)

    @cached_property
    def evaluation_keys(self) -> list[str]:
        return keys_of(self.evaluations)

    @cached_property
    def prefixes(self) -> list[str]:
        """`eval_`, or `eval_<set>_` of each held-out set."""
        sets = [key.removesuffix(ACCURACY) for key in self.evaluation_keys if key.endswith(f"_{ACCURACY}")]
        return sets or [EVALUATION] * bool(self.evaluation_keys)


def read(path: Path, resumes: Collection[int] = ()) -> Curves:
    """`resumes`: steps that the run went on from. What had been done beyond one is dropped once the run is there again."""
    training: Records = {}
    evaluations: Records = {}
    bad = repeated = last = 0
    for line in lines_of(path):
        step = line.get("step") if line is not None else None
        if line is None or not is_count(step):
            bad += 1
        elif "loss" in line:
            if step <= last and training:
                repeated += _go_back(training, step, resumes)
                _go_back(evaluations, step, resumes)
            repeated += training.pop(step, None) is not None
            training[step], last = line, step
        elif any(key.startswith(EVALUATION) for key in line):
            evaluations[step] = evaluations.get(step, {}) | line
    return Curves(dict(sorted(training.items())), dict(sorted(evaluations.items())), bad, repeated)


def evaluation_of(path: Path, step: int) -> dict[str, float]:
    """What the evaluation of a step found, of all held-out sets; {} where there is none."""
    found = read(path).evaluations.get(step, {})
    return {name: value for name, value in found.items() if name.startswith(EVALUATION) and is_number(value)}


def _go_back(records: Records, step: int, resumes: Collection[int]) -> int:
    """Drop what had been done beyond the checkpoint that a run went on from, which now says `step`; how many those were."""
    start = max((resume for resume in resumes if resume < step), default=None)
    undone = [done for done in records if start is not None and done > start]
    for done in undone:
        del records[done]
    return len(undone)


def column(records: Mapping[int, Mapping[str, Any]], key: str) -> Column:
    said = [(step, record[key]) for step, record in records.items() if key in record]
    return Column([step for step, _ in said], [finite(value) for _, value in said])


def finite(value: Any) -> float | None:
    """A number as a float; None for what is none, or too large for sums of it."""
    return float(value) if is_number(value) and -LARGEST < value < LARGEST else None


def keys_of(records: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Names of numbers, in the order in which they were first said; null is a number that was not finite."""
    found = dict.fromkeys(
        key for record in records.values() for key, value in record.items() if value is None or is_number(value)
    )
    return [name for name in found if name != "step"]


def tail_of(count: int) -> int:
    """How many of so many logged steps a last value is the mean of: a tenth of all, at most 50."""
    return min(max(ceil(TAIL_SHARE * count), 1), TAIL_MOST)


def tail_mean(column: Column) -> float | None:
    """Mean of the finite values of a column's tail."""
    values = [value for value in column.values[-tail_of(len(column.values)) :] if value is not None]
    return fmean(values) if values else None


def last_of(column: Column) -> float | None:
    """Its last finite value."""
    return next((value for value in reversed(column.values) if value is not None), None)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluations


class Evaluation(NamedTuple):
    """A figure of a held-out set: the last, the best, and when they were."""

    last: float
    step: int
    best: float
    best_step: int


def evaluation(curves: Curves, key: str, highest: bool = False) -> Evaluation | None:
    """Of a key such as `eval_loss`; `highest`: more is better. Of equals the first is the best."""
    steps, values = curves.evaluated(key)
    told = [(step, value) for step, value in zip(steps, values) if value is not None]
    if not told:
        return None
    best = (max if highest else min)(told, key=lambda one: one[1])
    return Evaluation(told[-1][1], told[-1][0], best[1], best[0])


def summary(curves: Curves) -> dict[str, Any]:
    """Loss, accuracy and speed: of the last logged step, and means of the tail. Of each held-out set last and best."""
    found: dict[str, Any] = {"tail": tail_of(len(curves.training)) if curves.training else None}
    for name, key in {"loss": "loss", "accuracy": ACCURACY, "tokens_per_second": "perf/tokens_per_second"}.items():
        numbers = curves.trained(key)
        found |= {name: last_of(numbers), f"{name}_mean": tail_mean(numbers)}
    found["evaluations"] = {
        prefix.rstrip("_"): {
            name: told._asdict() if (told := evaluation(curves, prefix + key, highest)) else None
            for name, key, highest in (("loss", "loss", False), ("accuracy", ACCURACY, True))
        }
        for prefix in curves.prefixes
    }
    return found
