"""A model that somebody names: a run, a checkpoint, a folder of weights or of an adapter, an id of the hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dspref import config as configuration
from dspref.config import ModelSection, cache_folder
from dspref.errors import ConfigError, IOFault
from dspref.model import adapters, weights
from dspref.run import manifest, record
from dspref.run.checkpoint import Progress, behind_final, committed_folders
from dspref.run.folder import RESOLVED, RunFolder
from dspref.training.consolidate import checked_config, consolidate

STATE = "state.json"


class Named(NamedTuple):
    """A model as `from_pretrained` finds it, and what is known of where it comes from."""

    folder: str
    """Folder, or hub id."""
    trust_remote_code: bool = False
    """As the run that made it says."""
    delta: float | None = None
    """BCO's running mean of that run at this step; None where it is not known."""

    @property
    def is_adapter(self) -> bool:
        return adapters.is_saved(self.folder, "")


@contextmanager
def opened(source: str, said: str = "") -> Iterator[Named]:
    """The model that `source` names, for as long as this is open: the final model of a finished run, else that of its newest
    checkpoint, which is written to a folder of its own meanwhile. `said`: the option it was given by, for messages.

    Raises ConfigError where there is no model, IOFault where it is damaged.
    """
    blamed = f"{said}: " if said else ""
    path = Path(source)
    if (path / record.NAME).is_file():
        run = RunFolder(path)
        committed = committed_folders(run)
        if run.is_finished:
            if damaged := run.damage_of_export():
                raise IOFault(f"{blamed}{path / damaged}: is not what the run wrote; name a checkpoint of the run")
            behind = behind_final(run)
            code = configuration.load(path / RESOLVED).model.trust_remote_code
            yield Named(str(run.final), code, delta_of(behind) if behind else None)
            return
        if not committed:
            raise ConfigError(f"{blamed}{source}: the run has no model yet, nor a checkpoint (checkpoint.save_every)")
        path = committed[-1]
    if manifest.step_of(path.absolute()) is not None and path.absolute().parent.name == "checkpoints":
        section = checked_config(path).model
        (home := cache_folder("exports")).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            consolidate(path, Path(scratch) / "model")
            yield Named(f"{scratch}/model", section.trust_remote_code, delta_of(path))
        return
    _refuse_without_weights(source, blamed)
    yield Named(source)


def _refuse_without_weights(source: str, blamed: str) -> None:
    """Raise ConfigError where a folder, or a repository of the hub, holds no model, before anything else is said of it."""
    if not os.path.isdir(source) and (reason := weights.no_folder(source)):
        raise ConfigError(f"{blamed}{source}: {reason}")
    if found := manifest.committed(Path(source)):
        raise ConfigError(f"{blamed}{source}: holds checkpoints; name one of them, such as {found[-1]}")
    if adapters.is_saved(source, ""):
        return
    try:
        weights.fetch(ModelSection(name_or_path=source))
    except ConfigError as error:
        reason = str(error).removeprefix("model.name_or_path: ").removesuffix(weights.OR_DRAWN)
        raise ConfigError(f"{blamed}{reason}") from None


def delta_of(checkpoint: Path) -> float:
    return Progress.read(checkpoint / STATE).rewards.value


def section_of(named: Named, like: ModelSection) -> ModelSection:
    """The section of a run whose policy begins as this model; what does not concern weights is as in `like`."""
    changes = {"revision": None, "init": "pretrained", "load_in_4bit": False, "adapter_name": "default"}
    code = named.trust_remote_code or like.trust_remote_code
    if not named.is_adapter:
        changes |= {"name_or_path": named.folder, "lora": None}
    else:
        base, revision = adapters.base_of(named.folder)
        changes |= {"name_or_path": base, "revision": revision}
        changes |= {"lora": configuration.LoraSection(path=named.folder)}
    return like.model_copy(update=changes | {"trust_remote_code": code})
