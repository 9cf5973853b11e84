"""Which trackers are on there, and by what names of project and run: only those of a tracker that is on count."""

from __future__ import annotations

from typing import Any, get_args

from dspref.config.sections import Tracker
from dspref.convert.draft import FALSE, Draft, as_list

KNOWN: tuple[str, ...] = get_args(Tracker)
# Tracker -> its switches, its projects, its names for a run.
SWITCHES = {name: (f"use_{name}",) for name in KNOWN} | {
    "wandb": ("use_wandb", "logger.wandb.key", "with_tracking"),
    "tensorboard": ("use_tensorboard", "logger.tensorboard_dir"),
}
PROJECTS = {
    "wandb": ("wandb_project", "wandb_project_name", "logger.wandb.project"),
    "mlflow": ("mlflow_experiment_name",),
    "trackio": ("trackio_project_name", "project"),
    "comet": ("comet_project_name",),
    "swanlab": ("swanlab_project",),
}
RUNS = {
    "wandb": ("wandb_name", "wandb_run_name", "logger.wandb.run_name", "wandb_run_id"),
    "mlflow": ("mlflow_run_name",),
    "trackio": ("trackio_run_name",),
    "swanlab": ("swanlab_run_name",),
}
# Where a switch alone turns a tracker on, and the name of a project does not.
BY_SWITCH = ("open-instruct", "openrlhf", "llamafactory")


def trackers(draft: Draft) -> None:
    """log.trackers, log.project, log.run_name and output_dir."""
    asked = as_list(draft.take("report_to"))
    names = [asked] if isinstance(asked, str) else [str(name) for name in asked] if isinstance(asked, list) else []
    if asked is not None and not isinstance(asked, str | list):
        draft.leave("report_to", asked, "log.trackers lists the trackers that there are")
    words = ["wandb", "tensorboard"] if "all" in names and draft.dialect != "open-instruct" else names
    words = ["comet" if word == "comet_ml" else word for word in words]
    words += [name for name in KNOWN if _is_on(draft, name, asked is not None)]
    kept = [name for name in dict.fromkeys(words) if name in KNOWN]
    for name in dict.fromkeys(words):
        if name not in (*kept, "none", "all"):
            draft.leave("report_to", name, "log.trackers lists the trackers that there are")
    if kept:
        draft.put("log.trackers", kept)
    open_switch = draft.computes("report_to", *(key for keys in SWITCHES.values() for key in keys))
    for name in KNOWN:
        if name not in kept and not open_switch:
            _leave_names(draft, name)
    project = draft.take(*(key for name in kept for key in PROJECTS.get(name, ())))
    if project is not None:
        draft.put("log.project", str(project))
    name = draft.take("run_name", *(key for name in kept for key in RUNS.get(name, ())), "exp_name")
    if name is not None:
        draft.put("log.run_name", str(name))
    folder = draft.take("output_dir", "save_path", "ckpt.output_dir", "out_dir")
    if folder is not None:
        draft.put("output_dir", folder)


def _is_on(draft: Draft, name: str, chosen: bool) -> bool:
    """Whether a switch of theirs turns a tracker on, or the name of its project does where nothing else was said. `chosen`:
    whether a list of trackers is given."""
    given = [value for key in SWITCHES[name] if (value := draft.take(key)) is not None]
    if given:
        return any(value not in FALSE for value in given)
    if chosen or draft.dialect in BY_SWITCH:
        return False
    names = (*PROJECTS.get(name, ()), *RUNS.get(name, ()))
    return draft.has(*(key for key in names if key not in ("project", "wandb_run_id")))


def _leave_names(draft: Draft, tracker: str) -> None:
    """Names of a tracker that is off."""
    for key in (*PROJECTS.get(tracker, ()), *RUNS.get(tracker, ())):
        value: Any = draft.take(key)
        if value is not None:
            draft.leave(key, value, f"{tracker} is off there")
        if key in draft.unread:
            draft.leave_code(key, draft.unread.pop(key), f"is computed there; {tracker} is off")
