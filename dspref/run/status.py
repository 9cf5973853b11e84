"""What a run folder says of its run, read from its files alone: on a login node, without torch, while the run goes on.

Any file may be missing, and the last line of a log half-written.
"""

from __future__ import annotations

import math
import os
import socket
import statistics
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from dspref.config import yaml12
from dspref.errors import ConfigError
from dspref.files import read_lines, read_object
from dspref.reading import is_count, is_number
from dspref.run import curves, manifest, record
from dspref.run.curves import Curves
from dspref.run.finding import is_run
from dspref.terminal import duration, printable

# The file of a run folder that says how far the scoring of its reference is, while that lasts.
SCORING = "scoring.json"
# Step times that the estimate of the end is made of.
RECENT = 50
# States of a run that goes on.
ALIVE = ("running", "scoring")
# A run that says nothing for so long may have lost its node.
SILENT_SECONDS = 600
# State -> what a person can do.
NEXT = {
    **dict.fromkeys(
        ("interrupted", "stopped", "ended", "cancelled"), "the same command again goes on from the newest checkpoint"
    ),
    "held": "scontrol release and the job's number: SLURM starts no job that is held",
    "requeued": "nothing: SLURM starts the job again, and it goes on from the newest checkpoint",
}
# No step takes so many seconds.
LONGEST = 1e9


def read(folder: Path, now: datetime | None = None, numbers: Curves | None = None) -> dict[str, Any]:
    """Everything that is known of a run; None for what is not. Raises ConfigError where there is no run. `numbers`: of its
    metrics.jsonl, if they have been read."""
    now = now or datetime.now(UTC)
    (found, damage), job = record.read(folder), read_object(folder / "submit" / "job.json")
    run = record.sound(found)
    if not is_run(folder):
        raise ConfigError(f"{folder}: holds no dspref run; give the output_dir of one")
    if not damage and not found and not job and not os.path.exists(folder / "submit" / "config.yaml"):
        damage = "is missing"
    if damage and not run:
        run = {"state": "damaged", "error": f"{record.NAME}: {damage}"}
    events = events_of(folder)
    # What runs outside of SLURM belongs to no job, whatever was submitted before.
    jobs = [] if run.get("state") == "running" and not run.get("job") else [job.get("job"), run.get("job")]
    numbers = numbers or curves.read(folder / "metrics.jsonl", resumes_of(events))
    step, effective, recent = training(numbers)
    commit_step, commit_time = newest_commit(folder, events)
    scoring = scoring_of(folder)
    state = state_of(run, job, events)
    if state == "running" and scoring:
        state = "scoring"
    begin = moment(run.get("started")) or (moment(events[0]["time"]) if events else None)
    sign = last_sign(folder, events)
    end = now if state in ALIVE else end_of(events, numbers)
    wall = (end - begin).total_seconds() if begin and end else 0
    step, planned = max(step, commit_step or 0), run.get("steps")
    steps = planned if is_count(planned) else max_steps(folder)
    runs = job.get("runs")
    return {
        "run": str(folder),
        "state": state,
        "objective": objective_of(folder),
        "host": run.get("host"),
        "pid": run.get("pid"),
        "world_size": run.get("world_size"),
        "job": next((found for found in jobs if isinstance(found, str)), None),
        "step": step,
        "steps": steps,
        "seconds_per_step": recent,
        "scoring": scoring if state == "scoring" else None,
        "eta_seconds": recent * (steps - step) if state == "running" and steps and recent else None,
        "commit_step": commit_step,
        "commit_age_seconds": (now - commit_time).total_seconds() if commit_time else None,
        "silent_seconds": (now - sign).total_seconds() if sign else None,
        "wall_seconds": wall or None,
        "goodput": min(effective / wall, 1.0) if wall > 0 else None,
        "restarts": max(sum(event.get("event") == "start" for event in events) - 1, 0),
        "error": run.get("error"),
        "log": job.get("log") if isinstance(job.get("log"), str) else None,
        "runs": [run for run in runs if isinstance(run, str)] if isinstance(runs, list) else None,
        **curves.summary(numbers),
    }


def events_of(folder: Path) -> list[dict[str, Any]]:
    """events.jsonl, but for what has no time."""
    return [event for event in read_lines(folder / "events.jsonl") if moment(event.get("time"))]


def resumes_of(events: list[dict[str, Any]]) -> set[int]:
    """The steps that a run went on from."""
    return {event["step"] for event in events if event.get("event") == "resume" and is_count(event.get("step"))}


