"""Checkpoints that are committed or absent: what one holds, which are kept, and resume.

A save (`dspref.saving`) writes `checkpoints/.saving-step-N`; every rank adds its part, and hashes it; rank 0 writes the
manifest and renames the folder to `step-N`. What bears that name is complete. DeepSpeed's own `latest` is not used.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from dspref import config as configuration
from dspref import distributed
from dspref.config import CheckpointSection, Config
from dspref.errors import ConfigError
from dspref.objectives import RunningMean
from dspref.run_folder import RunFolder, environment


@dataclass(frozen=True)
class Progress:
    """What a checkpoint knows beyond the engine's state."""

    step: int = 0
    metrics_offset: int = 0
    tracker_id: str | None = None
    rewards: RunningMean = field(default_factory=RunningMean)
    """BCO's delta."""
    owes_evaluation: bool = False
    """Whether the run was stopped within the evaluation of this step."""
    skipped: int = 0
    """Steps in a row, up to this one, that changed nothing."""

    @classmethod
    def read(cls, path: Path) -> Progress:
        state = json.loads(path.read_text(encoding="utf-8"))
        return cls(**state | {"rewards": RunningMean(**state.get("rewards", {}))})


def facts_of(run: RunFolder, config: Config) -> dict[str, Any]:
    """What the manifests of a run say of it, beside the step; on rank 0."""
    if distributed.world().rank != 0:
        return {}
    known = run.run
    return {
        "run_id": known.get("run_id"),
        "content": known.get("content", {}),
        "config": hashlib.sha256(configuration.dump(config).encode()).hexdigest(),
        "zero_stage": config.zero_stage,
        "dtype": config.model.dtype,
        "packages": environment()["packages"],
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is saved, and kept


class Part(Protocol):
    """What has a state of its own: the policy, a reference that moves. Every rank saves and loads."""

    def save(self, folder: Path) -> list[Path]:
        """Write this rank's files below a folder, not yet down to the disk; which they are. Raises OSError."""
        ...

    def load(self, folder: Path) -> None: ...


def folder_of(run: RunFolder, step: int) -> Path:
    """Of the committed checkpoint of a step."""
    return run.checkpoints / f"step-{step:06d}"


def signed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest, with the sha256 of all else that it says."""
    said = {key: value for key, value in manifest.items() if key != "sha256"}
    return said | {"sha256": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}


def prune(run: RunFolder, rules: CheckpointSection) -> list[str]:
    """Delete checkpoints that the retention rules do not keep. What cannot be deleted stays, and is returned in words."""
    read = {folder: manifest_of(folder) for folder in committed_folders(run)}
    manifests = {folder: manifest for folder, manifest in read.items() if manifest}
    scores = {folder: m["metrics"].get(rules.keep_best) if rules.keep_best else None for folder, m in manifests.items()}
    steps = [(m["step"], scores[folder]) for folder, m in manifests.items()]
    gone = to_delete(steps, rules.keep_last, rules.keep_every, lower_is_better="loss" in (rules.keep_best or ""))
    try:
        for folder, manifest in manifests.items():
            if manifest["step"] in gone:
                # Renamed first: a half-deleted folder must not bear a committed name.
                folder.rename(folder.with_name(f".trash-{folder.name}"))
        _sweep(run)
    except OSError as error:
        return [f"{error.filename}: not deleted ({error.strerror})"]
    return []


def to_delete(
    checkpoints: Sequence[tuple[int, float | None]],
    keep_last: int,
    keep_every: int | None,
    lower_is_better: bool = False,
) -> set[int]:
    """Steps to delete of `checkpoints` (step, score); the newest, multiples of `keep_every` and the best score stay."""
    steps = sorted(step for step, _ in checkpoints)
    kept = set(steps[-keep_last:])
    if keep_every:
        kept |= {step for step in steps if step % keep_every == 0}
    scored = [(score, step) for step, score in checkpoints if score is not None]
    if scored:
        kept.add((min if lower_is_better else max)(scored)[1])
    return set(steps) - kept


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


class Found(NamedTuple):
    """A sound checkpoint, and where the run was."""

    folder: Path
    manifest: dict[str, Any]
    progress: Progress


def find(run: RunFolder, mode: str) -> Found | None:
    """The newest sound checkpoint; None where the run starts from step 0. `mode`: auto | required | never.

    A damaged one is set aside, as `damaged-step-N`, with one line.
    """
    distributed.on_main(lambda: _sweep(run))
    found = [(folder, manifest_of(folder)) for folder in committed_folders(run)] if mode != "never" else []
    found, run_id = distributed.broadcast_object((found, run.run.get("run_id")))
    for folder, manifest in reversed(found):
        damage = "its manifest.json is missing or was changed"
        if manifest is not None:
            damage = "it is another run's" if manifest["run_id"] != run_id else damage_of(folder, manifest)
        if manifest is None or damage:
            distributed.log(f"warning: {folder.name} is damaged ({damage}); it is set aside, and the one before is tried")
            distributed.on_main(lambda folder=folder: _set_aside(folder))
            continue
        return Found(folder, manifest, Progress.read(folder / "state.json"))
    if mode == "required":
        raise ConfigError(f"checkpoint.resume: required, but {run.checkpoints} holds no sound checkpoint")
    if found:
        distributed.log("warning: no checkpoint of this run is sound; starting from step 0")
    return None


def resume(run: RunFolder, found: Found | None, parts: Sequence[Part], seed: int) -> Progress:
    """Load what was found into `parts`."""
    if found is None:
        return Progress()
    for part in parts:
        part.load(found.folder)
    _restore_rng(found.folder, found.manifest, seed)
    run.event("resume", step=found.progress.step)
    distributed.log(f"resumed from {found.folder.name}")
    return found.progress


def _sweep(run: RunFolder) -> None:
    """Remove what a process that was killed left of a save, of a conversion, or of a checkpoint that it was deleting."""
    for trash in run.checkpoints.glob(".trash-step-*"):
        # Killed while it put a newer save of the same step in its place.
        committed = trash.with_name(trash.name.removeprefix(".trash-"))
        newest = max(map(_folder_step, committed_folders(run)), default=-1)
        if _folder_step(committed) > newest and (trash / "manifest.json").exists():
            trash.rename(committed)
    for kind in (".saving-*", ".trash-*", ".universal-*"):
        for left in run.checkpoints.glob(kind):
            shutil.rmtree(left, ignore_errors=True)


def _set_aside(folder: Path) -> None:
    aside = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def committed_folders(run: RunFolder) -> list[Path]:
    """Folders that bear the name of a committed checkpoint, oldest first."""
    return sorted(f for f in run.checkpoints.glob("step-*") if f.is_dir())


def newest_step(run: RunFolder) -> int:
    """Of the committed checkpoints, by their manifests; -1 where there is none. The same answer on all ranks."""
    found = [manifest["step"] for folder in committed_folders(run) if (manifest := manifest_of(folder))]
    return distributed.broadcast_object(max(found, default=-1))


def _folder_step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself; None where that cannot be read, or was changed."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        whole = signed(manifest)["sha256"] == manifest["sha256"] and _folder_step(folder) == manifest["step"]
        return manifest if whole else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def damage_of(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """What differs from the manifest, found by all ranks together; None if the checkpoint is sound."""
    files = manifest["files"]
    rank, size = distributed.world().rank, distributed.world().size
    mine = [name for name in sorted(files)[rank::size] if not _is_sound(folder / name, files[name])]
    found = [name for part in distributed.gather_objects(mine) for name in part]
    return f"{found[0]} differs from its manifest" if found else None


def _is_sound(path: Path, expected: Sequence[Any]) -> bool:
    if not path.is_file() or path.stat().st_size != expected[0]:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == expected[1]


def _restore_rng(folder: Path, manifest: Mapping[str, Any], seed: int) -> None:
    """The generators as they were; on another number of ranks, where there is no such thing, new ones by seed and step."""
    rank, size = distributed.world().rank, distributed.world().size
    if manifest["world_size"] == size:
        _load_rng(folder / f"rng-rank-{rank}.safetensors")
        return
    distributed.set_seed(int(np.random.SeedSequence([seed, manifest["step"]]).generate_state(1)[0]))
    distributed.log(
        f"{manifest['world_size']} ranks before, {size} now: the same pairs in the same order; dropout draws other numbers"
    )


def save_rng(path: Path) -> None:
    """The random generators of this rank: torch, CUDA, numpy, python. No pickle."""
    numpy_state = np.random.get_state(legacy=False)["state"]  # type: ignore[index]
    _, words, gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.append(numpy_state["key"], numpy_state["pos"]).astype(np.int64)),
        "python": torch.tensor(words, dtype=torch.int64),
    }
    if gauss is not None:
        tensors["python_gauss"] = torch.tensor(gauss, dtype=torch.float64)
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, path)


def _load_rng(path: Path) -> None:
    tensors = load_file(path)
    torch.set_rng_state(tensors["torch"])
    words = tensors["numpy"].numpy()
    np.random.set_state({"bit_generator": "MT19937", "state": {"key": words[:-1].astype(np.uint32), "pos": int(words[-1])}})
    gauss = tensors["python_gauss"].item() if "python_gauss" in tensors else None
    random.setstate((3, tuple(tensors["python"].tolist()), gauss))
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
