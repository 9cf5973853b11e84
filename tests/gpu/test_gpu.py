"""What only a GPU can show: `pytest -m gpu`. Models and data are made here, nothing is downloaded."""

from __future__ import annotations

import gzip
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
import transformers
import yaml
from test_waits import Undistributed, packs_of, policy_of
from tiny import preference_rows, save_tiny, save_tokenizer, tiny_config, tiny_model

from dspref.config import ModelSection
from dspref.data.batch import collate
from dspref.data.loader import Step
from dspref.data.truncate import TokenizedPair
from dspref.model import attention
from dspref.model.generation import stream
from dspref.model.logps import pair_logps, scored_logps
from dspref.model.packed import PackedCausalLM, prepare_for_training
from dspref.model.sdpa import causal_mask
from dspref.objectives import RunningMean, build_objective
from dspref.reference.modes import Reference
from dspref.report.metrics import Meter
from dspref.report.performance import Clock
from dspref.report.profiling import Profile
from dspref.training import gradient
from dspref.training.gradient import Instruments, StepLoss
from dspref.training.numbers import Suspects

CUDA = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def random_pairs(count: int, vocabulary: int) -> list[TokenizedPair]:
    draws = np.random.default_rng(0)
    sizes = draws.integers(3, 200, size=(count, 3))
    return [TokenizedPair(*(draws.integers(0, vocabulary, size=n).astype(np.int32) for n in row)) for row in sizes]


