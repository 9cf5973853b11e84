"""The packed forward against one plain transformers forward per sequence, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_tiny, tiny_config, tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from dspref.config import ModelSection
from dspref.data.batch import PackedBatch, collate
from dspref.data.truncate import TokenizedPair
from dspref.errors import ConfigError, EnvironmentFault, UserError
from dspref.model import admission, attention, loading
from dspref.model import packed as model
from dspref.model.attention import PACKED, Segments, packed_attention
from dspref.model.packed import PackedCausalLM
from dspref.model.sdpa import AT_ONCE, Options, calls_of, causal_mask, sdpa

# Each row is a way in which families differ: biases, learnt positions, q/k norms, windows, what happens to the logits.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2 window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {},
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "gpt2": {},
    "gemma2": {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": 3.0,
        "sliding_window": 8,
        "query_pre_attn_scalar": 9,
    },
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


def config_of(family: str) -> PretrainedConfig:
    config = tiny_config(family.split()[0], **FAMILIES[family])
    if family == "qwen2 window":
        assert config.layer_types == ["full_attention", "sliding_attention"]
    return config


def some_pairs(count: int = 3, seed: int = 0) -> list[TokenizedPair]:
    """Sequences of 4 to 34 tokens: windows of 8 are crossed within prompts, within answers and between them."""
    draws = np.random.default_rng(seed)
    lengths = [(13, 5, 21), (2, 17, 2), (9, 1, 12)][:count]
    return [TokenizedPair(*(draws.integers(0, 256, n).astype(np.int32) for n in part)) for part in lengths]


def plain_logps(lm: torch.nn.Module, pairs: list[TokenizedPair]) -> Tensor:
    """log p of each answer token: one forward per sequence, no packing, full softmax."""
    results = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(np.concatenate([pair.prompt, answer])).long()
            logits = lm(input_ids=ids[None], use_cache=False).logits[0].float()
            results += [logits[t - 1].log_softmax(-1)[ids[t]] for t in range(len(pair.prompt), len(ids))]
    return torch.stack(results)


def gradients(lm: torch.nn.Module, logps: Tensor) -> dict[str, Tensor]:
    """Of a sum in which every token has a weight of its own."""
    lm.zero_grad()
    (logps * torch.linspace(-1.0, 2.0, len(logps))).sum().backward()
    return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_forward_is_one_plain_forward_per_sequence(family: str, tmp_path: Path) -> None:
    """In both layouts: log-probs to 2e-6, gradients of every parameter to 1e-5."""
    lm = save_tiny(tmp_path, config_of(family), seed=1)
    lm.set_attn_implementation("eager")
    pairs = some_pairs()
    expected = plain_logps(lm, pairs)
    expected_gradients = gradients(lm, expected)
    scale = max(float(g.abs().max()) for g in expected_gradients.values())
    assert set(expected_gradients) == {name for name, _ in lm.named_parameters()}

    section = ModelSection(name_or_path=str(tmp_path), dtype="float32")
    packed = loading.load(section, str(tmp_path), "sdpa", "float32", zero3=None)
    for sharing in (False, True):
        ours, routing = packed(collate(pairs, range(len(pairs)), prefix_sharing=sharing))
        assert routing is None, "the router loss is for a policy that was prepared for training"
        assert (ours.logps - expected).abs().max() <= 2e-6
        assert ours.mean_logits.shape == ours.logps.shape
        assert ours.collision is None
        our_gradients = gradients(packed.lm, ours.logps)
        assert our_gradients.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            # A key's bias moves no softmax: its gradient is noise around 0, and the floor is for it.
            tolerance = 1e-5 * max(float(gradient.abs().max()), 1e-3 * scale)
            assert (our_gradients[name] - gradient).abs().max() <= tolerance, (name, sharing)


def test_sequences_are_long_enough_to_cross_the_windows() -> None:
    """The test above would say nothing about windows otherwise."""
    narrow, wide = (tiny_model(tiny_config("mistral", sliding_window=w), seed=1) for w in (8, None))
    with torch.no_grad():
        assert (plain_logps(narrow, some_pairs()) - plain_logps(wide, some_pairs())).abs().max() > 1e-3


YARN = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}}


@pytest.mark.parametrize(("family", "overrides"), [("llama", {}), ("llama", YARN), ("gemma2", {})])
def test_what_no_file_holds_is_put_into_shards_as_a_whole_model_has_it(family, overrides, tmp_path) -> None:
    """In bf16 the frequencies of positions are fp32. `test_half_precision_follows_fp32` has the shards."""
    config = (
        AutoConfig.for_model("gpt2", n_layer=2, n_embd=64, n_head=4)
        if family == "gpt2"
        else tiny_config(family, **overrides)
    )
    save_tiny(tmp_path, config, seed=1)
    section = ModelSection(name_or_path=str(tmp_path), dtype="bfloat16")
    whole = loading.load(section, str(tmp_path), "sdpa", "bfloat16", zero3=None).lm
    computed = loading._computed_buffers(section, loading.load_config(section), "bfloat16")
    assert computed.keys() == {name for name, _ in whole.named_non_persistent_buffers()}
    for name, buffer in computed.items():
        assert buffer.dtype == whole.get_buffer(name).dtype and torch.equal(buffer, whole.get_buffer(name)), name
        assert buffer.dtype == torch.float32 or not name.endswith("inv_freq")


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    """The layout of the pack reaches attention in the recomputation too."""
    save_tiny(tmp_path, tiny_config("qwen2"), seed=1)
    batch = collate(some_pairs(), range(3), prefix_sharing=True)
    results = []
    for checkpointing in (False, True):
        section = ModelSection(name_or_path=str(tmp_path), dtype="float32", gradient_checkpointing=checkpointing)
        packed = loading.load(section, str(tmp_path), "sdpa", "float32", zero3=None)
        packed = model.prepare_for_training(packed, section, with_collision=False)
        assert {layer.gradient_checkpointing for layer in packed.lm.base_model.layers} == {checkpointing}
        (logps, *_), _ = packed(batch)
        results.append((logps.detach(), gradients(packed.lm, logps)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-9)


def test_collision_entropies_come_with_the_policy_that_was_asked_for_them(tmp_path: Path) -> None:
    """Those of its own distribution at each scored token; its log-probs stay what they were."""
    lm = save_tiny(tmp_path, tiny_config("qwen2"), seed=1)
    section = ModelSection(name_or_path=str(tmp_path), dtype="float32")
    batch, given = collate(some_pairs(1), [0], prefix_sharing=False), {}
    for asked in (False, True):
        packed = loading.load(section, str(tmp_path), "sdpa", "float32", zero3=None)
        given[asked], _ = model.prepare_for_training(packed, section, with_collision=asked)(batch)
    assert given[False].collision is None
    assert torch.equal(given[True].logps, given[False].logps)
    pair = some_pairs(1)[0]
    ids = torch.from_numpy(np.concatenate([pair.prompt, pair.chosen])).long()
    with torch.no_grad():
        chances = lm(input_ids=ids[None]).logits[0, len(pair.prompt) - 1 : -1].softmax(dim=-1)
    torch.testing.assert_close(given[True].collision[: len(pair.chosen)], -chances.square().sum(dim=-1).log())


def test_who_shares_a_pack_changes_nothing(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("qwen2"), seed=1)
    packed = loading.load(ModelSection(name_or_path=str(tmp_path), dtype="float32"), str(tmp_path), "sdpa", "float32", None)
    pairs = some_pairs()
    with torch.no_grad():
        together, _ = packed(collate(pairs, range(3), prefix_sharing=True))
        alone = torch.cat([packed(collate([pair], [0], prefix_sharing=True))[0].logps for pair in pairs])
    assert (together.logps - alone).abs().max() <= 2e-6


def test_a_filler_pack_gives_zero_gradients_to_every_parameter(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("qwen2"), seed=1)
    packed = loading.load(ModelSection(name_or_path=str(tmp_path), dtype="float32"), str(tmp_path), "sdpa", "float32", None)
    (logps, *_), _ = packed(collate([], [], prefix_sharing=True))
    assert logps.shape == (0,)
    logps.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in packed.lm.parameters())


def test_dropout_is_off_unless_asked_for(tmp_path: Path) -> None:
    """gpt2 has its rates under other names; the config that an export writes keeps them."""
    rates = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    save_tiny(tmp_path, tiny_config("gpt2", **rates), seed=1)
    batch, spread = collate(some_pairs(), range(3), prefix_sharing=True), {}
    for disable in (True, False):
        section = ModelSection(name_or_path=str(tmp_path), dtype="float32", disable_dropout=disable)
        packed = loading.load(section, str(tmp_path), "sdpa", "float32", None).train()
        assert packed.published_config.attn_pdrop == 0.3
        with torch.no_grad():
            spread[disable] = (packed(batch)[0].logps - packed(batch)[0].logps).abs().max().item()
    assert spread[True] == 0.0
    assert spread[False] > 0.01


# --------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (2, 7), (4, 5)])
def test_causal_mask_entry_by_entry(queries: int, keys: int, window: int | None) -> None:
    mask = causal_mask(queries, keys, window, torch.device("cpu"))
    assert mask.shape == (queries, keys)
    for i in range(queries):
        position = keys - queries + i  # the last query is the last key
        for j in range(keys):
            assert mask[i, j].item() == (j <= position and (window is None or position - j < window))


@pytest.mark.parametrize("window", [None, 4, 25])  # 25: beyond any run of queries, within prompt + rejected
@pytest.mark.parametrize("sharing", [False, True])
def test_sdpa_kernel_against_softmax_query_by_query(sharing: bool, window: int | None) -> None:
    """With grouped heads (4 on 2) and a scale of its own."""
    batch = collate(some_pairs(), range(3), prefix_sharing=sharing)
    tokens, draws = len(batch.input_ids), torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, tokens, 8, generator=draws) for heads in (4, 2, 2))
    output, weights = packed_attention(
        torch.nn.Identity(),
        query,
        key,
        value,
        None,
        scaling=0.2,
        sliding_window=window,
        segments=Segments(batch, "sdpa"),
    )
    assert weights is None
    assert output.shape == (1, tokens, 4, 8)
    gather = range(tokens) if batch.kv_index is None else batch.kv_index.tolist()
    q_bounds, k_bounds = batch.cu_seqlens_q.tolist(), batch.cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(q_bounds, q_bounds[1:], k_bounds, k_bounds[1:]):
        for t in range(q0, q1):
            seen = list(gather)[k0 : k1 - (q1 - 1 - t)][-(window or tokens) :]
            for h in range(4):
                scores = torch.tensor([0.2 * float(query[0, h, t] @ key[0, h // 2, s]) for s in seen]).softmax(0)
                expected = sum(p * value[0, h // 2, s] for p, s in zip(scores, seen))
                torch.testing.assert_close(output[0, t, h], expected, rtol=1e-5, atol=1e-6)


def test_sdpa_kernel_with_softcap_and_sinks_query_by_query() -> None:
    """c tanh(score / c), and a column of the softmax without a value."""
    batch = collate(some_pairs(), range(3), prefix_sharing=True)
    tokens, draws = len(batch.input_ids), torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, tokens, 8, generator=draws) for heads in (4, 2, 2))
    sinks = torch.tensor([0.0, 1.0, -1.0, 2.0])
    output = call_of(query, key, value, batch, softcap=0.5, s_aux=sinks)
    bounds = zip(
        *(x.tolist() for x in (batch.cu_seqlens_q, batch.cu_seqlens_q[1:], batch.cu_seqlens_k, batch.cu_seqlens_k[1:]))
    )
    assert batch.kv_index is not None
    for q0, q1, k0, k1 in bounds:
        for t in range(q0, q1):
            seen = batch.kv_index.tolist()[k0 : k1 - (q1 - 1 - t)]
            for h in range(4):
                scores = torch.stack([0.5 * torch.tanh(0.2 * query[0, h, t] @ key[0, h // 2, s] / 0.5) for s in seen])
                shares = torch.cat([scores, sinks[h : h + 1]]).softmax(0)
                expected = sum(p * value[0, h // 2, s] for p, s in zip(shares, seen))
                torch.testing.assert_close(output[0, t, h], expected, rtol=1e-5, atol=1e-6)


def call_of(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, **options: Any) -> Tensor:
    segments = Segments(batch, "sdpa")
    return packed_attention(torch.nn.Identity(), query, key, value, None, scaling=0.2, segments=segments, **options)[0]


SHORT, ONE_LONG = ([5, 13, 1, 8], [5, 13, 1, 8]), ([5, 1, 3000, 8, 1500], [5, 1, 3000, 8, 1500])
SHARED = ([5, 3, 1, 8], [5, 20, 9, 8])  # answers behind a prompt of others


@pytest.mark.parametrize("more", ["", "biased", "softcap and sinks"])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 4), (False, None)])
@pytest.mark.parametrize("lengths", [SHORT, SHARED, ONE_LONG], ids=["short", "shared", "one long"])
def test_segments_side_by_side_are_each_by_itself(lengths: Any, causal: bool, window: int | None, more: str) -> None:
    """As GPUs compute them, and where long ones are in blocks of queries: outputs, and gradients of all that goes in, padded
    rows or not."""
    if lengths is ONE_LONG and (more or window):
        pytest.skip("says no more than the short ones, in much more time")
    draws, found, cpu = torch.Generator().manual_seed(0), [], torch.device("cpu")
    q, k, v = (torch.randn(sum(lengths[i]), 2, 4, generator=draws, dtype=torch.float64) for i in (0, 1, 1))
    bias, softcap, sinks = None, None, None
    if more == "biased":
        bias = torch.randn(2, 2 * max(lengths[1]) + 1, generator=draws, dtype=torch.float64)
    elif more:
        softcap, sinks = 0.7, torch.randn(2, generator=draws, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, bias, sinks) if x is not None]
    for side_by_side, at_once in ((False, AT_ONCE), (True, AT_ONCE), (False, 70)):
        calls = calls_of(*lengths, cpu, side_by_side)
        output = sdpa(q, k, v, calls, causal, Options(0.5, 0.0, window, softcap, bias, sinks), at_once)
        slope = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view_as(output)
        found.append([output, *torch.autograd.grad(output, inputs, slope)])
        assert len(calls.rows) == (len(lengths[0]) if not side_by_side else 3 if lengths is ONE_LONG else 1)
    each, *others = found
    for other in others:
        for one, same in zip(each, other, strict=True):
            torch.testing.assert_close(same, one, rtol=1e-9, atol=1e-11)


def call(kernel: str = "sdpa", batch: PackedBatch | None = None, **options: Any) -> Tensor:
    batch = batch or collate(some_pairs(1), [0], prefix_sharing=False)
    query = torch.ones(1, 2, len(batch.input_ids), 8)
    given: dict[str, Any] = {"attention_mask": None, "segments": Segments(batch, kernel)} | options
    return packed_attention(torch.nn.Identity(), query, query, query, **given)[0]


@pytest.mark.parametrize(
    ("kernel", "options", "named"),
    [
        ("sdpa", {"segments": None}, "Identity"),
        ("sdpa", {"attention_mask": torch.ones(1, 1, 18, 18)}, "attention_mask"),
        ("flash_attention_2", {"s_aux": torch.zeros(2)}, "flash_attention_2 cannot do sinks.*sdpa"),
        ("torch_varlen", {"softcap": 50.0}, "torch_varlen cannot do softcap"),
        ("torch_varlen", {"dropout": 0.1}, "torch_varlen cannot do dropout.*sdpa"),
        ("flash_attention_3", {"dropout": 0.1}, "flash_attention_3 cannot do dropout"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused_by_name(kernel: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises((ValueError, UserError), match=named) as refusal:
        call(kernel, **options)
    assert "\n" not in str(refusal.value)


def test_a_window_that_no_segment_reaches_is_no_window() -> None:
    batch = collate(some_pairs(), range(3), prefix_sharing=True)
    assert torch.equal(call(batch=batch, sliding_window=batch.max_seqlen_k), call(batch=batch))


def test_every_kernel_that_runs_here_honours_what_it_says() -> None:
    assert attention.available("cpu") == ["sdpa"]
    assert set(attention.KERNELS) >= {"sdpa", "torch_varlen", "flash_attention_2", "flash_attention_3"}
    options = {field for field in Options.__dataclass_fields__ if field != "scale"}
    assert all(row.honours <= options for row in attention.KERNELS.values())


# ------------------------------------------------------------------------------------------------ what is refused


def check(
    config: PretrainedConfig, max_length: int | None = 64, vocabulary: int = 256, device: str = "cpu", **keys: Any
) -> str:
    section = ModelSection(**{"name_or_path": "somewhere", "dtype": "float32"} | keys)
    return admission.check(section, config, max_length, vocabulary, device)


def test_a_model_that_fits_is_let_through() -> None:
    for family in FAMILIES:
        assert check(config_of(family)) == "sdpa"
        assert check(config_of(family), router_aux_loss_coef=0.0) == "sdpa"
    assert check(config_of("qwen3_moe"), router_aux_loss_coef=0.1) == "sdpa"
    assert check(tiny_config("qwen2", max_position_embeddings=64), max_length=64, vocabulary=256) == "sdpa"
    assert check(tiny_config("qwen2"), max_length=None) == "sdpa"


@pytest.mark.parametrize(
    ("family", "overrides", "arguments", "named"),
    [
        ("qwen2", {}, {"vocabulary": 257}, "model.tokenizer_name_or_path: token id 256 .*vocabulary of 256"),
        ("qwen2", {"max_position_embeddings": 32}, {"max_length": 33}, "data.max_length: 33 .*32 positions"),
        ("gpt2", {"max_position_embeddings": 32}, {"max_length": 33}, "data.max_length: 33 .*32 positions"),
        ("qwen2", {}, {"router_aux_loss_coef": 0.1}, "model.router_aux_loss_coef: qwen2 has no router.*remove the key"),
        (
            "qwen3_next",
            {},
            {"attn_implementation": "torch_varlen", "device": "cuda", "router_aux_loss_coef": 0.0},
            "model.attn_implementation: torch_varlen, but qwen3_next is run one sequence at a time, as its linear_att",
        ),
        (
            "gemma2",
            {"attn_logit_softcapping": 50.0},
            {"attn_implementation": "torch_varlen", "device": "cuda"},
            "model.attn_implementation: .*torch_varlen cannot do softcap",
        ),
        (
            "llama",
            {"attention_dropout": 0.1},
            {"attn_implementation": "torch_varlen", "disable_dropout": False, "device": "cuda"},
            "model.attn_implementation: .*torch_varlen cannot do dropout",
        ),
        (
            "gpt2",
            {"attn_pdrop": 0.1},
            {"attn_implementation": "torch_varlen", "disable_dropout": False, "device": "cuda"},
            "model.attn_implementation: .*torch_varlen cannot do dropout",
        ),
    ],
)
def test_check_refuses_in_one_line(family: str, overrides: dict[str, Any], arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as refusal:
        check(tiny_config(family, **overrides), **arguments)
    assert "\n" not in str(refusal.value)


def test_a_kernel_that_is_not_here_is_refused_with_those_that_are() -> None:
    with pytest.raises(EnvironmentFault, match=r"torch_varlen is not available here \(cpu\).*sdpa"):
        check(tiny_config("qwen2"), attn_implementation="torch_varlen")


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bert", "is an encoder, and no causal language model"),
        ("roberta", "is an encoder"),
        ("bert-generation", "after its backbone"),
    ],
)
def test_check_refuses_families_with_layers_between_backbone_and_head(model_type: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check(AutoConfig.for_model(model_type), vocabulary=100)


@pytest.mark.parametrize("model_type", ["bloom", "codegen"])
def test_no_forward_lets_sequences_see_each_other(model_type: str) -> None:
    """Whatever passed `check`: a model that is not packed exactly must raise, never answer."""
    sizes = {"hidden_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 256}
    known = AutoConfig.for_model(model_type)
    config = AutoConfig.for_model(model_type, **{k: v for k, v in sizes.items() if hasattr(known, k)})
    packed = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=PACKED).eval()
    batch = collate(some_pairs(), range(3), prefix_sharing=False)
    with pytest.raises((ValueError, UserError)), torch.no_grad():
        PackedCausalLM(packed, "sdpa")(batch)
