"""The packed forward of vision-language models against one plain transformers forward per sequence, in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_model
from tiny_vision import IMAGE, image, processor, tiny_vision_config, tiny_vision_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText
from vision_oracle import Row, by_side, gradients, layout_of, packed_rows, plain_logps, row_of, some_rows

from dspref.config import ModelSection
from dspref.data.batch import PackedBatch, collate
from dspref.data.images import Pictures, RowImages
from dspref.data.truncate import TokenizedPair
from dspref.errors import ConfigError
from dspref.model import packed as model
from dspref.model import tiles, vision
from dspref.model.attention import PACKED, Segments
from dspref.model.generation import Passage, Style, generate, plain_attention


def exact_logps(packed: model.PackedCausalLM, batch: PackedBatch) -> Tensor:
    """Of a pack, with its head in float64 too, which `scored_logps` has in fp32."""
    hidden = packed.reader.read(packed.lm, batch, Segments(batch, "sdpa"), False).last_hidden_state[0][batch.predictor_index]
    head: Any = packed.lm.get_output_embeddings()
    logps = head(hidden).log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    return by_side(logps if batch.scored_index is None else logps[batch.scored_index], batch)


def packed_of(lm: Any) -> model.PackedCausalLM:
    lm = copy.deepcopy(lm)
    lm.set_attn_implementation(vision.implementations(lm.config))
    return model.PackedCausalLM(lm, "sdpa")


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        # A key's bias moves no softmax: its gradient is noise around 0, and the floor is for it.
        allowed = tolerance * max(float(gradient.abs().max()), 1e-3 * scale)
        assert (found[name] - gradient).abs().max() <= allowed, name


# transformers computes norms and rotations in fp32, whatever the weights are: gradients differ by its rounding.
EXACT, ROUNDED = 1e-9, 1e-6


@pytest.mark.parametrize("prefix_sharing", [True, False])
@pytest.mark.parametrize("kind", vision.FAMILIES)
def test_a_pack_is_one_plain_forward_per_sequence(kind: str, prefix_sharing: bool) -> None:
    """Text alone, several images, one; the same row with another answer, the same text with another image."""
    lm = tiny_vision_model(tiny_vision_config(kind), seed=1).double()
    rows = some_rows(lm)
    expected = plain_logps(lm, rows)
    expected_gradients = gradients(lm, expected)
    assert any("vision" in name or "visual" in name for name in expected_gradients), "towers take part"

    packed = packed_of(lm)
    ours = exact_logps(packed, packed_rows(lm, rows, prefix_sharing))
    assert ((ours - expected).abs() <= EXACT * expected.abs()).all()
    assert_same_gradients(gradients(packed.lm, ours), expected_gradients, ROUNDED)


@pytest.mark.parametrize("kind", [kind for kind in vision.FAMILIES if kind != "smolvlm"])  # idefics3, by one more package
def test_prompts_as_the_familys_processor_writes_them(kind: str, tmp_path: Path) -> None:
    """Tiles, rows and lines have tokens of their own, which the processor puts between those of the image."""
    words, stands_for_image = processor(kind, tmp_path)
    token = words.tokenizer.convert_tokens_to_ids("<|image_pad|>" if kind.startswith("qwen") else stands_for_image)
    lm = tiny_vision_model(tiny_vision_config(kind, len(words.tokenizer), token), seed=1).double()
    images = [image(56, 84, seed=1), image(20, 60, seed=2)]
    text = f"ab{stands_for_image}cd{stands_for_image}?"
    made = words(text=[text], images=[images] if vision.FAMILIES[kind].in_one_row else images, return_tensors="pt")
    prompt = made["input_ids"][0].numpy().astype(np.int32)
    tensors = {name: made[name] for name in vision.FAMILIES[kind].reads}
    chosen, rejected = np.arange(5, 9, dtype=np.int32), np.arange(9, 16, dtype=np.int32)
    rows = [Row(TokenizedPair(prompt, chosen, rejected), tensors, vision.row_images(made, lm.config, b"both"))]
    batch = packed_rows(lm, rows, prefix_sharing=True)
    expected = plain_logps(lm, rows)
    assert ((exact_logps(packed_of(lm), batch) - expected).abs() <= EXACT * expected.abs()).all()


@pytest.mark.parametrize("checkpointing", [False, True, pytest.param("offload", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", vision.FAMILIES)
def test_the_whole_forward_in_training(kind: str, checkpointing: Any) -> None:
    """With the log-probs of `scored_logps`, which are fp32; what is computed again in the backward has its images too."""
    lm = tiny_vision_model(tiny_vision_config(kind), seed=1).double()
    rows, packed = some_rows(lm), packed_of(lm)
    expected = plain_logps(lm, rows)
    expected_gradients = gradients(lm, expected)
    section = ModelSection(name_or_path="x", dtype="float32", gradient_checkpointing=checkpointing)
    tiles.put_into(packed.lm, 3 if checkpointing == "offload" else False)
    model.prepare_for_training(packed, section, with_collision=False)
    assert any(getattr(part, "gradient_checkpointing", False) for part in packed.modules()) == bool(checkpointing)
    batch = packed_rows(lm, rows, prefix_sharing=True)
    tokens, routing = packed(batch)
    assert routing is None
    ours = by_side(tokens.logps, batch)
    assert ((ours - expected).abs() <= 1e-5 * expected.abs()).all()
    assert_same_gradients(gradients(packed.lm, ours), expected_gradients, 1e-5)


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_an_image_is_read_once_however_many_sequences_have_it(prefix_sharing: bool) -> None:
    lm = tiny_vision_model(tiny_vision_config("qwen2_vl"), seed=1)
    rows = some_rows(lm)
    batch = packed_rows(lm, rows, prefix_sharing)
    assert batch.images is not None
    grids = batch.images.tensors["image_grid_thw"].tolist()
    assert grids == [[1, 4, 6], [1, 2, 6], [1, 2, 4], [1, 2, 4]], "two of the first row; one of the third, and its like; one"
    read: list[int] = []
    packed = packed_of(lm)
    packed.lm.model.visual.register_forward_hook(lambda tower, args, output: read.append(len(output.last_hidden_state)))  # type: ignore[union-attr,operator,arg-type]
    packed(batch)
    assert read == [24 + 12 + 8 + 8]
    prompts = sum(int((row.pair.prompt == IMAGE).sum()) for row in rows)
    taken = prompts - 2 if prefix_sharing else 2 * prompts  # the fourth row's prompt is the third's
    assert len(batch.images.feature_index) == taken == int((batch.input_ids == IMAGE).sum())


def test_equal_text_around_other_images_is_another_prompt() -> None:
    lm = tiny_vision_model(tiny_vision_config("llava"), seed=1)
    row = row_of(lm, ["wide"], 3, (2, 6, 5))
    other = copy.deepcopy(row)
    assert len(packed_rows(lm, [row, row], True).input_ids) == len(row.pair.prompt) + 6 + 5
    assert other.images is not None
    other.images = RowImages(other.images.tensors, b"other")
    assert len(packed_rows(lm, [row, other], True).input_ids) == 2 * (len(row.pair.prompt) + 6 + 5)


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("kind", vision.FAMILIES)
def test_a_pack_without_images_runs_the_tower_for_nothing(kind: str, count: int) -> None:
    """Every parameter that has a gradient where there are images has one, of zero in the tower; the log-probs are those of
    text alone. So too of a filler."""
    lm = tiny_vision_model(tiny_vision_config(kind), seed=1).double()
    with_images = set(gradients(lm, plain_logps(lm, [row_of(lm, ["large"], 3, (2, 6, 5))])))
    rows = [row_of(lm, [], seed, (6, 4, 9)) for seed in range(count)]
    packed = packed_of(lm)
    batch = packed_rows(lm, rows, prefix_sharing=True)
    assert batch.images is not None and not len(batch.images.feature_index)
    assert len(batch.images.tensors["pixel_values"]) == len(layout_of(lm).blank.tensors["pixel_values"])
    ours = exact_logps(packed, batch)
    found = gradients(packed.lm, ours)
    assert found.keys() == with_images
    if not count:
        assert not any(gradient.any() for gradient in found.values())
        return
    expected = plain_logps(lm, rows)
    assert ((ours - expected).abs() <= EXACT * expected.abs()).all()
    expected_gradients = gradients(lm, expected)
    assert all(name in expected_gradients or not gradient.any() for name, gradient in found.items())
    assert_same_gradients({name: found[name] for name in expected_gradients}, expected_gradients, ROUNDED)


@pytest.mark.parametrize("kind", ["qwen2_vl", "smolvlm"])
def test_a_text_alone_needs_no_pictures(kind: str) -> None:
    lm = tiny_vision_model(tiny_vision_config(kind), seed=1).double()
    rows = [row_of(lm, [], seed, (6, 4, 9)) for seed in (1, 2)]
    batch = collate([row.pair for row in rows], range(2), prefix_sharing=True)
    expected = plain_logps(lm, rows)
    assert ((exact_logps(packed_of(lm), batch) - expected).abs() <= EXACT * expected.abs()).all()


def test_positions_need_no_weights_and_go_on_behind_a_shared_prompt() -> None:
    lm = tiny_vision_model(tiny_vision_config("qwen2_5_vl"), seed=1)
    row = row_of(lm, ["large"], 1, (5, 3, 2))
    with torch.device("meta"):
        skeleton = type(lm)(copy.deepcopy(lm.config))
    assert row.images is not None
    pictures = Pictures([row.images], vision.image_layout(skeleton, row.images))
    positions = collate([row.pair], [0], prefix_sharing=True, pictures=pictures).position_ids
    text, rest = [0, 1, 2, 3, 4], [8, 9, 10]  # an image of 2 x 3 features is 3 long
    chosen, rejected = [11, 12, 13], [11, 12]
    assert positions.tolist() == [
        [*text, 5, 5, 5, 5, 5, 5, *rest, *chosen, *rejected],
        [*text, 5, 5, 5, 6, 6, 6, *rest, *chosen, *rejected],
        [*text, 5, 6, 7, 5, 6, 7, *rest, *chosen, *rejected],
    ]


def test_images_move_with_their_pack() -> None:
    lm = tiny_vision_model(tiny_vision_config("llava_next"), seed=1)
    batch = packed_rows(lm, [row_of(lm, ["large"], 1, (5, 3, 2))], True)
    moved = batch.to("meta").images
    assert batch.images is not None and moved is not None
    assert moved.tensors.keys() == batch.images.tensors.keys() == {"pixel_values", "image_sizes"}
    assert all(tensor.is_meta for tensor in (*moved.tensors.values(), moved.feature_index))


@pytest.mark.parametrize("kind", vision.FAMILIES)
@pytest.mark.parametrize("more", [-1, 1])
def test_a_tower_must_make_as_many_features_as_there_are_tokens(kind: str, more: int) -> None:
    """Else an image token would take another's: the processor's settings are not the model's."""
    lm = tiny_vision_model(tiny_vision_config(kind), seed=1)
    row = row_of(lm, ["wide"], 3, (2, 6, 5))
    place = int(np.flatnonzero(row.pair.prompt == IMAGE)[0])
    changed = np.delete(row.pair.prompt, place) if more < 0 else np.insert(row.pair.prompt, place, IMAGE)
    row.pair = row.pair._replace(prompt=changed.astype(np.int32))
    told = r"its processor writes \d+ tokens for images of which its tower makes \d+ features"
    with pytest.raises(ConfigError, match=told):
        packed_of(lm)(packed_rows(lm, [row], True))


