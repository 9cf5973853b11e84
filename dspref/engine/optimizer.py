"""The optimizer and the schedule of its learning rate, which DeepSpeed is given."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import transformers

from dspref import distributed
from dspref.config import TrainSection
from dspref.engine import builds, experts
from dspref.engine.accelerator import deepspeed
from dspref.errors import EnvironmentFault
from dspref.model.packed import PackedCausalLM


def make_optimizer(policy: PackedCausalLM, train: TrainSection) -> torch.optim.Optimizer:
    trained = [p for p in policy.parameters() if p.requires_grad]
    # Weight decay is for matrices; under ZeRO-3 `p.shape` is empty and `ds_shape` tells.
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if train.weight_decay == 0:
        groups = [{"params": trained, "weight_decay": 0.0}]
    betas = train.adam_beta1, train.adam_beta2
    options: dict[str, Any] = {"lr": train.learning_rate, "betas": betas, "eps": train.adam_epsilon}
    groups = experts.apart([g for g in groups if g["params"]])
    if train.optim == "cpu_adam":
        return _cpu_adam(groups, options)
    if train.optim == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def make_scheduler(optimizer: torch.optim.Optimizer, train: TrainSection, total_steps: int) -> Any:
    """By its name in transformers."""
    warmup = train.warmup_steps if train.warmup_steps is not None else math.ceil(train.warmup_ratio * total_steps)
    return transformers.get_scheduler(
        train.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=dict(train.lr_scheduler_kwargs),
    )


def _cpu_adam(groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    """DeepSpeed's Adam for states in host memory, compiled on first use."""
    folder = builds.folder(os.environ, own=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    for lock, age in builds.locks(folder):
        if age > builds.STALE_SECONDS:
            distributed.log(f"removed the stale build lock {lock}")
            lock.unlink(missing_ok=True)
    try:
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    except Exception as error:  # the builder raises whatever its tools raise
        reason = str(error).strip().splitlines()[0]
        raise EnvironmentFault(
            f"train.optim: cpu_adam cannot be built here ({reason}); install g++ and ninja, or use adamw"
        ) from None
