"""Checkpoints that are committed or absent: what one holds, which are kept, and resume.

A save (`dspref.run.saving`) writes `checkpoints/.saving-step-N`; every rank adds its part, and hashes it; rank 0 writes the
manifest and renames the folder to `step-N`. What bears that name is complete. DeepSpeed's own `latest` is not used.
"""

from __future__ import annotations

import hashlib
import random
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from dspref import distributed
from dspref.config import CheckpointSection, lower_is_better
from dspref.errors import ConfigError, IOFault
from dspref.files import read_json, remove
from dspref.objectives import RunningMean
from dspref.reading import is_count
from dspref.run import manifest
from dspref.run.best import Best
from dspref.run.folder import RunFolder
from dspref.run.manifest import step_of
from dspref.terminal import printable

# Of folders that a process leaves behind when it is killed: a save, a conversion, a deletion, a look past what is foreign.
LEFT = re.compile(r"(\.(saving|trash|universal|loading)-)+step-[0-9]{6,18}")


@dataclass(frozen=True)
class Progress:
    """What a checkpoint knows beyond the engine's state."""

    step: int = 0
    metrics_offset: int = 0
    tracker_ids: dict[str, str] = field(default_factory=dict)
    """Of each tracker, its own name for the run."""
    rewards: RunningMean = field(default_factory=RunningMean)
    """BCO's delta."""
    owes_evaluation: bool = False
    """Whether the run was stopped within the evaluation of this step."""
    skipped: int = 0
    """Steps in a row, up to this one, that changed nothing."""
    owes_samples: bool = False
    """Whether the run was stopped before prompts were answered that were due at this step."""
    best: Best = field(default_factory=Best)
    """What the evaluations so far have come to."""

    @classmethod
    def read(cls, path: Path) -> Progress:
        """Raises IOFault where the file holds something else."""
        try:
            state = read_json(path)
            if one := state.pop("tracker_id", None):  # as checkpoints had it when wandb alone had names
                state["tracker_ids"] = {"wandb": one}
            found = cls(
                **state | {"rewards": RunningMean(**state.get("rewards", {})), "best": Best(**state.get("best", {}))}
            )
            if not is_count(found.step) or not is_count(found.metrics_offset) or not is_count(found.skipped):
                raise ValueError("a number is none")
            if not all(isinstance(name, str) for name in found.tracker_ids.values()):
                raise ValueError("tracker_ids are no names")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise IOFault(f"{path}: is not the state of a run ({printable(str(error))}); delete that checkpoint") from None
        return found


# ---------------------------------------------------------------------------------------------------------------------
# What is saved, and kept


class Part(Protocol):
    """What has a state of its own: the policy, a reference that moves. Every rank saves and loads."""

    def save(self, folder: Path) -> list[Path]:
        """Write this rank's files below a folder, not yet down to the disk; which they are. Raises OSError."""
        ...

    def load(self, folder: Path) -> None: ...


