"""What a run has come to: the figures of its summary and of its model card, from what it has written."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspref.files import read_lines
from dspref.reading import is_number
from dspref.report import metrics, performance
from dspref.run import curves, status
from dspref.run.folder import EVENTS, METRICS
from dspref.training import numbers

# What is shown of metrics.jsonl, of training and of evaluations.
SHOWN = ("loss", "nll_loss", "aux_loss", "rewards/accuracies", "rewards/margins")


def summary(run: Path, step: int, seconds: float, vocabulary: int) -> dict[str, Any]:
    """Of a run folder whose last step is done; `seconds`: since its last start."""
    written = run / METRICS
    table, tail = learned(written)
    warning = numbers.ran_off(table, vocabulary)
    return {
        "step": step,
        "seconds": round(seconds, 1),
        # Of each step once, whichever start it belongs to.
        "seconds_in_steps": round(status.training(curves.read(written))[1], 1),
        "starts": sum(event.get("event") == "start" for event in read_lines(run / EVENTS)),
        "tail": tail,
        "learned": {name: values for name, values in table.items() if name.endswith(SHOWN)},
        "warnings": [warning] if warning else [],
        "speed": performance.medians(metrics.training_lines(written)),
    }


def learned(path: Path) -> tuple[dict[str, tuple[float | None, float]], int]:
    """(first, last) of what matters in metrics.jsonl, and the number of logged steps that a last value is the mean of: a
    tenth of all, at most 50. A single step is a few pairs, and says little. Of evaluations, first and last are those.

    Values that are not finite, those of skipped steps, are left out, and so is what a damaged line would have said.
    """
    records = list(read_lines(path))
    training = [record for record in records if is_number(record.get("loss"))]
    tail = training[-curves.tail_of(len(training)) :]
    table: dict[str, tuple[float | None, float]] = {}
    for name in (*SHOWN, *numbers.TELLING):
        values = [record[name] for record in tail if is_number(record.get(name))]
        if values:
            first = training[0].get(name)
            table[name] = (first if is_number(first) else None, statistics.fmean(values))
    evaluations = [record for record in records if "loss" not in record]
    for name in sorted({key for record in evaluations for key in record if key.endswith(SHOWN)}):
        values = [record[name] for record in evaluations if is_number(record.get(name))]
        if values:
            table[name] = (values[0] if len(values) > 1 else None, values[-1])
    return table, max(len(tail), 1)


def of_card(run: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a model card says of a run: the `step` whose weights the model has, and `metrics`, each with what it is. Of an
    earlier step than the last these are what its evaluation found."""
    step, learned = summary.get("weights_of", summary["step"]), summary.get("learned", {})
    if step != summary["step"]:
        found = curves.evaluation_of(run / METRICS, step)
        return {"step": step, "metrics": {name: value for name, value in found.items() if name.endswith(SHOWN)}}
    tail = summary.get("tail", 1)
    of_training = f" (training, mean of the last {tail} logged steps)" if tail > 1 else " (training, last step)"
    names = {name: name if name.startswith("eval_") else name + of_training for name in learned}
    return {"step": step, "metrics": {names[name]: last for name, (_, last) in learned.items()}}
