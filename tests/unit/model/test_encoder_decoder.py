"""The packed forward of encoder-decoder models against one plain transformers forward per example, in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_tokenizer, tiny_encoder_decoder, tiny_model
from torch import Tensor

from dspref.config import ModelSection
from dspref.data.batch import collate
from dspref.data.tokenize import load_tokenizer, tokenize_pairs
from dspref.data.truncate import TokenizedPair
from dspref.errors import ConfigError
from dspref.model import load_model, log_probs, read_as
from dspref.model import packed as model
from dspref.model.attention import KERNELS, PACKED, Segments, packed_attention
from dspref.model.families import FAMILIES

# Each row is a way in which families differ: bias by distance, learnt and computed positions, the head.
MODELS: dict[str, dict[str, Any]] = {
    "t5": {"feed_forward_proj": "gated-gelu"},
    "t5 unscaled": {"tie_word_embeddings": False},
    "mt5": {},
    "umt5": {},
    "bart": {"scale_embedding": True},
    "mbart": {},
    "marian": {},
    "m2m_100": {"max_position_embeddings": 8},
    "pegasus": {},
}


def tiny(name: str, seed: int = 1) -> Any:
    lm: Any = tiny_model(tiny_encoder_decoder(name.split()[0], **MODELS[name]), seed)
    if hasattr(lm, "final_logits_bias"):
        lm.final_logits_bias.copy_(torch.linspace(-1, 1, 256)[None])
    return lm


def some_pairs(lm: Any, seed: int = 0) -> list[TokenizedPair]:
    """Four pairs of 2 to 21 tokens, of which two have one prompt, and one answer in common."""
    draws = np.random.default_rng(seed)

    def ids(count: int) -> np.ndarray:
        return draws.integers(3, 256, count).astype(np.int32)

    def answer(count: int) -> np.ndarray:
        labels = ids(count)
        start = labels[-1] if FAMILIES[lm.config.model_type].wraps_last else lm.config.decoder_start_token_id
        return np.concatenate([[start], labels]).astype(np.int32)

    def mask(count: int) -> np.ndarray:
        return np.arange(count + 1) > 0

    sizes = [(13, 5, 21), (2, 17, 2), (9, 1, 12)]
    pairs = [TokenizedPair(ids(p), answer(c), answer(r), mask(c), mask(r)) for p, c, r in sizes]
    return [*pairs, pairs[0]._replace(chosen=answer(4), chosen_scored=mask(4))]


def plain_logps(lm: Any, pairs: list[TokenizedPair]) -> Tensor:
    """log p of each label, one forward per answer, of the chosen and then the rejected ones."""
    found = []
    for prompt, answer in [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]:
        labels = torch.from_numpy(answer[1:]).long()[None]
        logits = lm(input_ids=torch.from_numpy(prompt).long()[None], labels=labels).logits[0]
        found.append(logits.double().log_softmax(-1).gather(1, labels[0][:, None])[:, 0])
    return torch.cat(found)


def by_side(logps: Tensor, batch: Any) -> Tensor:
    """The log-probs of a pack in the order of `plain_logps`."""
    return logps[torch.argsort(batch.span_index, stable=True)]


def gradients(lm: torch.nn.Module, logps: Tensor) -> dict[str, Tensor]:
    """Of a sum in which every token has a weight of its own."""
    lm.zero_grad()
    (logps * torch.linspace(-1.0, 2.0, len(logps))).sum().backward()
    return {name: p.grad.double() for name, p in lm.named_parameters() if p.grad is not None}


def packed_of(lm: Any) -> model.PackedCausalLM:
    lm = copy.deepcopy(lm)
    lm.set_attn_implementation(PACKED)
    return model.PackedCausalLM(lm, "sdpa")


@pytest.mark.parametrize("checkpointing", [False, True, pytest.param("offload", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_a_pack_is_one_plain_forward_per_answer(name: str, checkpointing: Any) -> None:
    """log-probs and the gradient of every parameter to 1e-5 of its size; positions beyond the table's too (m2m_100)."""
    lm = tiny(name)
    pairs, packed = some_pairs(lm), packed_of(lm)
    lm = lm.double()
    lm.set_attn_implementation("eager")
    expected = plain_logps(lm, pairs)
    expected_gradients = gradients(lm, expected)
    trained = {name for name, p in lm.named_parameters() if p.requires_grad}
    assert set(expected_gradients) == trained, "every parameter takes part"

    section = ModelSection(name_or_path="x", dtype="float32", gradient_checkpointing=checkpointing)
    model.prepare_for_training(packed, section, with_collision=False)
    batch = collate(pairs, range(4), prefix_sharing=True, encoder_decoder=True)
    assert batch.prompts is not None
    assert len(batch.prompts.input_ids) == 13 + 2 + 9, "a prompt is read once for all its answers"
    tokens, routing = packed(batch)
    ours = by_side(tokens.logps, batch)
    assert routing is None
    assert ((ours - expected).abs() <= 1e-5 * expected.abs()).all()
    found = gradients(packed.lm, ours)
    assert found.keys() == expected_gradients.keys()
    scale = max(float(g.abs().max()) for g in expected_gradients.values())
    for key, gradient in expected_gradients.items():
        # A key's bias moves no softmax: its gradient is noise around 0, and the floor is for it.
        assert (found[key] - gradient).abs().max() <= 1e-5 * max(float(gradient.abs().max()), 1e-3 * scale), key


