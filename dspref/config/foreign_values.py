"""Values of other trainers, and what people try, by the key that takes them: what each is here. `hints` reads it for errors,
`convert` for whole configs. What has no counterpart (`adafactor`, `warmup_stable_decay`) is in no table, and gets no hint.
"""

from __future__ import annotations

from dspref.config.foreign import inverted

# Key -> our value -> what other tools call it, or what people try.
_VALUES = {
    "optim": {
        "adamw": (
            "adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adamw_hf adamw_apex_fused "
            "adamw_anyprecision adam fused_adam adamw_fused paged_adamw paged_adamw_32bit optimi_adamw"
        ),
        "adamw_8bit": "adamw_bnb_8bit paged_adamw_8bit adamw_torch_8bit ao_adamw_8bit adam_8bit adamw8bit",
        "cpu_adam": "deepspeed_cpu_adam cpuadam",
    },
    "dtype": {
        "bfloat16": "bf16 torch.bfloat16 bfloat",
        "float16": "fp16 half torch.float16 16 f16",
        "float32": "fp32 float torch.float32 32 f32 full no",
    },
    "attn_implementation": {
        "auto": "flex_attention null none true",
        "flash_attention_2": "flash_attention flash_attn flash fa2 flash_attn_2 flash_2 kernels-community/flash-attn",
        "flash_attention_3": "fa3 flash_attn_3 flash_3 kernels-community/vllm-flash-attn3 kernels-community/flash-attn3",
        "flash_attention_4": "fa4 flash_attn_4",
        "sdpa": "eager xformers disabled false sage_attention",
    },
    "lr_scheduler_type": {
        "cosine": "cosine_with_warmup cosine_annealing",
        "cosine_with_min_lr": "cosine_warmup_with_min_lr",
        "linear": "linear_with_warmup",
    },
    "init": {"random": "scratch from_scratch none true", "pretrained": "false"},
    "mode": {
        "auto": "true",
        "engine": "live",
        "stored": "precompute precomputed cached cache",
        "adapter": "base",
        "none": "false off null no",
    },
    "offload": {"cpu": "true", "none": "false null gpu"},
    "truncation_mode": {"keep_end": "left", "keep_start": "right"},
    "on_bad_row": {"drop": "skip ignore warn", "error": "raise fail"},
    "resume": {"auto": "true yes latest", "never": "false no null"},
    "trackers": {"tensorboard": "tb", "wandb": "weights_and_biases", "comet": "comet_ml"},
    "pairs": {
        "all": "true",
        "best_against_worst": "best_worst best_vs_worst",
        "best_against_rest": "best_rest best_vs_rest",
    },
    "router_aux_scope": {"step": "batch global", "micro": "micro_batch local"},
    "keep_together": {"none": "false null", "row": "true rows", "prompt": "prompts"},
    "loss_type": {
        "sigmoid": "dpo logistic",
        "bco_pair": "bco",
        "exo_pair": "exo",
        "nca_pair": "nca",
        "sppo_hard": "sppo",
        "apo_zero": "apo",
        "sft": "nll",
        "sigmoid_norm": "length_normalized",
        "tpo_l": "tpo-l",
    },
    "f_divergence_type": {"reverse_kl": "kl", "js_divergence": "js jsd jensen_shannon"},
}
# Key -> why there is none -> values of other tools that no value here stands for, however near they are in letters.
_STRANGERS = {
    "optim": {
        "the optimizers are AdamW's three": (
            "adamc adafactor adagrad ademamix ademamix_8bit ademamix_32bit adopt_adamw sgd lion lion_8bit lion_32bit "
            "rmsprop lomo adalomo muon came_pytorch grokadamw stable_adamw flash_adamw adamw_torch_4bit ao_adamw_4bit "
            "ao_adamw_fp8 adamw_4bit"
        ),
    },
    "lr_scheduler_type": {
        "there is no such schedule here": "reduce_lr_on_plateau warmup_stable_decay wsd greedy rex one_cycle exponential",
    },
    "loss_type": {
        "that is online reinforcement learning": "ppo grpo gdpo dapo rloo reinforce gspo",
        "there is no such loss here": "simnpo npo rdpo r_dpo tdpo slic rso rrhf pro beta_dpo epo",
    },
}
# The same, with what to write in full.
WHOLE_VALUES = {
    "trackers": dict.fromkeys(("none", "no", "off", "false"), "[]") | {"all": "[wandb, tensorboard]"},
}

VALUES = {key: inverted(table) for key, table in _VALUES.items()}
STRANGERS = {key: inverted(table) for key, table in _STRANGERS.items()}
