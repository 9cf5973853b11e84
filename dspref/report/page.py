"""A report as one HTML file: no request leaves it, and it needs nothing beside it.

What comes from runs is untrusted: text is escaped by the template, and the numbers are JSON that the page reads as data. The
page's own policy allows no request, and no script or style but the two that are written into it, by their hashes.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, NamedTuple

import jinja2

import dspref
from dspref.report import charts, tables, thumbnails
from dspref.report.charts import Chart
from dspref.run.history import MOST_EVENTS, Event, History, Sample
from dspref.terminal import printable

ASSETS = files("dspref") / "report" / "assets"
# Words of an answer that is compared with another; what follows is shown as it is.
MOST_WORDS = 600
# Curves of different runs are told apart by so many colours.
COLOURS = 8


# Details of an event that say nothing.
EMPTY = ("null", "{}", "[]", "")


class Part(NamedTuple):
    """A piece of an answer; `changed`: the other answer does not have it."""

    text: str
    changed: bool


class Answers(NamedTuple):
    """A sample as it is shown."""

    prompt: str
    reference: list[Part] | None
    policy: list[Part] | None
    chosen: str | None
    images: list[tuple[str, str | None]]
    """(name, small picture as a data: URI) of the prompt's images; None: it cannot be read here."""


def render(runs: Sequence[History], now: datetime | None = None) -> str:
    drawn = charts.of(runs)
    newest_first = (path for run in runs for sample in reversed(run.samples) for _, path in sample.images if path)
    small = thumbnails.of(newest_first)
    script = "\n".join(_asset(name) for name in ("uplot/uPlot.iife.min.js", "report.js"))
    style = "\n".join(_asset(name) for name in ("uplot/uPlot.min.css", "report.css"))
    return _template().render(
        version=dspref.__version__,
        made=(now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC"),
        title=", ".join(run.name for run in runs) if len(runs) <= 4 else f"{len(runs)} runs",
        runs=runs,
        colours=COLOURS,
        policy=_policy(script, style),
        script=script,
        style=style,
        data=embedded(charts.payload(drawn, runs)),
        sections=_sections(drawn),
        overview=tables.overview(runs),
        evaluations=tables.evaluations(runs),
        notes=charts.notes(drawn, runs),
        faults=[(run.name, fault) for run in runs for fault in run.faults],
        warnings=[(run.name, warning) for run in runs for warning in run.warnings],
        differences=tables.differences(runs),
        samples=[(run.name, by_step(run.samples, small)) for run in runs if run.samples],
        events=[(run.name, [_told(event) for event in run.events]) for run in runs if run.events],
        most_events=MOST_EVENTS,
        data_lines=[(run.name, run.data) for run in runs if run.data],
        marked=any(charts.marks(run) for run in runs),
        half_life=f"{charts.HALF_LIFE:.0%}",
    )


def embedded(value: Any) -> str:
    """JSON for a script element: no character of it can end the element, or begin a comment in it."""
    said = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return said.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("report.html"))


@cache
def _asset(name: str) -> str:
    found = ASSETS
    for part in name.split("/"):
        found = found / part
    return found.read_text(encoding="utf-8").strip()


def _policy(script: str, style: str) -> str:
    """A Content-Security-Policy for exactly this script and this style."""
    ours = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    return (
        f"default-src 'none'; script-src 'sha256-{ours[0]}'; style-src 'sha256-{ours[1]}'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


def _sections(drawn: Sequence[Chart]) -> dict[str, list[Chart]]:
    found: dict[str, list[Chart]] = {}
    for chart in drawn:
        found.setdefault(chart.section, []).append(chart)
    return found


def _told(event: Event) -> tuple[str, str, str, str]:
    details = ", ".join(f"{name} {printable(value, 300)}" for name, value in event.details if value not in EMPTY)
    step = "" if event.step is None else f"{event.step:,}"
    return event.time.strftime("%Y-%m-%d %H:%M:%S"), event.name, step, details


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def by_step(samples: Sequence[Sample], small: Mapping[str, str] = MappingProxyType({})) -> list[tuple[str, list[Answers]]]:
    """The samples of each step, the newest first; `small`: pictures of images, by path."""
    found: dict[int | None, list[Answers]] = {}
    for sample in samples:
        found.setdefault(sample.step, []).append(compared(sample, small))
    order = sorted(found, key=lambda step: float("inf") if step is None else step, reverse=True)
    return [("at the end" if step is None else f"at step {step:,}", found[step]) for step in order]


def compared(sample: Sample, small: Mapping[str, str] = MappingProxyType({})) -> Answers:
    """The reference's and the policy's answer, with the words that only one of them has."""
    images = [(name, small.get(path)) for name, path in sample.images]
    if sample.reference is None or sample.policy is None:
        answers = (sample.reference, sample.policy)
        reference, policy = (None if answer is None else [Part(answer, False)] for answer in answers)
        return Answers(sample.prompt, reference, policy, sample.chosen, images)
    (before, rest_before), (after, rest_after) = map(_words, (sample.reference, sample.policy))
    matches = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    old = [Part("".join(before[a:b]), tag != "equal") for tag, a, b, _, _ in matches if b > a]
    new = [Part("".join(after[c:d]), tag != "equal") for tag, _, _, c, d in matches if d > c]
    for parts, rest in ((old, rest_before), (new, rest_after)):
        parts += [Part(rest, False)] * bool(rest)
    return Answers(sample.prompt, old, new, sample.chosen, images)


def _words(answer: str) -> tuple[list[str], str]:
    """(words and what is between them, the rest of a long answer)."""
    words = re.findall(r"\w+|\s+|[^\w\s]", answer)
    return words[:MOST_WORDS], "".join(words[MOST_WORDS:])
