"""What DeepSpeed writes in a checkpoint, and how it gets back into an engine.

Files that were written by another number of ranks, or between ZeRO 1 and 2, go through DeepSpeed's universal format.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from dspref.engine.accelerator import ACCELERATOR as ACCELERATOR  # first: it tells DeepSpeed which to use

# isort: split

from deepspeed import DeepSpeedEngine
from deepspeed.checkpoint import ds_to_universal
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from dspref import distributed
from dspref.engine import plain
from dspref.engine.plain import as_data, read
from dspref.errors import EnvironmentFault, IOFault
from dspref.model import expert_parallel

# DeepSpeed's own folder within a checkpoint.
FOLDER = "engine"


class Sharding(NamedTuple):
    """How weights and optimizer states are spread."""

    stage: int
    ranks: int
    experts: int = 1
    """Ranks that hold the experts of a layer between them."""

    def __str__(self) -> str:
        spread = f" with the experts on {self.experts}" if self.experts > 1 else ""
        return f"ZeRO-{self.stage} on {self.ranks} rank{'s' if self.ranks > 1 else ''}{spread}"


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class SafeCheckpointEngine(TorchCheckpointEngine):
    """How DeepSpeed reads and writes a file: as `plain` does. `dspref.run.saving` flushes what is written.

    A failure to write is kept for `written`: raised within DeepSpeed, it would leave the other ranks in a barrier.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.forget()

    def forget(self) -> None:
        """A save begins."""
        self._failure: OSError | None = None
        self._written: list[Path] = []

    def written(self) -> list[Path]:
        """The files of this rank since the save began. Raises what went wrong with any."""
        if self._failure is not None:
            raise self._failure
        return self._written

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._trying(lambda: os.makedirs(path, exist_ok=exist_ok))

    def load(self, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=True)

    def save(self, state_dict: Any, path: str) -> None:
        self._trying(lambda: self._write(state_dict, path))

    def _write(self, state_dict: Any, path: str) -> None:
        plain.write(state_dict, Path(path))
        self._written.append(Path(path))

    def _trying(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            self._failure = error if isinstance(error, OSError) else OSError(str(error).split("\n", 1)[0])


def sharding_of(folder: Path) -> Sharding:
    """How the files in DeepSpeed's folder were spread."""
    state = read(model_files(folder)[0])
    told = state["ds_config"]
    stage = told.get("zero_optimization", {}).get("stage", 0)
    return Sharding(stage, state["dp_world_size"], expert_parallel.size_of(told))


def model_files(folder: Path) -> list[Path]:
    """The files with weights, by rank; at stages 0 to 2 there is one. (Those of single experts are beside them.)"""
    return sorted((file for file in folder.glob("*model_states.pt") if not file.name.startswith("layer_")), key=_rank)


def optimizer_files(folder: Path) -> list[Path]:
    """The files with fp32 weights and optimizer states, by rank; none at stage 0."""
    return sorted(folder.glob("*optim_states.pt"), key=_rank)


def _rank(file: Path) -> int:
    _, found, rest = file.name.partition("zero_pp_rank_")
    return int(rest.partition("_")[0]) if found else 0


def refuse_foreign(folder: Path) -> None:
    """Raise IOFault, on every rank, where a file names what a checkpoint does not hold: loading that could run code.

    Looked for before anything is loaded: a rank that failed alone would leave the others waiting.
    """
    rank, size = distributed.world().rank, distributed.world().size
    mine = [complaint for file in sorted(folder.rglob("*.pt"))[rank::size] if (complaint := plain.complaint(file))]
    for complaint in [found for part in distributed.gather_objects(mine) for found in part][:1]:
        raise IOFault(f"{complaint}; nothing of it was loaded or run; restore that checkpoint, or delete it")


# ---------------------------------------------------------------------------------------------------------------------
# Into an engine


def restore(engine: DeepSpeedEngine, folder: Path, strict: bool) -> None:
    """Load a checkpoint into an engine of the same stage, or from ZeRO 1 into 2 and back; on any number of ranks.

    `strict`: the checkpoint holds every weight. Raises IOFault for files that cannot be had as data.
    """
    refuse_foreign(folder / FOLDER)
    saved = sharding_of(folder / FOLDER)
    config: Any = engine._config
    spread = expert_parallel.size_of(config._param_dict)
    here = Sharding(int(engine.zero_optimization_stage()), distributed.world().size, spread)
    with as_data():
        if saved == here or saved.stage == here.stage == 0:  # at stage 0 every rank holds everything
            _load(engine, folder, strict)
            return
        _refuse_inconvertible(engine, saved, here)
        distributed.log(f"{folder.name} was saved by {saved}; converting it for {here}")
        universal = _universal(folder)
        distributed.on_main(lambda: _convert(folder, universal))
        with _mending(engine), _reading_universal(engine):
            _load(engine, universal, strict)
        distributed.barrier()
        distributed.on_main(lambda: shutil.rmtree(universal))


def _load(engine: DeepSpeedEngine, folder: Path, strict: bool) -> None:
    loaded, _ = engine.load_checkpoint(str(folder), tag=FOLDER, load_module_strict=strict)
    if loaded is None:
        raise EnvironmentFault(f"{folder}: DeepSpeed found no checkpoint there")


def _refuse_inconvertible(engine: DeepSpeedEngine, saved: Sharding, here: Sharding) -> None:
    reason = ""
    if saved.stage != here.stage and {saved.stage, here.stage} != {1, 2}:
        reason = "only stages 1 and 2 can be exchanged"
    elif max(saved.experts, here.experts) > 1:
        reason = "experts that are spread stay on as many ranks"
    elif getattr(engine.optimizer, "round_robin_gradients", False):
        reason = "with round_robin_gradients DeepSpeed notes wrong addresses"
    elif engine.zero_nvme_offload_optimizer():
        reason = "optimizer states on NVMe cannot be spread anew"
    elif type(engine.basic_optimizer) not in (torch.optim.AdamW, DeepSpeedCPUAdam):
        reason = f"the states of {type(engine.basic_optimizer).__name__} cannot be spread anew"
    if reason:
        raise EnvironmentFault(f"the checkpoint was saved by {saved}, and this run has {here}: {reason}; start it as it was")


def _universal(folder: Path) -> Path:
    """Beside the checkpoint, under a name that no checkpoint has."""
    return folder.with_name(f".universal-{folder.name}")


def _convert(folder: Path, universal: Path) -> None:
    """Raises IOFault where it fails. In this process: others would not read as data."""
    arguments = SimpleNamespace(
        input_folder=str(folder / FOLDER), output_folder=str(universal / FOLDER), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(arguments)
    except Exception as error:  # a full disk, and whatever DeepSpeed asserts: each has its own type
        shutil.rmtree(universal, ignore_errors=True)
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise IOFault(
            f"{folder}: cannot be converted for this number of ranks ({reason}); "
            f"free the space of another such checkpoint, or start the run as it was"
        ) from None


@contextlib.contextmanager
def _reading_universal(engine: DeepSpeedEngine) -> Iterator[None]:
    config: Any = engine._config
    config.load_universal_checkpoint = True
    try:
        yield
    finally:
        config.load_universal_checkpoint = False


@contextlib.contextmanager
def _mending(engine: DeepSpeedEngine) -> Iterator[None]:
    """What loading the universal format gets wrong. At stage 3 all groups of parameters are given what the first one has,
    so that norms would decay, and one step counter, which each would count up. Counters come back on the CPU."""
    optimizer: Any = engine.optimizer.optimizer  # type: ignore[union-attr]
    own = [{key: group[key] for key in ("weight_decay", "betas", "eps")} for group in optimizer.param_groups]
    yield
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)
    for parameter, state in optimizer.state.items():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].to(parameter.device, copy=True)
