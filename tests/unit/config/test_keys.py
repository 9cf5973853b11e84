"""Every key of other trainers has an answer, and the right one; so have their values. The lists are in keys/, from the
sources that each names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dspref.config.absent import NOT_NEEDED
from dspref.config.explain import Kind
from dspref.config.foreign import FOREIGN_KEYS
from dspref.config.load import examine
from dspref.config.within import WITHIN

LISTS = sorted((Path(__file__).parent / "keys").glob("*.txt"))
MINIMAL: dict[str, Any] = {"model": {"name_or_path": "m"}, "data": {"train": {"path": "p.jsonl"}}, "output_dir": "out"}


def keys_of(path: Path) -> list[str]:
    return [key for line in path.read_text().splitlines() if not line.startswith("#") for key in line.split()]


ALL = sorted({key for path in LISTS for key in keys_of(path)})


def reasons(document: dict[str, Any]) -> dict[str, str]:
    return {".".join(map(str, c.path)): c.reason for c in examine(MINIMAL | document)[1]}


def nested(path: str, value: Any) -> dict[str, Any]:
    """{a: {b: value}} of a.b; of objective the whole section."""
    section, _, key = path.partition(".")
    return {section: {**(MINIMAL.get(section) or {}), key: value}} if key else {section: value}


def test_the_lists_are_whole() -> None:
    sizes = {path.stem: len(keys_of(path)) for path in LISTS}
    assert len(ALL) > 1000 and len(sizes) == 12, sizes
    for path in LISTS:
        told = re.search(r": (\d+) keys\.$", path.read_text().splitlines()[0])
        assert told and int(told[1]) == sizes[path.stem] == len(set(keys_of(path))), path.stem


def test_dpo_keys_are_those_that_are_installed() -> None:
    """Of the part of TRL's configs that transformers has."""
    from transformers import TrainingArguments as arguments

    installed = {name for name, field in arguments.__dataclass_fields__.items() if field.init}
    if "warmup_ratio" in installed:
        pytest.skip("another version of transformers")
    for stem in ("trl-dpo", "trl-cpo", "trl-orpo", "trl-kto"):
        assert installed <= {*keys_of(next(path for path in LISTS if path.stem == stem))}, stem


def test_no_key_is_without_an_answer() -> None:
    """In a real config, where it stands at the top."""
    told = reasons({key: 1 for key in ALL if key not in ("output_dir", "deepspeed")})
    for key in ALL:
        if key in ("output_dir", "deepspeed", "train.seed"):  # as they are here
            continue
        reason = told[key]
        assert reason.startswith("unknown key; "), (key, reason)
        assert "in dspref this is " in reason or "drop it: " in reason, (key, reason)


def test_no_key_is_without_an_answer_in_any_section() -> None:
    for name in ("train", "model", "checkpoint", "log", "reference"):
        section = MINIMAL.get(name, {}) | dict.fromkeys(ALL, 1)
        own = set(examine(MINIMAL)[0].model_dump()[name])  # type: ignore[union-attr]
        for complaint in examine(MINIMAL | {name: section})[1]:
            if complaint.kind is Kind.UNKNOWN and complaint.path[-1] not in own:
                assert re.search("in dspref this is |drop it: |did you mean '", complaint.reason), complaint


# Key -> what the answer must name. Those that are hard, or were wrong before.
RIGHT = {
    "lr": "train.learning_rate", "save_steps": "checkpoint.save_every",
    "per_device_train_batch_size": "train.pairs_per_step", "micro_batch_size": "data.tokens_per_pack",
    "train.batch_size": "train.pairs_per_step", "bf16": "model.dtype: bfloat16", "warmup_ratio": "train.warmup_ratio",
    "warmup_steps": "train.warmup_steps", "label_smoothing": "objective.label_smoothing",
    "label_smoothing_factor": "objective.label_smoothing", "precompute_ref_log_probs": "reference.mode: stored",
    "precompute_ref_batch_size": "reference.tokens_per_pack", "sync_ref_model": "reference.sync_ref_model",
    "max_prompt_length": "data.max_prompt_length", "max_completion_length": "data.max_completion_length",
    "truncation_mode": "data.truncation_mode", "disable_dropout": "model.disable_dropout",
    "ld_alpha": "objective.ld_alpha", "router_aux_loss_coef": "model.router_aux_loss_coef",
    "load_balancing_weight": "model.router_aux_loss_coef", "use_weighting": "objective.use_weighting",
    "discopop_tau": "objective.discopop_tau", "run_name": "log.run_name",
    "use_8bit_optimizer": "train.optim: adamw_8bit", "pref_ftx": "objective.rpo_alpha", "orpo_alpha": "objective.beta",
    "dataset_mixture": "data.train: a list", "dataset_mixer_list": "weight", "dataset_splits": "split",
    "dataset_config": "name", "ds.lora.rank": "model.lora.r", "ds.zero_stage": "ds_configs/",
    "model.ipo_enable": "loss_type: ipo", "ref_offload": "reference.offload: cpu",
    "clip_grad_norm": "train.max_grad_norm", "l2": "train.weight_decay", "lora_target_linear": "all-linear",
    "truncation_side": "data.truncation_mode", "max_len": "data.max_length",
    "gradient_checkpointing": "model.gradient_checkpointing", "fsdp_offload_params": "zero3_offload_all",
    "data_seed": "train.seed", "hub_token": "HF_TOKEN", "wandb_run_group": "WANDB_RUN_GROUP",
    "val_set_size": "data.eval", "padding_free": "packed", "gradient_checkpointing_kwargs": "DeepSpeed",
    "muon.lr": "train.optim", "kto_desirable_weight": "objective.desirable_weight", "neftune_noise_alpha": "noise",
    "profiler_steps_start": "train.profile: [FIRST, LAST]", "enable_torch_profiler": "train.profile",
    "profiler_with_stack": "train.profile",
    "early_stopping_patience": "train.stop_when", "mixed_precision": "model.dtype", "alpha": "objective.alpha",
    "eval_on_start": "train.eval_at_start", "load_best_model_at_end": "export: best",
    "early_stopping_steps": "train.stop_when", "greater_is_better": "train.stop_when (direction",
    "generate_during_eval": "log.samples", "generation_temperature": "log.generation.temperature",
    "generation_max_new_tokens": "log.generation.max_new_tokens",
    "push_to_hub": "export.push_to_hub", "hub_strategy": "dspref push",
    "project": "log.project", "trust_remote_code": "model.trust_remote_code", "config": "include",
}  # fmt: skip


