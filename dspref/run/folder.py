"""The run folder: everything that a run leaves behind, and what it says of itself."""

from __future__ import annotations

import datetime
import json
import os
import platform
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import dspref
from dspref import config as configuration
from dspref import distributed
from dspref.errors import ConfigError, EnvironmentFault, ExitCode
from dspref.files import DRAFT, append_line, end_line, flushed, remove, whole_lines, write_atomically
from dspref.model import digests
from dspref.own_code import Used, kept_at
from dspref.reading import is_count, open_regular
from dspref.run import manifest, record
from dspref.run.finding import is_foreign
from dspref.secrets import redact

METRICS, EVENTS, RESOLVED = "metrics.jsonl", "events.jsonl", "config.resolved.yaml"

# Whose versions a run folder and a model card name.
PACKAGES = (
    "torch", "deepspeed", "transformers", "datasets", "numpy", "safetensors", "flash-attn", "peft", "bitsandbytes",
)  # fmt: skip


class RunFolder:
    """Everything that a run leaves behind. Made on rank 0, only after config and data have been found good."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"
        self._own: dict[str, Any] | None = None
        self._seen: tuple[bytes] | None = None

    # -----------------------------------------------------------------------------------------------------------------
    # run.json

    @property
    def run(self) -> dict[str, Any]:
        """run.json: id, state (running, finished), versions, and the summary of a finished run; {} in a fresh folder.

        Where it is damaged or gone, what the newest manifest says of the run. Raises ConfigError where none does.
        """
        if self._own is not None:
            return self._own
        found, damage = record.read(self.path)
        if found and not damage:
            return found
        said = manifest.newest(self.checkpoints)
        if said is not None:
            return {"run_id": said["run_id"], "content": said["content"]}
        if damage:
            raise ConfigError(
                f"{self.path / record.NAME}: {damage}, and no checkpoint tells what the run was; restore it, begin anew "
                "with checkpoint.resume=never, or use another output_dir="
            )
        return {}

    def look(self) -> list[str]:
        """What is wrong with the record of the run, in words to show. Remembers what it saw, for `open`."""
        found, damage = record.read(self.path)
        self._seen = (_content(self.path / record.NAME),)
        if not damage and (found or not self.run):
            return []
        said = damage or "is missing"
        return [f"warning: {self.path / record.NAME}: {said}; run {self.run['run_id']} goes on as its checkpoints tell"]

    @property
    def has_steps(self) -> bool:
        """Whether a step was made, as far as its metrics or a checkpoint tell."""
        written = self.path / METRICS
        return bool(manifest.committed(self.checkpoints)) or (written.is_file() and written.stat().st_size > 0)

    @property
    def is_finished(self) -> bool:
        return self.run.get("state") == "finished" and "summary" in self.run and self.final.exists()

    def damage_of_export(self) -> str | None:
        """The first file of the exported model that is no longer what the run wrote."""
        for name, (size, digest) in self.run.get("exported", {}).items():
            path = self.path / name
            if not path.is_file() or path.stat().st_size != size or digests.sha256(path) != digest:
                return name
        return None

    def update(self, **changes: Any) -> None:
        """Change run.json."""
        self._own = {**self.run, **changes}
        self._write(record.NAME, json.dumps(self._own, indent=2) + "\n")

    # -----------------------------------------------------------------------------------------------------------------
    # The beginning and the end of a run

    def refuse_foreign(self, anew: bool = False) -> None:
        """Raise ConfigError where the folder holds something that dspref did not make, and EnvironmentFault where something
        lies in the way of what it will. `anew`: what is there will be set aside."""
        if os.path.lexists(self.path) and not os.path.isdir(self.path):
            kind = "a file" if os.path.exists(self.path) else "a link that leads nowhere"
            raise ConfigError(f"output_dir: {self.path} is {kind}; choose another folder")
        if is_foreign(self.path):
            raise ConfigError(f"output_dir: {self.path} is not empty and holds no dspref run; choose another folder")
        if said := record.misplaced(self.path, anew):
            raise EnvironmentFault(f"output_dir: {said}")

    def open(
        self,
        settings: Mapping[str, Any],
        source: Path | None,
        ds_config: Mapping[str, Any],
        steps: int,
        anew: bool = False,
        own: Iterable[Used] = (),
    ) -> None:
        """Write state, resolved settings, versions and the sources of the user's `own` functions (rank 0, which holds the
        lock). run.json comes first: from then on a kill leaves a run. A folder that is started `anew` keeps its old run in
        `previous-*`.

        Raises EnvironmentFault where another process has been here since `look`.
        """
        if self._seen is not None and self._seen != (_content(self.path / record.NAME),):
            raise EnvironmentFault(f"output_dir: another process ran in {self.path} just now; give the same command again")
        for left in self.path.glob(f"{DRAFT}*"):
            remove(left)
        for left in (".final", ".adapter", ".old-final", ".old-adapter"):
            remove(self.path / left)
        if not anew:
            mend_tail(self.path / EVENTS)
        known = self._set_aside(anew)
        known = {key: value for key, value in known.items() if key not in ("error", "exit_code", "aside")}
        self._own = {"run_id": _new_id(), "started": _now()} | known
        self.update(steps=steps, **_whereabouts())
        for folder in (self.checkpoints, self.path / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        if source:
            self._write("config.source.yaml", configuration.source(source))
        self._write(RESOLVED, configuration.as_yaml(settings))
        self._write("ds_config.json", json.dumps(ds_config, indent=2) + "\n")
        for used in own:
            kept = kept_at(self.path, used.kind, used.name)
            kept.parent.mkdir(exist_ok=True)
            self._write(str(kept.relative_to(self.path)), used.source.text)
        self._write("env.json", json.dumps(environment(), indent=2) + "\n")

    def left(self, exit_code: int, message: str, step: int) -> None:
        """The run ends before its end (rank 0)."""
        if self._own and self._own["state"] == "running" and self.is_there:
            state = "interrupted" if exit_code in (ExitCode.INTERRUPTED, ExitCode.CTRL_C) else "failed"
            self.update(state=state, error=message, exit_code=exit_code)
            self.event("stop", step=step, cause=message, exit_code=exit_code)

    @property
    def is_there(self) -> bool:
        """False once the folder has been deleted or moved."""
        return (self.path / record.NAME).exists()

    def event(self, kind: str, **details: Any) -> None:
        """Append to events.jsonl (rank 0), unless the folder has been deleted."""
        if distributed.world().rank == 0 and self.is_there:
            append_line(self.path / EVENTS, redact(json.dumps({"time": _now(), "event": kind, **details})))

    def flush(self) -> None:
        """Bring to disk what has been written of metrics, events and samples so far: a checkpoint counts on it."""
        for name in (METRICS, EVENTS, record.SAMPLES):
            if (self.path / name).exists():
                flushed(self.path / name)

    def _write(self, name: str, text: str) -> None:
        write_atomically(self.path / name, redact(text))  # a config's comments may hold what its values may not

    def _set_aside(self, anew: bool) -> dict[str, Any]:
        """Move an old run to `previous-*` where it is begun anew, or where a process was killed while it did; what is known
        of the run in this folder then.

        run.json says first that the folder is being cleared, and stays: what is killed on the way goes on with it.
        """
        found, damage = record.read(self.path)
        going_on = not damage and found.get("aside", "")
        if going_on and not (going_on.startswith("previous-") and record.PASSING.fullmatch(going_on)):
            raise ConfigError(f"{self.path / record.NAME}: aside: {going_on!r} is no folder of dspref's; restore it")
        if not going_on and not (anew and any(entry.name not in record.STARTING for entry in _entries(self.path))):
            return self.run
        if not going_on:
            aside = manifest.free_name(self.path / f"previous-{datetime.datetime.now():%Y%m%d-%H%M%S}")
            aside.mkdir()
            if (self.path / record.NAME).is_file():
                write_atomically(aside / record.NAME, (self.path / record.NAME).read_bytes())
            found = {"run_id": _new_id(), "started": _now(), "aside": aside.name, **_whereabouts()}
            self._write(record.NAME, json.dumps(found, indent=2) + "\n")
        aside = self.path / found["aside"]
        aside.mkdir(exist_ok=True)
        for entry in [entry for entry in _entries(self.path) if entry.name != record.NAME]:
            entry.rename(manifest.free_name(aside / entry.name))
        return found


def content_key(used: Used) -> str:
    """Of the sha256 of its source, in `content` of run.json and of manifests."""
    return f"{used.kind.name} {used.name}"


def mend_tail(path: Path, end: int | None = None) -> None:
    """Cut off what lies behind `end` of a JSONL file, and what is no whole object at its end; damage is told."""
    end_line(path)
    size = path.stat().st_size if path.exists() else 0
    end = size if end is None else end
    kept, last = whole_lines(path, min(end, size))
    if kept < end:
        step = f", up to step {last['step']}" if last and is_count(last.get("step")) else ""
        distributed.log(
            f"warning: {path}: its end is damaged or missing; {end - kept} bytes are lost, whole lines stay{step}"
        )
    if kept < size:
        os.truncate(path, kept)


def _entries(folder: Path) -> Iterator[Path]:
    """What is in a run folder, but for what passes and for runs that were set aside."""
    return (entry for entry in folder.iterdir() if entry.name != record.LOCK and not record.PASSING.fullmatch(entry.name))


def _content(path: Path) -> bytes:
    """Of a small file; empty where it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError:
        return b""


def _whereabouts() -> dict[str, Any]:
    """Of the process that runs."""
    return {
        "state": "running",
        "job": os.environ.get("SLURM_JOB_ID"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "world_size": distributed.world().size,
    }


def _new_id() -> str:
    return uuid.uuid4().hex[:12]


def environment() -> dict[str, Any]:
    """Versions and hardware, for env.json and the model card."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "dspref": dspref.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world_size": distributed.world().size,
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
