"""Mixtures of experts whose experts several ranks hold between them, by DeepSpeed's AutoEP: which models can be spread so,
and what DeepSpeed is told of them.

AutoEP has presets of its own for these families. Those are not used: with transformers 5.23 they end in a TypeError where
they look for transformers' recorders of router logits (`_CanRecordRegistry.get()`), which dspref does without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from dspref.errors import ConfigError
from dspref.model.alone import ALONE

# Of DeepSpeed's settings.
KEY = "expert_parallel"
# Where `PackedCausalLM` has the layers.
LAYERS = r"lm\.model\.layers\.\d+\.mlp"


class Family(NamedTuple):
    """How a family routes tokens, in AutoEP's words."""

    experts: str
    """The key of config.json that has their number."""
    normed: str | bool
    """Whether the weights of a token's experts add up to 1, or the key that says so."""
    score: str = "softmax"
    shared: tuple[str, str] = ("", "")
    """Modules beside the routed experts: one that reads every token, and what weighs it."""
    whole_router: bool = False
    """Whether its router computes in fp32, whatever the model's type. AutoEP's does not."""


FAMILIES = {
    "mixtral": Family("num_local_experts", True),
    "qwen2_moe": Family("num_experts", "norm_topk_prob", shared=("shared_expert", "shared_expert_gate")),
    "qwen3_moe": Family("num_experts", "norm_topk_prob"),
    "deepseek_v2": Family("n_routed_experts", False, shared=("shared_experts", ""), whole_router=True),
    "deepseek_v3": Family("n_routed_experts", "norm_topk_prob", "sigmoid", ("shared_experts", ""), whole_router=True),
}


def size_of(strategy: Mapping[str, Any]) -> int:
    """How many ranks hold the experts of a layer between them; 1 where each has them all."""
    section = strategy.get(KEY) or {}
    # DeepSpeed takes whole floats for most numbers, and not for this one.
    return int(section.get("autoep_size", 1)) if section.get("enabled") else 1


def refuse(config: PretrainedConfig, strategy: Mapping[str, Any], dtype: str, kernel: str = "") -> None:
    """Raises ConfigError for a model that AutoEP cannot spread, or would run otherwise than its authors. `kernel`: of its
    attention, where that is known."""
    if (size := size_of(strategy)) == 1:
        return
    own, kind = f"deepspeed.{KEY}", config.model_type
    family = FAMILIES.get(kind)
    if family is None:
        raise ConfigError(f"{own}: {kind} is not among {', '.join(FAMILIES)}, which AutoEP can spread; remove it")
    if kernel == ALONE:
        raise ConfigError(
            f"{own}: has not been tried with a model that reads one sequence at a time, as this one; remove it"
        )
    experts = getattr(config, family.experts)
    if experts % size:
        few = max(n for n in range(1, min(size, experts + 1)) if experts % n == 0)
        fix = f"use {few}" if few > 1 else f"remove {own}"
        raise ConfigError(f"{own}.autoep_size: {size} does not divide the model's {experts} experts; {fix}")
    if family.whole_router and dtype != "float32":
        raise ConfigError(
            f"{own}: AutoEP has the routers of {kind} compute in {dtype}, which its authors have in fp32, so that others of "
            "its experts would be chosen; remove it, or use model.dtype: float32"
        )
    if getattr(config, "router_jitter_noise", 0):
        raise ConfigError(f"{own}: AutoEP leaves out router_jitter_noise, which the model's config.json asks for; remove it")
    if kind == "deepseek_v2" and config.topk_method != "greedy":
        raise ConfigError(f"{own}: AutoEP cannot route by the topk_method {config.topk_method} of {kind}; remove it")


def told(config: PretrainedConfig, size: int) -> dict[str, Any]:
    """The section as DeepSpeed is given it. All is written out, for nothing is to be looked up in a preset."""
    family = FAMILIES[config.model_type]
    normed = family.normed if isinstance(family.normed, bool) else bool(getattr(config, family.normed))
    groups = {"num_expert_groups": config.n_group, "num_limited_groups": config.topk_group} if _in_groups(config) else {}
    expert, gate = family.shared
    return {
        "enabled": True,
        "autoep_size": size,
        "moe_layer_pattern": LAYERS,
        "num_experts_attr": family.experts,
        "top_k": config.num_experts_per_tok,
        "score_func": family.score,
        "score_apply": "post",
        "route_norm": normed,
        "routed_scaling_factor": float(getattr(config, "routed_scaling_factor", None) or 1.0),
        "has_shared_experts": bool(expert),
        **({"shared_experts_pattern": expert} if expert else {}),
        **({"shared_experts_gate_pattern": gate} if gate else {}),
        **groups,
    }


def _in_groups(config: PretrainedConfig) -> bool:
    return config.model_type == "deepseek_v3"


def shared_of(config: PretrainedConfig) -> tuple[str, str]:
    """What transformers calls the modules beside the routed experts; "" for one that there is not."""
    return FAMILIES[config.model_type].shared


def shared_as_told(section: Mapping[str, Any]) -> tuple[str, str]:
    """`shared_of` the model that DeepSpeed was told of in `section`."""
    return section.get("shared_experts_pattern", ""), section.get("shared_experts_gate_pattern", "")


def as_loaded(name: str, shared: tuple[str, str]) -> str:
    """What transformers calls a parameter or buffer of a layer that AutoEP has put in place of the model's own."""
    ours = {"shared_experts": shared[0], "shared_experts_gate": shared[1], "router.gate": "gate", "router": "gate"}
    for theirs, own in ours.items():
        name = name.replace(f".mlp.{theirs}.", f".mlp.{own}.")
    return name


def put_together(experts: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a layer's experts [E, ...], by their names in AutoEP, as transformers holds them."""
    return {"gate_up_proj": torch.cat([experts["w1"], experts["w3"]], dim=1), "down_proj": experts["w2"]}
