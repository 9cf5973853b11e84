"""Keys of TRL, the Hugging Face Trainer, alignment-handbook, axolotl, LLaMA-Factory, open-instruct, OpenRLHF and accelerate
that have a place here, and which. `absent` has the others, each with the reason; `foreign_values` has the values.

A table alone: `hints` answers mistakes from it, and `convert` turns configs by it. A place is a key, perhaps with the value
that stands for the flag (`model.dtype: bfloat16`), perhaps with a remark behind it. Keys of one name in both need no entry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# What to write here -> keys of other tools, wherever they stand.
_FOREIGN_KEYS = {
    # ------------------------------------------------------------------------------------------------------------- train
    "train.pairs_per_step (the global batch) and data.tokens_per_pack (memory)": (
        "per_device_train_batch_size per_gpu_train_batch_size micro_batch_size batch_size micro_train_batch_size "
        "train.micro_batch_size train_micro_batch_size_per_gpu"
    ),
    "train.pairs_per_step (the global batch)": "train_batch_size train.batch_size",
    "train.pairs_per_step; micro-steps follow from data.tokens_per_pack": "gradient_accumulation_steps",
    "train.num_train_epochs": "num_epochs epochs max_epochs train.max_epochs",
    "train.max_steps": "max_train_steps",
    "train.learning_rate": "lr adam.lr",
    "train.learning_rate, train.adam_beta1, train.adam_beta2, train.adam_epsilon and train.weight_decay": "adam",
    "train.lr_scheduler_type": "lr_scheduler scheduler",
    "train.lr_scheduler_kwargs (min_lr_rate) with train.lr_scheduler_type: cosine_with_min_lr": (
        "cosine_min_lr_ratio min_lr_ratio"
    ),
    "train.warmup_ratio": "lr_warmup_ratio",
    "train.weight_decay": "l2 adam.weight_decay",
    "train.adam_beta1 and train.adam_beta2": "adam_betas adam.betas",
    "train.adam_epsilon": "adam.eps",
    "train.optim": "optimizer",
    "train.optim: adamw_8bit": "use_8bit_optimizer",
    "train.max_grad_norm": "gradient_clipping gradient_clip_val max_norm clip_grad_norm",
    "train.seed": "data_seed",
    "train.eval_every": "eval_steps eval_strategy evaluation_strategy eval.steps eval_delay",
    "train.eval_every (steps)": "evals_per_epoch",
    "train.hang_timeout (seconds)": "ddp_timeout timeout",
    "train.profile: [FIRST, LAST], both included (profiler_steps counts from profiler_steps_start)": (
        "profiler_steps profiler_steps_start"
    ),
    "train.profile: [FIRST, LAST] (optimizer steps)": "enable_torch_profiler profiler_active_steps",
    # ------------------------------------------------------------------------------------------------------------- model
    "model.name_or_path": "model_name_or_path model_path base_model pretrain model.model_name_or_path",
    "model.revision": "model_revision revision_of_model",
    "model.tokenizer_name_or_path": "tokenizer tokenizer_config tokenizer_name tokenizer_path",
    "model.chat_template": ("chat_template_path chat_template_jinja tokenizer_chat_template data.tokenizer_chat_template"),
    "model.chat_template (a Jinja file; default: the tokenizer's own)": "template chat_template_name",
    "model.init: random": "train_from_scratch reinit_weights",
    "model.dtype: bfloat16": "bf16 pure_bf16 bfloat16",
    "model.dtype: float16": "fp16 float16",
    "model.dtype: float32": "float32",
    "model.dtype": "torch_dtype precision param_dtype ds.param_dtype compute_dtype mixed_precision",
    "model.attn_implementation": (
        "flash_attn flash_attention flash_attention_2 use_flash_attn use_flash_attention_2 sdp_attention eager_attention "
        "xformers_attention flex_attention sage_attention attention_implementation attn_impl attn_backend "
        "ds.attn_implementation"
    ),
    "model.liger": "use_liger_kernel enable_liger_kernel use_liger ds.use_liger_kernel",
    "model.router_aux_loss_coef": "moe_aux_loss_coef aux_loss_coef model.aux_loss_coef load_balancing_weight",
    "model.router_aux_loss_coef (on by default where there are experts; 0 turns it off)": "load_balancing_loss",
    "model.load_in_4bit (8 bits are not supported)": "load_in_8bit",
    "model.load_in_4bit": "quantization_bit use_qlora ds.load_in_4bit",
    "model.gradient_checkpointing: offload": "activation_offloading",
    "model.tiled_mlp": "tiled_mlp",
    "model.tiled_mlp (tokens of a tile)": "tiled_mlp_num_shards",
    "model.gradient_checkpointing": (
        "disable_gradient_checkpointing activation_checkpointing model.gradient_checkpointing_enable "
        "fsdp_activation_checkpointing"
    ),
    "model.lora": "adapter use_peft use_lora peft peft_config lora_config ds.lora",
    "model.lora (null: the whole model)": "finetuning_type",
    "model.lora.r": "lora_rank lora_r ds.lora.rank",
    "model.lora.lora_alpha": "ds.lora.alpha",
    "model.lora.lora_dropout": "ds.lora.dropout",
    "model.lora.target_modules": "lora_target lora_target_modules ds.lora.target_modules",
    "model.lora.target_modules: all-linear": "lora_target_linear",
    "model.lora.modules_to_save": "lora_modules_to_save additional_target",
    "model.lora.layers_to_transform": "peft_layers_to_transform",
    "model.lora.rank_pattern": "lora_rank_pattern",
    "model.lora.alpha_pattern": "lora_alpha_pattern",
    "model.lora.init_lora_weights": "peft_init_lora_weights",
    "model.lora.path": "lora_model_dir adapter_name_or_path adapter_path",
    "model.lora.use_dora": "peft_use_dora",
    "model.lora.use_rslora": "peft_use_rslora",
    "model.lora.merge_on_export": "merge_lora",
    "model.adapter_name": "model_adapter_name",
    # --------------------------------------------------------------------------------------------------------- reference
    "reference.name_or_path": (
        "ref_model ref_model_name_or_path reference_model reference_model_name_or_path ref_model_adapters ref_pretrain "
        "ref.model_name_or_path"
    ),
    "reference.name_or_path and reference.offload": "ref",
    "reference.adapter_name": "ref_adapter_name",
    "reference.mode: stored": "precompute_ref_log_probs",
    "reference.store": "reference_logprobs_cache_path",
    "reference.tokens_per_pack": "precompute_ref_batch_size",
    "reference.offload: cpu": "ref_offload ref.offload",
    # --------------------------------------------------------------------------------------------------------- objective
    "objective.name": "rl",
    "objective.beta": "rl_beta dpo_beta pref_beta model.beta",
    "objective.beta (with objective.name: orpo)": "orpo_alpha",
    "objective.loss_type": "pref_loss dpo_loss_type loss",
    "objective.loss_type: ipo": "ipo model.ipo_enable",
    "objective.loss_type: sigmoid_norm": "dpo_norm_loss",
    "objective.loss_weights": "dpo_loss_weights",
    "objective.loss_weights, beside a list in objective.loss_type that has bco_pair": "pref_bco_weight",
    "objective.desirable_weight": "kto_desirable_weight kto_chosen_weight desirable_loss_weight",
    "objective.undesirable_weight": "kto_undesirable_weight kto_rejected_weight undesirable_loss_weight",
    "objective.simpo_gamma (absolute) or objective.gamma_beta_ratio": "gamma",
    "objective.gamma_beta_ratio": "dpo_gamma_beta_ratio",
    "objective.rpo_alpha": "pref_ftx nll_loss_coef model.nll_loss_coef",
    "objective.cpo_alpha (with objective.name: cpo and objective.loss_type: simpo)": "sft_weight",
    "objective.label_smoothing": "dpo_label_smoothing model.label_smoothing",
    "objective.use_weighting": "dpo_use_weighting",
    # -------------------------------------------------------------------------------------------------------------- data
    "data.train: {path: ...}": (
        "dataset_name dataset train_dataset train_file data_path dataset_path dataset_dir data.dataset data_files"
    ),
    "data.train: a list of sources": "datasets train_files",
    "data.train: a list of sources, each with its weight": (
        "dataset_mixer dataset_mixer_list dataset_mixture mixer_list interleave_probs dataset_probs data.dataset_probs "
        "fraction"
    ),
    "data.train: {path: ..., split: ...}": (
        "dataset_train_split dataset_splits dataset_mixer_list_splits mixer_list_splits dataset_split data.dataset_split "
        "train_split"
    ),
    "data.train: {path: ..., name: ...}": "dataset_config dataset_configs dataset_config_name",
    "data.train: {path: ..., max_samples: ...}": "max_train_samples data.max_samples sanity_check",
    "data.train: {path: ..., columns: {prompt: ...}}": "prompt_key data.prompt_key input_key",
    "data.train: {path: ..., columns: {chosen: ...}}": "chosen_key data.chosen_key",
    "data.train: {path: ..., columns: {rejected: ...}}": "rejected_key data.rejected_key",
    "data.train: {path: ..., columns: {completion: ...}} (one answer, with objective.name: kto)": "output_key",
    "data.train: {path: ..., columns: {label: ...}} (with objective.name: kto)": "label_key",
    "data.train: {path: ..., template: {...}}": "input_template data.input_template",
    "data.train: {path: ..., as: chat}": "apply_chat_template data.apply_chat_template",
    "data.eval: {path: ...}": "eval_dataset test_dataset eval_file validation_file eval.dataset",
    "data.eval: {NAME: {path: ...}}": "test_datasets eval_on_each_dataset",
    "data.eval: {path: ..., split: ...}": "dataset_test_split eval_split eval.split",
    "data.eval and train.eval_every": "do_eval",
    "data.max_length": "cutoff_len sequence_len max_seq_length max_seq_len model_max_length max_len data.max_len",
    "data.max_prompt_length": "max_prompt_len",
    "data.max_completion_length": "max_target_length max_response_length",
    "data.truncation_mode": "truncation_side",
    "data.on_overlong": "excess_length_strategy",
    "data.shuffle": "shuffle_merged_datasets disable_shuffling train_sampling_strategy",
    "data.scored": "mask_history train_on_prompt",
    "data.tokens_per_pack": (
        "per_device_eval_batch_size per_gpu_eval_batch_size eval_batch_size max_tokens_per_batch eval_accumulation_steps"
    ),
    # ---------------------------------------------------------------------------------------------- checkpoints and logs
    "checkpoint.save_every": "save_steps save_strategy checkpointing_steps ckpt.save_steps",
    "checkpoint.save_every (steps)": "saves_per_epoch",
    "checkpoint.keep_last": "save_total_limit keep_last_n_checkpoints max_ckpt_num ckpt.max_num",
    "train.eval_at_start": "eval_on_start",
    "train.stop_when (metric and patience, in evaluations)": "early_stopping_patience early_stopping_steps",
    "train.stop_when (direction; by default the metric's name tells)": "greater_is_better",
    "checkpoint.keep_best": "metric_for_best_model",
    "export: best (with the metric in checkpoint.keep_best)": "load_best_model_at_end",
    "checkpoint.resume": "resume_from_checkpoint auto_resume_from_checkpoints load_checkpoint ckpt.load_enable",
    "checkpoint.resume: never": "overwrite_output_dir",
    "log.every": "logging_steps logging_strategy logger.logging_steps",
    "log.trackers": "report_to with_tracking",
    "log.trackers: [wandb]": "use_wandb",
    "log.trackers: [tensorboard]": "use_tensorboard logger.tensorboard_dir",
    "log.trackers: [mlflow]": "use_mlflow",
    "log.trackers: [trackio]": "use_trackio",
    "log.trackers: [comet]": "use_comet",
    "log.trackers: [swanlab]": "use_swanlab",
    "log.project": (
        "wandb_project wandb_project_name logger.wandb.project mlflow_experiment_name trackio_project_name "
        "comet_project_name swanlab_project"
    ),
    "log.run_name": (
        "wandb_name wandb_run_name wandb_run_id exp_name logger.wandb.run_name mlflow_run_name trackio_run_name "
        "swanlab_run_name"
    ),
    "log.generation.max_new_tokens": "generation_max_new_tokens",
    "log.generation.temperature": "generation_temperature",
    "log.generation.top_p": "generation_top_p",
    "log.samples": "generate_during_eval dpo_generate_during_eval generate_samples num_generation_samples",
    "export.push_to_hub (owner/name)": (
        "push_to_hub hub_model_id push_to_hub_model_id export_hub_model_id push_to_hub_organization save_to_hub hf_entity "
        "hf_repo_id"
    ),
    "output_dir, checkpoint.save_every, checkpoint.keep_last and checkpoint.resume": "ckpt",
    "log.every, log.trackers, log.project and log.run_name": "logger",
    "output_dir": "logging_dir export_dir output_path save_path out_dir ckpt.output_dir",
    # --------------------------------------------------------------------------------------------------------- deepspeed
    "deepspeed": "deepspeed_config ds_config deepspeed_config_file zero_optimization",
    "deepspeed, model.dtype, model.attn_implementation, model.liger and model.lora": "ds",
    "deepspeed: ds_configs/zero1.json, zero2.json or zero3.json": "zero_stage ds.zero_stage",
    "deepspeed: ds_configs/zero2_offload.json or zero3_offload.json": (
        "adam_offload ds.adam_offload offload_optimizer offload_optimizer_device"
    ),
    "deepspeed: ds_configs/zero3_offload_all.json": "offload_param offload_param_device fsdp_offload_params",
    "parallel.sequence (ranks that hold a pack between them, by an exchange of heads, not a ring)": (
        "sequence_parallel_size sequence_parallel_degree context_parallel_size context_parallel_degree cp_size sp_size "
        "ring_attn_size ds.ring_attn_size"
    ),
    "deepspeed (zero_hpz_partition_size of its zero_optimization)": "zpg ds.zpg zero_hpz_partition_size",
    "deepspeed (overlap_comm of its zero_optimization)": "overlap_comm ds.overlap_comm",
    "deepspeed: ds_configs/zero3.json, which shards as FSDP does": (
        "fsdp fsdp_config fsdp_version fsdp_auto_wrap_policy fsdp_sharding_strategy fsdp_min_num_params "
        "fsdp_reshard_after_forward fsdp_transformer_layer_cls_to_wrap fsdp_use_orig_params fsdp_backward_prefetch "
        "fsdp_forward_prefetch fsdp_cpu_ram_efficient_loading fsdp_sync_module_states dp_shard_size dp_replicate_size"
    ),
}
PLACE = re.compile(r"([a-z_0-9]+(?:\.[a-z_0-9]+)*)(?:: (\[[a-z, ]+\]|[\w-]+))?(?: \(.*\))?\Z")


def inverted(table: Mapping[str, str]) -> dict[str, str]:
    """Each word of a table's values -> its key."""
    return {word: ours for ours, words in table.items() for word in words.split()}


FOREIGN_KEYS = inverted(_FOREIGN_KEYS)


def place_of(key: str) -> tuple[tuple[str, ...], str | None] | None:
    """The path of the one key that another tool's key is here, and the YAML text of the value that its flag stands for; None
    where more than that must be said."""
    found = PLACE.match(FOREIGN_KEYS.get(key, ""))
    return (tuple(found[1].split(".")), found[2]) if found else None
