"""What must be known of their keys on evaluations, checkpoints and the hub beyond their place."""

from __future__ import annotations

import re
from typing import Any

from dspref.config.hints import FILL_IN
from dspref.config.outcome_checks import is_repository
from dspref.config.watched import lower_is_better
from dspref.convert.draft import EMPTY_STEPS, Draft

# Where the Trainer of transformers decides, evaluations without a number of steps come with the lines of the log.
LOGGING_STEPS = {"trl": 10, "alignment-handbook": 500, "llamafactory": 500}
NAMES_OF_HUB = ("hub_model_id", "push_to_hub_model_id", "export_hub_model_id", "hf_repo_id", "save_to_hub")
AT_ONCE = "export.push_to_hub uploads once, at the end of the run, to main; `dspref push RUN owner/name` does by hand"


def cadence(draft: Draft) -> None:
    """Saving, evaluating and logging; steps as they are, other units told."""
    logged = _logging(draft)
    _evaluations(draft, logged)
    saves = draft.take("save_strategy")
    by_steps = saves in (None, "steps")
    every = draft.take("save_steps", "checkpointing_steps", "ckpt.save_steps", default=by_steps)
    if by_steps and isinstance(every, int) and every > 0 and every is not True:
        draft.put("checkpoint.save_every", every)
    elif saves in ("no", False):
        _overruled(draft, "save_steps", every, "save_strategy")
    elif not by_steps:
        draft.leave("save_strategy", saves, f"write checkpoint.save_every, in steps{_by_metric(saves)}")
        _overruled(draft, "save_steps", every, "save_strategy")
    elif every not in EMPTY_STEPS and (not isinstance(every, int) or every > 0):
        draft.leave("save_steps", every, "write checkpoint.save_every, in steps")
    kept = draft.take("save_total_limit", "keep_last_n_checkpoints", "max_ckpt_num", "ckpt.max_num")
    if isinstance(kept, int) and kept > 0:
        draft.put("checkpoint.keep_last", kept)
    elif draft.get("checkpoint.save_every") is not None:
        draft.note("checkpoint", "every checkpoint is kept there; here the last 2 are, unless keep_last says more")
    resumes = draft.take("resume_from_checkpoint", "auto_resume_from_checkpoints", "load_checkpoint", "ckpt.load_enable")
    if resumes:
        draft.leave("resume_from_checkpoint", resumes, "a run goes on from its newest checkpoint: checkpoint.resume: auto")
    if draft.flag("overwrite_output_dir"):
        draft.leave("overwrite_output_dir", True, "a run goes on where there is one; checkpoint.resume: never begins anew")


def _by_metric(strategy: Any) -> str:
    return "; checkpoint.keep_best keeps the best by a metric" if strategy == "best" else ""


def _overruled(draft: Draft, key: str, value: Any, by: str) -> None:
    """Tell of a number of steps that another key of theirs makes nothing."""
    if value not in EMPTY_STEPS:
        above = draft.given.get(draft.called.get(by, by))
        draft.leave(key, value, f"{draft.name(by)}: {'no' if above is False else above} goes before it")


def _logging(draft: Draft) -> int | None:
    """log.every; the steps between two lines there."""
    how, every = draft.take("logging_strategy"), draft.take("logging_steps", "logger.logging_steps")
    if how not in (None, "steps"):
        draft.leave("logging_strategy", how, "write log.every, in steps")
        _overruled(draft, "logging_steps", every, "logging_strategy")
        return None
    if isinstance(every, int) and every > 0:
        draft.put("log.every", every)
        return every
    if every is not None:
        draft.leave("logging_steps", every, "write log.every, in steps")
    return LOGGING_STEPS.get(draft.dialect) if every is None and not draft.computes("logging_steps") else None


def _evaluations(draft: Draft, logged: int | None) -> None:
    """train.eval_every."""
    how = draft.take("eval_strategy", "evaluation_strategy")
    every = draft.take("eval_steps", "eval.steps")
    draft.flag("do_eval")
    key, value = ("eval_steps", every) if every not in EMPTY_STEPS else ("eval_strategy", how)
    if draft.get("data.eval") is None and (how not in (None, "no", False) or every not in EMPTY_STEPS):
        draft.leave(key, value, "there is nothing to evaluate: name held-out pairs in data.eval")
    elif how in ("no", False):
        draft.leave("eval_strategy", how, "what is in data.eval is evaluated at the end")
        _overruled(draft, "eval_steps", every, "eval_strategy")
    elif how not in (None, "steps"):
        draft.leave("eval_strategy", how, "write train.eval_every, in steps")
        _overruled(draft, "eval_steps", every, "eval_strategy")
    elif isinstance(every, int) and every > 0 and every is not True:
        draft.put("train.eval_every", every)
    elif every not in EMPTY_STEPS:
        draft.leave("eval_steps", every, "write train.eval_every, in steps")
    elif how == "steps" and logged and not draft.computes("eval_steps"):
        draft.put("train.eval_every", logged, "theirs has no eval_steps: it evaluates every logging_steps")


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


def hub(draft: Draft) -> None:
    """Where theirs uploads: TRL, LLaMA-Factory, open-instruct if a flag says so, axolotl and exports if there is a name."""
    names = [key for key in NAMES_OF_HUB if draft.has(key) or key in draft.unread]
    wanted, repo = draft.flag("push_to_hub"), draft.take(*NAMES_OF_HUB)
    owner = draft.take("push_to_hub_organization", "hf_entity")
    by_name = draft.dialect == "axolotl" or names[:1] in (["export_hub_model_id"], ["save_to_hub"])
    uploads = wanted or draft.computes("push_to_hub") or (wanted is None and bool(names) and by_name)
    private, strategy = draft.flag("hub_private_repo"), draft.take("hub_strategy")
    if uploads:
        _repository(draft, repo, owner)
        if private is False:
            said = "export.push_to_hub uploads private; `dspref push RUN owner/name --public` does not"
            draft.leave("hub_private_repo", False, said)
        if strategy not in (None, "end"):
            draft.leave("hub_strategy", strategy, AT_ONCE)
        return
    for key in {*NAMES_OF_HUB} & {*draft.unread}:
        draft.leave_code(key, draft.unread.pop(key), "is computed there, and nothing is uploaded")
    said = "nothing is uploaded there; export.push_to_hub: owner/name would, at the end, or `dspref push RUN owner/name`"
    told = {"hub_model_id": repo, "hf_entity": owner, "hub_private_repo": private, "hub_strategy": strategy}
    for key, value in told.items():
        if value is not None:
            draft.leave(key, value, said)


def _repository(draft: Draft, repo: Any, owner: Any) -> None:
    """export.push_to_hub; the owner is the user's own there where none is named, which no file tells."""
    if draft.computes(*NAMES_OF_HUB):
        return
    if repo is not None and not isinstance(repo, str):
        draft.leave("hub_model_id", repo, "export.push_to_hub: is a repository of the hub, as owner/name")
        return
    folder = str(draft.get("output_dir") or "").rstrip("/").rsplit("/", 1)[-1]
    name = str(repo or re.sub(r"[^\w.-]+", "-", folder) or "model")
    whole = name if "/" in name else f"{owner or FILL_IN}/{name}"
    if not is_repository(whole):
        draft.leave("hub_model_id", name, "export.push_to_hub: is no repository of the hub; write it as owner/name")
        return
    if "/" in name or owner:
        draft.put("export.push_to_hub", whole)
    else:
        given = f"{draft.name('hub_model_id')}: {name}" if repo else f"{draft.name('push_to_hub')}: true"
        draft.later["export.push_to_hub"] = (whole, f"{given}, of whoever runs it there; write the owner, or drop the key")
