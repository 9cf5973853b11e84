"""The plan of a run's memory: shapes are those of models, parts obey formulas, and what it says to change helps."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from dspref.config import LoraSection, ModelSection
from dspref.errors import ConfigError
from dspref.machine import fitting, footprint, gpus, layers, memory_plan, shapes
from dspref.machine.fitting import Asked, changes
from dspref.machine.layers import Layout, Live, Pack
from dspref.machine.memory_plan import GIB, estimate
from dspref.machine.shapes import ModelShape, of_tensors
from dspref.model import adapters
from dspref.model.packed import PackedCausalLM, prepare_for_training
from dspref.report.performance import size_of

# Qwen2.5-7B, in numbers.
SEVEN = ModelShape(
    weights=7_615_616_512, head=544_997_376, tied=False, layers=28, hidden=3584, queries=3584, keys=512, inner=18_944,
    gated=True, vocabulary=152_064, largest=544_997_376, trained=7_615_616_512, body=6.525e9,
)  # fmt: skip
EIGHT = Layout("cuda", 2, 8, 3, packs=4)
PACK = Pack(16_384, 8_000, 1.3)

FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "gpt2": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("files", [True, False], ids=["headers", "config"])
def test_a_shape_is_that_of_the_model(family: str, files: bool, tmp_path: Path) -> None:
    """From headers to the weight; from config.json alone but for biases."""
    config = tiny_config(family, 1000, **FAMILIES[family])
    lm = save_tiny(tmp_path / "m", config, 1)
    section = ModelSection(name_or_path=str(tmp_path / "m"), init="pretrained" if files else "random")
    shape, size = shapes.of_section(section), size_of(PackedCausalLM(lm, "sdpa"))
    weights = sum(p.numel() for p in lm.parameters())
    assert shape.weights == shape.trained == pytest.approx(weights, rel=0 if files else 0.01)
    assert shape.head == size.head == 1000 * 64
    assert shape.work.channels == size.channels
    if family != "gpt2":  # whose positions are a matrix that no token is multiplied by
        assert shape.work.body == pytest.approx(size.body, rel=1e-6)
    assert shape.tied == (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight)
    assert shape.query_norms == family.startswith("qwen3") and shape.gated == (family != "gpt2")


@pytest.mark.parametrize("freeze", [["embed_tokens"], ["layers.0", "norm"], ["*_proj"]])
def test_what_is_frozen_is_not_counted_as_trained(freeze: list[str], tmp_path: Path) -> None:
    lm = save_tiny(tmp_path / "m", tiny_config("qwen2", 1000, tie_word_embeddings=True), 1)
    section = ModelSection(name_or_path=str(tmp_path / "m"), freeze=freeze)
    shape, model = shapes.of_section(section), prepare_for_training(PackedCausalLM(lm, "sdpa"), section, False)
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    assert shape.trained == trained < shape.weights and shape.frozen == shape.weights - trained
    assert shape.work.trained_body == pytest.approx(size_of(model).trained_body, rel=1e-6)
    assert shape.work.trained_head == size_of(model).trained_head
    assert footprint.count_weights(section, section.freeze) == shape.frozen


@pytest.mark.parametrize(
    "settings",
    [{}, {"r": 4, "target_modules": ["q_proj", "v_proj"]}, {"target_modules": r".*\.mlp\.\w+_proj"},
     {"exclude_modules": ["down_proj"]}, {"layers_to_transform": [1], "target_modules": ["q_proj"]}, {"use_dora": True},
     {"rank_pattern": {"q_proj": 2}}, {"modules_to_save": ["lm_head"]}],
)  # fmt: skip
def test_an_adapter_has_as_many_weights_as_peft_makes(settings: dict[str, Any], tmp_path: Path) -> None:
    lm = save_tiny(tmp_path / "m", tiny_config("llama", 500), 1)
    section = ModelSection(name_or_path=str(tmp_path / "m"), lora=LoraSection(**settings))
    shape = shapes.of_section(section)
    adapters.for_training(lm, section=section, seed=1, reference=None, live=False)
    assert shape.trained == sum(p.numel() for p in lm.parameters() if p.requires_grad)
    assert shape.frozen == shape.weights and shape.work.trained_head == 0


def test_a_saved_adapter_brings_its_own_size(tmp_path: Path) -> None:
    save_tiny(tmp_path / "m", tiny_config("llama", 500), 1)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 2, "target_modules": ["v_proj"]}))
    model = ModelSection(name_or_path=str(tmp_path / "m"), lora=LoraSection(path=str(tmp_path / "adapter")))
    assert shapes.of_section(model).trained == 2 * 2 * (64 + 32)


def test_a_model_that_is_not_here_is_named_with_a_way_to_get_its_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"some/model: no config.json of it .*hf download some/model"):
        shapes.of_section(ModelSection(name_or_path="some/model"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="tells no sizes"):
        shapes.of_section(ModelSection(name_or_path=str(tmp_path)))


@pytest.mark.parametrize(
    ("stage", "weights", "masters", "states"),
    [(1, 2.0, 4 / 8, 8 / 8), (2, 2.0, 4 / 8, 8 / 8), (3, 2 / 8, 4 / 8, 8 / 8)],
)
def test_zero_shards_what_it_says(stage: int, weights: float, masters: float, states: float) -> None:
    """Rajbhandari et al. 2020 (arXiv:1910.02054), figure 1: 2, 4 and 8 bytes of each weight over 8 ranks."""
    found = memory_plan.states(SEVEN, replace(EIGHT, stage=stage))
    of_each = [found[name] / SEVEN.weights for name in ("weights", "fp32 masters", "optimizer states")]
    assert of_each == pytest.approx([weights, masters, states])


def test_offload_moves_bytes_to_the_host() -> None:
    here, away = EIGHT, replace(EIGHT, states_on="cpu", weights_on="cpu")
    parts = estimate(SEVEN, away, PACK).parts
    assert not (parts["weights"] or parts["fp32 masters"] or parts["optimizer states"] or parts["gradients"])
    assert estimate(SEVEN, here, PACK).host == 0
    # masters, moments, gradients, those of all packs, weights in bf16 twice
    assert estimate(SEVEN, away, PACK).host == pytest.approx(SEVEN.weights / 8 * (4 + 8 + 4 + 4 + 2 + 2), rel=1e-6)


@pytest.mark.parametrize("reference", ["none", "whole", "sharded", "offloaded"])
def test_a_reference_costs_what_stays_of_it(reference: str) -> None:
    live = {
        "none": None,
        "whole": Live(SEVEN, 2, False),
        "sharded": Live(SEVEN, 2, True),
        "offloaded": Live(SEVEN, 2, True, True),
    }
    found = estimate(SEVEN, replace(EIGHT, reference=live[reference]), PACK)
    share = {"none": 0, "whole": 2, "sharded": 2 / 8, "offloaded": 0}[reference]
    assert found.parts["reference"] == pytest.approx(share * SEVEN.weights, abs=1)
    assert (found.host > 0) == (reference == "offloaded")


@pytest.mark.parametrize(
    ("live", "device", "beside", "host"),
    [
        # TR-DPO in 16 bits: masters beside the weights, wherever these are.
        (Live(SEVEN, 2, False, masters=4), "cuda", 6, 0),
        (Live(SEVEN, 2, True, masters=4), "cuda", 6 / 8, 0),
        (Live(SEVEN, 2, True, True, masters=4), "cuda", 0, 6 / 8),
        # BEMA: its mean in fp32 and the beginning in bf16, always in host memory.
        (Live(SEVEN, 2, False, history=6), "cuda", 2, 6),
        (Live(SEVEN, 2, True, history=6), "cuda", 2 / 8, 6 / 8),
        (Live(SEVEN, 2, False, True, history=6), "cuda", 0, 8 / 8),  # offloading shards it
        (Live(SEVEN, 4, True, history=8), "cpu", 12 / 8, 0),
    ],
)
def test_a_reference_that_moves_costs_what_moves_it(live: Live, device: str, beside: float, host: float) -> None:
    found = estimate(SEVEN, replace(EIGHT, reference=live, device=device), PACK)
    assert found.parts["reference"] == pytest.approx(beside * SEVEN.weights, abs=1)
    assert found.host == pytest.approx(host * SEVEN.weights, abs=1)


def test_an_adapter_needs_no_masters_of_the_model() -> None:
    adapted = replace(SEVEN, frozen_base=True, trained=40_000_000)
    parts = estimate(adapted, replace(EIGHT, stage=2), PACK).parts
    assert parts["fp32 masters"] == 4 * 5_000_000 and parts["weights"] == 2 * (SEVEN.weights + 40_000_000)
    in_four_bits = estimate(adapted, replace(EIGHT, stage=2, four_bits=True), PACK).parts
    assert 0.3 < in_four_bits["weights"] / parts["weights"] < 0.45  # embedding and head stay


def test_checkpointing_keeps_one_vector_a_layer() -> None:
    kept = {on: memory_plan.activations(SEVEN, replace(EIGHT, checkpointing=on), PACK) for on in (True, False)}
    assert kept[True] == 16_384 * 3584 * (28 * 2 + 8)
    # 14.6 h + 4 m in two bytes: h 3584, m 18,944, keys an eighth of h
    assert kept[False] / kept[True] > 20


@pytest.mark.parametrize("tokens", [2048, 16_384, 60_000])
def test_more_tokens_never_need_less(tokens: int) -> None:
    fewer, more = (estimate(SEVEN, EIGHT, layers.scaled(PACK, n)).total for n in (tokens, tokens + 256))
    assert fewer <= more


def test_the_largest_budget_is_the_last_that_fits() -> None:
    run = Asked(SEVEN, EIGHT, PACK)
    room = 0.92 * 79.1 * GIB
    tokens = fitting.largest_budget(run, room)
    needs = [estimate(SEVEN, EIGHT, layers.scaled(PACK, n)).total for n in (tokens, tokens + 256)]
    assert needs[0] <= room < needs[1] and tokens > 16_384
    assert fitting.largest_budget(run, 1 * GIB) == 0


LONG = Pack(65_536, 2_000)


def test_inputs_of_layers_are_on_the_device_or_on_the_host() -> None:
    here, there = (estimate(SEVEN, replace(EIGHT, inputs_on=on), LONG) for on in ("gpu", "cpu"))
    of_layer = 65_536 * 3584 * 2
    assert here.parts["activations"] - there.parts["activations"] == 26 * of_layer  # two are on their way
    assert there.host - here.host == 28 * of_layer
    on_cpu = [estimate(SEVEN, replace(EIGHT, device="cpu", inputs_on=on), LONG) for on in ("gpu", "cpu")]
    assert on_cpu[0] == on_cpu[1]
    kept = [estimate(SEVEN, replace(EIGHT, checkpointing=False, inputs_on=on), LONG) for on in ("gpu", "cpu")]
    assert kept[0] == kept[1]


def test_tiles_keep_nothing_of_their_width() -> None:
    wide = replace(SEVEN, inner=2 * SEVEN.inner)
    for layout in (replace(EIGHT, tile=4096), replace(EIGHT, tile=4096, checkpointing=False)):
        assert layers.activations(wide, layout, LONG) == layers.activations(SEVEN, layout, LONG)
        grown = layers.in_a_layer(wide, layout, LONG) - layers.in_a_layer(SEVEN, layout, LONG)
        assert grown == SEVEN.inner * 2 * (4096 * (4 + 2) + 3584)  # of a tile, and of the weights
    small = replace(EIGHT, tile=65_536)
    assert estimate(SEVEN, small, LONG) == estimate(SEVEN, EIGHT, LONG), "a pack of one tile is as without"


def test_long_pairs_have_changes_of_their_own_and_those_help() -> None:
    """In the order of their costs: each alone where it is enough."""
    run = Asked(SEVEN, EIGHT, LONG, tiles=True, heads=28)
    longest, total = 65_536, run.needs.total
    out, tiled = "model.gradient_checkpointing", "model.tiled_mlp"
    seen = {}
    for room in range(total - 1, total // 3, -(2**28)):
        found = changes(run, longest, room)
        if found[-1].total <= room:
            seen[tuple(change.setting.split("=")[0] for change in found)] = found
    assert list(seen)[:3] == [(out,), (tiled,), (out, tiled)]
    shared = [found[-1].setting for names, found in seen.items() if names[-1] == "parallel.sequence"]
    for setting in shared:
        found = re.fullmatch(r"parallel\.sequence=([24]) data\.tokens_per_pack=(\d+)", setting)
        assert found and int(found[1]) * int(found[2]) >= longest
    assert shared
    assert not any("sequence" in change.setting for change in changes(replace(run, heads=0), longest, total / 4))
    assert not any("tiled" in change.setting for change in changes(replace(run, tiles=False), longest, total / 4))


def test_beside_spread_experts_only_what_goes_with_them_is_proposed() -> None:
    """No other optimizer, adapter or ranks that share a pack; and no file, which would be in the place of `deepspeed`."""
    run = Asked(SEVEN, EIGHT, LONG, tiles=True, heads=28, spread=True)
    settings = " ".join(change.setting for change in changes(run, 65_536, run.needs.total / 20))
    assert "deepspeed.zero_optimization.offload_optimizer.device=cpu" in settings
    assert "deepspeed.zero_optimization.offload_param.device=cpu" in settings and "offload" in settings.split()[0]
    assert not any(word in settings for word in ("sequence", "8bit", "lora", ".json"))


@pytest.mark.parametrize("card", gpus.GPUS)
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_what_it_says_to_change_makes_it_fit_or_all_is_tried(card: str, ranks: int) -> None:
    layout = Layout("cuda", 2, ranks, 1, packs=4, checkpointing=False, reference=Live(SEVEN, 2, False))
    run, room = Asked(SEVEN, layout, PACK), 0.92 * gpus.GPUS[card].gib * GIB
    found = changes(run, 2048, room)
    totals = [run.needs.total, *(change.total for change in found)]
    assert all(a - b == change.saves > 0 for a, b, change in zip(totals, totals[1:], found))
    if run.needs.total <= room:
        assert not found
    elif totals[-1] > room:
        assert "model.lora=true" in [change.setting for change in found]


def test_what_costs_nothing_comes_first_and_what_is_needless_not_at_all() -> None:
    layout = Layout("cuda", 2, 2, 1, packs=4, reference=Live(SEVEN, 2, False))
    run = Asked(SEVEN, layout, PACK)
    settings = [change.setting for change in changes(run, 2048, 0.92 * 39.4 * GIB)]
    assert "train.optim=adamw_8bit" not in settings and settings[-1].startswith("deepspeed=ds_configs/")
    assert "offload" in settings[-1]
    slightly = changes(run, 2048, run.needs.total - 1)
    assert [change.setting for change in slightly] == ["reference.mode=stored"]
    assert not changes(replace(run, moving=True), 2048, run.needs.total)


def test_stages_and_offloads_are_all_there_and_one_is_the_runs_own() -> None:
    names = [(name, own) for name, _, own in fitting.strategies(Asked(SEVEN, EIGHT, PACK))]
    assert [name for name, own in names if own] == ["ZeRO-3"]
    assert len(names) == 6 and not any(name == "ZeRO-0" for name, _ in names)  # which is for fp32 alone
    in_fp32 = Asked(SEVEN, replace(EIGHT, value=4, device="cpu", states_on="nvme"), PACK)
    assert [name for name, _, own in fitting.strategies(in_fp32) if own] == ["ZeRO-3, states on nvme"]
    assert "ZeRO-0" in [name for name, _, _ in fitting.strategies(in_fp32)]


def test_a_strategy_says_where_things_are() -> None:
    text = Path("ds_configs/zero3_offload_all.json").read_text(encoding="utf-8")
    found = memory_plan.zero_settings(json.loads(text))
    assert (found["stage"], found["states_on"], found["weights_on"], found["overlap"]) == (3, "cpu", "cpu", True)
    assert memory_plan.zero_settings({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1e7}})["bucket"] == 10**7
    assert memory_plan.zero_settings({})["stage"] == 0


def test_defaults_are_those_of_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    own = DeepSpeedZeroConfig(stage=3)
    asked = {"reduce_bucket_size": own.reduce_bucket_size, "sub_group_size": own.sub_group_size}
    assert asked | {"stage3_max_live_parameters": own.max_live_parameters} == memory_plan.DEFAULTS


def test_cards_are_found_by_name_and_others_named() -> None:
    assert gpus.find("H100").peak == 989e12 and gpus.find("rtx-4090").name == "RTX 4090"
    assert all(card.peak > 1e14 and card.gib > 20 for card in gpus.GPUS.values())
    with pytest.raises(ConfigError, match=r"--gpu: a100 is not known; did you mean a100-"):
        gpus.find("a100")
    assert gpus.chosen("cpu", None, None, 2).gib > 0.1 and gpus.chosen("h100", 40, 0.3, 8).gib == 40


def test_a_head_of_many_words_is_done_in_chunks() -> None:
    """Probabilities of 8,000 tokens x 152,064 words would be 4.9 GB; chunks are bounded."""
    small, large = Pack(1000, 800), Pack(16_384, 8_000)
    kept, chunked = (layers.head(SEVEN, EIGHT, pack) for pack in (small, large))
    assert kept > 6 * 800 * 152_064
    assert chunked < 2.3e9


def test_a_frozen_model_keeps_less_of_its_norms() -> None:
    lm = tiny_model(tiny_config("llama", 500), 1)
    tensors = {name: tuple(p.shape) for name, p in lm.named_parameters()}
    whole, frozen = (of_tensors(tensors, lm.config.to_dict(), lora) for lora in (None, LoraSection()))
    layout = Layout("cpu", 4, 1, 2)
    saved = layers.kept_per_token(whole, layout) - layers.kept_per_token(frozen, layout)
    assert saved == 2 * 4 * 64


def test_nothing_of_a_plan_needs_torch() -> None:
    """The arithmetic is for programs without it too; the layering test follows the imports."""
    for module in (fitting, gpus, memory_plan, shapes):
        assert "torch" not in vars(module)
    assert torch and AutoModelForCausalLM  # of the tests above
