"""Encoder-decoder and vision-language models on a GPU: `pytest -m gpu`. Nothing is downloaded."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_encoder_decoder as apart
import torch
import vision_oracle as sight
from tiny import tiny_encoder_decoder, tiny_model
from tiny_vision import tiny_vision_config, tiny_vision_model

from dspref.data.batch import Layout, collate
from dspref.model import attention, packed, vision

CUDA = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize(
    ("queries", "keys"), [([5, 130, 1, 64], None), ([3, 1, 200], [90, 257, 1])], ids=["own", "of answers"]
)
@pytest.mark.parametrize("kernel", [name for name in attention.KERNELS if name != "sdpa"])
def test_prompts_are_read_in_both_directions(
    kernel: str, queries: list[int], keys: list[int] | None, device: str = CUDA
) -> None:
    """Output and gradients of what sees all keys of its segment, against float64."""
    if kernel not in attention.available(device):
        pytest.skip(f"{kernel} is not installed here")
    keys, draws = keys or queries, torch.Generator().manual_seed(0)
    q, slope = (torch.randn(sum(queries), 6, 64, generator=draws).bfloat16() for _ in range(2))
    k, v = (torch.randn(sum(keys), 6, 64, generator=draws).bfloat16() for _ in range(2))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = torch.cat(
        [
            torch.einsum("hqk,khd->qhd", (torch.einsum("qhd,khd->hqk", own, seen) / 8).softmax(-1), values)
            for own, seen, values in zip(exact[0].split(queries), exact[1].split(keys), exact[2].split(keys))
        ]
    )
    bounds = (torch.tensor([0, *counts]).cumsum(0).int().to(device) for counts in (queries, keys))
    segments = attention.Segments(Layout(*bounds, None, max(queries), max(keys)), kernel, causal=False)
    own = [x.to(device).requires_grad_() for x in (q, k, v)]
    heads = (x.transpose(0, 1)[None] for x in own)
    found = attention.packed_attention(torch.nn.Identity(), *heads, None, segments=segments)[0][0]
    grads = torch.autograd.grad(found, own, slope.to(device))
    for ours, theirs in zip([found, *grads], [expected, *torch.autograd.grad(expected, exact, slope.double())], strict=True):
        assert (ours.detach().double().cpu() - theirs).norm() <= 2e-2 * theirs.norm()


def half(lm: Any, implementation: Any, kernel: str, device: str) -> packed.PackedCausalLM:
    lm = copy.deepcopy(lm).to(device, torch.bfloat16)
    lm.set_attn_implementation(implementation)
    return packed.PackedCausalLM(lm, kernel)  # type: ignore[arg-type]


def assert_follows(found: torch.Tensor, exact: torch.Tensor) -> None:
    """bf16 after fp32: no token far off, and none in the mean."""
    found = found.detach().float().cpu()
    assert (found - exact).abs().max() <= 0.15 and (found - exact).mean().abs() <= 0.02


@pytest.mark.parametrize("kernel", ["torch_varlen", "sdpa"])
@pytest.mark.parametrize("name", apart.MODELS)
def test_encoder_decoder_models_in_bf16(name: str, kernel: str, device: str = CUDA) -> None:
    """Log-probs of packs against plain forwards in fp32, and the size of every gradient."""
    if kernel == "torch_varlen" and "t5" in name:
        pytest.skip("T5 adds a bias to its scores, which only sdpa takes")
    kind = name.split()[0]
    lm: Any = tiny_model(tiny_encoder_decoder(kind, **apart.MODELS[name], d_model=64), seed=1)
    pairs = apart.some_pairs(lm)
    expected = apart.plain_logps(lm, pairs).float()
    exact = apart.gradients(lm, expected)
    model = half(lm, attention.PACKED, kernel, device)
    batch = collate(pairs, range(len(pairs)), prefix_sharing=True, encoder_decoder=True).to(device)
    logps = apart.by_side(model(batch)[0].logps, batch)
    assert_follows(logps, expected.detach())
    model.zero_grad()
    (logps * torch.linspace(-1.0, 2.0, len(logps), device=device)).sum().backward()
    whole = sum(float(gradient.norm()) ** 2 for gradient in exact.values()) ** 0.5
    off = sum(
        float((parameter.grad.double().cpu() - exact[name]).norm()) ** 2
        for name, parameter in model.lm.named_parameters()
        if parameter.grad is not None and name in exact
    )
    assert off**0.5 <= 0.1 * whole


@pytest.mark.parametrize("kind", vision.FAMILIES)
def test_vision_language_models_in_bf16(kind: str, device: str = CUDA) -> None:
    """Shared prompts with images, the tower in its own attention."""
    lm = tiny_vision_model(tiny_vision_config(kind), seed=1)
    rows = sight.some_rows(lm)
    with torch.no_grad():
        expected = sight.plain_logps(lm, rows)
    batch = sight.packed_rows(lm, rows, True).to(device)
    kernel = attention.available(device)[0]
    model = half(lm, vision.implementations(lm.config), kernel, device)
    logps = model(batch)[0].logps
    assert_follows(sight.by_side(logps, batch), expected)
    logps.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    ("config", "more"),
    [
        ("quickstart_encoder_decoder", ["log.samples=2"]),
        ("quickstart_encoder_decoder", ["model.lora={r: 4}", "model.gradient_checkpointing=true"]),
        ("pictures", ["model.gradient_checkpointing=true"]),
        ("pictures", ["model.freeze=[vision_tower]"]),
    ],
)
def test_a_few_steps_of_the_configs_that_ship(config: str, more: list[str], stage: int, tmp_path: Path) -> None:
    values = [
        "model.dtype=bfloat16", "train.max_steps=6", "train.eval_every=3", "checkpoint.save_every=3", "log.every=1",
        f"deepspeed.zero_optimization.stage={stage}", f"output_dir={tmp_path}/run", *more,
    ]  # fmt: skip
    command = [sys.executable, "launch/train.py", "--config", f"launch/configs/{config}.yaml", *values]
    left_out = ("DS_ACCELERATOR", "PYTHONDONTWRITEBYTECODE")
    environment = {k: v for k, v in os.environ.items() if k not in left_out} | {"DSPREF_CACHE": f"{tmp_path}/cache"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 6 and all(0 < loss < 20 for loss in losses)