def prune(run: RunFolder, rules: CheckpointSection) -> list[str]:
    """Delete checkpoints that the retention rules do not keep. What cannot be deleted stays, and is returned in words."""
    manifests = {folder: said for folder in committed_folders(run) if (said := manifest.read(folder))}
    scores = {folder: m["metrics"].get(rules.keep_best) if rules.keep_best else None for folder, m in manifests.items()}
    steps = [(m["step"], scores[folder]) for folder, m in manifests.items()]
    lower = rules.keep_best is not None and lower_is_better(rules.keep_best)
    gone = to_delete(steps, rules.keep_last, rules.keep_every, bool(lower))
    try:
        for folder, said in manifests.items():
            if said["step"] in gone:
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
    """Steps to delete of `checkpoints` (step, score); the newest, multiples of `keep_every` and the first of the best score
    stay."""
    steps = sorted(step for step, _ in checkpoints)
    kept = set(steps[-keep_last:])
    if keep_every:
        kept |= {step for step in steps if step % keep_every == 0}
    scored = [(score if lower_is_better else -score, step) for step, score in checkpoints if score is not None]
    if scored:
        kept.add(min(scored)[1])
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

    A damaged one is set aside, as `damaged-step-N`, with one line. Raises ConfigError where what is sound is all another
    run's.
    """
    distributed.on_main(lambda: _sweep(run))
    found = distributed.broadcast_object(_candidates(run) if mode != "never" and distributed.world().rank == 0 else [])
    foreign, has_own = [], any(own for _, _, own in found)
    for folder, said, is_own in found:
        if said is None:
            damage = "its manifest.json is missing or was changed"
        else:
            damage = damage_of(folder, said) or ("" if is_own else "it is another run's")
            foreign += [said["run_id"]] if damage == "it is another run's" else []
        if said is None or damage:
            if has_own or not foreign:
                distributed.log(
                    f"warning: {folder.name} is damaged ({damage}); it is set aside, and the one before is tried"
                )
                distributed.on_main(lambda folder=folder: _set_aside(folder))
            continue
        return Found(folder, said, Progress.read(folder / "state.json"))
    if foreign and not has_own:
        raise ConfigError(
            f"{run.path / 'run.json'}: is not the record of the checkpoints beside it, which are of run {foreign[0]}; "
            "restore it, delete it to go on with them, or begin anew with checkpoint.resume=never"
        )
    if mode == "required":
        raise ConfigError(f"checkpoint.resume: required, but {run.checkpoints} holds no sound checkpoint")
    if found:
        distributed.log("warning: no checkpoint of this run is sound; starting from step 0")
    return None


def resume(run: RunFolder, found: Found | None, parts: Sequence[Part], seed: int) -> Progress:
    """Load what was found into `parts`."""
    if found is None:
        return Progress()
    with _named_files_of(found.folder, found.manifest) as clean:
        for part in parts:
            part.load(clean)
        _restore_rng(clean, found.manifest, seed)
    run.event("resume", step=found.progress.step)
    distributed.log(f"resumed from {found.folder.name}")
    return found.progress


def load_step(run: RunFolder, step: int, part: Part) -> bool:
    """Load the checkpoint of a step into `part`; False where there is none, or it is not sound."""
    folder = manifest.folder_of(run.checkpoints, step)
    said = distributed.broadcast_object(manifest.read(folder) if distributed.world().rank == 0 else None)
    if said is None or damage_of(folder, said):
        return False
    with _named_files_of(folder, said) as clean:
        part.load(clean)
    return True


def _candidates(run: RunFolder) -> list[tuple[Path, dict[str, Any] | None, bool]]:
    """(folder, manifest, whether that is of this run) of what may be resumed, the newest first."""
    run_id = run.run.get("run_id")
    read = [(folder, manifest.read(folder)) for folder in reversed(committed_folders(run))]
    return [(folder, said, bool(said) and said["run_id"] == run_id) for folder, said in read]


@contextmanager
def _named_files_of(folder: Path, said: Mapping[str, Any]) -> Iterator[Path]:
    """A folder with the files that the manifest names and no others: DeepSpeed loads what has a name of the right form."""
    strays = distributed.broadcast_object(manifest.strays(folder, said) if distributed.world().rank == 0 else [])
    if not strays:
        yield folder
        return
    distributed.log(f"warning: {folder / strays[0]} is not in the manifest of {folder.name}; it is not read")
    clean = folder.with_name(f".loading-{folder.name}")
    distributed.on_main(lambda: manifest.link(folder, said, clean))
    yield clean
    distributed.barrier()
    distributed.on_main(lambda: shutil.rmtree(clean))


def _sweep(run: RunFolder) -> None:
    """Remove what a process that was killed left of a save, of a conversion, or of a checkpoint that it was deleting."""
    left = [entry for entry in run.checkpoints.iterdir() if LEFT.fullmatch(entry.name)]
    for trash in left:
        # Killed while it put a newer save of the same step in its place.
        step = step_of(trash, ".trash-")
        newest = max((step_of(folder) or 0 for folder in committed_folders(run)), default=-1)
        if step is not None and step > newest and (trash / manifest.NAME).exists():
            trash.rename(manifest.folder_of(run.checkpoints, step))
    for folder in left:
        remove(folder)


def _set_aside(folder: Path) -> None:
    """Whatever was damaged stays, for whoever wants to look."""
    folder.rename(manifest.free_name(folder.with_name(f"damaged-{folder.name}")))


def behind_final(run: RunFolder) -> Path | None:
    """The checkpoint with the weights that a finished run has exported; None where it is not kept."""
    summary = run.run["summary"]
    step = summary.get("weights_of", summary.get("step"))
    return next((folder for folder in committed_folders(run) if step_of(folder.absolute()) == step), None)


def committed_folders(run: RunFolder) -> list[Path]:
    """Folders that bear the name of a committed checkpoint, oldest first."""
    return manifest.committed(run.checkpoints)


def newest_step(run: RunFolder) -> int:
    """Of the committed checkpoints, by their manifests; -1 where there is none. The same answer on all ranks."""
    said = manifest.newest(run.checkpoints) if distributed.world().rank == 0 else None
    return distributed.broadcast_object(said["step"] if said else -1)


def damage_of(folder: Path, said: Mapping[str, Any]) -> str | None:
    """What differs from the manifest, found by all ranks together; None if the checkpoint is sound."""
    files = said["files"]
    rank, size = distributed.world().rank, distributed.world().size
    mine = [name for name in sorted(files)[rank::size] if not _is_sound(folder / name, files[name])]
    found = [name for part in distributed.gather_objects(mine) for name in part]
    return f"{found[0]} differs from its manifest" if found else None


def _is_sound(path: Path, expected: Sequence[Any]) -> bool:
    if not path.is_file() or path.stat().st_size != expected[0]:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == expected[1]


def _restore_rng(folder: Path, said: Mapping[str, Any], seed: int) -> None:
    """The generators as they were; on another number of ranks, where there is no such thing, new ones by seed and step."""
    rank, size = distributed.world().rank, distributed.world().size
    if said["world_size"] == size:
        _load_rng(folder / f"rng-rank-{rank}.safetensors")
        return
    distributed.set_seed(int(np.random.SeedSequence([seed, said["step"]]).generate_state(1)[0]))
    distributed.log(
        f"{said['world_size']} ranks before, {size} now: the same pairs in the same order; dropout draws other numbers"
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
