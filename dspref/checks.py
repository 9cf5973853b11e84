"""What must hold between the keys of a config. Each check yields (path of the key to blame, reason with its remedy)."""

from __future__ import annotations

from collections.abc import Iterator

from dspref import strategy
from dspref.objectives import OBJECTIVES, loss_keys
from dspref.sections import Config

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
    if config.checkpoint.keep_best and not config.data.eval:
        yield ("checkpoint", "keep_best"), "there is nothing to evaluate; set data.eval"


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


CHECKS = (_check_unsupported, _check_objective, _check_lengths, _check_schedule, _check_reference, _check_strategy)
