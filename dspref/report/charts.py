"""Which charts a report has, and what each shows of the runs: the same for every format that draws.

A long curve is thinned: of each stretch of steps its lowest and highest value stay, so that no spike is lost, and where a
value is no number. What a curve says in words (first, last, extremes) is of all its values.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspref.report.specs import KNOWN, PHASES, SECTIONS, TIMES, Spec
from dspref.run import curves
from dspref.run.curves import Column
from dspref.run.history import History, text

# Stretches of steps of which a thinned curve keeps the extremes; a curve of up to three points for each is not thinned.
STRETCHES = 400
# Stretches that time by phase is the mean over.
PHASE_STRETCHES = 150
# Curves are smoothed with a half-life of this share of their points.
HALF_LIFE = 0.02
# A logarithmic axis is shown first where the largest of a chart's typical values is so many times the smallest.
WIDE = 30
# Digits of a value in a report.
DIGITS = 6
# Steps and rows of the table below a chart.
TABLE_ROWS = 40
# The most lines on values that are not finite.
MOST_NOTES = 40
# Characters of a metric's name.
MOST_OF_NAME = 120


@dataclass(frozen=True)
class Curve:
    """A key of a run. `steps`, `values`, `smooth`: thinned, None where a value is no finite number; `whole`: all of it."""

    run: int
    key: str
    label: str
    held_out: bool
    steps: list[int]
    values: list[float | None]
    smooth: list[float | None]
    whole: Column


@dataclass(frozen=True)
class Chart:
    """`stacked`: its curves are parts of a whole. `log`: whether it opens with a logarithmic axis, None where none fits."""

    id: str
    title: str
    meaning: str
    section: str
    curves: list[Curve]
    summary: str
    log: bool | None = None
    stacked: bool = False
    table: list[list[str]] = field(default_factory=list)


def of(runs: Sequence[History]) -> list[Chart]:
    """All charts of which the runs have a number."""
    found = []
    for section, specs in SECTIONS.items():
        found += [chart for spec in specs if (chart := _chart(spec, section, runs))]
    found += [chart for index in range(len(runs)) if (chart := phases(runs, index))]
    found += [chart for spec in _others(runs) if (chart := _chart(spec, "Other metrics", runs))]
    return found


def _others(runs: Sequence[History]) -> Iterator[Spec]:
    """What a run has beside the metrics that are known here: terms of a loss, sources of a mixture, what is newer."""
    training = dict.fromkeys(key for run in runs for key in run.curves.training_keys if key not in KNOWN | TIMES)
    told = {prefix + key for run in runs for prefix in run.curves.prefixes for key in {*training, *KNOWN}} | KNOWN
    held_out = dict.fromkeys(key for run in runs for key in run.curves.evaluation_keys if key not in told)
    for number, (key, label) in enumerate([*((k, "training") for k in training), *((k, "held out") for k in held_out)]):
        yield Spec(f"other-{number}", text(key, MOST_OF_NAME), {key: label}, "", held_out=label == "training")


def _chart(spec: Spec, section: str, runs: Sequence[History]) -> Chart | None:
    found = [curve for index, run in enumerate(runs) for curve in _curves(spec, index, run)]
    if not any(value is not None for curve in found for value in curve.values):
        return None
    summary = f"{spec.title} by step. " + " ".join(in_words(curve, runs) for curve in found)
    table = table_of(found, runs)
    return Chart(spec.id, spec.title, spec.meaning, section, found, summary, _logarithmic(spec, found), table=table)


def _curves(spec: Spec, index: int, run: History) -> Iterator[Curve]:
    sets = run.curves.prefixes if spec.held_out else []
    for key, label in spec.keys.items():
        held_out = key.startswith(curves.EVALUATION)
        whole = run.curves.evaluated(key) if held_out else run.curves.trained(key)
        if whole.steps:
            yield _curve(index, key, label, held_out, whole)
        for prefix in sets:
            whole = run.curves.evaluated(prefix + key)
            if whole.steps:
                name = text(prefix.removeprefix(curves.EVALUATION).rstrip("_"), MOST_OF_NAME)
                yield _curve(index, prefix + key, f"held out{' ' if name else ''}{name}", True, whole)


def _curve(run: int, key: str, label: str, held_out: bool, whole: Column) -> Curve:
    kept = thinned(whole)
    smooth = whole.values if held_out else smoothed(whole.values)
    values, means = ([_rounded(column[at]) for at in kept] for column in (whole.values, smooth))
    return Curve(run, key, label, held_out, [whole.steps[at] for at in kept], values, means, whole)


def thinned(column: Column, stretches: int = STRETCHES) -> list[int]:
    """Which points of a curve are kept: of each stretch the lowest, the highest and the first that is no number; the first
    and the last of all."""
    count = len(column.steps)
    if count <= 3 * stretches:
        return list(range(count))
    kept = {0, count - 1}
    for k in range(stretches):
        inside = range(k * count // stretches, (k + 1) * count // stretches)
        told = [at for at in inside if column.values[at] is not None]
        if told:
            kept |= {min(told, key=lambda at: column.values[at] or 0.0), max(told, key=lambda at: column.values[at] or 0.0)}
        kept |= set([at for at in inside if column.values[at] is None][:1])
    return sorted(kept)


def smoothed(values: Sequence[float | None]) -> list[float | None]:
    """Exponential means of what came before, without the pull of the beginning; None where a value is None."""
    decay = 0.5 ** (1 / half_life(len(values)))
    total = weight = 0.0
    found: list[float | None] = []
    for value in values:
        if value is not None:
            total, weight = total * decay + value, weight * decay + 1
        found.append(None if value is None else total / weight)
    return found


def half_life(count: int) -> int:
    """Points, of so many."""
    return max(2, round(HALF_LIFE * count))


def _logarithmic(spec: Spec, found: Sequence[Curve]) -> bool | None:
    """None where some value is below zero, or nothing is above."""
    if not spec.log:
        return None
    values = [value for curve in found for value in curve.whole.values if value is not None]
    if min(values) < 0 or max(values) == 0:
        return None
    peaks = [max((value for value in curve.whole.values if value is not None), default=0) for curve in found]
    typical = [statistics.median([v for v in curve.whole.values if v] or [0]) for curve in found]
    low, high = min((v for v in (*peaks, *typical) if v > 0), default=1), max(peaks)
    # A schedule falls to zero and is read on a linear axis, unless runs are far apart.
    return high > WIDE * (min(p for p in peaks if p > 0) if spec.id == "learning-rate" else low)


def phases(runs: Sequence[History], index: int) -> Chart | None:
    """Where the time of a run's steps goes: means over stretches of its steps, one phase above the other."""
    training = runs[index].curves.training
    steps = [step for step, record in training.items() if any(f"perf/{phase}_seconds" in record for phase in PHASES)]
    if not steps:
        return None
    size = math.ceil(len(steps) / PHASE_STRETCHES)
    stretches = [steps[at : at + size] for at in range(0, len(steps), size)]
    found = []
    for phase in PHASES:
        key = f"perf/{phase}_seconds"
        whole = Column(steps, [curves.finite(training[step].get(key)) for step in steps])
        means = [_mean([curves.finite(training[step].get(key)) for step in stretch]) for stretch in stretches]
        found.append(Curve(index, key, phase, False, [stretch[-1] for stretch in stretches], means, means, whole))
    if not any(value for curve in found for value in curve.values):
        return None
    medians = {c.label: statistics.median([v for v in c.whole.values if v is not None] or [0]) for c in found}
    total = sum(medians.values()) or 1
    shares = ", ".join(f"{name} {number(seconds)} s ({seconds / total:.0%})" for name, seconds in medians.items())
    title = "Time by phase" + (f": {runs[index].name}" if len(runs) > 1 else "")
    meaning = f"Seconds of a step, medians: {shares}." + (f" Drawn are means of {size} logged steps." if size > 1 else "")
    summary = f"{title}, seconds of a step, one phase above the other. Medians: {shares}."
    return Chart(
        f"phases-{index}", title, meaning, "Speed and memory", found, summary, stacked=True, table=table_of(found, runs)
    )


