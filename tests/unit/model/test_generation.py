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


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_repetition_penalty_of_the_generation_config_is_kept(penalty: float, tmp_path: Path) -> None:
    lm = sharp(tiny_config("llama"), seed=1)
    lm.generation_config.repetition_penalty = penalty
    lm.generation_config.eos_token_id = [3, 5]
    expected = [plain(lm, prompt, [3, 5]) for prompt in prompts()]
    assert expected != [plain(lm, prompt, [3, 5], repetition_penalty=1.0) for prompt in prompts()]
    model = packed(lm, tmp_path)
    style = generation.style_of(model.lm, TOKENS, 0.0, 1.0, [7])
    assert style.ends == {3, 5, 7} and style.positions == 4096
    assert ours(model, prompts(), generation.style_of(model.lm, TOKENS, 0.0, 1.0, [])) == expected


def test_an_answer_ends_where_the_model_has_no_more_positions(tmp_path: Path) -> None:
    """And the others of its batch go on. Learnt positions are a table: behind its end there is nothing to read."""
    model = packed(sharp(tiny_config("gpt2", max_position_embeddings=32), seed=1), tmp_path)
    style = generation.style_of(model.lm, TOKENS, 0.0, 1.0, [])
    asked = [*prompts(), list(range(32))]
    assert [len(answer) for answer in ours(model, asked, style)] == [19, 24, 2, 24, 13, 0]


def test_what_is_drawn_depends_on_the_prompts_seed_alone(tmp_path: Path) -> None:
    model = packed(sharp(tiny_config("qwen2"), seed=1), tmp_path)
    style, seeds = Style(TOKENS, temperature=1.5, top_p=0.9), [11, 12, 13, 14, 15]
    state = torch.get_rng_state()
    together = ours(model, prompts(), style, seeds=seeds)
    assert torch.equal(state, torch.get_rng_state())
    alone = [ours(model, [prompt], style, seeds=[seed])[0] for prompt, seed in zip(prompts(), seeds)]
    assert together == alone and together != ours(model, prompts(), style, seeds=seeds[::-1])
    greedy = ours(model, prompts(), Style(TOKENS))
    assert together != greedy
    for cold in (Style(TOKENS, temperature=1e-4), Style(TOKENS, temperature=1.5, top_p=1e-6)):
        assert ours(model, prompts(), cold, seeds=seeds) == greedy


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [(1.0, 1.0, [0.1, 0.6, 0.3]), (1.0, 0.7, [0.0, 2 / 3, 1 / 3]), (1.0, 0.6, [0.0, 1.0, 0.0]), (0.5, 1.0, [1, 36, 9])],
)
def test_tokens_are_drawn_by_their_probabilities(temperature: float, top_p: float, expected: list[float]) -> None:
    logits = torch.tensor([0.1, 0.6, 0.3]).log()
    numbers = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    drawn = generation.draw(logits.repeat(4000, 1), numbers, Style(1, temperature, top_p))
    shares = torch.bincount(drawn, minlength=3) / 4000
    assert torch.allclose(shares, torch.tensor(expected) / sum(expected), atol=1e-3)