def run_packed(model: torch.nn.Module, kernel: str, sharing: bool, pairs: list[TokenizedPair]) -> tuple[torch.Tensor, list]:
    packed = PackedCausalLM(model, kernel)  # type: ignore[arg-type]
    packed.zero_grad()
    logps = packed(collate(pairs, range(len(pairs)), prefix_sharing=sharing).to("cuda"))[0].logps
    logps.mean().backward()
    return logps.detach(), [p.grad.float().clone() for p in packed.parameters()]


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("kernel", [name for name in attention.KERNELS if name != "sdpa"])
def test_each_kernel_agrees_with_sdpa_in_bf16(kernel, sharing):
    if kernel not in attention.available("cuda"):
        pytest.skip(f"{kernel} is not installed here")
    config = tiny_config("llama", 512, hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    model = tiny_model(config, seed=1).to("cuda", torch.bfloat16)
    model.config._attn_implementation = attention.PACKED
    pairs = random_pairs(6, 512)
    expected, expected_grads = run_packed(model, "sdpa", sharing, pairs)
    found, grads = run_packed(model, kernel, sharing, pairs)
    assert (found - expected).abs().mean() < 0.02
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert (ours - theirs).norm() <= 0.05 * theirs.norm() + 1e-4


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("kernel", list(attention.KERNELS))
def test_each_kernel_agrees_with_float64(kernel, width, window, sharing, device="cuda", dtype=torch.bfloat16, allowed=2e-2):
    """Output and gradients of grouped heads, computed on the CPU from the same numbers."""
    if kernel not in attention.available(device):
        pytest.skip(f"{kernel} is not installed here")
    if not attention.KERNELS[kernel].takes(width):
        pytest.skip(f"{kernel} takes no heads of size {width} here")
    batch = collate(random_pairs(6, 99), range(6), prefix_sharing=sharing)
    draws, tokens = torch.Generator().manual_seed(0), len(batch.input_ids)
    q, k, v, slope = (torch.randn(tokens, heads, width, generator=draws).to(dtype) for heads in (6, 2, 2, 6))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = in_float64(*exact, batch, window)
    expected_grads = torch.autograd.grad(expected, exact, slope.double())
    own = [x.to(device).requires_grad_() for x in (q, k, v)]
    segments = attention.Segments(batch.to(device), kernel)
    heads = (x.transpose(0, 1)[None] for x in own)
    found = attention.packed_attention(torch.nn.Identity(), *heads, None, sliding_window=window, segments=segments)[0][0]
    grads = torch.autograd.grad(found, own, slope.to(device))
    for ours, theirs in zip([found, *grads], [expected, *expected_grads], strict=True):
        assert (ours.detach().double().cpu() - theirs).norm() <= allowed * theirs.norm()


def in_float64(q, k, v, batch, window) -> torch.Tensor:
    """Attention written for reading, a sequence at a time: [T, H, D]."""
    k, v = (x if batch.kv_index is None else x[batch.kv_index] for x in (k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    queries, keys = (bounds.diff().tolist() for bounds in (batch.cu_seqlens_q, batch.cu_seqlens_k))
    outputs = []
    for own, seen, values in zip(q.split(queries), k.split(keys), v.split(keys)):
        scores = torch.einsum("qhd,khd->hqk", own, seen) * q.shape[-1] ** -0.5
        hidden = ~causal_mask(len(own), len(seen), window, own.device)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(outputs)


def test_log_probs_and_their_gradients_against_float64():
    """Kept and made again: 640 tokens and 24,000, of which the first count."""
    draws = torch.Generator().manual_seed(0)
    weight = (torch.randn(32_064, 256, generator=draws) * 0.2).bfloat16()
    for count in (640, 24_000):
        hidden = torch.randn(count, 256, generator=draws).bfloat16()
        targets = torch.randint(0, len(weight), (count,), generator=draws)
        some = slice(0, 640)
        exact = [x.double().requires_grad_() for x in (hidden[some], weight)]
        expected = (exact[0] @ exact[1].t()).log_softmax(-1).gather(1, targets[some, None])[:, 0]
        expected_grads = torch.autograd.grad(expected.sum(), exact)
        own = [x.cuda().requires_grad_() for x in (hidden, weight)]
        found = scored_logps(*own, None, targets.cuda()).logps
        grads = torch.autograd.grad(found[some].sum(), own)
        assert (found[some].double().cpu() - expected).abs().max() < 1e-3
        for ours, theirs in zip((grads[0][some], grads[1]), expected_grads):
            assert (ours.double().cpu() - theirs).norm() <= 2e-2 * theirs.norm()


def test_log_probs_never_hold_all_logits():
    hidden = torch.randn(8192, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(128_000, 256, device="cuda", dtype=torch.bfloat16) * 0.05).requires_grad_()
    targets = torch.randint(0, 128_000, (8192,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logps = scored_logps(hidden, weight, None, targets).logps
    logps.sum().backward()
    whole = 8192 * 128_000 * 4
    assert torch.cuda.max_memory_allocated() - before < whole / 4
    some = slice(0, 64)
    plain = torch.log_softmax(hidden[some].double() @ weight.double().t(), -1).gather(-1, targets[some, None])[:, 0]
    assert (logps[some] - plain).abs().max() < 1e-3  # rounded to bf16, logits alone would be off by more


@pytest.mark.parametrize("loss_type", ["sigmoid", "aot"])
def test_a_logged_step_waits_for_nothing(loss_type, device=CUDA):
    """The second one: the first compiles and fills caches. DeepSpeed's own part is left out."""
    model = policy_of("qwen2", hidden_size=256, num_attention_heads=4).to(device, torch.bfloat16)
    model.kernel = attention.available(device.type)[0]
    made, packs = build_objective("dpo", loss_type), [batch.pinned() for batch in packs_of(False)]
    with torch.no_grad():
        base = [pair_logps(model(batch, only_logps=True)[0], batch) for batch in (batch.to(device) for batch in packs)]
    counts = {"pairs": 6, "chosen_tokens": 60, "rejected_tokens": 60, "chosen_and_prompt_tokens": 90, "tokens": 300}
    for mode in ("default", "error"):
        asked = iter(base * 2)
        reference = Reference(lambda name, batch, asked=asked: next(asked))
        looking = Instruments(Meter(device), Clock(device), Suspects())
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            step = Step(1, 1.0, len(packs), packs, counts, 1.0)
            gradient.accumulate(step, Undistributed(model, device), StepLoss(made), reference, RunningMean(), looking)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_profile_has_kernels_and_a_memory_snapshot(tmp_path: Path):
    said: list[str] = []
    profile = Profile(tmp_path, (2, 3), torch.device("cuda"), said.append)
    for step in range(1, 5):
        profile.write()
        profile.begin(step)
        profile.phase("forward")
        torch.ones(256, 256, device="cuda") @ torch.ones(256, 256, device="cuda")
        profile.end()
    profile.close(over=True)
    folder = tmp_path / "profile/steps-2-3"
    with gzip.open(folder / "rank-0.trace.json.gz", "rt") as file:
        kinds = [event.get("cat") for event in json.load(file)["traceEvents"]]
    assert kinds.count("kernel") >= 2 and len(said) == 1 and said[0].startswith("profile: steps 2 to 3")
    snapshot = pickle.loads((folder / "rank-0.memory.pickle").read_bytes())
    assert snapshot["segments"] and any(snapshot["device_traces"])
    assert "CUDA" in (folder / "rank-0.operators.txt").read_text()


def test_an_answer_is_streamed_as_it_is_generated():
    """As `dspref chat` shows it."""
    lm, ids = tiny_model(tiny_config("qwen2"), seed=1).to("cuda"), [5, 9, 17]
    how = transformers.GenerationConfig(max_new_tokens=12, do_sample=False)
    whole = lm.generate(torch.tensor([ids], device="cuda"), generation_config=how)
    assert list(stream(lm, ids, how)) == whole[0, len(ids) :].tolist()


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_run_on_one_gpu(stage, dtype, tmp_path: Path):
    losses = run(tmp_path, stage, dtype, "qwen2", {"name": "dpo"})
    assert math.isclose(losses[0], math.log(2), abs_tol=1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_moe"])
@pytest.mark.parametrize(
    "objective",
    [
        {"name": "dpo", "loss_type": ["aot", "bco_pair", "sft"], "use_weighting": False, "ld_alpha": 0.5},
        {"name": "dpo", "use_weighting": True},
        {"name": "simpo"},
        {"name": "orpo"},
        {"name": "kto"},
        {"name": "bco"},
        {"name": "listwise"},
        {"name": "listwise", "loss_type": "lipo_lambda"},
    ],
    ids=["two passes", "wpo", "simpo", "orpo", "kto", "bco", "plackett_luce", "lipo_lambda"],
)
def test_objectives_on_one_gpu(objective, model_type, tmp_path: Path):
    run(tmp_path, 3, "bfloat16", model_type, objective)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_liger_gives_the_same_losses(model_type, tmp_path: Path):
    pytest.importorskip("liger_kernel", reason="it comes with dspref[liger]")
    plain, liger = (
        run(tmp_path / f"{flag}", 2, "bfloat16", model_type, {"name": "dpo"}, {"model": {"liger": flag}})
        for flag in (False, True)
    )
    assert np.allclose(plain, liger, atol=1e-3)


LORA = {"lora": {"r": 8}}
FOLLOWING = {"sync_ref_model": True, "ref_model_sync_steps": 2}


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        (3, {"reference": {"mode": "engine", "offload": "cpu"}}),
        (3, {"reference": {**FOLLOWING, "offload": "cpu"}}),
        (2, {"reference": FOLLOWING}),
        *[(stage, {"reference": {"bema": {"update_freq": 1}}}) for stage in (2, 3)],
        *[(stage, {"model": LORA, "reference": {"mode": "adapter"}}) for stage in (1, 2, 3)],
        (3, {"model": {"lora": {"r": 8, "use_dora": True, "modules_to_save": ["lm_head"], "merge_on_export": True}}}),
    ],
)
def test_references_and_adapters_on_one_gpu(stage, more, tmp_path: Path):
    losses = run(tmp_path, stage, "bfloat16", "qwen2", {"name": "dpo"}, more)
    assert math.isclose(losses[0], math.log(2), abs_tol=2e-2)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("mode", ["adapter", "stored"])
def test_4_bits_below_and_8_bits_in_the_optimizer(mode, stage, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    more = {"model": {**LORA, "load_in_4bit": True}, "train": {"optim": "adamw_8bit"}, "reference": {"mode": mode}}
    losses = run(tmp_path, stage, "bfloat16", "qwen2", {"name": "dpo"}, more)
    assert math.isclose(losses[0], math.log(2), abs_tol=2e-2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_adamw_in_8_bits_trains_the_whole_model(stage, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    run(tmp_path, stage, "bfloat16", "qwen2", {"name": "dpo"}, {"train": {"optim": "adamw_8bit"}})


def run(
    tmp_path: Path, stage: int, dtype: str, model_type: str, objective: dict, more: Mapping[str, dict] = MappingProxyType({})
) -> list[float]:
    """Losses of four steps of a tiny model, in several packs, as a user starts them; `more` goes into the sections."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    config = tiny_config(model_type, save_tokenizer(tmp_path / "tokenizer"), **(experts if "moe" in model_type else {}))
    save_tiny(tmp_path / "model", config, seed=1)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(24, seed=2)))
    values = {
        "model": {"name_or_path": f"{tmp_path}/model", "tokenizer_name_or_path": f"{tmp_path}/tokenizer", "dtype": dtype},
        "data": {
            "train": {"path": f"{tmp_path}/pairs.jsonl"},
            "eval": {"path": f"{tmp_path}/pairs.jsonl", "split": "train"},
            "tokens_per_pack": 512,
        },
        "objective": objective,
        "train": {"pairs_per_step": 8, "max_steps": 4, "learning_rate": 1e-4},
        "deepspeed": {"zero_optimization": {"stage": stage}},
        "checkpoint": {"save_every": 2},
        "output_dir": f"{tmp_path}/run",
    }
    for section, keys in more.items():
        values[section] = {**values.get(section, {}), **keys}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    left_out = ("DS_ACCELERATOR", "PYTHONDONTWRITEBYTECODE")  # imports take twice the time without bytecode
    environment = {k: v for k, v in os.environ.items() if k not in left_out} | {"DSPREF_CACHE": f"{tmp_path}/cache"}
    command = [sys.executable, "launch/train.py", "--config", f"{tmp_path}/run.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    return losses


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_inputs_of_layers_wait_in_host_memory(family):
    """The same gradients to the bit, and of the inputs of 12 layers few on the device at the peak."""
    pairs = [TokenizedPair(*(np.arange(n, dtype=np.int32) % 250 for n in (4000, 20, 20)))]
    config = tiny_config(
        family, hidden_size=1024, intermediate_size=1024, num_hidden_layers=12, max_position_embeddings=4096
    )
    results, peaks = [], []
    for how in (True, "offload"):
        lm = tiny_model(config, seed=1).to("cuda", torch.bfloat16)
        lm.set_attn_implementation(attention.PACKED)
        section = ModelSection(name_or_path="m", gradient_checkpointing=how)  # type: ignore[arg-type]
        packed = prepare_for_training(PackedCausalLM(lm, "sdpa"), section, with_collision=False)
        batch = collate(pairs, range(1), prefix_sharing=False).to("cuda")
        for _ in range(3):  # one pass after another, over the memory of the one before
            packed.zero_grad()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            packed(batch)[0].logps.sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        results.append([p.grad.clone() for p in packed.parameters()])
    assert all(torch.equal(*both) for both in zip(*results))
    of_layer = len(batch.input_ids) * 1024 * 2
    assert peaks[0] - peaks[1] > 7 * of_layer