def test_image_tokens_are_those_of_images() -> None:
    lm = tiny_vision_model(tiny_vision_config("llava"), seed=1)
    row = row_of(lm, ["wide"], 3, (2, 6, 5))
    answered = row.pair._replace(rejected=np.array([3, IMAGE], dtype=np.int32))
    longer = row.pair._replace(prompt=np.append(row.pair.prompt, np.int32(IMAGE)))
    for pair, images in [(row.pair, None), (answered, row.images)]:
        with pytest.raises(ValueError, match="pair 0 of a pack: image tokens without an image"):
            packed_rows(lm, [Row(pair, {}, images)], True)
    with pytest.raises(ValueError, match="prompts with images are not scored"):
        collate([row.pair], [0], prefix_sharing=True, score_prompt=True, pictures=Pictures([row.images], layout_of(lm)))
    with pytest.raises(ValueError, match="pair 1 of a pack: 5 image tokens, and elsewhere another number"):
        packed_rows(lm, [row, Row(longer, {}, row.images)], True)


@pytest.mark.parametrize("kind", ["qwen3_vl", "internvl"])
def test_without_a_pack_the_model_is_as_its_authors_wrote_it(kind: str) -> None:
    lm = tiny_vision_model(tiny_vision_config(kind), seed=1)
    rows, packed = some_rows(lm), packed_of(lm)
    packed(packed_rows(lm, rows, True))
    packed.lm.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.equal(plain_logps(packed.lm, rows), plain_logps(lm, rows))


