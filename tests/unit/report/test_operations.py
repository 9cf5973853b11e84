"""Operations of encoder-decoder and vision-language models, against those that torch counts in a real pack of theirs."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_encoder_decoder import some_pairs, tiny
from tiny import tiny_encoder_decoder, tiny_model
from tiny_vision import IMAGE, tiny_vision_config, tiny_vision_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from vision_oracle import packed_rows, some_rows

from dspref.config import ModelSection
from dspref.data.batch import PackedBatch, collate
from dspref.data.plan import alone, group
from dspref.data.sight import runs_of
from dspref.data.truncate import TokenizedPair
from dspref.machine import built, layers
from dspref.machine.flops import Work
from dspref.machine.layers import Layout, Pack
from dspref.model import packed as model
from dspref.model import vision
from dspref.model.attention import PACKED
from dspref.model.pieces import ATTENTION
from dspref.report.performance import size_of

# What is frozen of each: nothing, what reads first, what reads last, the lowest layer.
STACKS = [[], ["encoder", "shared"], ["decoder", "shared", "lm_head"], ["encoder.*.0", "shared"]]
PARTS = [[], ["visual", "vision_tower", "vision_model"], ["language_model", "text_model", "lm_head"]]


def ready(lm: Any, implementations: Any, freeze: list[str], checkpointing: bool = False) -> model.PackedCausalLM:
    lm.set_attn_implementation(implementations)
    names = [name for name, _ in lm.named_parameters(remove_duplicate=False)]
    of_family = [part for part in freeze if any(part.split(".")[0] in name for name in names)]
    section = ModelSection(name_or_path="x", dtype="float32", gradient_checkpointing=checkpointing, freeze=of_family)
    return model.prepare_for_training(model.PackedCausalLM(lm, "sdpa"), section, False)


def counted(packed: model.PackedCausalLM, batch: PackedBatch) -> tuple[float, float]:
    """Operations of forward and backward by torch, without attention, of which it takes causal kinds for full."""
    with FlopCounterMode(display=False) as counter:
        tokens, _ = packed(batch)
        forward = products(counter)
        tokens.logps.sum().backward()
    return forward, products(counter) - forward


def products(counter: FlopCounterMode) -> float:
    """But those of rotary positions too, which older transformers have as products of matrices; T5's attention is in bmm."""
    counts = counter.get_flop_counts()
    rotary = sum(sum(ops.values()) for module, ops in counts.items() if "rotary" in module.rpartition(".")[2])
    of_attention = ("attention", "bmm")
    return sum(n for op, n in counts["Global"].items() if not any(word in str(op) for word in of_attention)) - rotary


def without_attention(more: Any) -> dict[str, float]:
    return {name: count for name, count in more.items() if not name.endswith(ATTENTION)}


@pytest.mark.parametrize("freeze", STACKS, ids=["all", "decoder", "encoder", "from layer 1"])
@pytest.mark.parametrize("name", ["t5", "t5 unscaled", "umt5", "bart", "m2m_100"])
def test_an_encoder_reads_prompts_and_a_decoder_answers(name: str, freeze: list[str]) -> None:
    packed = ready(tiny(name), PACKED, [part.replace(".*.", ".block." if "t5" in name else ".layers.") for part in freeze])
    batch = collate(some_pairs(packed.lm), range(4), prefix_sharing=True, encoder_decoder=True)
    assert batch.prompts is not None
    work = Work(len(batch.input_ids), len(batch.targets), 0, {"prompts": len(batch.prompts.input_ids)})
    size = size_of(packed)
    assert (size.forward(work), size.backward(work)) == counted(packed, batch)


@pytest.mark.parametrize("freeze", PARTS, ids=["all", "language model", "tower"])
@pytest.mark.parametrize("kind", [kind for kind in vision.FAMILIES if kind != "smolvlm"])
def test_a_tower_reads_patches_and_the_rest_their_features(kind: str, freeze: list[str]) -> None:
    lm = tiny_vision_model(tiny_vision_config(kind), 1)
    packed, rows = ready(lm, vision.implementations(lm.config), freeze), some_rows(lm)
    batch = packed_rows(lm, rows, prefix_sharing=True)
    work = Work(len(batch.input_ids), len(batch.targets), 0, without_attention(read(lm, rows, batch)))
    size = size_of(packed)
    assert (size.forward(work), size.backward(work)) == counted(packed, batch)


