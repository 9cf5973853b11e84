"""Models that read one sequence per forward: which, what is said of them, and how many forwards they make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny, tiny_config
from tiny_families import plain_logps, small_config, small_pairs
from transformers import AutoConfig, PretrainedConfig

from dspref.config import DataSection, ModelSection
from dspref.data.batch import PackedBatch, collate
from dspref.errors import ConfigError
from dspref.model import adapters, admission, alone, by_hand, generation, loading
from dspref.model import packed as model
from dspref.model.generation import Style
from dspref.model.packed import PackedCausalLM

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.0] * 8, "short_factor": [1.0] * 8}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def why(config: PretrainedConfig, max_length: int | None = 64) -> str:
    return admission.why_alone(config, max_length) or ""


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen3_next", "its linear_attention layers take no boundaries"),
        ("jamba", "its linear_attention layers take no boundaries"),
        ("mamba2", "take no boundaries"),
        ("bloom", "its layers take no boundaries"),
        ("falcon", "its layers take no boundaries"),
        ("nemotron", "its attention is not told where sequences begin"),
        ("doge", "it makes an attention mask of its own"),
        ("llama", ""),
        ("gpt_oss", ""),
        ("gemma2", ""),
    ],
)
def test_which_models_read_one_sequence_at_a_time(family: str, reason: str) -> None:
    assert reason in why(AutoConfig.for_model(family))
    assert bool(reason) == bool(why(AutoConfig.for_model(family)))


def test_positions_that_depend_on_the_longest_sequence_do_so_beyond_a_length() -> None:
    llama = tiny_config("llama", rope_parameters=DYNAMIC, max_position_embeddings=64)
    phi = tiny_config("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=32)
    assert why(llama, 64) == "" and why(phi, 32) == ""
    assert why(llama, None) == "its dynamic positions depend on the longest sequence beyond 64 tokens"
    assert why(phi, 33) == "its longrope positions depend on the longest sequence beyond 32 tokens"
    section: Any = ModelSection(name_or_path="m", dtype="float32")
    assert admission.check(section, phi, 33, 0, "cpu") == alone.ALONE
    assert admission.check(section, phi, 32, 0, "cpu") == "sdpa"


def test_prompts_are_not_shared_and_who_asks_for_it_is_refused() -> None:
    train: Any = {"path": "pairs.jsonl"}
    config = AutoConfig.for_model("bloom")
    reason = why(config)
    assert alone.laid_out(DataSection(train=train), config, reason).prefix_sharing is False
    assert alone.laid_out(DataSection(train=train, prefix_sharing=True), config, None).prefix_sharing is True
    with pytest.raises(ConfigError, match=r"^data.prefix_sharing: true, but bloom is run one .*; drop the key$") as refusal:
        alone.laid_out(DataSection(train=train, prefix_sharing=True), config, reason)
    assert "\n" not in str(refusal.value)


def load(folder: Path, family: str, max_length: int | None = None, **overrides: Any) -> tuple[Any, PackedCausalLM]:
    """(transformers' model, ours) with the same weights."""
    lm = save_tiny(folder, small_config(family, **overrides), seed=1)
    section: Any = ModelSection(name_or_path=str(folder), dtype="float32", gradient_checkpointing=family != "mamba2")
    kernel = admission.check(section, loading.load_config(section), max_length, 0, "cpu")
    assert kernel == alone.ALONE
    packed = loading.load(section, str(folder), kernel, "float32", None)
    return lm, model.prepare_for_training(packed, section, with_collision=False)


def forwards_of(packed: PackedCausalLM, batch: PackedBatch) -> tuple[list[int], Any]:
    """How many tokens each forward of the backbone reads, and what comes of the pack."""
    seen: list[int] = []
    backbone = admission.backbone_of(packed.lm)
    with backbone.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    ):
        return seen, packed(batch)[0]


@pytest.mark.parametrize("family", ["stablelm", "qwen3_5_text"])
def test_every_rank_makes_as_many_forwards(family: str, tmp_path: Path) -> None:
    """With gradient checkpointing; fillers change no log-prob, and their gradient is 0."""
    lm, packed = load(tmp_path, family)
    pairs = small_pairs()
    batch = collate(pairs, range(2), prefix_sharing=False)
    expected, found = plain_logps(lm, pairs), []
    for count in (1, 4, 6):
        seen, tokens = forwards_of(packed, replace(batch, sequences=count))
        assert seen == [16, 24, 11, 4] + [4] * (count - 4)
        torch.testing.assert_close(tokens.logps.double(), expected, rtol=0, atol=5e-6)
        packed.zero_grad()
        tokens.logps.sum().backward()
        found.append({name: p.grad.clone() for name, p in packed.named_parameters() if p.grad is not None})
    assert all(torch.equal(gradient, found[0][name]) for name, gradient in found[2].items())
    seen, tokens = forwards_of(packed, replace(collate([], [], prefix_sharing=False), sequences=3))
    assert seen == [4] * 3 and len(tokens.logps) == 0


def test_a_pack_that_shares_prompts_is_read_whole_all_the_same(tmp_path: Path) -> None:
    """As a reference has it, whose policy shares them."""
    lm, packed = load(tmp_path, "jamba")
    pairs = small_pairs()
    seen, tokens = forwards_of(packed, collate(pairs, range(2), prefix_sharing=True))
    assert seen == [16, 24, 11, 4]
    torch.testing.assert_close(tokens.logps.double(), plain_logps(lm, pairs), rtol=0, atol=5e-6)


def test_log_probs_by_hand(tmp_path: Path) -> None:
    pairs = small_pairs()
    lm = save_tiny(tmp_path, small_config("bloom"), seed=1)
    found = by_hand.log_probs(by_hand.load_model(str(tmp_path), "float32"), pairs, tokens_per_pack=20)
    sums = [part.sum() for part in plain_logps(lm, pairs).split([5, 13, 9, 2])]
    torch.testing.assert_close(found.chosen.double(), torch.stack(sums[::2]), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.rejected.double(), torch.stack(sums[1::2]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["mamba2", "jamba"])
def test_adapters_leave_out_what_kernels_of_mamba_read_past_them(family: str) -> None:
    section = ModelSection.model_validate({"name_or_path": "m", "dtype": "float32", "lora": {"r": 2}})
    lm = admission.build_skeleton(section, small_config(family))
    adapters.try_on(lm, section)
    adapted = {name.rpartition(".")[2] for name, part in lm.named_modules() if hasattr(part, "lora_A")}
    assert "in_proj" in adapted and "out_proj" not in adapted


@pytest.mark.parametrize("family", ["bloom", "mamba2", "qwen3_next"])
def test_answers_are_those_of_one_sequence_after_the_other(family: str, tmp_path: Path) -> None:
    """Prompts of unequal lengths side by side: no padding is seen."""
    lm, packed = load(tmp_path, family)
    packed = packed.eval()
    with torch.no_grad():
        for parameter in (*lm.parameters(), *packed.lm.parameters()):
            parameter *= 6 if parameter.dim() > 1 else 1
    prompts = [pair.prompt.tolist() + pair.chosen.tolist() for pair in small_pairs()] + [[5]]
    with generation.plain_attention(packed.lm):
        found = generation.generate(packed, prompts, Style(12), torch.device("cpu"))
    for prompt, answer in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(lm(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer == ids[len(prompt) :]
    assert len({token for answer in found for token in answer}) > 2
