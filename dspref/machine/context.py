"""What the checks of a machine look at, and what they say: the one place here that sees a whole config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, get_args

from dspref.config import Config, ModelSection, Tracker, strategy
from dspref.machine import footprint, inputs
from dspref.machine.inputs import Found

OK, WARN, FAIL = "OK", "WARN", "FAIL"

# Tracker -> the package that it is.
TRACKERS = {name: "comet_ml" if name == "comet" else name for name in get_args(Tracker)}


class Verdict(NamedTuple):
    """OK, WARN or FAIL, and one line that says why and what to do."""

    level: str
    text: str


@dataclass(frozen=True)
class CheckContext:
    """A machine, and what a run asks of it; without a config, the machine alone."""

    config: Config | None = None
    env: Mapping[str, str] = field(default_factory=lambda: os.environ)
    ranks: int = 1
    """Ranks on this machine."""
    on_gpu: bool = False
    shared_memory: Path = Path("/dev/shm")
    proc: Path = Path("/proc")
    cgroup: Path = Path("/sys/fs/cgroup")

    @property
    def model(self) -> ModelSection | None:
        return self.config.model if self.config else None

    @property
    def output_dir(self) -> Path | None:
        return Path(self.config.output_dir) if self.config else None

    @property
    def begins_anew(self) -> bool:
        return self.config is not None and self.config.checkpoint.resume == "never"

    @property
    def store(self) -> Path | None:
        """Of reference log-probs, where the config names one."""
        return Path(self.config.reference.store) if self.config and self.config.reference.store else None

    @property
    def trackers(self) -> list[str]:
        return list(self.config.log.trackers) if self.config else []

    @property
    def offloads_optimizer(self) -> bool:
        return self.config is not None and strategy.offloads_optimizer(self.config.strategy)

    @property
    def packages(self) -> dict[str, str]:
        """Package that not every run needs -> the key that asks for it."""
        if self.config is None:
            return {}
        asked = {
            "peft": ("model.lora", self.config.model.lora is not None),
            "bitsandbytes": ("model.load_in_4bit", self.config.model.load_in_4bit),
            "liger_kernel": ("model.liger", self.config.model.liger),
            **{package: (f"log.trackers: {name}", name in self.trackers) for name, package in TRACKERS.items()},
        }
        if self.config.train.optim == "adamw_8bit":
            asked["bitsandbytes"] = ("train.optim: adamw_8bit", True)
        return {package: key for package, (key, needs) in asked.items() if needs}

    @property
    def cuda_key(self) -> str | None:
        """The key that asks for a GPU."""
        if self.config is None:
            return None
        model, kernel = self.config.model, self.config.model.attn_implementation
        needs = {
            "model.load_in_4bit": model.load_in_4bit,
            "model.liger": model.liger,
            "train.optim: adamw_8bit": self.config.train.optim == "adamw_8bit",
            f"model.attn_implementation: {kernel}": kernel not in ("auto", "sdpa"),
        }
        return next((key for key, needed in needs.items() if needed), None)

    @property
    def operators(self) -> list[str]:
        """What DeepSpeed will compile."""
        return ["cpu_adam"] if self.config is not None and self.config.train.optim == "cpu_adam" else []

    @property
    def bytes_to_write(self) -> int | None:
        """None where that cannot be told."""
        if (run := self.config) is None:
            return None
        moving = footprint.per_weight_moving(run.reference, run.model.dtype)
        return footprint.of_run(run.model, run.train, run.checkpoint, run.zero_stage, Path(run.output_dir), moving)

    def look(self, beside: Path | None = None) -> Found:
        """At the things that the config names; `beside`: its folder."""
        if (run := self.config) is None:
            return Found([], [])
        found = inputs.look(run.model, run.reference, run.data, beside, run.log.samples_file)
        found.faults.extend(inputs.folders(Path(run.output_dir), run.reference.store, self.begins_anew))
        return inputs.once_each(found)
