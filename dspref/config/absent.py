"""Keys of other trainers that have no place here, each with the reason in one line; `foreign` has those that have one."""

from __future__ import annotations

from dspref.config.foreign import inverted

# Why dspref needs no key, or has none -> those of other tools.
_NOT_NEEDED = {
    # -------------------------------------------------------------------------------------------------- batches and data
    "every batch is packed, without padding": (
        "padding_free dpo_padding_free packing sample_packing eval_sample_packing neat_packing pad_to_sequence_len "
        "padding_value pad_to_multiple_of group_by_length length_column_name pad_token batch_flattening "
        "multipack_real_batches block_diag_attn sample_packing_group_size sample_packing_bin_size "
        "sample_packing_sequentially sample_packing_mp_start_method sample_packing_eff_est packing_samples "
        "ds.packing_samples max_packed_sequence_len curriculum_sampling"
    ),
    "the budget of a pack is in tokens: data.tokens_per_pack": "auto_find_batch_size gpu_memory_limit",
    "no pair is left out": "dataloader_drop_last",
    "answers of a pair are always computed together, and share their prompt": "concatenated_forward",
    "loss and gradient are means over the whole step, on every layout": "average_tokens_across_devices reduce_loss",
    "gradients are exchanged once for each step": "sync_each_batch",
    "tokens come from a file that is mapped into memory": (
        "dataloader_num_workers dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context "
        "data.dataloader_num_workers dataset_keep_in_memory data_shared_file_system"
    ),
    "batches are made ahead of the step that needs them": "dataloader_pin_memory",
    "the order of pairs is planned from train.seed": (
        "dataloader_in_order dispatch_batches split_batches mix_strategy buffer_size"
    ),
    "tokens go to the cache ($DSPREF_CACHE) and are found again": (
        "dataset_prepared_path tokenized_path local_cache_dir dataset_local_cache_dir cache_mode dataset_cache_mode "
        "cache_dir dataset_mix_dir adapter_folder"
    ),
    "tokens are found again by their content": (
        "overwrite_cache skip_cache dataset_skip_cache config_hash dataset_config_hash skip_prepare_dataset"
    ),
    "`dspref check --data` reads and tokenizes the data": "cache_dataset_only is_preprocess preprocess_iterable",
    "`dspref score` computes reference log-probs alone": "cache_logprobs_only",
    "rows are rendered while others are tokenized": (
        "dataset_num_proc preprocessing_num_workers dataset_processes preprocessing_batch_size num_dataset_shards_to_save"
    ),
    "columns that are not named are ignored": "remove_unused_columns label_names dataset_target_columns target_columns",
    "tokens are mapped from disk, and take no memory": "streaming dataset_streaming streaming_multipack_buffer_size",
    "rows are read as they are; prepare them in a file of their own": (
        "dataset_exact_deduplication dataset_shard_num dataset_shard_idx decontaminate "
        "benchmarks ground_truths_key sft_messages_key min_sample_len pose_split_on_token_ids pose_max_context_len "
        "pose_num_chunks use_pose eval_sequence_len"
    ),
    "rows are read as they are, or by a function of yours: data.train: {path: ..., format: my_module:my_function}": (
        "dataset_transform_fn transform_fn formatting_func map filter"
    ),
    "all sources of a mixture are shuffled together": "shuffle_before_merging_datasets",
    "split the file, and name the held-out part in data.eval": "val_set_size val_size test_size test_split_size",
    "this is for pre-training": (
        "pretraining_dataset pretrain_multipack_buffer_size pretrain_multipack_attn pretraining_sample_concatenation "
        "text_column"
    ),
    "this is for supervised fine-tuning": (
        "dataset_kwargs use_dft_loss use_asft_loss asft_alpha use_eaft_loss use_eaft eaft_alpha eaft_k compute_accuracy "
        "do_causal_lm_eval eval_causal_lm_metrics total_num_tokens total_supervised_tokens eval_table_size "
        "eval_max_new_tokens"
    ),
    "the answers are scored, and the prompt only by orpo": "train_on_inputs ignore_pad_token_for_loss",
    "scored tokens are known by their place": "label_pad_token_id",
    "write model.freeze, a list of parts of parameters' names, such as [vision_tower]": (
        "freeze_mm_modules freeze_vision_tower freeze_multi_modal_projector"
    ),
    "the model's own processor says it": (
        "processor_type processor_kwargs image_size image_resize_algorithm image_max_pixels image_min_pixels "
        "image_do_pan_and_scan crop_to_patches"
    ),
    "paths of images are relative to the file that names them": "media_dir",
    "the chat template says it": "role_boundaries",
    "videos and sounds are not read": (
        "video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate"
    ),
    # ---------------------------------------------------------------------------------------------- tokenizer and template
    "the tokenizer's own files say it": (
        "tokenizer_type tokenizer_legacy tokenizer_use_mistral_common tokenizer_save_jinja_files tokenizer_revision tokens "
        "added_tokens_overrides split_special_tokens add_tokens add_special_tokens new_special_tokens_config "
        "init_special_tokens add_bos get_tokenizer_fn eot_tokens fix_untrained_tokens special_tokens"
    ),
    "tokenizers are the fast ones": (
        "tokenizer_use_fast use_fast_tokenizer use_slow_tokenizer disable_fast_tokenizer data.disable_fast_tokenizer"
    ),
    "vocabularies stay as they are": (
        "resize_vocab resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings"
    ),
    "a system message stands in the rows, or in the chat template": (
        "system_prompt default_system default_system_message auto_insert_empty_system_msg"
    ),
    "rows carry their own: a column `tools`": "tools tool_format",
    "rows carry their own: a column `chat_template_kwargs`": "chat_template_kwargs enable_thinking preserve_thinking",
    # -------------------------------------------------------------------------------------------------------------- model
    "the model's own config says it": (
        "model_type is_llama_derived_model is_falcon_derived_model is_mistral_derived_model is_qwen_derived_model "
        "type_of_model base_model_config cls_model_config overrides_of_model_config overrides_of_model_kwargs config_name "
        "rope_scaling additional_model_arguments mixture_of_depths scaling_softmax scaling_softmax_factor "
        "scaling_softmax_bias experts_implementation ds.experts_implementation llama4_linearized_experts"
    ),
    "model.dtype, model.revision and model.attn_implementation have keys of their own": "model_init_kwargs",
    "reference.dtype has a key of its own": "ref_model_init_kwargs",
    "model.revision is that of weights, tokenizer and code": "base_model_revision model_code_revision",
    "models are decoders": "is_encoder_decoder",
    "models are those of transformers": (
        "use_unsloth use_unsloth_gc use_kernels use_v1_kernels use_mca use_kt kt_weight_path kt_expert_checkpoint_path "
        "kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size use_ms"
    ),
    "weights are put where DeepSpeed wants them": (
        "low_cpu_mem_usage device device_map max_memory offload_folder experimental_skip_move_to_device lora_on_cpu "
        "qlora_sharded_model_loading quantization_device_map zero3_init_flag embeddings_skip_upcast ple_cpu_offload"
    ),
    "it is off while training": "use_cache use_kv_cache",
    "kernels follow from model.attn_implementation and model.liger": (
        "flash_attn_cross_entropy flash_attn_fuse_mlp flash_attn_rms_norm flash_optimum flex_attn_compile_kwargs "
        "fused_attn_kernel gemma4_hybrid_attn_impl large_head_attention flash_attn_d512 sdpa_varlen liger_kernel_config "
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel"
    ),
    "attention is that of the model, over whole sequences": "shift_attn s2_attention",
    "the head is computed for scored tokens alone, in pieces": (
        "use_logits_to_keep dpo_use_logits_to_keep use_liger_loss dpo_use_liger_kernel chunked_cross_entropy "
        "chunked_cross_entropy_num_chunks upcast_lmhead_output"
    ),
    "model.dtype is the type of the weights, and log-probs are fp32": (
        "bf16_full_eval fp16_full_eval fp16_opt_level half_precision_backend fp16_backend upcast_layernorm fp32_norms "
        "fp32_norm_classes downcast_bf16 infer_dtype"
    ),
    "8-bit floats are not supported": "fp8 fp8_config fp8_backend fp8_enable_fsdp_float8_all_gather",
    "matrix products take what torch allows": "tf32",
    "load_in_4bit is nf4 with double quantization": (
        "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage bnb_config_kwargs quantization_method "
        "quantization_type double_quantization"
    ),
    "weights are quantized by model.load_in_4bit alone": (
        "gptq qat quantization model_quantization_config model_quantization_config_kwargs quantize_moe_experts "
        "use_onebitllms ref_model_quantization_bit"
    ),
    "tiles of model.tiled_mlp run the model's own MLP": "tiled_mlp_use_original_mlp",
    "dspref chooses what works with DeepSpeed": (
        "use_reentrant gradient_checkpointing_kwargs activation_checkpointing_kwargs use_reentrant_gc "
        "gradient_checkpointing_use_reentrant model.gradient_checkpointing_reentrant selective_checkpointing"
    ),
    "model.gradient_checkpointing and the offloads of ds_configs/ save memory": "layer_offloading",
    "memory is kept in segments that grow": "torch_empty_cache_steps gc_steps gc_collect_steps",
    "it is not supported: compiled layers were no faster where it was tried (docs/LOG.md)": (
        "torch_compile torch_compile_backend torch_compile_mode torch_compile_options torchdynamo dynamo_config deepcompile "
        "ds.deepcompile"
    ),
    "it is not supported": "jit_mode_eval use_ipex",
    "model.freeze names what is not trained, by parts of parameters' names": (
        "unfrozen_parameters freeze_trainable_layers freeze_trainable_modules freeze_extra_modules freeze_language_model"
    ),
    "the same weights are trained at every step": (
        "use_llama_pro lisa_n_layers lisa_step_interval lisa_layers_attribute"
    ),
    "noise on embeddings would change log-probs that are compared": "neftune_noise_alpha noisy_embedding_alpha",
    # ------------------------------------------------------------------------------------------------------------ adapters
    "peft knows it from the layer": "lora_fan_in_fan_out peft_autocast_adapter_dtype",
    "models are causal language models": "lora_task_type",
    "model.lora without path makes one": "create_new_adapter",
    "adapters are LoRA's, as model.lora has them": (
        "bias lora_bias lora_target_parameters peft_layers_pattern peft_layer_replication peft_trainable_token_indices "
        "peft_ensure_weight_tying relora relora_prune_ratio relora_prune_method relora_cpu_offload jagged_restart_steps "
        "jagged_restart_warmup_steps jagged_restart_anneal_steps module_dropout oft_rank oft_block_size oft_target "
        "pissa_init pissa_iter pissa_convert base_model_attribute_name"
    ),
    "model.lora.merge_on_export adds the adapter as peft does": "merge_method",
    # ------------------------------------------------------------------------------------------------ optimizer and schedule
    "every weight has train.learning_rate": (
        "loraplus_lr_ratio loraplus_lr_embedding embedding_lr embedding_lr_scale lr_groups optim_target_modules"
    ),
    "the optimizers are AdamW's: train.optim": (
        "adafactor optim_args torchdistx_path adam_epsilon2 adam_beta3 dion_lr dion_momentum dion_rank_fraction "
        "dion_rank_multiple_of qgalore_rank qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant "
        "qgalore_proj_bits qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size use_galore "
        "galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise use_apollo "
        "apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_scale_type "
        "apollo_layerwise apollo_scale_front use_badam badam_mode badam_start_block badam_switch_mode badam_switch_interval "
        "badam_update_ratio badam_mask_mode badam_verbose use_adam_mini use_muon muon muon.lr muon.momentum muon.ns_steps "
        "muon.nesterov muon.no_nesterov zero_allow_untested_optimizer"
    ),
    "AdamW is torch's own, fused where it can be; in 8 bits: train.optim: adamw_8bit": (
        "fused_optimizer dpo_use_paged_optimizer"
    ),
    "schedules are those of transformers: train.lr_scheduler_type": (
        "lr_quadratic_warmup cosine_constant_lr_ratio lr_div_factor"
    ),
    "smoothing of preferences is objective.label_smoothing": "label_smoothing_factor",
    "gradients accumulate in fp32": "grad_accum_dtype ds.grad_accum_dtype",
    # ---------------------------------------------------------------------------------------------------------- objectives
    "dspref trains on preference pairs alone; objective.name says how": "stage trainer_cls trl",
    "BCO's matching of underlying distributions is not here": "prompt_sample_size min_density_ratio max_density_ratio",
    "this is for reward models or online reinforcement learning": (
        "vllm ebft reward_model process_reward_model center_rewards_coefficient num_labels ppo_buffer_size ppo_epochs "
        "ppo_score_norm ppo_target ppo_whiten_rewards reward_model_adapters reward_model_quantization_bit reward_model_type"
    ),
    "reference.mode and reference.name_or_path say it": "force_use_ref_model",
    # ------------------------------------------------------------------------------------------------------------- launch
    "the launcher says it": (
        "local_rank nproc_per_node num_processes world_size num_machines machine_rank main_process_ip main_process_port "
        "master_addr master_port rdzv_backend same_network gpu_ids compute_environment distributed_type "
        "main_training_function deepspeed_multinode_launcher deepspeed_hostfile enable_cpu_affinity accelerator_config "
        "use_ray ray_run_name ray_num_workers ray_init_kwargs ray_scope resources_per_worker debug_launcher"
    ),
    "the launcher says it: deepspeed --num_gpus N": "num_gpus",
    "export variables before the command; a config never sets any": "env",
    "`include: base.yaml` at the top of the file takes in another": "config axolotl_config_path",
    "it belongs to the top of the file, which it adds others to": "include",
    "the machine says it: GPUs where there are some": (
        "use_cpu no_cuda use_mps_device tpu_num_cores tpu_metrics_debug tpu_env tpu_use_cluster tpu_use_sudo"
    ),
    "DeepSpeed trains, not DDP": (
        "ddp ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend "
        "ignore_bias_buffers mp_parameters"
    ),
    "data parallelism, ZeRO, parallel.sequence and deepspeed.expert_parallel alone": (
        "heads_k_stride ring_attn_func ring_head_stride ds.ring_attn_head_stride tensor_parallel_size "
        "tensor_parallel_degree pipeline_parallel_degree ds.tensor_parallel_size use_hyper_parallel "
        "hyper_parallel_args"
    ),
    "leaf modules of experts are found by dspref": "deepspeed_moe_layer_cls_names",
    "DeepSpeed's own checkpoints are read by any number of ranks": (
        "ds.use_universal_ckpt use_ds_universal_ckpt disable_trace_cache"
    ),
    "the final model is gathered as it is written": (
        "zero3_save_16bit_model fsdp_state_dict_type fsdp_final_state_dict_type save_hf_ckpt ckpt.save_hf"
    ),
    # -------------------------------------------------------------------------------------------------------- checkpoints
    "a run folder keeps its checkpoints in checkpoints/": "ckpt_path ckpt.path",
    "checkpoint.keep_last bounds what is kept": "max_ckpt_mem ckpt.max_mem",
    "weights are always safetensors": "save_safetensors",
    "`dspref export` writes the model of a checkpoint": (
        "save_only_model disable_ds_ckpt ckpt.disable_ds export_size export_device export_legacy_format"
    ),
    "the folder has the name that output_dir gives": "add_seed_and_date_to_exp_name do_not_randomize_output_dir",
    "checkpoints go to a shared folder": "save_on_each_node",
    "a signal has a checkpoint committed": "enable_jit_checkpoint dynamic_checkpoint save_first_step",
    "a resumed run goes on with its order, exactly": "ignore_data_skip restore_callback_states_from_checkpoint",
    "train.max_skipped_steps and train.spike_sigmas watch the loss": "loss_watchdog_threshold loss_watchdog_patience",
    "train.seed fixes every draw": "full_determinism train.full_determinism_enable",
    # ------------------------------------------------------------------------------------------------ evaluation and logs
    "a command does that, and no key": "do_train do_predict",
    "every evaluation gives all its metrics": (
        "prediction_loss_only include_for_metrics include_inputs_for_metrics batch_eval_metrics eval_do_concat_batches "
        "eval_use_gather_object past_index use_legacy_prediction_loop eval_num_beams"
    ),
    "benchmarks run on RUN/final by their own tools": (
        "do_bench_eval bench_dataset bench_split callbacks try_launch_beaker_eval_jobs try_auto_save_to_beaker "
        "gs_bucket_path oe_eval_tasks oe_eval_max_length oe_eval_gpu_multiplier eval_workspace eval_priority "
        "hf_metadata_dataset"
    ),
    "answers are greedy, or drawn by log.generation: {temperature, top_p}": (
        "generation_top_k generation_prompt_ratio generation_do_sample"
    ),
    "models are served by other tools": (
        "vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction "
        "sglang_tp_size sglang_config sglang_lora_backend infer_backend gradio_title gradio_share gradio_server_name "
        "gradio_server_port gradio_max_new_tokens gradio_temperature export_quantization_bit export_quantization_dataset "
        "export_quantization_nsamples export_quantization_maxlen"
    ),
    "the first step is always logged": "logging_first_step",
    "a bar is shown on a terminal only": "disable_tqdm",
    "logs/ in the run folder has every rank": "debug log_level log_level_replica log_on_each_node print_param_status",
    "metrics.jsonl has every figure": (
        "plot_loss logging_nan_inf_filter include_num_input_tokens_seen include_tokens_per_second include_tkps "
        "include_effective_tokens_per_second skip_memory_metrics steps_per_print"
    ),
    "train.profile: [FIRST, LAST] has one window, and traces of every rank in RUN/profile": (
        "profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_repeat"
    ),
    "train.profile: [FIRST, LAST] records shapes, no stacks, and memory apart": (
        "profiler_record_shapes profiler_profile_memory profiler_with_stack"
    ),
    "the clock of DeepSpeed is set in its settings": "profile_modules wall_clock_breakdown",
    "log.trackers lists the trackers that there are": "use_otel_metrics otel_metrics_host otel_metrics_port",
    "export MLFLOW_TRACKING_URI instead": "mlflow_tracking_uri",
    "export COMET_WORKSPACE instead": "comet_workspace",
    "export COMET_START_ONLINE instead: 0 keeps the run in its folder": "comet_mode comet_online",
    "a run goes on in its own experiment": "comet_experiment_key",
    "the experiment of comet is set by environment variables of comet": "comet_experiment_config",
    "export TRACKIO_SPACE_ID or TRACKIO_BUCKET_ID instead": "trackio_space_id trackio_bucket_id trackio_static_space_id",
    "export SWANLAB_WORKSPACE instead": "swanlab_workspace",
    "export SWANLAB_MODE instead": "swanlab_mode",
    "swanlab writes into the run folder": "swanlab_logdir",
    "export SWANLAB_WEBHOOK instead": "swanlab_lark_webhook_url",
    "export.push_to_hub: owner/name uploads the finished model once, to main, and so does `dspref push RUN owner/name`": (
        "hub_strategy hub_revision hub_always_push hub_model_revision overwrite_hub_revision push_to_hub_revision "
        "hf_repo_revision"
    ),
    "export.push_to_hub: owner/name uploads private; `dspref push RUN owner/name --public` does not": "hub_private_repo",
    "export.push_to_hub and `dspref push RUN owner/name` upload the model, and no data": "push_dataset_to_hub",
    "the address follows from export.push_to_hub: owner/name, or `dspref push RUN owner/name`": "hf_repo_url",
    "export HF_TOKEN instead; a config holds no secrets": "hub_token push_to_hub_token hf_hub_token hf_use_auth_token",
    "a config holds no secrets": (
        "comet_api_key swanlab_api_key swanlab_lark_secret ms_hub_token om_hub_token"
    ),
    "run `wandb login` instead; a config holds no secrets": "logger.wandb.key",
    "export WANDB_ENTITY instead": "wandb_entity wandb_org logger.wandb.org",
    "export WANDB_RUN_GROUP instead": "wandb_run_group wandb_group logger.wandb.group",
    "export WANDB_MODE instead": "wandb_mode",
    "gradients are not sent": "wandb_watch",
    "models are not sent": "wandb_log_model hf_mlflow_log_artifacts",
    "what dspref does needs none": "plugins",
    "every key is checked": "strict",
}  # fmt: skip

NOT_NEEDED = inverted(_NOT_NEEDED)
