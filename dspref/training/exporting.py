"""The model of a run or of one of its checkpoints, as a folder of its own: `dspref export`."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from dspref import config as configuration
from dspref.config import ModelSection
from dspref.errors import ConfigError, IOFault
from dspref.files import flushed_tree
from dspref.model import adapters, loading
from dspref.run import export, record
from dspref.run.checkpoint import behind_final, committed_folders
from dspref.run.folder import RESOLVED, RunFolder
from dspref.training import outcome, preparation, stages
from dspref.training.consolidate import as_merged, consolidate, refuse_taken, refuse_unmergeable
from dspref.training.model_card import model_card


def write(source: Path, to: Path, dtype: str | None = None, merge: bool = False) -> Path:
    """Write the model of a run, or of a committed checkpoint, to the folder `to`; what it was made of.

    Of a finished run that is `final/`, or where that is damaged, or has another `dtype`, the checkpoint with its weights; of
    another run, its newest checkpoint. `merge`: add the adapter to the model below it.
    Raises ConfigError, IOFault; then `to` is as it was.
    """
    if not is_run(source):
        consolidate(source, to, dtype, merge)
        return source
    refuse_taken(to)
    run = RunFolder(source)
    committed = committed_folders(run)
    if not run.is_finished and not committed:
        raise ConfigError(f"{source}: is not finished, and has no committed checkpoint; set checkpoint.save_every")
    behind = behind_final(run) if run.is_finished else committed[-1]
    if behind and (not run.is_finished or run.damage_of_export() or (dtype and not merge)):
        consolidate(behind, to, dtype, merge)
        return behind
    copy_final(run, to, dtype, merge)
    return run.final


def is_run(folder: Path) -> bool:
    return (folder / record.NAME).is_file()


def copy_final(run: RunFolder, to: Path, dtype: str | None, merge: bool) -> None:
    """Write `to` from `final/` of a finished run, as it is or merged."""
    if damaged := run.damage_of_export():
        raise IOFault(f"{run.path / damaged}: is not what the run wrote; restore it")
    config = configuration.load(run.path / RESOLVED)
    section = config.model
    if merge:
        refuse_unmergeable(section)
    merges = merge and adapters.is_saved(str(run.final), "")
    if dtype and dtype != section.dtype and not merges:
        remedy = "leave --dtype out, or train with checkpoint.save_every"
        raise ConfigError(
            f"--dtype: {run.path} left no checkpoint with weights in other types than {section.dtype}; {remedy}"
        )
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".export-") as scratch:
        draft = Path(scratch) / "final"
        if merges:
            section = section.model_copy(update={"dtype": dtype} if dtype else {})
            recipe = stages.recipe(config, stages.reference_spec(config))._replace(model=as_merged(section))
            card = model_card(recipe, outcome.of_card(run.path, run.run["summary"]))
            merge_final(run, draft, section, card)
        else:
            shutil.copytree(run.final, draft)
        flushed_tree(draft)
        draft.rename(to)


def merge_final(run: RunFolder, draft: Path, section: ModelSection, card: str) -> None:
    """Add the adapter in `final/` to its model, and write that."""
    loading.quiet()
    base = str(run.path / "init") if section.init == "random" else section.name_or_path
    export.write_merged(draft, base, run.final, section)
    own = {"tokenizer_name_or_path": str(run.final), "revision": None, "chat_template": None}
    tokenizer = preparation.tokenizer_of(section.model_copy(update=own))
    export.accompany(draft, tokenizer, card)
