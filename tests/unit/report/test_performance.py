"""Operations are those that a real model executes; time goes to the phase it was spent in."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_batch import grouped_pairs
from tiny import tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from dspref.data.batch import collate
from dspref.data.loader import Step
from dspref.data.plan import group
from dspref.model import attention
from dspref.model.packed import PackedCausalLM
from dspref.report.performance import Account, Clock, ModelSize, Work, medians, number_in, peak_flops, peak_of, size_of

CPU = torch.device("cpu")


def packed(family: str, **overrides: Any) -> PackedCausalLM:
    lm = tiny_model(tiny_config(family, 1000, **overrides), seed=1)
    lm.config._attn_implementation = attention.PACKED
    return PackedCausalLM(lm, "sdpa")


FAMILIES = {"qwen2": {}, "llama": {"tie_word_embeddings": True}, "qwen3": {"head_dim": 32}}


@pytest.mark.parametrize("family", FAMILIES)
def test_counted_operations_are_those_that_torch_counts(family) -> None:
    """Forward and backward of a real pack with shared prompts, against torch's own counter, without attention: torch counts
    that in full squares, here it is causal."""
    model = packed(family, **FAMILIES[family])
    pairs = grouped_pairs(8)
    batch = collate(pairs, range(len(pairs)), prefix_sharing=True)
    with FlopCounterMode(display=False) as counter:
        tokens, _ = model(batch)
        of_forward = products(counter)
        tokens.logps.sum().backward()
    size, work = size_of(model), Work(len(batch.input_ids), len(batch.targets), 0)
    assert size.forward(work) == of_forward
    assert size.backward(work) == products(counter) - of_forward


def products(counter: FlopCounterMode) -> int:
    """But those of attention, and of rotary positions, which older transformers have as products of matrices."""
    counts = counter.get_flop_counts()
    rotary = sum(sum(ops.values()) for module, ops in counts.items() if module.endswith(".rotary_emb"))
    return sum(count for op, count in counts["Global"].items() if "attention" not in str(op)) - rotary


def test_frozen_weights_cost_no_weight_gradient_and_nothing_below_the_lowest_that_is_trained() -> None:
    model, work = packed("llama"), Work(100, 50, 0)
    whole = size_of(model)
    model.requires_grad_(False)
    assert size_of(model).forward(work) == whole.forward(work) and size_of(model).backward(work) == 0
    model.lm.get_input_embeddings().requires_grad_(True)
    frozen = size_of(model)
    assert frozen.backward(work) == whole.forward(work) == whole.backward(work) / 2
    model.requires_grad_(False).lm.model.layers[1].requires_grad_(True)
    half = size_of(model)
    assert half.backward(work) == 2 * whole.body * 100 + 2 * whole.head * 50


def test_a_token_meets_only_its_experts() -> None:
    few, many = (
        size_of(packed("qwen3_moe", num_experts=n, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1))
        for n in (4, 8)
    )
    router = 2 * 64 * 4  # two layers, four more outputs
    assert many.body - few.body == router


def test_a_config_may_name_things_otherwise() -> None:
    text = SimpleNamespace(n_routed_experts=8, intermediate_size=[10, 30], head_dim=None, hidden_size=64)
    assert number_in(text, "num_experts", "n_routed_experts", default=1) == 8
    assert number_in(text, "intermediate_size", default=1) == 20
    assert number_in(text, "head_dim", default=16) == number_in(text, "absent", default=16) == 16


def test_attention_is_counted_causally() -> None:
    """One sequence of n tokens: n (n + 1) / 2 scores, each 4 operations per channel; a shared prompt once."""
    pairs = grouped_pairs(3)
    same = [[hash((*p.prompt,)), hash((*p.prompt, -1, *p.chosen)), hash((*p.prompt, -1, *p.rejected))] for p in pairs]
    lengths = [[len(part) for part in pair[:3]] for pair in pairs]
    _, numbers = torch.unique(torch.tensor(same), return_inverse=True)
    groups = group(numbers.numpy(), torch.tensor(lengths).numpy(), 10**6)
    batch = collate(pairs, range(len(pairs)), prefix_sharing=True)
    scores = 0
    for q, k in zip(batch.cu_seqlens_q.diff().tolist(), batch.cu_seqlens_k.diff().tolist()):
        scores += sum(k - q + i + 1 for i in range(q))
    assert groups.attention.sum() == scores
    assert groups.tokens.sum() == len(batch.input_ids)
    size = ModelSize.of_text(0, 0, 0, 0, channels=128)
    assert size.forward(Work(0, 0, scores)) == 4 * 128 * scores
    assert size.backward(Work(0, 0, scores)) == 8 * 128 * scores


def step() -> Step:
    counts = {"pairs": 4, "chosen_tokens": 300, "rejected_tokens": 100, "chosen_and_prompt_tokens": 350, "tokens": 600}
    return Step(2, 0.5, 1, (), counts, 0.5, computed_tokens=500, attention_pairs=1000, scored_tokens=400)


def test_what_is_executed_adds_recomputation_and_reference() -> None:
    size = ModelSize.of_text(body=1000, head=10, trained_body=1000, trained_head=10, channels=7)
    plain = Account(size, None, False, CPU, "bfloat16")
    all_of_it = Account(size, size, True, CPU, "bfloat16")
    forward = 2 * (1000 * 500 + 10 * 400) + 4 * 7 * 1000
    assert plain.flops(step()) == (3 * forward, 3 * forward)
    assert all_of_it.flops(step()) == (3 * forward, 3 * forward + (forward - 2 * 10 * 400) + forward)
    # 400 tokens of a vocabulary of a million are not kept; a first pass is for steps of several packs.
    large = replace(plain, vocabulary=10**6, looks_ahead=True)
    assert large.flops(step()) == (3 * forward, 3 * forward + 2 * 10 * 400)
    assert large.flops(replace(step(), num_packs=2))[1] == 3 * forward + 2 * 10 * 400 + forward


def test_rates_are_of_the_whole_step() -> None:
    seconds = {"data": 0.0, "forward": 0.5, "reference": 0.0, "backward": 1.0, "update": 0.5, "total": 2.0, "cpu": 1.5}
    record = Account(ModelSize.of_text(1, 1, 1, 1, 1), None, False, CPU, "float32").record(step(), seconds)
    assert record["perf/pairs_per_second"] == 2 and record["perf/tokens_per_second"] == 300
    assert record["perf/response_tokens_per_second"] == 200 and record["perf/computed_tokens_per_second"] == 250
    assert record["perf/backward_seconds"] == 1 and record["perf/cpu_seconds"] == 1.5
    assert "perf/mfu" not in record, "nobody knows a CPU's peak"
    assert 0.01 < record["perf/memory_gib"] < 100


def test_time_goes_to_its_phase() -> None:
    clock = Clock(CPU)
    for phase, pause in (("data", 0.0), ("forward", 0.05), ("backward", 0.02), ("forward", 0.05)):
        clock.begin(phase)
        time.sleep(pause)
    clock.begin("")
    found = clock.read()
    assert found["forward"] >= 0.1 and found["backward"] >= 0.02 and found["reference"] == 0
    assert found["total"] == pytest.approx(found["data"] + found["forward"] + found["backward"])
    assert found["cpu"] < found["total"]


def test_medians_leave_the_first_step_out() -> None:
    lines = [{"step": n, "perf/seconds": s} for n, s in ((1, 100.0), (2, 1.0), (3, 3.0), (4, 2.0))]
    assert medians(lines) == {"seconds": 2.0}
    assert medians(lines[:1]) == {"seconds": 100.0} and medians([]) == {}


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 NVL", 835), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA GH200 480GB", 989), ("NVIDIA GB200", 2500), ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121), ("NVIDIA A10G", 70), ("AMD Instinct MI300X", 1307), ("NVIDIA RTX A6000", 155),
        ("NVIDIA RTX A1000", None), ("NVIDIA RTX A4000", None), ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla V100-SXM2-32GB", None),
    ],
)  # fmt: skip
def test_a_peak_is_that_of_the_device_or_unknown(name: str, tflops: int | None) -> None:
    assert peak_of(name) == (tflops and tflops * 1e12)
    assert peak_flops(CPU, "bfloat16") is None