def _mean(values: Sequence[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return _rounded(statistics.fmean(told)) if told else None


# ---------------------------------------------------------------------------------------------------------------------
# In words


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if 10_000 <= abs(value) < 1e9 else f"{value:.4g}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


def name_of(curve: Curve, runs: Sequence[History]) -> str:
    return f"{runs[curve.run].name}, {curve.label}" if len(runs) > 1 else curve.label


def in_words(curve: Curve, runs: Sequence[History]) -> str:
    """A curve for those who do not see it."""
    told = [(value, step) for step, value in zip(curve.whole.steps, curve.whole.values) if value is not None]
    if not told:
        return f"{name_of(curve, runs)}: no value is a number."
    (first, begin), (last, end), low, high = told[0], told[-1], min(told), max(told)
    gaps = f" {curve.whole.gaps} not finite." if curve.whole.gaps else ""
    return (
        f"{name_of(curve, runs)}: {number(first)} at step {begin:,}, {number(last)} at step {end:,}, "
        f"lowest {number(low[0])} at {low[1]:,}, highest {number(high[0])} at {high[1]:,}.{gaps}"
    )


def table_of(found: Sequence[Curve], runs: Sequence[History]) -> list[list[str]]:
    """A head and up to `TABLE_ROWS` rows, evenly over the steps, the first and the last among them: step, a value of each
    curve."""
    steps = sorted({step for curve in found for step in curve.whole.steps})
    many = len(steps)
    chosen = [steps[round(at * (many - 1) / (TABLE_ROWS - 1))] for at in range(TABLE_ROWS)] if many > TABLE_ROWS else steps
    lookup = [dict(zip(curve.whole.steps, curve.whole.values)) for curve in found]
    rows = [[f"{step:,}", *(_cell(values, step) for values in lookup)] for step in chosen]
    return [["step", *(name_of(curve, runs) for curve in found)], *rows]


def _cell(values: dict[int, float | None], step: int) -> str:
    found = values.get(step)
    return "" if step not in values else "not finite" if found is None else number(found)


def notes(charts: Sequence[Chart], runs: Sequence[History]) -> list[str]:
    """What was left out of the drawing, and what could not be drawn."""
    every = [curve for chart in charts for curve in chart.curves if not chart.stacked]
    found = []
    cut = [curve for curve in every if len(curve.steps) < len(curve.whole.steps)]
    if cut:
        most = max(len(curve.whole.steps) for curve in cut)
        found.append(
            f"Curves of up to {most:,} points are thinned: of each of {STRETCHES} stretches the lowest and highest value "
            "are drawn, so that no spike is lost. --format csv has every value."
        )
    gaps = [
        f"{of_run}{text(key, MOST_OF_NAME)}: {count:,} of {len(told.steps):,} values are not finite: gaps."
        for run in runs
        for of_run in [f"{run.name}: " if len(runs) > 1 else ""]
        for keys, column in (
            (run.curves.training_keys, run.curves.trained),
            (run.curves.evaluation_keys, run.curves.evaluated),
        )
        for key in keys
        if (count := (told := column(key)).gaps)
    ]
    more = [f"and {len(gaps) - MOST_NOTES} more"] if len(gaps) > MOST_NOTES else []
    return [*found, *gaps[:MOST_NOTES], *more]


def payload(charts: Sequence[Chart], runs: Sequence[History]) -> dict[str, Any]:
    """What the page draws from."""
    return {
        "runs": [{"name": run.name, "marks": marks(run)} for run in runs],
        "charts": [
            {
                "id": chart.id, "title": chart.title, "log": chart.log, "stacked": chart.stacked,
                "curves": [
                    {
                        "run": curve.run, "key": text(curve.key, MOST_OF_NAME),
                        "label": curve.label, "held_out": curve.held_out,
                        "x": curve.steps, "y": curve.values, "smooth": None if curve.held_out else curve.smooth,
                    }
                    for curve in chart.curves
                ],
            }
            for chart in charts
        ],
    }  # fmt: skip


def marks(run: History) -> list[dict[str, Any]]:
    """Steps that a run went on from, and those that it skipped."""
    found = {(event.step, event.name) for event in run.events if event.name in ("resume", "skip") and event.step is not None}
    return [{"step": step, "what": name} for step, name in sorted(found)][:200]
