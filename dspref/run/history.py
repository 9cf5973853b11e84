"""All that a run folder has of its run, for a report: from its files alone, without torch, while the run goes on or after.

Any file may be missing, damaged, or of an older dspref: what could not be read is told in `faults`, and the rest stands.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from dspref import reading
from dspref.config import yaml12
from dspref.errors import ConfigError
from dspref.files import lines_of, read_object
from dspref.reading import is_count
from dspref.run import curves, finding, record, status
from dspref.run.curves import Curves
from dspref.secrets import redact
from dspref.terminal import shown

# Bytes of a log, from its beginning, in which the lines on data and the warnings are looked for.
LOG_BYTES = 20_000_000
# The most of what is kept: of samples, of a text in one, of events, of different warnings.
MOST_SAMPLES, MOST_CHARACTERS, MOST_EVENTS, MOST_WARNINGS = 400, 4_000, 2_000, 100
# What samples.jsonl calls the answers: of the policy, and of the reference or of the model before training.
POLICY, REFERENCE = ("policy", "after"), ("reference", "before")
# Of a sample; and how the name of one begins that is no path.
MOST_IMAGES, OF_BYTES = 32, "sha256:"
STAMP = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:[+-]\d\d:\d\d)? ")


class Sample(NamedTuple):
    """A prompt with its answers. `step`: None where the file does not say, which is the end of the run."""

    step: int | None
    prompt: str
    policy: str | None
    reference: str | None
    chosen: str | None
    images: tuple[tuple[str, str], ...] = ()
    """(name, path) of the images of the prompt; no path, where the row had the image itself."""


class Event(NamedTuple):
    """`details`: what else the line says, as (name, value) in words."""

    time: datetime
    name: str
    step: int | None
    details: list[tuple[str, str]]


@dataclass(frozen=True)
class History:
    """What is known of a run. `status`: as `status.read` has it. `config`, `versions`: dotted names and values in words.
    `data`: the run's own lines on its data. `faults`: what is wrong with its files, a line each."""

    name: str
    status: dict[str, Any]
    curves: Curves
    events: list[Event]
    samples: list[Sample]
    config: dict[str, str]
    versions: dict[str, str]
    data: list[str]
    warnings: list[str]
    faults: list[str]


def read_all(folders: Sequence[Path]) -> list[History]:
    """The runs in or at these folders, each once. Raises ConfigError where there is none in one of them."""
    found: dict[str, Path] = {}
    for folder in folders:
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise ConfigError(f"{folder}: is no folder; give the output_dir of a run")
        runs = [folder] if finding.is_run(folder) else finding.runs_in(folder)
        if not runs:
            raise ConfigError(f"{folder}: holds no dspref run; give the output_dir of one")
        sweep = status.read(folder)["runs"] if finding.is_run(folder) else None
        runs = [path for path in map(Path, sweep or []) if finding.is_run(path)] or runs
        found |= {os.path.realpath(path): path for path in runs if os.path.realpath(path) not in found}
    return [read(path, name) for path, name in zip(found.values(), names(list(found)))]


def names(paths: Sequence[str]) -> list[str]:
    """As little of each path as tells it from the others."""
    parts = [Path(path).parts for path in paths]
    longest = max(map(len, parts), default=1)
    for length in range(1, longest + 1):
        short = ["/".join(part[-length:]) for part in parts]
        if len(set(short)) == len(short):
            return [text(name, 80) for name in short]
    return [text(path, 80) for path in paths]


def read(folder: Path, name: str) -> History:
    """Raises ConfigError where there is no run."""
    faults: list[str] = []
    events, bad_events = _events(folder / "events.jsonl")
    numbers = curves.read(folder / "metrics.jsonl", {e.step for e in events if e.name == "resume" and e.step is not None})
    about = status.read(folder, numbers=numbers)
    samples, bad_samples, more = samples_of(folder / record.SAMPLES)
    config = _config(folder, faults)
    data, warnings = _log(folder / "logs" / "rank-0.log")
    warnings += [text(line) for line in (_summary(folder).get("warnings") or []) if text(line) not in warnings]
    for file in ("metrics.jsonl", "events.jsonl", "config.resolved.yaml", "env.json"):
        if not os.path.exists(folder / file):
            faults.append(f"{file} is missing")
        elif not os.path.isfile(folder / file) or not os.access(folder / file, os.R_OK):
            faults.append(f"{file} cannot be read")
    bad = {"metrics.jsonl": numbers.bad_lines, "events.jsonl": bad_events, "samples.jsonl": bad_samples}
    faults += [
        f"{file}: {_counted(count, 'line')} passed over, damaged or half-written" for file, count in bad.items() if count
    ]
    if numbers.repeated:
        faults.append(
            f"metrics.jsonl: {_counted(numbers.repeated, 'step')} said twice, as the run went back; the later holds"
        )
    if not numbers.training and os.path.exists(folder / "metrics.jsonl"):
        faults.append("metrics.jsonl has no step yet")
    faults += [f"samples.jsonl: {more} more samples are left out"] * bool(more)
    damage = record.read(folder)[1] or ("is missing" if about["state"] == "damaged" else "")
    faults += [f"{record.NAME} {damage}"] * bool(damage)
    versions = _flat(read_object(folder / "env.json"))
    faults += ["env.json cannot be read"] * (os.path.isfile(folder / "env.json") and not versions)
    return History(name, about, numbers, events[-MOST_EVENTS:], samples, config, versions, data, warnings, faults)


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def text(value: Any, limit: int = MOST_CHARACTERS) -> str:
    """A value of a file in words: without secrets and without what a terminal or a browser would obey."""
    try:
        said = value if isinstance(value, str) else json.dumps(value)
    except (RecursionError, ValueError):  # nested by a hand that means it
        said = "…"
    said = shown(redact(said[: 2 * limit]))
    return said if len(said) <= limit else f"{said[: limit - 1]}…"


