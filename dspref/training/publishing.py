"""A finished run's model goes to the hub: asked for by the run (`export.push_to_hub`), or by hand (`dspref push`)."""

from __future__ import annotations

from pathlib import Path

from dspref import config as configuration
from dspref import distributed, terminal
from dspref.errors import UserError
from dspref.run import publish, record
from dspref.run.folder import RESOLVED


def push(run: Path, repo: str, public: bool = False) -> tuple[str, list[str]]:
    """Upload the model, or the adapter, of a finished run with its card: its address, and what to be warned of.

    Raises as `publish.finished_model` and `publish.push`.
    """
    final = publish.finished_model(run)
    config = configuration.load(run / RESOLVED)
    warnings = []
    if config.model.lora and not config.model.lora.merge_on_export and Path(config.model.name_or_path).exists():
        line = f"the adapter is for {config.model.name_or_path}, a folder that others do not have"
        warnings.append(f"warning: {line}; dspref export --merge writes the whole model")
    metrics = publish.held_out_of(run, record.read(run)[0].get("summary", {}))
    paths = [source.path for source in config.data.train_sources]
    said = publish.metadata_of(config.model, paths, config.objective.name, run.absolute().name, metrics)
    return publish.push(final, repo, public, said), warnings


def push_at_the_end(run: Path, repo: str) -> None:
    """What the run asked for, on rank 0. The run is done: an upload that fails is told, and changes no exit code."""
    if distributed.world().rank != 0:
        return
    try:
        address, warnings = push(run, repo)
    except UserError as error:
        again = terminal.command("dspref", "push", run, repo)
        distributed.log(f"warning: export.push_to_hub: {str(error).removesuffix('; the same command tries again')}")
        distributed.log(f"the model is in {run / 'final'}; `{again}` uploads it")
        return
    for line in warnings:
        distributed.log(line)
    distributed.log(f"pushed  {address}")
