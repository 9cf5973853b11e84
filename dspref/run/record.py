"""run.json: what a run says of itself; and the names of what may lie in its folder before there is one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dspref import own_code, reading
from dspref.files import DRAFT, read_json
from dspref.reading import are_words, is_count, is_number, is_word
from dspref.run.manifest import are_files
from dspref.watch.lock import NAME as LOCK
from dspref.watch.lock import RECORD as NAME

# What a folder may hold before its run.json: what `dspref submit` and SLURM put there, what a user asks for, and what an
# older dspref wrote before it.
STARTING = {
    "submit", "logs", "STOP", "SAVE", LOCK, "config.source.yaml", "config.resolved.yaml", "ds_config.json", "env.json",
}  # fmt: skip
# What a run writes anew as a whole, what it adds to, and what it keeps in folders (two for sources of the user's functions);
# of these the logs of its ranks.
SAMPLES = "samples.jsonl"
WHOLE = ("config.source.yaml", "config.resolved.yaml", "ds_config.json", "env.json", "scoring.json")
APPENDED = ("metrics.jsonl", "events.jsonl", SAMPLES)
FOLDERS = ("checkpoints", "logs", "submit", *(kind.folder for kind in own_code.KINDS))
MODELS = ("final", "adapter")
LOG = re.compile(r"rank-\d+(\.log|\.stacks\.txt)")
# Of files that are being written, of claims of the lock, and of runs that were set aside.
PASSING = re.compile(rf"{re.escape(DRAFT)}.*|{re.escape(LOCK)}-.*|previous-\d{{8}}-\d{{6}}(-\d+)?")


def read(folder: Path) -> tuple[dict[str, Any], str]:
    """(run.json, what is wrong with it in words); ({}, "") where there is none."""
    path = folder / NAME
    try:
        found = read_json(path)
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError) as error:
        return {}, f"cannot be read: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}"
    if not isinstance(found, dict):
        return {}, "holds no object"
    if "run_id" not in found:
        return found, "has no run_id"
    wrong = [key for key in found if key in KINDS and not KINDS[key](found[key])]
    return found, f"its {wrong[0]} is of the wrong kind" if wrong else ""


def misplaced(folder: Path, anew: bool = False) -> str | None:
    """What lies in a run folder where the run will write something of another kind, in words; `anew`: all but run.json is
    set aside first."""
    for path, kind in _kept(folder, anew):
        if os.path.lexists(path) and (found := _other_kind(path, kind)):
            return f"{path} {found}, where the run keeps its {path.name}; move it away"
    return None


def _kept(folder: Path, anew: bool) -> Iterator[tuple[Path, str]]:
    """What a run keeps in its folder: files that are written as a whole, logs that are added to, folders."""
    yield folder / NAME, "file"
    if anew:
        return
    yield from ((folder / name, "file") for name in WHOLE)
    yield from ((folder / name, "log") for name in APPENDED)
    yield from ((folder / name, "folder") for name in FOLDERS)
    if not {"exported", "aside"} & read(folder)[0].keys():
        yield from ((folder / name, "model") for name in MODELS)
    logs = folder / "logs"
    names = sorted(os.listdir(logs)) if os.path.isdir(logs) and os.access(logs, os.R_OK) else []
    yield from ((logs / name, "log") for name in names if LOG.fullmatch(name))


def _other_kind(path: Path, kind: str) -> str | None:
    if kind == "file":
        return "is a folder, not a file" if os.path.isdir(path) else None  # another name can be taken from anything else
    if not os.path.exists(path):
        return "is a link that leads nowhere"
    if kind == "model":
        ours = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
        return None if ours else "is none of the run's models"
    if kind == "folder":
        return None if os.path.isdir(path) else "is no folder"
    try:
        reading.refuse_kind(os.stat(path), path)
    except OSError as error:
        return error.strerror
    return None


def sound(found: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run.json whose values are of the right kind."""
    return {key: value for key, value in found.items() if key in KINDS and KINDS[key](value)}


def _is_summary(value: Any) -> bool:
    return isinstance(value, dict) and all(check(value.get(key)) for key, check in SUMMARY.items())


def _are_pairs(value: Any) -> bool:
    pairs = list(value.values()) if isinstance(value, dict) else [None]
    return all(isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_maybe(is_number), pair)) for pair in pairs)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_number, value.values()))


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_word, value))


def _maybe(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


# What is shown of a finished run.
SUMMARY: dict[str, Callable[[Any], bool]] = {
    "step": is_count,
    "seconds": is_number,
    "learned": _are_pairs,
    "speed": _maybe(_are_numbers),
    # Those of older runs lack what follows.
    "tail": _maybe(is_count),
    "starts": _maybe(is_count),
    "seconds_in_steps": _maybe(is_number),
    "warnings": _maybe(_are_words),
    "stopped": _maybe(is_word),
    "weights_of": _maybe(is_count),
}
KINDS: dict[str, Callable[[Any], bool]] = {
    "run_id": is_word,
    "state": is_word,
    "started": is_word,
    "steps": _maybe(is_count),
    "job": _maybe(is_word),
    "host": _maybe(is_word),
    "pid": _maybe(is_count),
    "world_size": _maybe(is_count),
    "content": are_words,
    "samples": is_word,
    "exported": are_files,
    "summary": _is_summary,
    "error": lambda value: isinstance(value, str),
    "exit_code": _maybe(is_count),
    "aside": is_word,
}
