"""A report as tables: for its page, as Markdown to paste into an issue, and every value as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

from dspref.report.charts import number
from dspref.run import curves, status
from dspref.run.curves import ACCURACY
from dspref.run.history import History, text
from dspref.terminal import duration, printable

# Rows of a table of differences, and events and warnings, in Markdown.
MOST_ROWS = 40
# What differs between any two runs and says nothing.
OWN = ("output_dir", "log.run_name")
# Events of which Markdown tells each.
TELLING = ("start", "resume", "skip", "stop", "finish")
HEAD = ["run", "step", "key", "value"]


class Table(NamedTuple):
    """`rows`: a name and a cell for each head."""

    heads: list[str]
    rows: list[tuple[str, list[str]]]


def overview(runs: Sequence[History]) -> Table:
    """A column per run: how far it came, and what it learned."""
    rows = {
        "state": [run.status["state"] for run in runs],
        "step": [status.steps_in_words(run.status) for run in runs],
        "loss, first to last": [_from_to(run, "loss") for run in runs],
        "accuracy": [_from_to(run, ACCURACY) for run in runs],
        "margin": [_from_to(run, "rewards/margins") for run in runs],
        "log-prob chosen": [_from_to(run, "logps/chosen") for run in runs],
        "log-prob rejected": [_from_to(run, "logps/rejected") for run in runs],
        "tokens per second": [number(_recent(run, "perf/tokens_per_second")) for run in runs],
        "peak memory, GiB": [number(_most(run, "perf/memory_gib")) for run in runs],
        "time": [duration(run.status["wall_seconds"]) if run.status["wall_seconds"] else "–" for run in runs],
        "in kept steps": [f"{run.status['goodput']:.0%}" if run.status["goodput"] is not None else "–" for run in runs],
        "left": [duration(run.status["eta_seconds"]) if run.status["eta_seconds"] is not None else "–" for run in runs],
        "restarts": [str(run.status["restarts"]) for run in runs],
        "skipped steps": [str(sum(event.name == "skip" for event in run.events)) for run in runs],
        "last checkpoint": [_step(run.status["commit_step"]) for run in runs],
        "ranks": [str(run.status["world_size"] or "–") for run in runs],
        "error": [text(run.status["error"] or "–", 300) for run in runs],
    }
    kept = {name: cells for name, cells in rows.items() if any(cell != "–" for cell in cells)}
    return Table([run.name for run in runs], list(kept.items()))


def _from_to(run: History, key: str) -> str:
    """The first value of a metric, and the mean of its last ones."""
    found = run.curves.trained(key)
    first = next((value for value in found.values if value is not None), None)
    return f"{number(first)} → {number(curves.tail_mean(found))}" if first is not None else "–"


def _recent(run: History, key: str) -> float | None:
    return curves.tail_mean(run.curves.trained(key))


def _most(run: History, key: str) -> float | None:
    return max((value for value in run.curves.trained(key).values if value is not None), default=None)


def _step(step: int | None) -> str:
    return "–" if step is None else f"{step:,}"


def evaluations(runs: Sequence[History]) -> Table:
    """A row per run and held-out set: the last figures and the best."""
    rows = []
    for run in runs:
        for prefix in run.curves.prefixes:
            cells = []
            for key, highest in (("loss", False), (ACCURACY, True), ("rewards/margins", True)):
                found = curves.evaluation(run.curves, prefix + key, highest)
                cells += [number(found.last), f"{number(found.best)} at {found.best_step:,}"] if found else ["–", "–"]
            steps = run.curves.evaluated(f"{prefix}loss").steps
            rows.append((f"{run.name}: {text(prefix.rstrip('_'), 120)}", [_step(steps[-1] if steps else None), *cells]))
    return Table(["step", "loss", "best", "accuracy", "best", "margin", "best"], rows)


def differences(runs: Sequence[History]) -> Table:
    """Settings and versions in which runs differ, or of a single run all of them."""
    every = [run.config | {f"env: {key}": value for key, value in run.versions.items()} for run in runs]
    keys = dict.fromkeys(key for settings in every for key in settings)
    told = [(key, [settings.get(key, "–") for settings in every]) for key in keys]
    if len(runs) > 1:
        told = [(key, cells) for key, cells in told if len(set(cells)) > 1 and key not in OWN]
    return Table([run.name for run in runs], told)


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def markdown(runs: Sequence[History]) -> str:
    parts = [f"## dspref report: {', '.join(_cell(run.name) for run in runs)}", _table(overview(runs), "")]
    held_out = evaluations(runs)
    if held_out.rows:
        parts += ["### Evaluations", _table(held_out, "set")]
    if len(runs) > 1:
        different = differences(runs)
        parts += ["### Settings that differ", _table(different, "key") if different.rows else "None."]
    for run in runs:
        lines = [f"- {_cell(line)}" for line in (*run.faults, *(f"warning: {line}" for line in run.warnings))]
        told = [event for event in run.events if event.name in TELLING]
        lines += [
            f"- {event.time:%Y-%m-%d %H:%M:%S} {_cell(event.name)}"
            + (f" at step {event.step:,}" if event.step is not None else "")
            + "".join(
                f", {_cell(name)} {_cell(value)}" for name, value in event.details if value not in ("null", "{}", "[]", "")
            )
            for event in told[-MOST_ROWS:]
        ]
        lines += [f"- {_cell(line)}" for line in run.data]
        if lines:
            parts += [f"### {_cell(run.name)}: warnings, events, data", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _table(table: Table, corner: str) -> str:
    rows = [
        [corner, *table.heads],
        ["---"] * (len(table.heads) + 1),
        *([name, *cells] for name, cells in table.rows[:MOST_ROWS]),
    ]
    lines = ["| " + " | ".join(cell if cell == "---" else _cell(cell) for cell in row) + " |" for row in rows]
    more = len(table.rows) - MOST_ROWS
    return "\n".join(lines) + (f"\n\nand {more} more" if more > 0 else "")


def _cell(cell: str) -> str:
    """Text that stays text: no markup, no link, no mention, no second cell."""
    said = printable(cell, 300).replace("&", "&amp;").replace("<", "&lt;").replace("@", "&#64;")
    return re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", said)


# ---------------------------------------------------------------------------------------------------------------------
# CSV


def long_form(runs: Sequence[History]) -> str:
    """run, step, key, value: every number of training and of evaluations, and an empty value where it was none."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEAD)
    for run in runs:
        sets = ((run.curves.training, run.curves.training_keys), (run.curves.evaluations, run.curves.evaluation_keys))
        for records, keys in sets:
            for step, record in records.items():
                for key in keys:
                    if key in record:
                        value = curves.finite(record[key])
                        writer.writerow([_plain(run.name), step, _plain(key), "" if value is None else repr(value)])
    return out.getvalue()


def _plain(name: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    said = printable(text(name, 200))
    return f"'{said}" if said[:1] in ("=", "+", "-", "@") else said
