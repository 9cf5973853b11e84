"""What must be known of their keys on evaluations, checkpoints and trackers beyond their place."""

from __future__ import annotations

from typing import get_args

from dspref.config.draft import EMPTY_STEPS, Draft
from dspref.config.sections import Tracker
from dspref.config.watched import lower_is_better


def cadence(draft: Draft) -> None:
    """Saving, evaluating and logging; steps as they are, other units told."""
    evaluates = draft.take("eval_strategy", "evaluation_strategy")
    every = draft.take("eval_steps", "eval.steps")
    draft.flag("do_eval")
    if draft.get("data.eval") is None and (evaluates not in (None, "no", False) or every not in EMPTY_STEPS):
        draft.leave("eval_steps", every or evaluates, "there is nothing to evaluate: name held-out pairs in data.eval")
    elif evaluates in ("no", False):
        draft.leave("eval_strategy", evaluates, "what is in data.eval is evaluated at the end")
    elif isinstance(every, int) and every > 0:
        draft.put("train.eval_every", every)
    elif every not in EMPTY_STEPS or evaluates == "epoch":
        draft.leave("eval_steps", every or evaluates, "write train.eval_every, in steps")
    saves = draft.take("save_strategy")
    every = draft.take("save_steps", "checkpointing_steps", "ckpt.save_steps")
    if saves in ("no", False) or every in EMPTY_STEPS or (isinstance(every, int) and every < 0):
        every = None
    if saves in ("epoch", "best") or (every is not None and not isinstance(every, int)):
        draft.leave("save_strategy" if saves else "save_steps", saves or every, "write checkpoint.save_every, in steps")
    elif every is not None:
        draft.put("checkpoint.save_every", every)
    kept = draft.take("save_total_limit", "keep_last_n_checkpoints", "max_ckpt_num", "ckpt.max_num")
    if isinstance(kept, int) and kept > 0:
        draft.put("checkpoint.keep_last", kept)
    elif every is not None:
        draft.note("checkpoint", "every checkpoint is kept there; here the last 2 are, unless keep_last says more")
    resumes = draft.take("resume_from_checkpoint", "auto_resume_from_checkpoints", "load_checkpoint", "ckpt.load_enable")
    if resumes:
        draft.leave("resume_from_checkpoint", resumes, "a run goes on from its newest checkpoint: checkpoint.resume: auto")
    if draft.flag("overwrite_output_dir"):
        draft.leave("overwrite_output_dir", True, "a run goes on where there is one; checkpoint.resume: never begins anew")
    logging = draft.take("logging_steps", "logger.logging_steps")
    if isinstance(logging, int) and logging > 0:
        draft.put("log.every", logging)
    elif logging is not None:
        draft.leave("logging_steps", logging, "write log.every, in steps")


def judging(draft: Draft) -> None:
    """What follows from evaluations: an early end, the best weights. Theirs are judged by the loss where nothing is said."""
    best, greater = draft.flag("load_best_model_at_end"), draft.flag("greater_is_better")
    metric = str(draft.take("metric_for_best_model") or "loss")
    metric = metric if metric.startswith("eval_") else f"eval_{metric}"
    patience = draft.take("early_stopping_patience", "early_stopping_steps")
    at_start, lower = draft.flag("eval_on_start"), lower_is_better(metric)
    if draft.get("data.eval") is None:
        asked = {"load_best_model_at_end": best, "early_stopping_patience": patience, "eval_on_start": at_start}
        for key, value in asked.items():
            if value:
                draft.leave(key, value, "there is nothing to evaluate: name held-out pairs in data.eval")
        return
    if at_start is not None:
        draft.put("train.eval_at_start", at_start)
    if best and greater is not None and greater == lower:
        draft.leave("load_best_model_at_end", True, f"{metric} is better when {'lower' if lower else 'higher'} here")
    elif best:
        draft.put("checkpoint.keep_best", metric)
        draft.put("export.weights", "best")
    if patience and draft.get("train.eval_every") is None:
        draft.leave("early_stopping_patience", patience, "train.stop_when needs train.eval_every, in steps")
    elif patience:
        draft.put("train.stop_when.metric", metric)
        draft.put("train.stop_when.patience", patience)
        if greater is not None and greater != (lower is False):
            draft.put("train.stop_when.direction", "max" if greater else "min")


def trackers(draft: Draft) -> None:
    asked = draft.take("report_to")
    names = [asked] if isinstance(asked, str) else [str(name) for name in asked] if isinstance(asked, list) else []
    if asked is not None and not isinstance(asked, str | list):
        draft.leave("report_to", asked, "log.trackers lists the trackers that there are")
    if (
        draft.flag("with_tracking")
        or draft.take("use_wandb")
        or draft.has("wandb_project", "wandb_name", "logger.wandb.project")
    ):
        names.append("wandb")
    known = get_args(Tracker)
    for name in known:
        if draft.take(f"use_{name}", *(("logger.tensorboard_dir",) if name == "tensorboard" else ())):
            names.append(name)
    words = ["wandb", "tensorboard"] if "all" in names and draft.dialect != "open-instruct" else names
    words = ["comet" if word == "comet_ml" else word for word in words]
    kept = [name for name in dict.fromkeys(words) if name in known]
    for name in words:
        if name not in (*kept, "none", "all"):
            draft.leave("report_to", name, "log.trackers lists the trackers that there are")
    if kept:
        draft.put("log.trackers", kept)
    name = draft.take(
        "run_name", "wandb_name", "wandb_run_name", "logger.wandb.run_name", "mlflow_run_name", "trackio_run_name",
        "swanlab_run_name", "exp_name",
    )  # fmt: skip
    if name is not None:
        draft.put("log.run_name", str(name))
    folder = draft.take("output_dir", "save_path", "ckpt.output_dir", "out_dir")
    if folder is not None:
        draft.put("output_dir", folder)


def hub(draft: Draft) -> None:
    """TRL and LLaMA-Factory upload where a flag says so, axolotl where there is a name."""
    names = ("hub_model_id", "push_to_hub_model_id", "export_hub_model_id")
    wanted, repo = draft.flag("push_to_hub"), draft.take(*names)
    if isinstance(repo, str) and repo.count("/") == 1 and (wanted or (wanted is None and draft.dialect == "axolotl")):
        draft.put("export.push_to_hub", repo)
    elif wanted or (repo is not None and wanted is None):
        key, value = ("push_to_hub", wanted) if repo is None else ("hub_model_id", repo)
        draft.leave(key, value, "write export.push_to_hub, as owner/name, where the model is to be uploaded")
