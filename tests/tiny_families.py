"""Models of nearly every decoder-only family of transformers, shrunken by the names of their settings."""

from __future__ import annotations

import copy
from inspect import get_annotations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tiny import filled
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from dspref.data.truncate import TokenizedPair
from dspref.model import families

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# Families of transformers 5.23 that can be trained, by model_type; docs/make_families.py has the others.
_LISTED = """
    afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba beam biogpt bitnet bloom codegen cohere cohere2
    cohere2_moe cohere_compass_text ctrl cwm dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots1
    ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint gemma gemma2 gemma3_text
    gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt-sw3 gpt2 gpt_bigcode
    gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoehybrid
    granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling2_text inkling_text
    internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4_text
    longcat_flash mamba mamba2 mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3
    mistral mixtral modernbert-decoder mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt
    persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen4_exp_text
    recurrent_gemma seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm youtu zamba zamba2 zaya
"""
LISTED = _LISTED.split()
# The code of experts that computes in float64.
EXPERTS = {"experts_implementation": "eager"}
# Families that compute in float32 whatever they are told.
IN_FLOAT32 = {"inkling2_text", "xglm"}
# Settings by what families call them; those that a config does not have are left out.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_dim", "lru_width"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size", "emb_dim", "input_embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim", "dff", "dim_ff", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "router_hidden_size"), 16),
    **dict.fromkeys(("dense_intermediate_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "dim_head", "kv_channels", "v_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("attention_head_dim", "index_head_dim", "mamba_d_head", "mamba_head_dim", "mamba_headdim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "n_mamba_heads", "index_n_heads"), 2),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "d_rel", "rel_extent"), 8),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), 8),
    **dict.fromkeys(("local_attention", "attention_chunk_size", "index_topk"), 8),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "model_max_length"), 64
    ),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 64),
    "hidden_size_per_layer_input": 4,
    "unpadded_vocab_size": 60,
    # What happens to logits, so that leaving it out would show.
    **dict.fromkeys(("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_mup_width_multiplier"), 0.25),
    **dict.fromkeys(("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"), 3.0),
    **dict.fromkeys(("embedding_scale", "embedding_multiplier", "scale_emb"), 2.0),
    "attn_logit_softcapping": 2.0,
}
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
NO_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id")
LATENT = {"num_key_value_heads": 4, "head_dim": 4}  # of keys that are wider than the rotary part that heads share
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
# What the names above do not say, by family.
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "bailing_hybrid", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), LATENT),
    **dict.fromkeys(("glm_moe_dsa", "kimi_linear", "longcat_flash", "youtu"), LATENT),
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "granitemoehybrid": MAMBA | {"layer_types": ["linear_attention", "full_attention"]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": None, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "mamba2": {"num_heads": 8, "chunk_size": 8},
    "ministral": {"head_dim": 8},
    "deepseek_v2": LATENT | {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "falcon": {"num_kv_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": [48, 48], "laurel_rank": 4, "altup_num_inputs": 2},
    "gemma4_text": {"head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 0},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid"],
    },
    "modernbert-decoder": {"pad_token_id": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "minicpm3": LATENT | {"dim_model_base": 16},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 2},
    "xglm": {"decoder_start_token_id": 0},
    "zamba2": {"n_mamba_heads": 8, "mamba_expand": 2, "mamba_headdim": 8, "hidden_size": 32},
    "zaya": {"num_experts_per_tok": 1},
}


def small_config(family: str, **overrides: Any) -> PretrainedConfig:
    """The config of a family by its model_type, of its own classes, with all sizes small and no special token."""
    plain = AutoConfig.for_model(family)
    changes = {name: value for name, value in SMALL.items() if _told(plain, name) is not None}
    changes |= {name: None for name in NO_TOKENS if _told(plain, name) is not None and _may_be_none(plain, name)}
    kinds = {name: list(dict.fromkeys(vars(plain)[name])) for name in KINDS if vars(plain).get(name)}
    depth = max([2, *map(len, kinds.values())])
    changes |= {name: (own * depth)[:depth] for name, own in kinds.items()}
    changes |= {name: depth for name in DEPTHS if name in changes}
    noises = ("dropout", "pdrop", "layerdrop", "jitter")
    changes |= {name: 0.0 for name, x in vars(plain).items() if isinstance(x, float) and any(n in name for n in noises)}
    return AutoConfig.for_model(family, **changes | OWN.get(family, {}) | overrides)


def _told(config: PretrainedConfig, name: str) -> Any:
    """A setting that can be given; some are properties, or differ by layer."""
    if isinstance(getattr(type(config), name, None), property):
        return None
    try:
        return getattr(config, name, None)
    except Exception:  # an error of transformers' own, where layers differ
        return None


def _may_be_none(config: PretrainedConfig, name: str) -> bool:
    return "None" in str(get_annotations(type(config)).get(name, "None"))


def model_of(config: PretrainedConfig, kernel: str) -> PreTrainedModel:
    dtype = torch.float32 if config.model_type in IN_FLOAT32 else torch.float64
    with torch.random.fork_rng(devices=[]):
        make: Any = families.auto_class(config).from_config
        return filled(make(copy.deepcopy(config), dtype=dtype, attn_implementation=kernel, **EXPERTS), seed=1)


def gradients(lm: torch.nn.Module, logps: Tensor) -> dict[str, Tensor]:
    """Of a sum in which every token has a weight of its own."""
    (logps * torch.linspace(-1.0, 2.0, len(logps), dtype=logps.dtype)).sum().backward()
    return {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}


def small_pairs(count: int = 2) -> list[TokenizedPair]:
    """Sequences of 4 to 24 tokens: windows and chunks of 8 are crossed."""
    draws = np.random.default_rng(0)
    lengths = [(11, 5, 13), (2, 9, 2), (5, 3, 8), (3, 7, 10)][:count]
    return [TokenizedPair(*(draws.integers(0, 60, n).astype(np.int32) for n in part)) for part in lengths]


def plain_logps(lm: torch.nn.Module, pairs: list[TokenizedPair]) -> Float[Tensor, "C"]:
    """log p of each answer token: one forward per sequence as the model's authors have it, no mask, full softmax."""
    found = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(np.concatenate([pair.prompt, answer])).long()
            logits = lm(input_ids=ids[None]).logits[0].double()
            shares = logits[len(pair.prompt) - 1 : -1].log_softmax(dim=-1)
            found.append(shares.gather(1, ids[len(pair.prompt) :, None])[:, 0])
    return torch.cat(found)
