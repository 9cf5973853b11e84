"""The run folder: everything that a run leaves behind, and what it says of itself."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import dspref
from dspref import config as configuration
from dspref import distributed
from dspref.config import Config
from dspref.errors import ConfigError, EnvironmentFault, ExitCode
from dspref.files import DRAFT, append_line, end_line, flushed, remove, whole_lines, write_atomically
from dspref.model import digests
from dspref.reading import is_count, open_regular
from dspref.run import manifest, record
from dspref.run.status import is_foreign
from dspref.secrets import redact
from dspref.terminal import command

METRICS, EVENTS, RESOLVED = "metrics.jsonl", "events.jsonl", "config.resolved.yaml"

# Keys that may differ between a run and its continuation: they change speed, memory, reports or the length of the run (and
# with it the learning rates of the schedule), but neither the pairs of a step nor what is computed from them. (The router
# loss with scope `micro` is the exception: other packs balance experts over other tokens.)
MAY_CHANGE = (
    "data.tokens_per_pack", "data.prefix_sharing", "model.attn_implementation", "model.liger",
    "model.gradient_checkpointing",
    "model.name_or_path", "model.lora.path", "model.lora.merge_on_export", "reference.store",
    "train.max_steps", "train.num_train_epochs", "train.eval_every", "train.max_skipped_steps", "train.hang_timeout",
    "train.spike_sigmas",
    "checkpoint", "log", "output_dir",
    # How DeepSpeed lays out memory and talks (stage3_... are among these); of the stage see `_refuse_stage`. What decides
    # the order of weights in its shards is not here: sub_group_size, round_robin_gradients, offloading.
    "deepspeed.zero_optimization.stage", "deepspeed.zero_optimization.reduce_bucket_size",
    "deepspeed.zero_optimization.allgather_bucket_size", "deepspeed.zero_optimization.overlap_comm",
    "deepspeed.zero_optimization.contiguous_gradients", "deepspeed.wall_clock_breakdown", "deepspeed.comms_logger",
)  # fmt: skip
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

    def open(self, config: Config, source: Path | None, ds_config: Mapping[str, Any], steps: int) -> None:
        """Write state, config and versions (rank 0, which holds the lock). run.json comes first: from then on a kill leaves
        a run. A folder that is started anew keeps its old run in `previous-*`.

        Raises EnvironmentFault where another process has been here since `look`.
        """
        if self._seen is not None and self._seen != (_content(self.path / record.NAME),):
            raise EnvironmentFault(f"output_dir: another process ran in {self.path} just now; give the same command again")
        for left in self.path.glob(f"{DRAFT}*"):
            remove(left)
        for left in (".final", ".adapter", ".old-final", ".old-adapter"):
            remove(self.path / left)
        anew = config.checkpoint.resume == "never"
        if not anew:
            mend_tail(self.path / EVENTS)
        known = self._set_aside(anew)
        known = {key: value for key, value in known.items() if key not in ("error", "exit_code", "aside")}
        self._own = {"run_id": _new_id(), "started": _now()} | known
        self.update(steps=steps, **_whereabouts())
        for folder in (self.checkpoints, self.path / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        if source:
            self._write("config.source.yaml", source.read_text(encoding="utf-8"))
        self._write(RESOLVED, configuration.dump(config))
        self._write("ds_config.json", json.dumps(ds_config, indent=2) + "\n")
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
        """Bring to disk what has been written of metrics and events so far: a checkpoint counts on it."""
        for name in (METRICS, EVENTS):
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

    # -----------------------------------------------------------------------------------------------------------------
    # Changed settings

    def refuse_changes(self, config: Config) -> list[str]:
        """What differs from the settings of the run in this folder, as lines to show. Raises ConfigError for a key that
        decides what a step computes, and where nothing tells any more what the settings were."""
        if record.read(self.path)[0].get("aside"):
            return []
        said = manifest.newest(self.checkpoints, self.run.get("run_id"))
        new = flatten(configuration.resolved(config))
        old = self._settings_before(said, config)
        if old is None:
            return []
        self._refuse_stage(old.get("deepspeed.zero_optimization.stage", 0), config)
        changed = [key for key in sorted({*old, *new}) if not _alike(old.get(key), new.get(key))]
        refused = [key for key in changed if not key.startswith(MAY_CHANGE)]
        if refused:
            asked = flatten(config.model_dump(mode="json", exclude_unset=True))
            raise ConfigError(
                f"{_difference(refused, old, new, asked, self.path)}, or start anew with another output_dir= or "
                "checkpoint.resume=never"
            )
        return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed]

    def _settings_before(self, said: Mapping[str, Any] | None, config: Config) -> dict[str, Any] | None:
        """By the newest manifest, else by config.resolved.yaml; None where nothing has been computed with any."""
        if said and isinstance(said.get("settings"), dict):
            return flatten(settings_of(said["settings"]))
        path = self.path / RESOLVED
        try:
            return flatten(configuration.resolved(configuration.load(path)))
        except ConfigError as error:
            if not said and not self.is_finished:
                return None
            # The manifest of an older dspref, which holds no more than a digest.
            if said and said["config"] == digest_of(config):
                return flatten(configuration.resolved(config))
            raise ConfigError(
                f"{path}: cannot be read, so nothing tells whether the settings are still the run's ({first_line(error)}); "
                "restore it, or start anew with another output_dir= or checkpoint.resume=never"
            ) from None

    def _refuse_stage(self, before: int, config: Config) -> None:
        """Raise ConfigError where optimizer states would have to pass between stages that keep them otherwise."""
        saved, now = manifest.committed(self.checkpoints), config.zero_stage
        if before == now or {before, now} == {1, 2} or not saved:
            return
        lora = config.model.lora
        key = "model.lora.path" if lora and not lora.merge_on_export else "model.name_or_path"
        raise ConfigError(
            f"deepspeed.zero_optimization.stage: {now}, but the run in {self.path} has {before}, and of its "
            "optimizer only stages 1 and 2 read each other; restore it, or "
            f"`{command('dspref', 'export', saved[-1])} --to FOLDER` "
            f"and begin there with {key}=FOLDER and another output_dir="
        )


def first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def settings_of(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that a manifest holds, with the keys that dspref has now."""
    try:
        return configuration.resolved(Config.model_validate(values))
    except ValueError:  # of another version
        return values


def decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """Of resolved settings, by dotted key, those that may not change."""
    return {key: value for key, value in flatten(settings).items() if not key.startswith(MAY_CHANGE)}


def digest_of(config: Config) -> str:
    """sha256 of the resolved config."""
    return hashlib.sha256(configuration.dump(config).encode()).hexdigest()


# What other settings depend on, with defaults that differ: named first, as a change of it changes these too.
SELECTING = ("objective.name", "objective.loss_type", "reference.mode")


def _difference(
    keys: Sequence[str], old: Mapping[str, Any], new: Mapping[str, Any], asked: Mapping[str, Any], folder: Path
) -> str:
    """The settings that differ from those of the run in a folder, and what restores the first, which is one that the user
    has set (`asked`), where there is any. A section that one of them lacks is one difference."""
    found = list(dict.fromkeys(_section_of(key, old, new) for key in keys))
    found.sort(key=lambda key: (key not in SELECTING, not any(name == key or name.startswith(f"{key}.") for name in asked)))
    key, *others = found
    more = f" ({', '.join(others[:5])}{', ...' if others[5:] else ''} too)" if others else ""
    before, now = (_in_words(key, values) for values in (old, new))
    restore = f"restore it{more}" if before != "null" else f"leave it out{more}"
    return f"{key}: {now}, but the run in {folder} has {before}; {restore}"


def _section_of(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The outermost section of a key that only one of two settings has, else the key."""
    parts = key.split(".")
    sections = (".".join(parts[:n]) for n in range(1, len(parts)))
    lacking = (name for name in sections if any(name in values and values[name] is None for values in (old, new)))
    return next(lacking, key)


def _in_words(key: str, values: Mapping[str, Any]) -> str:
    if any(name.startswith(f"{key}.") for name in values):
        return "one with settings"
    return repr(value) if (value := values.get(key)) is not None else "null"


def _alike(before: Any, now: Any) -> bool:
    """Equal, but for secrets, which no file of a run holds."""
    return before == now or (isinstance(before, str) and isinstance(now, str) and before == redact(now))


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


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    return {k: v for key, inner in values.items() for k, v in flatten(inner, f"{prefix}.{key}" if prefix else key).items()}


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
