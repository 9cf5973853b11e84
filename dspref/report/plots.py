"""The charts of a report as one picture, by matplotlib, which is an extra: `pip install 'dspref[plots]'`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from dspref.errors import EnvironmentFault
from dspref.report import charts
from dspref.report.charts import Chart
from dspref.run.history import History

# Okabe and Ito's, as on the page; and how curves of one run differ.
COLOURS = ("#0072b2", "#d55e00", "#007d5a", "#b2558f", "#a87200", "#2b94cc", "#1b1f24", "#7a7f86")
DASHES = ("-", "--", ":", "-.")
COLUMNS, WIDTH, HEIGHT, DPI = 3, 5.2, 3.0, 110


def render(runs: Sequence[History]) -> bytes:
    """A PNG. Raises EnvironmentFault where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EnvironmentFault("--format png: needs matplotlib, which is not here; pip install 'dspref[plots]'") from None
    drawn = [chart for chart in charts.of(runs) if chart.section != "Other metrics"]
    rows = max(-(-len(drawn) // COLUMNS), 1)
    figure = Figure(figsize=(COLUMNS * WIDTH, rows * HEIGHT), layout="constrained")
    for number, chart in enumerate(drawn):
        _draw(figure.add_subplot(rows, COLUMNS, number + 1), chart, runs)
    if not drawn:
        figure.text(0.5, 0.5, "No step has been logged yet.", ha="center")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI)
    return out.getvalue()


def _draw(axes: Any, chart: Chart, runs: Sequence[History]) -> None:
    axes.set_title(_plain(chart.title), fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
    if chart.stacked:
        parts = [[value or 0.0 for value in curve.values] for curve in chart.curves]
        axes.stackplot(
            chart.curves[0].steps, *parts, labels=[_plain(c.label) for c in chart.curves], colors=COLOURS, alpha=0.7
        )
    for curve in [] if chart.stacked else chart.curves:
        nth = [other for other in chart.curves if other.run == curve.run].index(curve)
        colour, dash = (curve.run, nth) if len(runs) > 1 else (nth, int(curve.held_out))
        values = [float("nan") if value is None else value for value in curve.values]
        label, marker = _plain(charts.name_of(curve, runs)), "o" if curve.held_out or len(values) == 1 else None
        style = DASHES[dash % len(DASHES)]
        axes.plot(
            curve.steps,
            values,
            style,
            color=COLOURS[colour % len(COLOURS)],
            label=label,
            lw=1.1,
            marker=marker,
            markersize=4,
        )
    if chart.log:
        axes.set_yscale("log")
    axes.legend(fontsize=7, framealpha=0.6)


def _plain(text: str) -> str:
    """Text that matplotlib takes for no formula, and that it does not leave out of a legend."""
    return text.replace("$", "\\$").lstrip("_") or "-"
