"""The configs of other trainers: whose a file is, whether it is a preference run, and what they take where it says nothing.

Sources: TRL 1.16 on transformers 5.23, alignment-handbook, SimPO's own repository, axolotl 0.19, LLaMA-Factory 0.9.5,
open-instruct's dpo_tune_cache.py, OpenRLHF 0.11's train_dpo.py and 0.8's train_kto.py; BCO of TRL 1.13.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dspref.errors import ConfigError

DIALECTS = ("trl", "alignment-handbook", "axolotl", "llamafactory", "open-instruct", "openrlhf")
# Keys that only one of them has.
MARKS = {
    "axolotl": (
        "base_model rl sequence_len micro_batch_size datasets num_epochs val_set_size adapter lora_target_linear "
        "dataset_prepared_path sample_packing evals_per_epoch saves_per_epoch rl_beta test_datasets lora_model_dir "
        "flash_attention lr_scheduler optimizer"
    ),
    "llamafactory": (
        "stage finetuning_type cutoff_len pref_beta pref_loss pref_ftx template lora_target lora_rank dataset_dir plot_loss "
        "quantization_bit additional_target simpo_gamma flash_attn"
    ),
    "alignment-handbook": "dataset_mixer dataset_mixture dataset_splits gamma_beta_ratio torch_dtype",
    "open-instruct": (
        "dpo_loss_type dpo_beta dpo_gamma_beta_ratio mixer_list mixer_list_splits dataset_mixer_list "
        "dataset_mixer_list_splits use_slow_tokenizer with_tracking checkpointing_steps keep_last_n_checkpoints "
        "max_train_steps use_flash_attn tokenizer_name use_lora try_launch_beaker_eval_jobs reduce_loss dataset_mixer "
        "max_seq_length num_epochs preprocessing_num_workers"
    ),
    "openrlhf": (
        "pretrain ref_pretrain micro_train_batch_size max_len save_path apply_chat_template chosen_key adam_offload zpg"
    ),
    "trl": (
        "dataset_name dataset_train_split model_name_or_path use_peft precompute_ref_log_probs dataset_num_proc rpo_alpha "
        "tpo_alpha tpo_l_gamma"
    ),
}  # fmt: skip

_TRAINER = {
    "num_train_epochs": 3.0, "lr_scheduler_type": "linear", "warmup_ratio": 0.0, "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1, "save_steps": 500,
}  # fmt: skip
# What a config that does not say it has, where dspref would have something else.
DEFAULTS: dict[str, dict[str, Any]] = {
    "trl": _TRAINER | {"learning_rate": 1e-6, "max_length": 1024},
    "alignment-handbook": _TRAINER | {"learning_rate": 1e-6, "max_length": 1024, "gradient_checkpointing": True},
    "axolotl": {
        "num_epochs": 1.0, "lr_scheduler": "cosine", "warmup_ratio": 0.0, "micro_batch_size": 1,
        "gradient_accumulation_steps": 1, "gradient_checkpointing": False, "sequence_len": 512,
    },
    "llamafactory": _TRAINER | {"learning_rate": 5e-5, "cutoff_len": 2048, "finetuning_type": "lora"},
    "open-instruct": {
        "num_epochs": 2.0, "learning_rate": 2e-5, "warmup_ratio": 0.03, "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1, "max_grad_norm": -1, "gradient_checkpointing": False,
    },
    "openrlhf": {
        "max_epochs": 1.0, "learning_rate": 1e-5, "lr_scheduler": "cosine_with_min_lr", "lr_warmup_ratio": 0.03,
        "min_lr_ratio": 0.1, "train_batch_size": 128, "max_len": 512, "zero_stage": 2, "adam_betas": [0.9, 0.95],
        "gradient_checkpointing": False, "dataset_split": "train",
    },
}  # fmt: skip
# The same, for objectives of which it differs. TRL's trainers of single answers take rows in their order.
_IN_ORDER = {"train_sampling_strategy": "sequential"}
OF_OBJECTIVE: dict[tuple[str, str], dict[str, Any]] = {
    ("trl", "kto"): _IN_ORDER,
    ("trl", "bco"): _IN_ORDER | {"learning_rate": 5e-7},
    ("trl", "tpo"): {"learning_rate": 5e-7},
    ("alignment-handbook", "kto"): _IN_ORDER,
    ("axolotl", "kto"): _IN_ORDER,
    ("openrlhf", "kto"): {"max_len": 2048, "input_key": "input", "label_key": "label"},
}

METHODS = "DPO, CPO, SimPO, ORPO, KTO, BCO, TPO"
ACCELERATE = {"compute_environment", "distributed_type", "deepspeed_config", "main_training_function", "num_machines"}
# Signs of another kind of run, each with its name.
OTHERS = {
    "reinforcement learning": (
        "reward_funcs num_generations reward_weights num_ppo_epochs reward_model reward_model_path vllm ppo_epochs "
        "rollout_func"
    ),
    "a reward model": "center_rewards_coefficient num_labels process_reward_model",
    "supervised fine-tuning": (
        "dataset_text_field completion_only_loss assistant_only_loss eval_packing dataset_kwargs packing "
        "pretraining_dataset max_seq_length"
    ),
}
# Keys of KTO and of BCO, which train on single answers.
_KTO = (
    "desirable_weight undesirable_weight kto_chosen_weight kto_rejected_weight kto_desirable_weight kto_undesirable_weight "
    "desirable_loss_weight undesirable_loss_weight"
)
_BCO = "prompt_sample_size min_density_ratio max_density_ratio"
# Of TPO, which trains on a gold answer beside each pair.
_TPO = "tpo_alpha tpo_l_gamma"
# Keys of a preference run, whoever's.
_PAIRS = (
    "beta loss_type label_smoothing rpo_alpha truncation_mode max_prompt_length precompute_ref_log_probs simpo_gamma "
    "cpo_alpha gamma_beta_ratio ref_model ld_alpha f_divergence_type loss_weights use_weighting dpo_beta dpo_loss_type "
    "rl_beta pref_beta pref_loss reference_free sync_ref_model ref_pretrain chosen_key rejected_key dpo_label_smoothing "
    "ipo nll_loss_coef"
)
PAIRS = {*_PAIRS.split(), *_KTO.split(), *_BCO.split(), *_TPO.split()}
# Keys that tell more than others.
TELLING = {"base_model": "axolotl", "stage": "llamafactory", "pref_loss": "llamafactory", "pretrain": "openrlhf"}
STAGES = {"dpo", "orpo", "simpo", "ipo", "cpo", "kto", "bco", "tpo"}
KINDS = {
    "sft": "supervised fine-tuning", "pt": "pre-training", "rm": "a reward model", "ppo": "reinforcement learning",
    "grpo": "reinforcement learning", "gdpo": "reinforcement learning",
    "ebft": "reinforcement learning", "reward": "a reward model", "rloo": "reinforcement learning",
}  # fmt: skip


def recognise(theirs: Mapping[str, Any]) -> str | None:
    """Whose config it is, by the keys that it has; None where they say nothing."""
    if any(key.split(".")[0] in ("ckpt", "ds", "adam", "logger") and "." in key for key in theirs):
        return "openrlhf"
    found = {name: sum(key in theirs for key in marks.split()) for name, marks in MARKS.items()}
    for key, name in (
        ("base_model", "axolotl"),
        ("stage", "llamafactory"),
        ("pref_loss", "llamafactory"),
        ("pretrain", "openrlhf"),
    ):
        found[name] += 3 * (key in theirs)
    if "per_device_eval_batch_size" in theirs or ("output_dir" in theirs and "bf16" in theirs):  # of transformers' arguments
        found["open-instruct"] -= 2
    best = max(found, key=lambda name: found[name])
    return best if found[best] > 0 else None


def refuse_other_runs(theirs: Mapping[str, Any], where: str, objective: str | None) -> None:
    """Raise ConfigError for what is no preference run."""
    if {*theirs} & ACCELERATE and not {"model_name_or_path", "base_model"} & {*theirs}:
        inner = theirs.get("deepspeed_config")
        stage = (inner if isinstance(inner, Mapping) else {}).get("zero_stage", 3)
        said = f"its ZeRO stage is here deepspeed: ds_configs/zero{stage}.json, and its num_processes are --gpus"
        raise ConfigError(f"{where}: is an accelerate config, and no run; {said}")
    if "zero_optimization" in theirs:
        raise ConfigError(f"{where}: is a DeepSpeed config, and no run; ds_configs/README.md says which of ours is its like")
    kind = None
    for key in ("rl", "stage", "pref_loss"):
        if isinstance(word := theirs.get(key), str) and word.lower() not in STAGES:
            kind = kind or KINDS.get(word.lower())
    if kind is None and "base_model" in theirs and not theirs.get("rl"):
        kind = "supervised fine-tuning: it has no `rl`"
    if kind is None and not objective and not {*theirs} & PAIRS and theirs.get("rl", theirs.get("stage")) not in STAGES:
        kind = next((name for name, keys in OTHERS.items() if {*theirs} & {*keys.split()} and not _named(theirs)), None)
        if kind is None and not _named(theirs):
            known = f"the method in one of {', '.join(sorted(STAGES - {'ipo'}))}"
            raise ConfigError(
                f"{where}: nothing in it says that it is a preference run; if it is, give --objective, {known}"
            )
    kind = kind or next(
        (name for name in list(OTHERS)[:2] if any(theirs.get(key) is not None for key in OTHERS[name].split())), None
    )
    if kind:
        raise ConfigError(f"{where}: is a config of {kind}; dspref trains on preferences: {METHODS}")


def _named(theirs: Mapping[str, Any]) -> str | None:
    """The method that the names of the run tell, where its keys do not."""
    for key in ("run_name", "output_dir", "hub_model_id", "exp_name", "_file", "trl_command"):
        words = re.findall(r"(?<![a-z])(orpo|simpo|cpo|dpo|kto|bco|tpo)(?![a-z])", str(theirs.get(key) or "").lower())
        if words:
            return words[-1]
    return None


def objective_of(theirs: Mapping[str, Any], dialect: str) -> str:
    """dpo, cpo, simpo, orpo, kto, bco or tpo."""
    if found := _of_answers(theirs):
        return found
    words = [theirs.get(key) for key in ("rl", "pref_loss", "dpo_loss_type", "loss_type")]
    for word in words:
        if isinstance(word, str) and word.lower() in ("simpo", "orpo", "cpo", "dpo", "ipo"):
            name = word.lower()
            if name == "simpo" and dialect in ("trl", "axolotl"):
                return "cpo"
            return "dpo" if name == "ipo" else name
    if {"sft_weight", "gamma_beta_ratio"} & {*theirs} and dialect != "open-instruct":
        return "simpo"
    if {"cpo_alpha", "simpo_gamma"} & {*theirs} and dialect == "trl":
        return "cpo"
    named = (_named(theirs) or "dpo") if dialect in ("trl", "alignment-handbook") else "dpo"
    # A name may tell a loss: dpo-bco-pair.
    return "dpo" if named in ("kto", "bco") and theirs.get("loss_type") not in (None, "apo_zero_unpaired") else named


def _of_answers(theirs: Mapping[str, Any]) -> str | None:
    """kto or bco, where a config says that single answers are trained on, or pairs as if they were; tpo, where gold answers
    are."""
    words = {str(theirs.get(key) or "").lower() for key in ("rl", "stage", "pref_loss", "dpo_loss_type", "loss_type")}
    if words & {"kto", "kto_pair", "apo_zero_unpaired"} or {*theirs} & {*_KTO.split()}:
        return "kto"
    if words & {"tpo", "tpo-l", "tpo_l"} or {*theirs} & {*_TPO.split()}:
        return "tpo"
    return "bco" if "bco" in (theirs.get("rl"), theirs.get("stage")) or {*theirs} & {*_BCO.split()} else None