@pytest.mark.parametrize("kind", vision.FAMILIES)
def test_the_kernel_of_packs_is_the_language_models_alone(kind: str, tmp_path: Any) -> None:
    lm = tiny_vision_model(tiny_vision_config(kind), seed=1)
    packed_of(lm).lm.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == [type(lm).__name__]
    loaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path, config=config, attn_implementation=vision.implementations(config)
    )
    assert loaded.config.text_config._attn_implementation == PACKED
    assert loaded.config.vision_config._attn_implementation == "sdpa"
    rows = some_rows(lm)
    batch = packed_rows(lm, rows, True)
    with torch.no_grad():
        tokens, _ = model.PackedCausalLM(loaded, "sdpa")(batch)
        assert (by_side(tokens.logps, batch) - plain_logps(lm, rows)).abs().max() <= 2e-6


def test_a_tower_under_the_kernel_of_packs_is_refused() -> None:
    """It would read its images as if they were the pack's sequences."""
    lm = tiny_vision_model(tiny_vision_config("qwen2_5_vl"), seed=1)
    batch = packed_rows(lm, some_rows(lm), True)
    lm.set_attn_implementation(PACKED)
    with pytest.raises(ConfigError, match="VisionAttention does not pass a pack's layout on"):
        model.PackedCausalLM(lm, "sdpa")(batch)


