"""Which folders hold runs, by what lies in them. Loads no torch."""

from __future__ import annotations

import os
from pathlib import Path

from dspref.files import read_object
from dspref.run import manifest, record


def is_foreign(folder: Path) -> bool:
    """True for a folder that holds something which dspref did not make."""
    if not os.path.isdir(folder):
        return False
    if any((folder / name).exists() for name in (record.NAME, "submit/config.yaml", "submit/job.sbatch")):
        return False
    passing = record.PASSING.fullmatch
    known = {*record.STARTING, "events.jsonl"}  # a run may add to it in a folder that was deleted under it
    entries = [entry for entry in folder.iterdir() if entry.name not in known and not passing(entry.name)]
    if [entry.name for entry in entries] == ["checkpoints"] and entries[0].is_dir() and not any(entries[0].iterdir()):
        return False
    return bool(entries) and manifest.newest(folder / "checkpoints") is None


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, or what is left of one."""
    left = (record.NAME, "submit/config.yaml", "submit/job.json", "metrics.jsonl", "events.jsonl")
    return any(os.path.isfile(folder / name) for name in left) or bool(record.read(folder)[1])


def runs_in(folder: Path, depth: int = 2) -> list[Path]:
    """The runs in a folder of runs, by name: those in it, or in a folder in it, and those of its sweeps; none that was set
    aside."""
    if not depth:
        return []
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and not record.PASSING.fullmatch(path.name))
    except OSError:
        return []
    found: list[Path] = []
    for path in inner:
        runs = read_object(path / "submit" / "job.json").get("runs")
        of_sweep = (
            [Path(run) for run in runs if isinstance(run, str) and is_run(Path(run))] if isinstance(runs, list) else []
        )
        found += of_sweep or ([path] if is_run(path) else runs_in(path, depth - 1))
    return list({os.path.realpath(path): path for path in found}.values())