def _summary(folder: Path) -> Mapping[str, Any]:
    return record.sound(record.read(folder)[0]).get("summary") or {}


def _events(path: Path) -> tuple[list[Event], int]:
    """(events, lines that are none)."""
    found, bad = [], 0
    for line in lines_of(path):
        time = status.moment(line.get("time")) if line is not None else None
        if line is None or time is None:
            bad += 1
            continue
        details = [(text(key, 60), text(value, 300)) for key, value in line.items() if key not in ("time", "event", "step")]
        step = line.get("step")
        found.append(Event(time, text(line.get("event", "?"), 60), step if is_count(step) else None, details))
    return found, bad


def samples_of(path: Path) -> tuple[list[Sample], int, int]:
    """(the last samples, lines that are none, how many samples are left out)."""
    found, bad = [], 0
    for line in lines_of(path):
        answers = [_first(line or {}, names) for names in (POLICY, REFERENCE, ("chosen",))]
        prompt = (line or {}).get("prompt")
        if not isinstance(prompt, str | list) or not any(answer is not None for answer in answers):
            bad += 1
            continue
        step = (line or {}).get("step")
        found.append(Sample(step if is_count(step) else None, _turns(prompt), *answers, images=_images(line or {})))
    return found[-MOST_SAMPLES:], bad, max(len(found) - MOST_SAMPLES, 0)


def _images(line: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    images, folder = line.get("images"), line.get("image_folder")
    names = [name for name in images if isinstance(name, str)] if isinstance(images, list) else []
    at = folder if isinstance(folder, str) else ""
    paths = ["" if name.startswith(OF_BYTES) else os.path.join(at, os.path.expanduser(name)) for name in names]
    return tuple(zip((text(name, 300) for name in names), paths))[:MOST_IMAGES]


def _first(line: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of these values that is there: a text, or messages."""
    return next((_turns(line[name]) for name in names if isinstance(line.get(name), str | list)), None)


def _turns(value: Any) -> str:
    """A text, or the messages of a conversation, as one text."""
    if isinstance(value, str):
        return text(value)
    turns = [turn for turn in value if isinstance(turn, dict)]
    return "\n".join(f"{text(turn.get('role', '?'), 40)}: {text(turn.get('content', ''))}" for turn in turns)


def _config(folder: Path, faults: list[str]) -> dict[str, str]:
    for path in (folder / "config.resolved.yaml", folder / "submit" / "config.yaml"):
        if not os.path.isfile(path):
            continue
        try:
            return _flat(yaml12.parse(path)[0])
        except (ConfigError, OSError) as error:
            faults.append(text(f"{path.name} cannot be read: {error}", 300))
    return {}


def _flat(value: Any, before: str = "") -> dict[str, str]:
    """Dotted names of what is not a table, and the values in words."""
    if isinstance(value, dict) and value:
        parts = (_flat(inner, f"{before}.{key}" if before else str(key)) for key, inner in value.items())
        return {key: said for part in parts for key, said in part.items()}
    return {text(before, 120): text(value, 300)} if before else {}


def _log(path: Path) -> tuple[list[str], list[str]]:
    """(what the newest start says of its data, different warnings with how often they came)."""
    data: dict[str, None] = {}
    warnings: Counter[str] = Counter()
    for line in _lines(path):
        if line.startswith("model  "):  # a banner: a start
            data.clear()
        if re.match(r"(?:data|scored|packs|reference|steps|engine) {2,}|data: |left out |rows ", line):
            data[text(line, 500)] = None
        elif line.startswith("warning: "):
            warnings[text(line.removeprefix("warning: "), 500)] += 1
    said = [line + (f" ({count} times)" if count > 1 else "") for line, count in warnings.items()]
    more = [f"and {len(said) - MOST_WARNINGS} more"] if len(said) > MOST_WARNINGS else []
    return list(data), said[:MOST_WARNINGS] + more


def _lines(path: Path) -> Iterator[str]:
    """The lines of a log without their time stamps."""
    try:
        with reading.open_regular(path) as file:
            content = file.read(LOG_BYTES)
    except OSError:
        return
    for line in content.decode("utf-8", "replace").splitlines():
        yield STAMP.sub("", line)
