"""Checkpoints that are committed or absent, and resume.

A save writes `checkpoints/.saving-step-N`; every rank adds its part; the files are hashed; rank 0 writes the manifest and
renames the folder to `step-N`. What bears that name is complete. DeepSpeed's own `latest` file is neither written nor read.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import dspref
from dspref import distributed
from dspref.config import CheckpointSection
from dspref.errors import ConfigError
from dspref.files import sync_folder, write_atomically
from dspref.objectives import RunningMean
from dspref.run_folder import RunFolder


@dataclass(frozen=True)
class Progress:
    """What a checkpoint knows beyond the engine's state."""

    step: int = 0
    metrics_offset: int = 0
    tracker_id: str | None = None
    rewards: RunningMean = field(default_factory=RunningMean)
    """BCO's delta."""

    @classmethod
    def read(cls, path: Path) -> Progress:
        state = json.loads(path.read_text(encoding="utf-8"))
        return cls(**state | {"rewards": RunningMean(**state.get("rewards", {}))})


# ---------------------------------------------------------------------------------------------------------------------
# Saving


class Part(Protocol):
    """What has a state of its own: the policy, a reference that moves. Every rank saves and loads."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def save(run: RunFolder, parts: Sequence[Part], progress: Progress, metrics: Mapping[str, float]) -> Path:
    """Commit a checkpoint of all ranks; its folder. `metrics`: those of this step's evaluation, for `keep_best`."""
    started = time.monotonic()
    committed = run.checkpoints / f"step-{progress.step:06d}"
    draft = run.checkpoints / f".saving-{committed.name}"
    if distributed.world().rank == 0:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    distributed.barrier()
    for part in parts:
        part.save(draft)
    _save_rng(draft / f"rng-rank-{distributed.world().rank}.safetensors")
    if distributed.world().rank == 0:
        write_atomically(draft / "state.json", json.dumps(asdict(progress), indent=2) + "\n")
    distributed.barrier()
    hashes = _hash_together(draft)
    if distributed.world().rank == 0:
        manifest = {
            "step": progress.step,
            "world_size": distributed.world().size,
            "dspref": dspref.__version__,
            "metrics": dict(metrics),
            "files": hashes,
        }
        write_atomically(draft / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        if committed.exists():  # left by a run that was resumed from an earlier step
            committed.rename(draft.with_name(f".trash-{committed.name}"))
        os.rename(draft, committed)
        sync_folder(run.checkpoints)
        seconds = round(time.monotonic() - started, 2)
        run.event("commit", step=progress.step, bytes=sum(size for size, _ in hashes.values()), seconds=seconds)
    distributed.barrier()
    return committed


def prune(run: RunFolder, rules: CheckpointSection) -> None:
    """Delete checkpoints that the retention rules do not keep (rank 0)."""
    if distributed.world().rank != 0:
        return
    read = {folder: manifest_of(folder) for folder in committed_folders(run)}
    manifests = {folder: manifest for folder, manifest in read.items() if manifest}
    scores = {folder: m["metrics"].get(rules.keep_best) if rules.keep_best else None for folder, m in manifests.items()}
    steps = [(m["step"], scores[folder]) for folder, m in manifests.items()]
    gone = to_delete(steps, rules.keep_last, rules.keep_every, lower_is_better="loss" in (rules.keep_best or ""))
    for folder, manifest in manifests.items():
        if manifest["step"] in gone:
            # Renamed first: a half-deleted folder must not bear a committed name.
            folder.rename(trash := folder.with_name(f".trash-{folder.name}"))
            shutil.rmtree(trash, ignore_errors=True)
    for trash in run.checkpoints.glob(".trash-*"):
        shutil.rmtree(trash, ignore_errors=True)


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


def _hash_together(folder: Path) -> dict[str, tuple[int, str]]:
    """{relative path: (size, sha256)} of all files; the ranks share the work."""
    listing = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    # Of all ranks: a network file system may not yet list another node's files.
    names = sorted({name for part in distributed.gather_objects(listing) for name in part})
    rank, size = distributed.world().rank, distributed.world().size
    mine = {name: _hash(folder / name) for name in names[rank::size]}
    return dict(sorted({k: v for part in distributed.gather_objects(mine) for k, v in part.items()}.items()))


def _hash(path: Path) -> tuple[int, str]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def resume(run: RunFolder, parts: Sequence[Part], mode: str, seed: int) -> Progress:
    """Load the newest sound checkpoint into `parts`, or start from step 0. `mode`: auto | required | never."""
    found = [(folder, manifest_of(folder)) for folder in committed_folders(run)] if mode != "never" else []
    for folder, manifest in reversed(distributed.broadcast_object(found)):
        damage = "its manifest.json cannot be read" if manifest is None else damage_of(folder, manifest)
        if manifest is None or damage:
            distributed.log(f"warning: {folder.name} is damaged ({damage}); trying the one before")
            continue
        for part in parts:
            part.load(folder)
        _restore_rng(folder, manifest, seed)
        progress = Progress.read(folder / "state.json")
        run.event("resume", step=progress.step)
        distributed.log(f"resumed from {folder.name}")
        return progress
    if mode == "required":
        raise ConfigError(f"checkpoint.resume: required, but {run.checkpoints} holds no sound checkpoint")
    return Progress()


def committed_folders(run: RunFolder) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(f for f in run.checkpoints.glob("step-*") if (f / "manifest.json").exists())


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself; None where that cannot be read."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if {"step", "world_size", "metrics", "files"} <= manifest.keys() else None


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


def _save_rng(path: Path) -> None:
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