def test_a_pair_has_the_same_log_probs_alone_and_among_others() -> None:
    lm = tiny("t5")
    packed, pairs = packed_of(lm), some_pairs(lm)
    with torch.no_grad():
        batch = collate(pairs, range(4), prefix_sharing=True, encoder_decoder=True)
        together = by_side(packed(batch)[0].logps, batch)
        parts = [collate([pair], [0], prefix_sharing=True, encoder_decoder=True) for pair in pairs]
        each = [pair_of(packed(part)[0].logps, part) for part in parts]
    assert (together - torch.cat([one[side] for side in (0, 1) for one in each])).abs().max() <= 2e-6


def pair_of(logps: Tensor, batch: Any) -> list[Tensor]:
    return [logps[batch.span_index == side] for side in (0, 1)]


def test_a_filler_runs_every_module_and_has_no_gradient() -> None:
    packed = packed_of(tiny("bart"))
    tokens, _ = packed(collate([], [], prefix_sharing=True, encoder_decoder=True))
    assert tokens.logps.numel() == 0
    tokens.logps.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in packed.parameters())


@pytest.mark.parametrize("name", ["t5", "bart", "m2m_100"])
def test_without_a_pack_the_model_is_as_its_authors_wrote_it(name: str) -> None:
    """Generation, after packs were run."""
    lm = tiny(name)
    packed, prompt = packed_of(lm), torch.arange(5, 12)[None]
    packed(collate(some_pairs(lm), range(4), prefix_sharing=True, encoder_decoder=True))
    with torch.no_grad():
        expected = lm(input_ids=prompt, labels=prompt).logits
        packed.lm.set_attn_implementation("sdpa")
        assert torch.equal(packed.lm(input_ids=prompt, labels=prompt).logits, expected)


def test_log_probs_by_hand_are_those_of_plain_transformers(tmp_path: Path) -> None:
    """Of rows, by a tokenizer that was told of the model: its start token, and an end token behind each answer."""
    lm: Any = tiny_model(tiny_encoder_decoder("bart", save_tokenizer(tmp_path / "tokenizer")), seed=1)
    lm.save_pretrained(tmp_path / "model")
    packed = load_model(str(tmp_path / "model"), dtype="float32")
    tokenizer = read_as(packed, load_tokenizer(str(tmp_path / "tokenizer")))
    rows = [{"prompt": "ab cd", "chosen": "ef", "rejected": "ghij"}, {"prompt": "k", "chosen": "lmn", "rejected": "o"}]
    found = log_probs(packed, tokenize_pairs(rows, tokenizer), tokens_per_pack=10)
    for k, row in enumerate(rows):
        for side, ours in (("chosen", found.chosen), ("rejected", found.rejected)):
            labels = torch.tensor([[*tokenizer(row[side])["input_ids"], tokenizer.eos_token_id]])
            logits = lm(input_ids=torch.tensor([tokenizer(row["prompt"])["input_ids"]]), labels=labels).logits
            wanted = logits[0].log_softmax(-1).gather(1, labels[0][:, None]).sum()
            assert abs(float(wanted - ours[k])) <= 1e-4


def test_only_a_kernel_that_knows_a_bias_takes_one() -> None:
    batch = collate([], [], prefix_sharing=True, encoder_decoder=True)
    layer: Any = torch.nn.Module()
    layer.is_causal = True
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ConfigError, match=r"torch_varlen cannot do position_bias .*kernels that can: sdpa"):
        packed_attention(layer, q, q, q, None, position_bias=torch.zeros(2, 9), segments=Segments(batch, "torch_varlen"))
    assert [name for name, kernel in KERNELS.items() if "position_bias" in kernel.honours] == ["sdpa"]
