"""The run folder: everything that a run leaves behind, and what it says of itself."""

from __future__ import annotations

import datetime
import json
import os
import platform
import socket
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import dspref
from dspref import config as configuration
from dspref import distributed
from dspref.config import Config
from dspref.errors import ConfigError, ExitCode
from dspref.files import write_atomically
from dspref.lock import NAME as LOCK
from dspref.secrets import redact
from dspref.status import is_foreign
from dspref.terminal import command

# Keys that may differ between a run and its continuation: they change speed, memory, reports or the length of the run (and
# with it the learning rates of the schedule), but neither the pairs of a step nor what is computed from them. (The router
# loss with scope `micro` is the exception: other packs balance experts over other tokens.)
MAY_CHANGE = (
    "data.tokens_per_pack", "data.prefix_sharing", "model.attn_implementation", "model.gradient_checkpointing",
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

    @property
    def run(self) -> dict[str, Any]:
        """run.json: id, state (running, finished), versions, and the summary of a finished run; {} in a fresh folder."""
        path = self.path / "run.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError as error:
            raise ConfigError(f"{path}: cannot be read ({error}); restore it, or use another output_dir=") from None

    @property
    def is_finished(self) -> bool:
        return self.run.get("state") == "finished" and "summary" in self.run and self.final.exists()

    def refuse_foreign(self) -> None:
        """Raise ConfigError where the folder holds something that dspref did not make."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output_dir: {self.path} is a file; choose another folder")
        if is_foreign(self.path):
            raise ConfigError(f"output_dir: {self.path} is not empty and holds no dspref run; choose another folder")

    def open(self, config: Config, source: Path | None, ds_config: Mapping[str, Any], steps: int) -> None:
        """Write config, versions and state (rank 0). A folder that is started anew keeps its old run in `previous-*`."""
        if config.checkpoint.resume == "never" and self.run:
            self._set_aside()
        for folder in (self.path, self.checkpoints, self.path / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        if source:
            self._write("config.source.yaml", source.read_text(encoding="utf-8"))
        self._write("config.resolved.yaml", configuration.dump(config))
        self._write("ds_config.json", json.dumps(ds_config, indent=2) + "\n")
        self._write("env.json", json.dumps(environment(), indent=2) + "\n")
        known = {key: value for key, value in self.run.items() if key not in ("error", "exit_code")}
        self.update(
            {"run_id": uuid.uuid4().hex[:12], "started": _now()} | known,
            state="running",
            steps=steps,
            job=os.environ.get("SLURM_JOB_ID"),
            host=socket.gethostname(),
            pid=os.getpid(),
            world_size=distributed.world().size,
        )

    def update(self, known: Mapping[str, Any] | None = None, **changes: Any) -> None:
        """Change run.json."""
        self._write("run.json", json.dumps({**(known or self.run), **changes}, indent=2) + "\n")

    def left(self, exit_code: int, message: str, step: int) -> None:
        """The run ends before its end (rank 0)."""
        if self.run.get("state") == "running" and self.run.get("pid") == os.getpid():
            state = "interrupted" if exit_code in (ExitCode.INTERRUPTED, ExitCode.CTRL_C) else "failed"
            self.update(state=state, error=message, exit_code=exit_code)
            self.event("stop", step=step, cause=message, exit_code=exit_code)

    def event(self, kind: str, **details: Any) -> None:
        """Append to events.jsonl (rank 0)."""
        if distributed.world().rank == 0:
            with open(self.path / "events.jsonl", "a", encoding="utf-8") as file:
                file.write(redact(json.dumps({"time": _now(), "event": kind, **details})) + "\n")

    def _write(self, name: str, text: str) -> None:
        write_atomically(self.path / name, redact(text))  # a config's comments may hold what its values may not

    def refuse_changes(self, config: Config) -> list[str]:
        """What differs from the config of the run in this folder, as lines to show. Raises ConfigError for a key that
        decides what a step computes."""
        path = self.path / "config.resolved.yaml"
        if not path.exists():
            return []
        began = configuration.load(path)
        self._refuse_stage(began, config)
        old, new = (flatten(configuration.resolved(c)) for c in (began, config))
        changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        refused = [key for key in changed if not key.startswith(MAY_CHANGE)]
        if refused:
            key = refused[0]
            raise ConfigError(
                f"{key}: {new.get(key)!r}, but the run in {self.path} has {old.get(key)!r}; restore it, or start anew with "
                "another output_dir= or checkpoint.resume=never"
            )
        return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed]

    def _refuse_stage(self, began: Config, config: Config) -> None:
        """Raise ConfigError where optimizer states would have to pass between stages that keep them otherwise."""
        stages = began.zero_stage, config.zero_stage
        saved = sorted(self.checkpoints.glob("step-*/manifest.json"))
        if stages[0] == stages[1] or set(stages) == {1, 2} or not saved:
            return
        lora = config.model.lora
        key = "model.lora.path" if lora and not lora.merge_on_export else "model.name_or_path"
        raise ConfigError(
            f"deepspeed.zero_optimization.stage: {stages[1]}, but the run in {self.path} has {stages[0]}, and of its "
            f"optimizer only stages 1 and 2 read each other; restore it, or "
            f"`{command('dspref', 'export', saved[-1].parent)} --to FOLDER` "
            f"and begin there with {key}=FOLDER and another output_dir="
        )

    def _set_aside(self) -> None:
        aside = self.path / f"previous-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        entries = [entry for entry in self.path.iterdir() if not entry.name.startswith("previous-") and entry.name != LOCK]
        aside.mkdir()
        for entry in entries:
            entry.rename(aside / entry.name)


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