@pytest.mark.parametrize("kind", vision.FAMILIES)
def test_half_precision_follows_fp32(kind: str) -> None:
    """Pixels come in fp32, whatever the weights are."""
    lm = tiny_vision_model(tiny_vision_config(kind), seed=1)
    batch = packed_rows(lm, some_rows(lm), True)
    with torch.no_grad():
        exact, half = (packed_of(lm.to(dtype))(batch)[0].logps for dtype in (torch.float32, torch.bfloat16))
    assert 0 < (half - exact).abs().max() <= 0.1
    assert (half - exact).mean().abs() <= 0.01


def test_text_is_read_on_without_a_pack() -> None:
    """As for answers that are written between steps."""
    lm = tiny_vision_model(tiny_vision_config("qwen2_5_vl"), seed=1)
    packed, ids = packed_of(lm), torch.tensor([[5, 9, 17, 200]])
    passage = Passage(ids, torch.ones_like(ids), torch.arange(4)[None])
    with torch.no_grad(), plain_attention(packed.lm):
        logits, _ = packed(passage)
        assert (logits - lm(input_ids=ids).logits[:, -1]).abs().max() <= 1e-6
    assert packed.lm.config.text_config._attn_implementation == PACKED
    assert packed.lm.config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", vision.FAMILIES)
def test_answers_in_a_batch_are_those_of_generate(kind: str) -> None:
    """Prompts of many lengths, with several images, one and none; and a batch without any image."""
    lm = tiny_vision_model(tiny_vision_config(kind), seed=1).double()
    rows, packed, style = some_rows(lm), packed_of(lm), Style(6)
    expected = []
    for row in rows:
        ids = torch.from_numpy(row.pair.prompt).long()[None]
        types = {"mm_token_type_ids": (ids == IMAGE).int()} if kind.startswith("qwen") and row.processed else {}
        how: Any = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        made = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **row.processed, **types, **how)
        expected.append(made[0, ids.shape[1] :].tolist())
    assert len(set(map(tuple, expected))) > 2 and expected[-2] != expected[-1], "the image decides"
    for some in (range(len(rows)), [1]):
        pictures = Pictures([rows[k].images for k in some], layout_of(lm))
        with plain_attention(packed.lm):
            found = generate(
                packed, [rows[k].pair.prompt.tolist() for k in some], style, torch.device("cpu"), pictures=pictures
            )
        assert found == [expected[k] for k in some]


def small(kind: str, **towers: Any) -> Any:
    """A config of a family that is refused."""
    return AutoConfig.for_model(kind, **towers)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: small("paligemma"), "paligemma lets the tokens of an image see each other in both directions"),
        (lambda: small("gemma3"), "gemma3 lets the tokens of an image see each other in both directions"),
        (lambda: small("llava", vision_config={"model_type": "pixtral"}), "llava has a tower for images of many sizes"),
        (lambda: small("llava_onevision"), "llava_onevision is not known to read images in a pack; families: qwen2_vl, "),
    ],
)
def test_other_families_are_refused_by_name(config: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.name_or_path: {reason}"):
        vision.family_of(config())


def test_a_model_without_a_tower_takes_no_images() -> None:
    batch = packed_rows(tiny_vision_model(tiny_vision_config("llava"), seed=1), [], True)
    lm = tiny_model(tiny_config("qwen2"), seed=1)
    lm.set_attn_implementation(PACKED)
    with pytest.raises(ConfigError, match="qwen2 is not known to read images in a pack"):
        model.PackedCausalLM(lm, "sdpa")(batch)
