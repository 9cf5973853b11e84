"""The model of a checkpoint, written as `final/` is: from the shards of any stage and number of ranks, by one process."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dspref import config as configuration
from dspref import own_code
from dspref.config import Config, ModelSection
from dspref.engine import shards
from dspref.errors import ConfigError, DataError, IOFault
from dspref.model import expert_parallel, loading
from dspref.reference import spec
from dspref.run import export, manifest
from dspref.run.checkpoint import committed_folders, damage_of
from dspref.run.folder import RESOLVED, RunFolder
from dspref.run.settings import decisive, settings_of
from dspref.training import preparation, stages
from dspref.training.model_card import model_card

if TYPE_CHECKING:
    from torch import Tensor

# The wrapper's name for the transformers model, which is in every name of DeepSpeed's.
INNER = "lm."


@torch.no_grad()
def consolidate(checkpoint: Path, to: Path, dtype: str | None = None, merge: bool = False) -> None:
    """Write the model of a committed checkpoint to the folder `to`, in `dtype` (default: the run's). `merge`: with its
    adapter added to it, whatever the run's merge_on_export.

    Raises ConfigError where there is no such checkpoint or `to` is taken, IOFault where the checkpoint is damaged; then
    `to` is as it was.
    """
    refuse_taken(to)
    run, config = RunFolder(checkpoint.absolute().parent.parent), checked_config(checkpoint)
    said = checked_manifest(checkpoint)
    if dtype:
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    if merge:
        refuse_unmergeable(config.model)
        config = config.model_copy(update={"model": as_merged(config.model)})
    base = str(run.path / "init") if config.model.init == "random" else config.model.name_or_path
    refuse_other_base(run, config.model)
    loading.quiet()
    with named_files_of(checkpoint, said) as clean:
        shards.refuse_foreign(clean / shards.FOLDER)
        state = in_type(full_state(clean / shards.FOLDER, config.model.lora is not None), config.model.dtype)
    section = config.model.model_copy(update={"load_in_4bit": False})  # which needs a GPU; what is trained is beside it
    reference = stages.reference_spec(config)
    policy = loading.load(section, base, "sdpa", section.dtype, None, spec.attach(reference, config.train.seed))
    tokenizer = preparation.tokenizer_of(section)
    summary = {"step": said["step"], "metrics": said["metrics"]}
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".export-") as draft:
        final, adapter = Path(draft) / "final", Path(draft) / "adapter"
        card = model_card(stages.recipe(config, reference), summary)
        export.write(final, adapter, policy, state, tokenizer, config.model, base, card)
        final.rename(to)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def refuse_taken(to: Path) -> None:
    if os.path.exists(to) and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"--to: {to} is there already; give a folder that is not")


def refuse_unmergeable(section: ModelSection) -> None:
    if section.lora is None:
        raise ConfigError("--merge: the run trains the whole model, and has no adapter; leave --merge out")


def as_merged(section: ModelSection) -> ModelSection:
    """The section of a model whose adapter is added to it."""
    assert section.lora
    return section.model_copy(update={"lora": section.lora.model_copy(update={"merge_on_export": True})})


def checked_config(checkpoint: Path) -> Config:
    """The config of the run that a committed checkpoint belongs to."""
    run = RunFolder(checkpoint.absolute().parent.parent)
    if not os.path.isfile(checkpoint / manifest.NAME) or manifest.step_of(checkpoint.absolute()) is None:
        known = committed_folders(RunFolder(checkpoint)) or committed_folders(run)
        there = f"; there is {known[-1]}" if known else ""
        raise ConfigError(f"{checkpoint}: is no committed checkpoint (RUN/checkpoints/step-N){there}")
    path, said = run.path / RESOLVED, manifest.read(checkpoint)
    settings = said.get("settings") if said else None
    try:
        config = configuration.load(path)
        if isinstance(settings, dict) and decisive(configuration.resolved(config)) != decisive(settings_of(settings)):
            config = Config.model_validate(settings)
        return config
    except (ConfigError, ValueError):
        # Where a function of the user's own is not to be had, the file's fault says so.
        with own_code.kept_in(run.path), suppress(ValueError):
            if isinstance(settings, dict):
                return Config.model_validate(settings)
        if not path.is_file():
            raise ConfigError(f"{path}: is missing; a checkpoint is exported from within its run folder") from None
        raise


def checked_manifest(checkpoint: Path) -> dict[str, Any]:
    """What the checkpoint says of itself, once every file has been found as it says."""
    said = manifest.read(checkpoint)
    damage = "its manifest.json cannot be read" if said is None else damage_of(checkpoint, said)
    if said is None or damage:
        raise IOFault(f"{checkpoint}: is damaged ({damage}); export another checkpoint")
    return said


@contextmanager
def named_files_of(checkpoint: Path, said: Mapping[str, Any]) -> Iterator[Path]:
    """A folder with the files that the manifest names and no others."""
    if not (strays := manifest.strays(checkpoint, said)):
        yield checkpoint
        return
    print(f"warning: {checkpoint / strays[0]} is not in the manifest of {checkpoint.name}; it is not read", file=sys.stderr)
    with tempfile.TemporaryDirectory() as clean:
        manifest.link(checkpoint, said, Path(clean) / checkpoint.name)
        yield Path(clean) / checkpoint.name


def refuse_other_base(run: RunFolder, section: ModelSection) -> None:
    """Raise DataError where the weights below an adapter are no longer those that it was trained on."""
    began = run.run.get("content", {})
    if section.lora is None or "model" not in began:
        return
    if stages.content_digests(section)["model"] != began["model"]:
        raise DataError(f"{section.name_or_path}: is no longer the model that {run.path} began with; restore it")


# ---------------------------------------------------------------------------------------------------------------------
# From shards to weights


def full_state(folder: Path, trained_only: bool) -> dict[str, Tensor]:
    """The weights by their names in the model; in fp32 what was trained, the rest as it was saved. Tied names share."""
    files = [shards.read(file) for file in shards.model_files(folder)]
    first, optimizer = files[0], [shards.read(file)["optimizer_state_dict"] for file in shards.optimizer_files(folder)]
    zero, groups = first["ds_config"]["zero_optimization"], [_shapes(group) for group in first["param_shapes"] or ()]
    shapes = {name: shape for group in groups for name, shape in group.items()}
    if zero["stage"] == 3:
        # What is in shards has no size in `module`.
        state = {name: tensor for name, tensor in first["module"].items() if name in first["buffer_names"]}
        state |= dict(_frozen_in_shards(files)) | dict(_flat_by_shape(optimizer, groups))
    else:
        state = dict(first["module"])
        if not zero.get("round_robin_gradients"):  # with which DeepSpeed notes wrong addresses
            spread = expert_parallel.size_of(first["ds_config"])
            state |= dict(_flat_by_address(optimizer, shapes, spread))
    if trained_only and shapes:
        state = {name: state[name] for name in shapes}
    state |= {name: state[other] for name, other in (first["shared_params"] or {}).items() if other in state}
    state = {name.removeprefix(INNER): tensor for name, tensor in state.items()}
    return _gathered(state, first) if expert_parallel.size_of(first["ds_config"]) > 1 else state


def _shapes(group: Mapping[str, Sequence[int]]) -> dict[str, torch.Size]:
    return {name: torch.Size(shape) for name, shape in group.items()}


def _gathered(state: dict[str, Tensor], saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Experts that were spread as the model has them, all by the names that it has for them."""
    for layer in saved["ds_autoep_layers"]:
        place = layer["expert_key_prefix"].removeprefix(INNER)
        experts = {name: state.pop(f"{place}.{name}") for name in ("w1", "w2", "w3")}
        state |= {f"{place}.{name}": whole for name, whole in expert_parallel.put_together(experts).items()}
    shared = expert_parallel.shared_as_told(saved["ds_config"][expert_parallel.KEY])
    return {expert_parallel.as_loaded(name, shared): tensor for name, tensor in state.items()}


def _flat_by_address(
    ranks: Sequence[dict[str, Any]], shapes: dict[str, torch.Size], spread: int
) -> Iterator[tuple[str, Tensor]]:
    """ZeRO 1 and 2: the groups of parameters are cut into one piece a rank, wherever that falls; addresses tell. Groups of
    experts that are spread over so many ranks, one after the other, are cut among those that have the same."""
    pieces: dict[str, dict[int, list[Tensor]]] = {}
    for number, rank in enumerate(ranks):
        for flat, addresses in zip(rank["single_partition_of_fp32_groups"], rank["param_slice_mappings"], strict=True):
            for name, address in addresses.items():
                holder = number % spread if ".experts.w" in name and spread > 1 else 0
                pieces.setdefault(name, {}).setdefault(holder, []).append(flat.narrow(0, address.start, address.numel))
    for name, by_holder in pieces.items():
        yield name, torch.cat([torch.cat(found).view(shapes[name]) for _, found in sorted(by_holder.items())])


def _flat_by_shape(
    ranks: Sequence[dict[str, Any]], groups: Sequence[Mapping[str, torch.Size]]
) -> Iterator[tuple[str, Tensor]]:
    """ZeRO-3: each parameter is cut into equal pieces, the last one filled up."""
    for i, shapes in enumerate(groups):
        holders, start = _holders(ranks, i), 0
        for name, shape in shapes.items():
            size = -(-shape.numel() // len(holders[0]))
            flats = [torch.cat([rank["fp32_flat_groups"][i].narrow(0, start, size) for rank in same]) for same in holders]
            yield name, torch.cat([flat[: shape.numel()].view(shape) for flat in flats])
            start += size


def _holders(ranks: Sequence[dict[str, Any]], group: int) -> list[list[dict[str, Any]]]:
    """The ranks that hold a group of parameters in pieces between them; several such lists, in the order of the experts, of
    experts that are spread."""
    if "ds_zero_partition_groups" not in ranks[0]:
        return [list(ranks)]
    found = {tuple(rank["ds_zero_partition_groups"][group]["partition_ranks"]) for rank in ranks}
    return [[ranks[number] for number in numbers] for numbers in sorted(found)]


def _frozen_in_shards(files: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    for name, shape in (files[0].get("frozen_param_shapes") or {}).items():
        whole = torch.cat([file["frozen_param_fragments"][name] for file in files])
        yield name, whole[: shape.numel()].view(shape)


def in_type(state: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Rounded once, as the run rounds its own; what is tied stays so."""
    kind = getattr(torch, dtype)
    known = {_place(tensor): tensor.to(kind) if tensor.is_floating_point() else tensor for tensor in state.values()}
    return {name: known[_place(tensor)] for name, tensor in state.items()}


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape
