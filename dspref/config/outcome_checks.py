"""What does not go together in which evaluations a run is judged by, and what becomes of its model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches

from dspref.config.objective_checks import Complaint
from dspref.config.sections import Config
from dspref.config.watched import lower_is_better
from dspref.objectives import as_list, component

# Metrics of every evaluation, behind its prefix.
EVALUATED = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    "entropy", "mean_token_accuracy",
)  # fmt: skip
KL = ("kl/chosen", "kl/rejected")
# A longer name is refused by the hub.
LONGEST_REPOSITORY = 96


def check_best(config: Config) -> Iterator[Complaint]:
    best, sets = config.checkpoint.keep_best, config.data.eval_sources
    if best is None:
        return
    if not sets:
        yield ("checkpoint", "keep_best"), "there is nothing to evaluate; set data.eval"
    elif no_metric := _no_metric(best, config, "rewards/margins"):
        yield ("checkpoint", "keep_best"), no_metric
    elif not (every := config.train.eval_every):
        yield ("checkpoint", "keep_best"), "needs evaluations; set train.eval_every"
    # With export: best there is a checkpoint at each evaluation that is the best so far.
    elif config.export.weights != "best" and (config.checkpoint.save_every or 0) % every:
        yield (
            ("checkpoint", "keep_best"),
            "needs an evaluation at every checkpoint: save_every a multiple of train.eval_every",
        )


def check_stopping(config: Config) -> Iterator[Complaint]:
    stop, sets, best = config.train.stop_when, config.data.eval_sources, config.export.weights == "best"
    if stop is not None:
        own = ("train", "stop_when")
        if not sets:
            yield own, "there is nothing to evaluate; set data.eval"
        elif no_metric := _no_metric(stop.metric, config, "loss"):
            yield (*own, "metric"), no_metric
        elif stop.direction is None and lower_is_better(stop.metric) is None:
            yield (*own, "metric"), "its name does not tell which way is better; set direction: min or max beside it"
        elif not config.train.eval_every:
            yield own, "a run is evaluated at its end alone, when there is nothing to stop; set train.eval_every"
    if not best:
        return
    if config.judged_by is None:
        yield ("export",), "by which metric? set train.stop_when, or checkpoint.keep_best, such as eval_loss"
    elif stop and config.checkpoint.keep_best not in (None, stop.metric):
        yield (
            ("checkpoint", "keep_best"),
            f"with export: best it must be {stop.metric}, as in train.stop_when",
        )
    elif stop and stop.direction and lower_is_better(stop.metric) not in (None, stop.direction == "min"):
        yield ("train", "stop_when", "direction"), "with export: best it must be that of the metric's name; leave it out"


def _no_metric(metric: str, config: Config, example: str) -> str | None:
    sets = config.data.eval_sources
    known = [prefix + name for prefix in sets for name in sorted(_evaluated(config))]
    if metric in known:
        return None
    close = get_close_matches(metric, known, n=1)
    return "no such metric; " + (f"did you mean {close[0]}?" if close else f"for example {next(iter(sets))}{example}")


def _evaluated(config: Config) -> set[str]:
    section = config.objective
    names = as_list(section.loss_type)
    has_nll = section.name != "dpo" or "sft" in names or section.rpo_alpha is not None
    kl = KL if section.name == "dpo" else ()
    return {*EVALUATED, *kl, *(f"loss/{component(name)}" for name in names), *(["nll_loss"] if has_nll else [])}


def check_hub(config: Config) -> Iterator[Complaint]:
    repo = config.export.push_to_hub
    if repo is not None and not is_repository(repo):
        yield ("export", "push_to_hub"), f"{repo!r} is no repository of the hub; write it as owner/name"
    elif repo is not None and repo.startswith("FILL_IN/"):  # as `dspref convert` writes it
        yield ("export", "push_to_hub"), f"{repo}: the owner is still to be filled in"


def is_repository(text: str) -> bool:
    """Whether the hub would take it as owner/name."""
    spelt = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text, re.ASCII) and text[-1] not in ".-" and "/." not in text
    return bool(spelt) and len(text) <= LONGEST_REPOSITORY and not re.search(r"--|\.\.|\.git\Z", text)