def test_the_answers_are_the_right_ones() -> None:
    told = reasons(dict.fromkeys(RIGHT, 1))
    for key, words in RIGHT.items():
        assert words in told[key], (key, told[key])


def test_no_answer_is_for_a_key_of_the_section_it_stands_in() -> None:
    """A key of ours is not answered as another's, but where the section lacks it."""
    config, _ = examine(MINIMAL)
    assert config
    for key in {*FOREIGN_KEYS, *NOT_NEEDED}:
        assert key not in type(config).model_fields or key == "deepspeed", key
        for section, table in WITHIN.items():
            assert key not in section.model_fields or key not in table, (key, section)


# (key, value) -> what must be said of it, or "" where nothing may be proposed.
VALUES_TOLD = {
    ("train.optim", "adamw_torch"): "did you mean 'adamw'?", ("train.optim", "adamw_torch_fused"): "did you mean 'adamw'?",
    ("train.optim", "paged_adamw_32bit"): "did you mean 'adamw'?", ("train.optim", "adamw_bnb_8bit"): "'adamw_8bit'?",
    ("train.optim", "paged_adamw_8bit"): "did you mean 'adamw_8bit'?", ("train.optim", "adafactor"): "AdamW's three",
    ("train.optim", "lion_8bit"): "AdamW's three", ("train.optim", "adamw_torch_4bit"): "AdamW's three",
    ("train.optim", "adamc"): "AdamW's three", ("train.optim", "galore_adamw_8bit"): "",
    ("train.lr_scheduler_type", "warmup_stable_decay"): "no such schedule",
    ("train.lr_scheduler_type", "cosine_warmup_with_min_lr"): "did you mean 'cosine_with_min_lr'?",
    ("model.dtype", "auto"): "", ("model.dtype", "bf16"): "did you mean 'bfloat16'?", ("model.dtype", "fp16"): "'float16'?",
    ("model.attn_implementation", "kernels-community/vllm-flash-attn3"): "did you mean 'flash_attention_3'?",
    ("model.attn_implementation", "fa2"): "did you mean 'flash_attention_2'?",
    ("objective.loss_type", "wpo"): "sigmoid with use_weighting", ("objective.loss_type", "kto"): "write name: kto",
    ("objective.loss_type", "simnpo"): "no such loss", ("objective.loss_type", "grpo"): "reinforcement",
    ("objective.loss_type", "simpo"): "write name: simpo", ("objective.loss_type", "aot_pairs"): "did you mean 'aot_pair'?",
    ("objective.name", "ipo"): "write objective: {name: dpo, loss_type: ipo}", ("objective.name", "simnpo"): "no such loss",
    ("objective.name", "cdpo"): "write objective: {name: dpo, loss_type: sigmoid} with label_smoothing",
    ("objective.name", "wpo"): "{name: dpo, loss_type: sigmoid} with use_weighting",
    ("objective.name", "grpo"): "reinforcement",
    ("objective.name", "cpo_simpo"): "{name: cpo, loss_type: simpo} with cpo_alpha",
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES_TOLD, ids=lambda case: f"{case[0]}={case[1]}")
def test_values_of_other_trainers_are_answered(case: tuple[str, str]) -> None:
    (reason,) = reasons(nested(*case)).values()
    if told := VALUES_TOLD[case]:
        assert told in reason
    else:
        assert reason.endswith(f"not '{case[1]}'"), reason


@pytest.mark.parametrize(
    ("family", "loss", "told"),
    [
        ("simpo", "ipo", "'simpo', 'simper' or 'repo', not 'ipo'; write objective: {name: dpo, loss_type: ipo}"),
        ("orpo", "sigmoid", "'orpo', not 'sigmoid'; write objective: {name: dpo, loss_type: sigmoid}"),
        ("orpo", "simpo", "write objective: {name: simpo}"),
        ("cpo", "robust", "write objective: {name: dpo, loss_type: robust}"),
        ("dpo", "repo", "write objective: {name: simpo, loss_type: repo}"),  # cpo would add an NLL that is not RePO's
        ("cpo", "cdpo", "write objective: {name: dpo, loss_type: sigmoid} with label_smoothing"),
        ("orpo", "grpo", "reinforcement"),
    ],
)
def test_a_loss_of_another_family_is_answered_with_that(family: str, loss: str, told: str) -> None:
    (reason,) = reasons({"objective": {"name": family, "loss_type": loss}}).values()
    assert told in reason


def test_a_key_with_its_section_in_one_word_is_answered() -> None:
    told = reasons({"train.lr": 1, "train.seed": 2, "model.padding_free": 1})
    assert "in dspref this is train.learning_rate" in told["train.lr"]
    assert "write train: {seed: ...}" in told["train.seed"] and "drop it: " in told["model.padding_free"]