def state_of(run: Mapping[str, Any], job: Mapping[str, Any], events: list[dict[str, Any]]) -> str:
    """run.json's word, but `stopped` where its process is gone, `submitted` where a job waits to begin or to go on, and
    `prepared` where a job script was only written."""
    submitted, last = moment(job.get("submitted")), moment(events[-1]["time"]) if events else None
    if not run and not job:
        return "prepared"
    if not run or (submitted and last and submitted > last and run.get("state") != "finished"):
        return "submitted"
    state = run.get("state", "unknown")
    return "stopped" if state == "running" and is_gone(run) else state


def scoring_of(folder: Path) -> dict[str, Any] | None:
    """Pairs whose reference is scored (`done`) and is to be (`total`), and `seconds_left`, which may be None."""
    said = read_object(folder / SCORING)
    done, total, left = (said.get(name) for name in ("done", "total", "seconds_left"))
    if not (is_count(done) and is_count(total) and done <= total > 0):
        return None
    return {"done": done, "total": total, "seconds_left": left if is_number(left) and math.isfinite(left) else None}


def is_gone(run: Mapping[str, Any]) -> bool:
    """True where the process would be on this host, and is not."""
    if run.get("host") != socket.gethostname() or not isinstance(run.get("pid"), int):
        return False
    try:
        os.kill(run["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # somebody else's, and alive
        pass
    return False


def training(numbers: Curves) -> tuple[int, float, float | None]:
    """(last step, seconds of all steps, median seconds of the recent ones), from the steps that metrics.jsonl keeps."""
    steps = list(timed(numbers))
    recent = [seconds for _, _, seconds in steps[-RECENT:]]
    effective = sum(count * seconds for _, count, seconds in steps)
    return max(numbers.training, default=0), effective, statistics.median(recent) if recent else None


def timed(numbers: Curves) -> Iterator[tuple[int, int, float]]:
    """Of each logged step that says how long it took: (step, steps since the logged one before, seconds of a step). Steps
    without a line of their own took as long."""
    before = 0
    for step, line in numbers.training.items():
        seconds = line.get("perf/seconds")
        if is_number(seconds) and 0 <= seconds < LONGEST:
            yield step, step - before, seconds
        before = step


def newest_commit(folder: Path, events: list[dict[str, Any]]) -> tuple[int | None, datetime | None]:
    """(step, time) of the newest committed checkpoint that is there."""
    try:
        found = [path for path in manifest.committed(folder / "checkpoints") if (path / manifest.NAME).exists()]
    except OSError:
        found = []
    if not found:
        return None, None
    step = manifest.step_of(found[-1])
    times = [event["time"] for event in events if event.get("event") == "commit" and event.get("step") == step]
    return step, moment(times[-1]) if times else modified(found[-1] / manifest.NAME)


def end_of(events: list[dict[str, Any]], numbers: Curves) -> datetime | None:
    """When a run that is over ended: at its last event, and the steps behind it. By what is written and not by the times of
    files, which a copy of the folder has of its own."""
    ended = moment(events[-1]["time"]) if events else None
    known = max((event["step"] for event in events if is_count(event.get("step"))), default=0)
    behind = sum(count * seconds for step, count, seconds in timed(numbers) if step > known)
    return ended + timedelta(seconds=behind) if ended else None


def last_sign(folder: Path, events: list[dict[str, Any]]) -> datetime | None:
    """When the run last left a trace."""
    signs = [moment(events[-1]["time"])] if events else []
    signs += [modified(folder / name) for name in ("metrics.jsonl", SCORING)]
    return max((sign for sign in signs if sign), default=None)


def asked(folder: Path, section: str) -> dict[str, Any]:
    """A section of the run's config, as it was resolved, else as it was submitted; {} where neither has one."""
    for path in (folder / "config.resolved.yaml", folder / "submit" / "config.yaml"):
        try:
            found = yaml12.parse(path)[0].get(section)
        except ConfigError:
            continue
        return found if isinstance(found, dict) else {}
    return {}


def max_steps(folder: Path) -> int | None:
    """The steps that the config names, if it does: of a run that has not planned them yet."""
    steps = asked(folder, "train").get("max_steps")
    return steps if is_count(steps) else None


def objective_of(folder: Path) -> str | None:
    """Name and losses, where the run has resolved its config."""
    section = asked(folder, "objective")
    losses = section.get("loss_type")
    names = [section.get("name"), *(losses if isinstance(losses, list) else [losses])]
    if not all(isinstance(name, str) for name in names):
        return None
    return f"{names[0]} / {' + '.join(names[1:])}"


def modified(path: Path) -> datetime | None:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except (OSError, ValueError, OverflowError):
        return None


def moment(text: Any) -> datetime | None:
    try:
        found = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    if not 1970 <= found.year < 9000:  # at the ends of what can be written no other time can be compared with it
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


# ---------------------------------------------------------------------------------------------------------------------
# In words


def show(status: Mapping[str, Any]) -> str:
    """One screen, aligned."""
    where = [f"on {status['host']}"] if status["host"] and status["state"] in (*ALIVE, "stopped") else []
    where += [f"{status['world_size']} rank{'s' * (status['world_size'] != 1)}"] if status["world_size"] else []
    where += [f"job {status['job']}"] if status["job"] else []
    if status["state"] in ALIVE and (status["silent_seconds"] or 0) > SILENT_SECONDS:
        where.append(f"no sign of life for {duration(status['silent_seconds'])}")
    left = f", about {duration(status['eta_seconds'])} left" if status["eta_seconds"] is not None else ""
    rows = {
        "run": status["run"],
        "state": ", ".join([status["state"], *where]),
        **({"objective": status["objective"]} if status["objective"] else {}),
        "step": steps_in_words(status) + left,
        "commit": "none, but for the final model" if status["state"] == "finished" else "none yet",
        "goodput": "unknown",
        "restarts": str(status["restarts"]),
    }
    if scoring := status["scoring"]:
        done, total, seconds = scoring["done"], scoring["total"], scoring["seconds_left"]
        left = f", about {duration(seconds)} left" if seconds is not None else ""
        rows["scoring"] = f"{done:,} of {total:,} pairs ({done / total:.0%}){left}, by the reference, before the next step"
    if status["commit_step"] is not None:
        rows["commit"] = f"step {status['commit_step']:,}, {duration(status['commit_age_seconds'])} ago"
    if status["goodput"] is not None:
        rows["goodput"] = f"{status['goodput']:.0%} of {duration(status['wall_seconds'])} went into steps that were kept"
    rows |= {name: text for name, text in learned(status).items() if text}
    rows |= {name: str(status[name]) for name in ("slurm", "error", "log") if status.get(name)}
    if next_step := NEXT.get(status["state"]):
        rows["next"] = next_step
    width = max(8, *map(len, rows))
    return "\n".join(f"{name:<{width}}  {printable(text, limit=500)}" for name, text in rows.items())


def learned(status: Mapping[str, Any]) -> dict[str, str]:
    """Loss, accuracy and held-out sets in words; "" for what is not known."""
    tail = f", {{}} as mean of the last {status['tail']} logged" if (status["tail"] or 0) > 1 else ""
    rows = {
        name: f"{figure(status[name])}{tail.format(figure(status[f'{name}_mean']))}" if status[name] is not None else ""
        for name in ("loss", "accuracy")
    }
    for name, told in status["evaluations"].items():
        parts = []
        for of in ("loss", "accuracy"):
            if found := told[of]:
                best = f" (best {figure(found['best'])} at {found['best_step']:,})"
                parts.append(f"{of} {figure(found['last'])} at step {found['step']:,}{best}")
        rows[printable(name, limit=40)] = ", ".join(parts)
    return rows


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


# Of a table of runs: the head of a column, and whether it holds numbers, which are set to the right.
COLUMNS = {
    "run": False, "state": False, "step": True, "loss": True, "acc": True, "eval loss": True, "eval acc": True,
    "tok/s": True, "left": True, "checkpoint": True,
}  # fmt: skip


def show_sweep(statuses: list[dict[str, Any]], within: Path | None = None) -> str:
    """A line per run, below the heads of their columns; `within`: the folder that their names are told from."""
    rows = [list(COLUMNS), *(in_columns(status, within) for status in statuses)]
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    lines = []
    for row in rows:
        cells = (f"{cell:{'>' if right else '<'}{width}}" for cell, width, right in zip(row, widths, COLUMNS.values()))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def in_columns(status: Mapping[str, Any], within: Path | None) -> list[str]:
    name = status["run"]
    if within and Path(name).is_relative_to(within):
        name = str(Path(name).relative_to(within))
    held_out = next(iter(status["evaluations"].values()), {})
    loss, accuracy = (figure((held_out.get(of) or {}).get("last")) for of in ("loss", "accuracy"))
    speed, left, commit = status["tokens_per_second_mean"], status["eta_seconds"], status["commit_step"]
    cells = [
        name, status["state"], steps_in_words(status), figure(status["loss"]), figure(status["accuracy"]), loss, accuracy,
        "-" if speed is None else f"{speed:,.0f}", "-" if left is None else duration(left),
        "-" if commit is None else f"{commit:,}",
    ]  # fmt: skip
    return [printable(cell, limit=120) for cell in cells]


def steps_in_words(status: Mapping[str, Any]) -> str:
    step, steps = status["step"], status["steps"]
    return f"{step:,} of {steps:,} ({step / steps:.0%})" if steps else f"{step:,}"
