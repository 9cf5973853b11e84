"""What must hold between the keys of a config. Each check yields (path of the key to blame, reason with its remedy)."""

from __future__ import annotations

from collections.abc import Iterator

from dspref import strategy
from dspref.objectives import OBJECTIVES, loss_keys
from dspref.sections import Config

# lr_scheduler_type -> (what lr_scheduler_kwargs may hold, of which at least one is needed)
SCHEDULE_OPTIONS: dict[str, tuple[set[str], set[str]]] = {
    "cosine": ({"num_cycles"}, set()),
    "cosine_with_restarts": ({"num_cycles"}, set()),
    "polynomial": ({"lr_end", "power"}, set()),
    "inverse_sqrt": ({"timescale"}, set()),
    "cosine_with_min_lr": ({"num_cycles", "min_lr", "min_lr_rate"}, {"min_lr", "min_lr_rate"}),
}
# Metrics of every evaluation, behind its prefix.
EVALUATED = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "nll_loss")

Complaint = tuple[tuple[str | int, ...], str]


def _check_unsupported(config: Config) -> Iterator[Complaint]:
    if config.model.router_aux_loss_coef:
        yield ("model", "router_aux_loss_coef"), "the router loss is not in this version; set 0 to train without it"
    if config.reference.mode == "adapter":
        yield (
            ("reference", "mode"),
            "adapter needs a LoRA policy, which this version does not train; use stored or engine",
        )


def _check_objective(config: Config) -> Iterator[Complaint]:
    section = config.objective
    objective = OBJECTIVES[section.name]
    applicable = {"name", "loss_type", objective.nll_weight, *loss_keys(objective, section.loss_type)}
    for key in sorted(section.model_fields_set - applicable):
        yield ("objective", key), f"does not apply to loss_type {section.loss_type}"
    if objective.needs_reference and config.reference.mode == "none":
        yield ("reference", "mode"), f"objective {section.name} needs a reference; use auto, stored or engine"


def _check_lengths(config: Config) -> Iterator[Complaint]:
    data = config.data
    if data.max_length and data.max_prompt_length and data.max_prompt_length >= data.max_length:
        yield ("data", "max_prompt_length"), f"must be below max_length ({data.max_length}), or no answer token fits"


def _check_schedule(config: Config) -> Iterator[Complaint]:
    train = config.train
    if {"warmup_ratio", "warmup_steps"} <= train.model_fields_set and train.warmup_steps is not None:
        yield ("train", "warmup_steps"), "give warmup_steps or warmup_ratio, not both"
    if train.eval_every and not config.data.eval:
        yield ("train", "eval_every"), "there is nothing to evaluate; set data.eval"
    asked = train.warmup_steps or ("warmup_ratio" in train.model_fields_set and train.warmup_ratio)
    if train.lr_scheduler_type == "constant" and asked:
        yield ("train", "lr_scheduler_type"), "constant has no warm-up; use constant_with_warmup"
    known, needed = SCHEDULE_OPTIONS.get(train.lr_scheduler_type, (set(), set()))
    for key in sorted(set(train.lr_scheduler_kwargs) - known):
        yield ("train", "lr_scheduler_kwargs"), f"{train.lr_scheduler_type} takes no {key}; it takes {_names(known)}"
    if needed and not needed & set(train.lr_scheduler_kwargs):
        yield ("train", "lr_scheduler_kwargs"), f"{train.lr_scheduler_type} needs {_names(needed)}"


def _names(keys: set[str]) -> str:
    return " or ".join(sorted(keys)) or "none"


def _check_best(config: Config) -> Iterator[Complaint]:
    best, sets = config.checkpoint.keep_best, config.data.eval_sources
    if best is None:
        return
    if not sets:
        yield ("checkpoint", "keep_best"), "there is nothing to evaluate; set data.eval"
    elif best not in {prefix + name for prefix in sets for name in EVALUATED}:
        yield ("checkpoint", "keep_best"), f"no such metric; for example {next(iter(sets))}rewards/margins"
    elif not config.train.eval_every or (config.checkpoint.save_every or 0) % config.train.eval_every:
        yield (
            ("checkpoint", "keep_best"),
            "needs an evaluation at every checkpoint: save_every a multiple of train.eval_every",
        )


def _check_reference(config: Config) -> Iterator[Complaint]:
    reference = config.reference
    if reference.offload == "cpu" and reference.zero_stage == 0:
        yield ("reference", "offload"), "cpu offload needs reference.zero_stage 3"
    if reference.mode == "stored" and reference.offload == "cpu":
        yield (
            ("reference", "offload"),
            "stored log-probs leave no reference in memory; drop offload or use mode: engine",
        )


def _check_strategy(config: Config) -> Iterator[Complaint]:
    if not config.has_strategy_file:
        yield ("deepspeed",), f"{config.deepspeed}: no such file; ds_configs/README.md lists those that come with dspref"
    problem = strategy.problem(config.strategy, config.model.dtype)
    if problem:
        yield ("deepspeed", *problem.path), problem.reason
    elif config.train.optim == "cpu_adam" and not strategy.offloads_optimizer(config.strategy):
        yield ("train", "optim"), "cpu_adam is for states in host memory; set offload_optimizer, or use adamw"


CHECKS = (
    _check_unsupported,
    _check_objective,
    _check_lengths,
    _check_schedule,
    _check_best,
    _check_reference,
    _check_strategy,
)
