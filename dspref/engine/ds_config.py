"""The DeepSpeed configs of policy and reference: the user's strategy, and what the YAML's other sections say."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from dspref.config import TrainSection, strategy


def training_config(user_strategy: Mapping[str, Any], dtype: str, train: TrainSection) -> dict[str, Any]:
    """The DeepSpeed config of the policy."""
    return _complete(user_strategy, dtype, train.optim) | {"gradient_clipping": train.max_grad_norm}


def reference_config(user_strategy: Mapping[str, Any], dtype: str, offload: str) -> dict[str, Any]:
    """The DeepSpeed config of a live sharded reference: ZeRO-3 without an optimizer, its parameters on CPU if asked.

    `user_strategy`: the policy's. `offload`: none | cpu.
    """
    policy = user_strategy.get("zero_optimization", {})
    zero: dict[str, Any] = {"stage": 3}
    # The same threshold as the policy: what is too small to shard there is too small here.
    if "stage3_param_persistence_threshold" in policy:
        zero["stage3_param_persistence_threshold"] = policy["stage3_param_persistence_threshold"]
    if offload == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return _complete({"zero_optimization": zero}, dtype)


def _complete(user_strategy: Mapping[str, Any], dtype: str, optim: str = "") -> dict[str, Any]:
    resolved = copy.deepcopy(dict(user_strategy))
    resolved.pop(strategy.UNPROVEN, None)  # between dspref and its user
    zero = resolved.setdefault("zero_optimization", {"stage": 0})
    resolved |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # `step()` is the boundary: any number of backwards, one update.
        "managed_gradient_accumulation": False,
        # It would wait for the GPU at every forward; `performance.Clock` waits for nothing.
        "timers": {"throughput": {"enabled": False}},
    }
    if zero.get("stage") == 1:
        zero["overlap_comm"] = False
    if dtype in ("bfloat16", "float16"):
        resolved["bf16" if dtype == "bfloat16" else "fp16"] = {"enabled": True}
        resolved["data_types"] = {"grad_accum_dtype": "fp32"}
    if optim == "adamw_8bit":
        resolved["zero_allow_untested_optimizer"] = True  # DeepSpeed knows bitsandbytes' only by its 32-bit name
    if strategy.offloads_optimizer(resolved):
        # torch's AdamW works on offloaded states, without a compiler.
        resolved["zero_force_ds_cpu_optimizer"] = False
    return resolved
