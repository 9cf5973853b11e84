"""Which models DeepSpeed's AutoEP is let loose on, what it is told of them, and what it is not to be used with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from transformers import PretrainedConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from dspref.engine import misfits
from dspref.errors import ConfigError
from dspref.model import expert_parallel
from dspref.model.alone import ALONE

SPREAD = {"expert_parallel": {"enabled": True, "autoep_size": 4}}
CONFIGS: dict[str, Any] = {
    "mixtral": transformers.MixtralConfig,
    "qwen2_moe": transformers.Qwen2MoeConfig,
    "qwen3_moe": transformers.Qwen3MoeConfig,
    "deepseek_v2": transformers.DeepseekV2Config,
    "deepseek_v3": transformers.DeepseekV3Config,
}


def refusal(config: PretrainedConfig, dtype: str = "float32", kernel: str = "sdpa", **section: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        expert_parallel.refuse(config, {"expert_parallel": SPREAD["expert_parallel"] | section}, dtype, kernel)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_families_that_are_taken(family: str) -> None:
    assert CONFIGS.keys() == expert_parallel.FAMILIES.keys()
    config = CONFIGS[family]()
    expert_parallel.refuse(config, SPREAD, "float32")
    told = expert_parallel.told(config, 4)
    assert told["autoep_size"] == 4 and told["top_k"] == config.num_experts_per_tok


def test_what_is_not_asked_for_is_not_refused() -> None:
    expert_parallel.refuse(transformers.LlamaConfig(), {"expert_parallel": {"enabled": False, "autoep_size": 4}}, "bfloat16")


def test_what_is_refused() -> None:
    assert "llama is not among mixtral, " in refusal(transformers.LlamaConfig())
    assert "3 does not divide the model's 8 experts; use 2" in refusal(transformers.MixtralConfig(), autoep_size=3)
    assert "6 does not divide the model's 8 experts; use 4" in refusal(transformers.MixtralConfig(), autoep_size=6)
    assert "router_jitter_noise" in refusal(transformers.MixtralConfig(router_jitter_noise=0.1))
    assert "topk_method group_limited" in refusal(transformers.DeepseekV2Config(topk_method="group_limited_greedy"))
    assert "one sequence at a time" in refusal(transformers.MixtralConfig(), kernel=ALONE)
    for family in ("deepseek_v2", "deepseek_v3"):
        assert "which its authors have in fp32" in refusal(CONFIGS[family](), "bfloat16")


def test_routers_of_deepseek_choose_others_in_bf16() -> None:
    """Why DeepSeek is refused in bf16. In fp32 both choose alike."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        hidden_size=512, n_routed_experts=64, num_experts_per_tok=8, n_group=8, topk_group=4, routed_scaling_factor=2.5
    )
    own = DeepseekV3TopkRouter(config)
    theirs = TokenChoiceTopKRouter(512, 64, 8, 4, 8, "sigmoid", True, 2.5, False)
    torch.nn.init.normal_(own.weight, std=0.05)
    tokens = torch.randn(2000, 512).bfloat16()

    def differ(dtype: torch.dtype) -> float:
        own.to(dtype), theirs.to(dtype)
        theirs.gate.weight.data.copy_(own.weight.data)
        chosen = (own(tokens.to(dtype))[2], theirs(tokens.to(dtype))[1])
        return float((chosen[0].sort().values != chosen[1].sort().values).any(dim=-1).float().mean())

    own.weight.data = own.weight.data.bfloat16().float()
    assert differ(torch.float32) == 0
    assert differ(torch.bfloat16) > 0.005


def test_what_each_weight_is_called() -> None:
    named = {
        "model.layers.0.mlp.router.gate.weight": "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.router.e_score_correction_bias": "model.layers.0.mlp.gate.e_score_correction_bias",
        "model.layers.0.mlp.shared_experts.up_proj.weight": "model.layers.0.mlp.shared_expert.up_proj.weight",
        "model.layers.0.mlp.shared_experts_gate.weight": "model.layers.0.mlp.shared_expert_gate.weight",
        "model.layers.0.mlp.gate_proj.weight": "model.layers.0.mlp.gate_proj.weight",
    }
    shared = expert_parallel.shared_of(transformers.Qwen2MoeConfig())
    assert {name: expert_parallel.as_loaded(name, shared) for name in named} == named


@pytest.mark.parametrize(("ranks", "fix"), [(1, "remove deepspeed.expert_parallel"), (6, "use 3"), (4, None), (8, None)])
def test_ranks_that_cannot_share(ranks: int, fix: str | None) -> None:
    if fix is None:
        return misfits.refuse_spread(SPREAD, ranks)
    with pytest.raises(ConfigError, match=f"autoep_size: 4 does not divide the {ranks} ranks?; {fix}"):
        misfits.refuse_spread(SPREAD, ranks)


def test_sizes_as_yaml_may_write_them() -> None:
    """DeepSpeed asks for an integer here; a size beyond all ranks is refused as fast as others."""
    size = expert_parallel.size_of({"expert_parallel": {"enabled": True, "autoep_size": 2.0}})
    assert size == 2 and type(size) is int
    with pytest.raises(ConfigError, match="does not divide the 2 ranks; use 2"):
        misfits.refuse_spread({"expert_parallel": {"enabled": True, "autoep_size": 10**12}}, 2)
    with pytest.raises(ConfigError, match=r"the model's 3 experts; remove deepspeed\.expert_parallel"):
        config = transformers.MixtralConfig(num_local_experts=3)
        expert_parallel.refuse(config, {"expert_parallel": {"enabled": True, "autoep_size": 2}}, "float32")
