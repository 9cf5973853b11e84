"""Models of nearly every decoder-only family of transformers, shrunken by the names of their settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig

from dspref.data.truncate import TokenizedPair

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# Settings by what families call them; those that a config does not have are left out.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_dim", "attention_hidden_size", "lru_width"), 32),
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
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 64),
    "hidden_size_per_layer_input": 4,
    "unpadded_vocab_size": 60,
    # What happens to logits, so that leaving it out would show.
    **dict.fromkeys(("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_mup_width_multiplier"), 0.25),
    **dict.fromkeys(("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"), 3.0),
    **dict.fromkeys(("embedding_scale", "embedding_multiplier", "scale_emb"), 2.0),
    "attn_logit_softcapping": 2.0,
}
NO_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id")
# What the names above do not say, by family.
OWN: dict[str, dict[str, Any]] = {}


def small_config(family: str, **overrides: Any) -> PretrainedConfig:
    """The config of a family by its model_type, of its own classes, with all sizes small and no special token."""
    plain = AutoConfig.for_model(family)
    changes = {name: value for name, value in SMALL.items() if hasattr(plain, name) and getattr(plain, name) is not None}
    changes |= {name: None for name in NO_TOKENS if hasattr(plain, name)}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type", "block_types"):
        if isinstance(kinds := vars(plain).get(name), list | tuple) and kinds:
            chosen = list(dict.fromkeys(kinds))
            changes[name] = (chosen * 2)[: max(2, len(chosen))]
    depth = max([2, *(len(value) for name, value in changes.items() if name.endswith(("_types", "_type")) and value)])
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if name in changes:
            changes[name] = (changes[name] * depth)[:depth]
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if name in changes:
            changes[name] = depth
    for name, value in vars(plain).items():
        if isinstance(value, float) and any(word in name for word in ("dropout", "pdrop", "layerdrop", "jitter")):
            changes[name] = 0.0
    return AutoConfig.for_model(family, **changes | OWN.get(family, {}) | overrides)


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
