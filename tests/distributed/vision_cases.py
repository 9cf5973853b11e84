"""What tests of vision-language models run on every rank."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import AutoConfig, AutoModelForImageTextToText

from dspref import distributed
from dspref.config import ModelSection, TrainSection
from dspref.data.batch import PackedBatch
from dspref.engine import ds_config, engine
from dspref.engine.engine import Engine
from dspref.model import loading, packed, vision


def gradients_of_packs(
    folder: str, strategy: dict[str, Any], checkpointing: bool, packs: list[PackedBatch]
) -> dict[str, np.ndarray]:
    """Of the sum of all log-probs, where each rank has a pack: read from AdamW's first moment."""
    distributed.init(1)
    engine.bring_up("float32")
    loading.quiet()
    train = TrainSection(pairs_per_step=1, max_grad_norm=0.0, weight_decay=0.0)
    config = ds_config.training_config(strategy, "float32", train)
    model_config = AutoConfig.from_pretrained(folder)
    with loading._partitioned(config if strategy["zero_optimization"]["stage"] == 3 else None):
        lm = AutoModelForImageTextToText.from_pretrained(
            folder, config=model_config, attn_implementation=vision.implementations(model_config)
        )
    section = ModelSection(name_or_path=folder, dtype="float32", gradient_checkpointing=checkpointing)
    model = packed.prepare_for_training(packed.PackedCausalLM(lm, "sdpa"), section, with_collision=False)
    policy = Engine.for_training(model, train, config, total_steps=1)
    tokens, _ = policy.forward(packs[distributed.world().rank])
    policy.backward(tokens.logps.sum())
    policy.step()
    found = gradients_of(policy, train.adam_beta1)
    policy.close()
    return found


def gradients_of(policy: Engine, adam_beta1: float) -> dict[str, np.ndarray]:
    """The gradient of the one step that was taken, read from AdamW's first moment: (1 - beta1) x gradient."""
    from deepspeed.utils import safe_get_full_optimizer_state

    named = policy.module.lm.named_parameters()
    moments = {name: safe_get_full_optimizer_state(parameter, "exp_avg") for name, parameter in named}
    return {name: (moment / (1 - adam_beta1)).numpy().copy() for name, moment in moments.items() if moment is not None}
