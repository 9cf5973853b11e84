"""What tests of packs that several ranks hold run on every rank, beside `cases`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tiny_families import gradients, model_of, small_config, small_pairs

from dspref import distributed
from dspref.config import ModelSection
from dspref.data.batch import collate
from dspref.engine import sequence
from dspref.errors import ConfigError
from dspref.model import admission, loading
from dspref.model.packed import PackedCausalLM


def faults_of_families(families: list[str], sharing: bool) -> dict[str, str]:
    """What is wrong with the log-probs and gradients of small models whose packs all ranks hold between them; a family that
    is refused has the reason, behind `refused: `."""
    world = distributed.init(1, sequence=2)
    loading.quiet()
    return {family: found for family in families if (found := _fault_of(family, sharing, world.size))}


def _fault_of(family: str, sharing: bool, size: int) -> str:
    config, pairs = small_config(family), small_pairs()
    section: Any = ModelSection(name_or_path=family, dtype="float32", gradient_checkpointing=False)
    kernel = admission.check(section, config, 64, 0, "cpu")
    try:
        admission.refuse_shared(config, size, 64)
    except ConfigError as error:
        return f"refused: {error}"
    batch = collate(pairs, range(len(pairs)), prefix_sharing=sharing)
    models = [PackedCausalLM(model_of(config, loading.attention_of(config, kernel)), kernel) for _ in range(2)]
    whole, shared = models
    shared.group = sequence.group()
    (expected, *_), _ = whole(batch)
    exact = gradients(whole.lm, expected)
    own = batch.computed.cut(distributed.world().part, size)
    (logps, *_), _ = shared(replace(batch, own=own))
    faults = (
        [f"log-probs off by {(logps - expected).abs().max():.1e}"] if not torch.allclose(logps, expected, 0, 2e-6) else []
    )
    found = gradients(shared.lm, logps)
    scale = max(float(gradient.abs().max()) for gradient in exact.values())
    for name, gradient in exact.items():
        mine = found[name] if name in found else torch.zeros_like(gradient)  # of experts that none of its tokens meets
        apart = (distributed.all_sum(mine.clone()) - gradient).abs().max()
        if not apart <= 3e-5 * max(float(gradient.abs().max()), 1e-3 * scale):
            faults.append(f"{name} off by {float(apart):.1e} of {float(gradient.abs().max()):.1e}")
    return "; ".join(faults[:3])