def read(lm: Any, rows: list[Any], batch: PackedBatch) -> Any:
    """What the tower reads of a pack, by its image tokens; of LLaVA-NeXT, whose tokens leave that open, by its tiles."""
    if lm.config.model_type == "llava_next":
        assert batch.images is not None
        return vision.tiles(0.0, lm.config, len(batch.images.tensors["pixel_values"]))
    prompts = {row.images.digest: row.pair.prompt for row in rows if row.images}
    runs = np.concatenate([runs_of(prompt == IMAGE) for prompt in prompts.values()])
    return vision.family_of(lm.config).reading(runs, lm.config)


def attention_of(packed: model.PackedCausalLM, batch: PackedBatch, part: str = "Global") -> tuple[float, float]:
    """Operations of attention in forward and backward, by torch: products of matrices, each in full squares."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tokens, _ = packed(batch)
        forward = batched(counter, part)
        tokens.logps.sum().backward()
    return forward, batched(counter, part) - forward


def batched(counter: FlopCounterMode, part: str) -> float:
    counts = counter.get_flop_counts()
    name = next(name for name in counts if name.rpartition(".")[2] == part)
    return sum(n for op, n in counts[name].items() if "bmm" in str(op))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_attention_of_every_kind_is_counted_within_its_own(name: str) -> None:
    packed = ready(tiny(name), PACKED, [])
    pairs = some_pairs(packed.lm)
    batch = collate(pairs, range(4), prefix_sharing=True, encoder_decoder=True)
    answers = np.diff(batch.cu_seqlens_q.numpy())
    lengths = np.array([[len(pair.prompt), len(pair.chosen) - 1, len(pair.rejected) - 1] for pair in pairs])
    same = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 9, 2]])
    groups = group(same, lengths, 10**6, apart=True)
    more = {"prompt_attention": int(groups.within.sum()), "cross_attention": int(groups.across.sum())}
    work = Work.of_step(0, 0, groups.attention.sum(), more)
    assert work.attention == (answers * (answers + 1) // 2).sum(), "answers are causal"
    size, full = size_of(packed), work._replace(attention=int((answers**2).sum()))
    assert (size.forward(full), size.backward(full)) == attention_of(packed, batch)
    apart = alone(lengths, apart=True)
    assert apart.within.tolist() == (2 * lengths[:, 0] ** 2).tolist()
    assert apart.across.tolist() == (lengths[:, 0] * lengths[:, 1:].sum(axis=1)).tolist()


@pytest.mark.parametrize("kind", [kind for kind in vision.FAMILIES if kind != "smolvlm"])
def test_attention_of_a_tower_is_that_of_its_images(kind: str) -> None:
    """In windows where it has some, which are taken to be whole; one in five of these is not."""
    lm = tiny_vision_model(tiny_vision_config(kind), 1)
    rows = some_rows(lm)
    packed, batch = ready(lm, vision.implementations(lm.config), []), packed_rows(lm, rows, prefix_sharing=True)
    more = {name: n for name, n in read(lm, rows, batch).items() if name.endswith(ATTENTION)}
    tower = next(name for name, _ in lm.base_model.named_children() if name in PARTS[1])
    expected, windows = attention_of(packed, batch, tower)[0], kind == "qwen2_5_vl"
    assert size_of(packed).forward(Work(0, 0, 0, more)) == pytest.approx(expected, rel=0.1 if windows else 0)


def test_what_checkpointing_computes_again_is_layers_that_a_gradient_comes_to() -> None:
    frozen, whole = (size_of(ready(tiny("bart"), PACKED, freeze)) for freeze in (["encoder", "shared"], []))
    work = Work(10, 5, 0, {"prompts": 100})
    assert whole.recomputed(work) == whole.forward(work._replace(scored=0))
    cross_keys = 2 * 2 * 32 * 32
    assert whole.recomputed(work) - frozen.recomputed(work) == 2 * 100 * (whole.met["prompts"].weights - cross_keys)


def test_tiles_of_a_grid_by_the_tokens_of_an_image() -> None:
    """LLaVA-NeXT, its own sizes: margins without tokens leave some of them open, and all together within 6 %."""
    grid = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    tower = SimpleNamespace(image_size=336, patch_size=14, model_type="clip_vision_model")
    config: Any = SimpleNamespace(
        vision_config=tower, image_grid_pinpoints=grid, model_type="llava_next", vision_feature_select_strategy="default"
    )
    own: Any = object.__new__(LlavaNextProcessor)
    own.__dict__.update(patch_size=14, num_additional_image_tokens=0, image_processor=SimpleNamespace(**vars(config)))
    draws = random.Random(1)
    sizes = [[draws.randint(100, 1600), draws.randint(100, 1600)] for _ in range(400)]
    tokens = np.array([own._get_number_of_features(*size, 336, 336) for size in sizes])
    found = vision.family_of(SimpleNamespace(model_type="llava_next")).reading(tokens, config)  # type: ignore[arg-type]
    assert found["patches"] / 576 == pytest.approx(sum(image_size_to_num_patches(s, grid, 336) for s in sizes), rel=0.06)


# ------------------------------------------------------------------------------------------------ memory of the same models


def kept_by(lm: Any, implementations: Any, batch: PackedBatch) -> int:
    """Bytes that a forward keeps for the backward pass, beside weights."""
    packed, seen = ready(lm, implementations, []), {}
    weights = {p.untyped_storage().data_ptr() for p in lm.parameters()}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage  # which holds its address, so that no other gets it
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed(batch)
    return sum(storage.nbytes() for storage in seen.values())


def numel(parameter: Any) -> int:
    return parameter.numel()


@pytest.mark.parametrize("kind", [kind for kind in vision.FAMILIES if kind != "smolvlm"])
def test_what_a_layer_of_a_tower_keeps(kind: str) -> None:
    """Counted in real layers: two more of them."""

    def tower(layers_of_tower: int) -> tuple[Any, int, Any]:
        config = tiny_vision_config(kind)
        own = config.vision_config
        setattr(own, "depth" if kind.startswith("qwen") else "num_hidden_layers", layers_of_tower)
        own.deepstack_visual_indexes = [0]
        own.fullatt_block_indexes = list(range(layers_of_tower)) if kind == "qwen2_5_vl" else None
        lm = tiny_vision_model(config, 1)
        rows = some_rows(lm)
        batch = packed_rows(lm, rows, prefix_sharing=True)
        return lm, kept_by(lm, vision.implementations(config), batch), read(lm, rows, batch)

    (_, few, _), (lm, many, more) = tower(2), tower(4)
    (stack,) = built.of_model(lm, "vision", numel, None).others
    assert stack.layers == (3 if kind.startswith("llava") else 4), "features of the last but one"
    expected = layers.kept_per_token(stack, Layout("cpu", 4, 1, 2, kernel="sdpa")) * more["places"]
    assert (many - few) / 2 == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "more"),
    [("t5", {}), ("t5", {"feed_forward_proj": "gated-gelu"}), ("bart", {}), ("m2m_100", {"activation_function": "relu"})],
)
def test_what_layers_of_an_encoder_and_a_decoder_keep(name: str, more: dict[str, Any], dtype: torch.dtype) -> None:
    """Counted in real layers, of a prompt of 120 tokens and answers of 60 and 60."""
    mask, ids = np.arange(61) > 0, np.arange(3, 123, dtype=np.int32)
    pair = TokenizedPair(ids, ids[:61], ids[20:81], mask, mask)
    batch = collate([pair], [0], prefix_sharing=True, encoder_decoder=True)

    def model_of(encoder: int, decoder: int) -> Any:
        sizes = {"num_layers": encoder, "num_decoder_layers": decoder, "d_kv": 32, "num_heads": 8, "d_ff": 512}
        if "t5" not in name:
            sizes = {"encoder_layers": encoder, "decoder_layers": decoder, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512}
            sizes["max_position_embeddings"] = 256
        return tiny_model(tiny_encoder_decoder(name, d_model=256, **sizes, **more), 1).to(dtype)

    base = kept_by(model_of(1, 1), PACKED, batch)
    shape = built.of_model(model_of(1, 1), "encoder-decoder", numel, None)
    layout = Layout("cpu", dtype.itemsize, 1, 2, kernel="sdpa")
    counts = {"prompts": 120, "prompt_attention": 120**2, "attention": 2 * 60**2}
    pack = Pack(240, 120, (2 * 120 + 120) / 240, counts)
    for other, stack in ((model_of(3, 1), shape.others[0]), (model_of(1, 3), shape)):
        assert (kept_by(other, PACKED, batch) - base) / 2 == pytest.approx(layers.kept(stack, layout, pack), rel=0.03)
