"""Answers by the packed model, in batches with padding and a cache, are those of plain transformers, prompt by prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_attention import FAMILIES, config_of
from tiny import tiny_config, tiny_model
from transformers import PreTrainedModel

from dspref.config import ModelSection
from dspref.model import generation, loading
from dspref.model.attention import PACKED
from dspref.model.generation import Style
from dspref.model.packed import PackedCausalLM

TOKENS, CPU = 24, torch.device("cpu")
FURTHER = {
    "gemma2 softcap": {"attn_logit_softcapping": 5.0, "sliding_window": 8, "query_pre_attn_scalar": 9},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}


def sharp(config: Any, seed: int) -> PreTrainedModel:
    """A model that has something to say: with weights as small as `tiny`'s an answer would be one token again and again."""
    lm = tiny_model(config, seed)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.dim() > 1:
                parameter *= 2 if "embed" in name or "lm_head" in name else 4
    return lm


def prompts(count: int = 5) -> list[list[int]]:
    draws = np.random.default_rng(7)
    return [draws.integers(0, 256, n).tolist() for n in (13, 2, 30, 7, 19)[:count]]


def plain(lm: PreTrainedModel, prompt: list[int], ends: list[int], **settings: Any) -> list[int]:
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": ends or None, "pad_token_id": 0} | settings
    return lm.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


def packed(lm: PreTrainedModel, tmp_path: Path) -> PackedCausalLM:
    lm.save_pretrained(tmp_path)
    return loading.load(
        ModelSection(name_or_path=str(tmp_path), dtype="float32"), str(tmp_path), "sdpa", "float32", None
    ).eval()


def ours(model: PackedCausalLM, asked: list[list[int]], style: Style, **more: Any) -> list[list[int]]:
    with generation.plain_attention(model.lm):
        return generation.generate(model, asked, style, CPU, **more)


@pytest.mark.parametrize("family", [*FAMILIES, *FURTHER])
def test_greedy_answers_are_those_of_plain_transformers(family: str, tmp_path: Path) -> None:
    config = config_of(family) if family in FAMILIES else tiny_config(family.split()[0], **FURTHER[family])
    lm = sharp(config, seed=1)
    free = [plain(lm, prompt, []) for prompt in prompts()]
    assert len({token for answer in free for token in answer}) > 10
    ends = [free[0][3], free[2][7]]  # so that answers end at different tokens, one by each
    expected = [plain(lm, prompt, ends) for prompt in prompts()]
    assert min(map(len, expected)) <= 4 and max(map(len, expected)) > 7
    model = packed(lm, tmp_path)
    assert ours(model, prompts(), Style(TOKENS, ends=frozenset(ends))) == expected
    assert {part.config._attn_implementation for part in model.lm.modules() if hasattr(part, "config")} == {PACKED}
