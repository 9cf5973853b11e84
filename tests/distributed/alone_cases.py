"""What tests of models that read one sequence per forward run on every rank."""

from __future__ import annotations

from typing import Any

import numpy as np
from vision_cases import gradients_of

from dspref import distributed
from dspref.config import ModelSection, TrainSection
from dspref.data.batch import PackedBatch
from dspref.engine import ds_config, engine
from dspref.engine.engine import Engine
from dspref.model import admission, alone, loading, packed


def steps_of_packs(
    folder: str, strategy: dict[str, Any], checkpointing: bool, packs: list[list[PackedBatch]]
) -> tuple[list[list[float]], dict[str, np.ndarray]]:
    """(log-probs of each pack of this rank, the gradient of all their sums on all ranks: from AdamW's first moment).
    `packs`: of each rank, which all have as many."""
    distributed.init(1)
    engine.bring_up("float32")
    loading.quiet()
    train = TrainSection(pairs_per_step=1, max_grad_norm=0.0, weight_decay=0.0)
    config = ds_config.training_config(strategy, "float32", train)
    section = ModelSection(
        name_or_path=folder, dtype="float32", gradient_checkpointing=checkpointing, router_aux_loss_coef=0.0
    )
    kernel = admission.check(section, loading.load_config(section), 64, 0, "cpu")
    assert kernel == alone.ALONE
    zero3 = config if strategy["zero_optimization"]["stage"] == 3 else None
    model = packed.prepare_for_training(loading.load(section, folder, kernel, "float32", zero3), section, False)
    policy, said = Engine.for_training(model, train, config, total_steps=1), []
    for pack in packs[distributed.world().rank]:
        tokens, _ = policy.forward(pack)
        said.append(tokens.logps.tolist())
        policy.backward(tokens.logps.sum())
    policy.step()
    found = gradients_of(policy, train.adam_beta1)
    policy.close()
    return said, found
