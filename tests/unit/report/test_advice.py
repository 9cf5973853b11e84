"""Each advice comes when its fact is bad, and only then."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_tokenizer, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from dspref.config import BemaSection, ModelSection, ReferenceSection
from dspref.data.batch import collate
from dspref.data.loader import Packing, StepLoader
from dspref.data.sources import Source
from dspref.data.store import load_pairs
from dspref.data.truncate import Limits, TokenizedPair
from dspref.machine.fitting import Asked
from dspref.machine.layers import Layout, Pack, kept_per_token
from dspref.machine.memory_plan import estimate
from dspref.machine.shapes import of_tensors
from dspref.model.attention import PACKED
from dspref.model.packed import PackedCausalLM
from dspref.report.advice import Facts, lines, of_moving, of_rows, shape_of, still_to_come, too_long, uneven

GIB = 2**30
GOOD = Facts(
    device="cuda", zero_stage=3, world_size=8, pairs_per_step=256, packs_per_step=2, fill=0.95, waiting=0.03,
    tokens_per_rank=31_000, fewer_packs=None, faster_kernel=None, sparsity=1.0, checkpointing=True,
    kept_bytes=60 * GIB, free_bytes=60 * GIB,
)  # fmt: skip


def test_a_good_run_hears_nothing() -> None:
    assert list(lines(GOOD)) == []


@pytest.mark.parametrize(
    "bad, mended, said",
    [
        ({"faster_kernel": "use X"}, {"faster_kernel": None}, "(sdpa): use X"),
        ({"waiting": 0.2}, {"waiting": 0.1}, "raise train.pairs_per_step"),
        ({"fill": 0.55, "fewer_packs": (18_944, 1.0)}, {"fewer_packs": None}, "data.tokens_per_pack=18944 needs 1 a step"),
        ({"tokens_per_rank": 900, "packs_per_step": 1}, {"world_size": 1}, "serves 900 tokens"),
        ({"sparsity": 20}, {"zero_stage": 2}, "from about 22,000 on"),
        (
            {"too_long": (9 * GIB, 4 * GIB, "model.tiled_mlp=true")},
            {"too_long": None},
            "9.0 GiB, and 4.0 GiB are free for it",
        ),
        ({"kept_bytes": 16 * GIB}, {"checkpointing": False}, "model.gradient_checkpointing=false"),
        ({"kept_bytes": 16 * GIB}, {"free_bytes": 20 * GIB}, "model.gradient_checkpointing=false"),
    ],
)
def test_each_advice_names_its_setting_and_comes_alone(bad, mended, said) -> None:
    (line,) = lines(replace(GOOD, **bad))
    assert said in line and len(line) < 220 and "\n" not in line
    assert list(lines(replace(GOOD, **{**bad, **mended}))) == []


@pytest.mark.parametrize(
    "counts, weights, key",
    [
        ((1_000, 10_000), (1.0, 1.0), "desirable"),
        ((10_000, 1_000), (1.0, 1.0), "undesirable"),
        ((999, 1_000), (1.0, 1.0), "desirable"),
        ((1_334, 1_000), (1.0, 1.0), "undesirable"),
        ((1_000, 1_000), (3.0, 1.0), "undesirable"),
        ((100, 900), (9.0, 1.5), "desirable"),
    ],
)
def test_the_weight_that_is_advised_is_within_the_papers_bounds(counts, weights, key) -> None:
    (line,) = uneven(counts, weights)
    found = re.search(r"objective\.(\w+)_weight=([\d.e+-]+)$", line)
    assert found and found[1] == key and len(line) < 220
    mended = (float(found[2]), weights[1]) if key == "desirable" else (weights[0], float(found[2]))
    assert 1 <= counts[0] * mended[0] / (counts[1] * mended[1]) <= 4 / 3
    assert not list(uneven(counts, mended))


def test_even_weights_and_a_label_that_is_not_wanted_hear_nothing() -> None:
    for counts, weights in (((3, 3), (1, 1)), ((4, 3), (1, 1)), ((1, 10), (10, 1)), ((0, 5), (0, 1)), ((5, 1), (1, 0))):
        assert not list(uneven(counts, weights)), (counts, weights)


def test_labels_of_one_kind_are_told() -> None:
    for counts, lacking in (((0, 5), "without any desirable"), ((5, 0), "without any undesirable")):
        (line,) = uneven(counts, (1.0, 1.0))
        assert lacking in line


def test_labels_beyond_the_papers_are_told_and_the_scale_mends_it(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{k}", "completions": [" a", " b"], "scores": [k, 8]} for k in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tokenizer(tmp_path / "tokenizer")
    tokenizer, source = AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), Source(f"{tmp_path}/rows.jsonl", pairs="list")
    how = {"on_bad_row": "error", "cache_dir": tmp_path / "cache", "log": lambda line: None}
    loader = StepLoader(
        load_pairs([source], tokenizer, Limits(), **how), [1.0], 2, 0, True, Packing(100, True, takes="list")
    )
    lipo = {"name": "listwise", "loss_type": "lipo_lambda", "score_scale": 1.0}
    (line,) = of_rows(lipo, loader)
    assert line.startswith("labels go up to 8") and line.endswith("objective.score_scale=0.125")
    assert not [*of_rows(lipo | {"score_scale": 0.125}, loader), *of_rows({"name": "listwise"}, loader)]


def test_a_reference_that_never_moves_is_told() -> None:
    bema = ReferenceSection(bema=BemaSection(update_after=100))
    assert not [*of_moving(bema, 500), *of_moving(ReferenceSection(), 1)]
    (line,) = of_moving(bema, 499)
    assert "after step 500, and the run has 499" in line
    (line,) = of_moving(ReferenceSection(sync_ref_model=True), 511)
    assert "after step 512" in line and "ref_model_sync_steps" in line


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("family", "keys"), [("llama", 1), ("llama", 4), ("qwen2", 2), ("qwen3", 1), ("qwen3", 4)])
def test_activations_are_those_that_a_layer_keeps(family: str, keys: int, shared: bool, dtype: torch.dtype) -> None:
    """Counted in real layers: the second and third of three."""
    few, tokens, attended, _ = kept_by(family, dtype, 1, keys, shared)
    many, _, _, lm = kept_by(family, dtype, 3, keys, shared)
    shape = of_tensors({n: tuple(p.shape) for n, p in lm.named_parameters()}, lm.config.to_dict(), None)
    layout = Layout("cpu", dtype.itemsize, 1, 2, kernel="sdpa")
    expected = tokens * kept_per_token(shape, layout, attended / tokens)
    assert (many - few) / 2 == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_keep_what_their_tokens_need(dtype: torch.dtype) -> None:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "decoder_sparse_step": 1}
    few, tokens, attended, _ = kept_by("qwen3_moe", dtype, 1, 2, False, **experts)
    many, _, _, lm = kept_by("qwen3_moe", dtype, 3, 2, False, **experts)
    shape = of_tensors({n: tuple(p.shape) for n, p in lm.named_parameters()}, lm.config.to_dict(), None)
    assert shape.inner == 512 and shape.copies == 2
    expected = tokens * kept_per_token(shape, Layout("cpu", dtype.itemsize, 1, 2, kernel="sdpa"), attended / tokens)
    assert (many - few) / 2 == pytest.approx(expected, rel=0.1)


def kept_by(
    family: str, dtype: torch.dtype, layers: int, keys: int, shared: bool, **more: int
) -> tuple[float, int, int, Any]:
    """(bytes that a forward keeps for the backward pass, tokens, keys that are attended to, the model)."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": keys, "num_hidden_layers": layers, **more}
    config = tiny_config(family, 256, hidden_size=512, intermediate_size=1792, **heads)
    lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=PACKED).train()
    pair = TokenizedPair(*[np.arange(start, start + n, dtype=np.int32) for start, n in ((0, 40), (40, 80), (120, 80))])
    batch = collate([pair], [0], prefix_sharing=shared)
    weights, seen = {p.untyped_storage().data_ptr() for p in lm.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage  # which holds its address, so that no other gets it
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        PackedCausalLM(lm, "sdpa")(batch)
    kept = sum(storage.nbytes() for storage in seen.values())
    return kept, len(batch.input_ids), int(batch.cu_seqlens_k[-1]), lm


@pytest.mark.parametrize("free, settings", [
    (1.0, None),
    (0.9, "model.gradient_checkpointing=true"),
    (0.13, "model.gradient_checkpointing=true; model.tiled_mlp=true"),
    (0.001, None),
])  # fmt: skip
def test_a_pack_that_is_too_long_hears_what_makes_it_fit(free: float, settings: str | None) -> None:
    """And nothing where it fits, or where nothing does."""
    _, _, _, lm = kept_by("llama", torch.float32, 8, 2, False)
    shape = of_tensors({n: tuple(p.shape) for n, p in lm.named_parameters()}, lm.config.to_dict(), None)
    run = Asked(shape, Layout("cpu", 4, 1, 1, checkpointing=False, kernel="sdpa"), Pack(60_000, 100), tiles=True)
    kept, coming = still_to_come(shape, run.layout, run.pack)
    found = too_long(run, 60_000, round(coming + free * kept))
    assert (found and found[2]) == settings
    if found:
        assert found[:2] == (kept, round(coming + free * kept) - coming)


def test_advice_and_plan_have_one_estimate() -> None:
    _, _, _, lm = kept_by("llama", torch.float32, 2, 2, False)
    shape = of_tensors({n: tuple(p.shape) for n, p in lm.named_parameters()}, lm.config.to_dict(), None)
    layout, pack = Layout("cpu", 4, 2, 2, packs=2, checkpointing=False, kernel="sdpa"), Pack(10_000, 5_000)
    parts = estimate(shape, layout, pack).parts
    kept, coming = still_to_come(shape_of(ModelSection(name_or_path="m"), lm), layout, pack)
    assert kept == parts["activations"] + parts["LM head"] and kept > 2e8
    assert coming == parts["optimizer states"] + parts["gradients"] + parts["ZeRO buffers"] > 0
