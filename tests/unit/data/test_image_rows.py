"""Rows with images: where these stand in a conversation, what their tokens are, what is refused, and what a store keeps."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_vision import TEMPLATE, image, image_rows, processor, tiny_vision_config
from transformers import AutoModelForImageTextToText

from dspref.data.formats import to_preference
from dspref.data.image_files import MAX_BYTES, MAX_PIXELS, Picture, decode, look
from dspref.data.image_rows import IMAGE
from dspref.data.image_store import decoded
from dspref.data.prompts import read_prompts
from dspref.data.rows import RowError
from dspref.data.sight import see, sight_of
from dspref.data.sources import Source
from dspref.data.store import PairStore, load_pairs
from dspref.data.truncate import Limits
from dspref.errors import ConfigError, DataError
from dspref.model import processors, vision
from dspref.reference.store import sequence_keys
from dspref.training.answers import text_of_prompt

ANSWERS = {"chosen": "a cat", "rejected": "a dog"}
PART = {"type": "image"}


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def seeing(kind: str, folder: Path) -> Any:
    words, stands_for_image = processor(kind, folder)
    words.chat_template = words.tokenizer.chat_template = TEMPLATE.replace("IMAGE", stands_for_image)
    token = words.tokenizer.convert_tokens_to_ids(words.image_token)
    with torch.device("meta"):
        skeleton = AutoModelForImageTextToText.from_config(tiny_vision_config(kind, len(words.tokenizer), token))
    see(words.tokenizer, processors.sight(words, skeleton, torch.float32))
    return words.tokenizer


def stored(
    folder: Path, rows: list[dict[str, Any]], kind: str = "llava", on_bad_row: str = "error", **limits: Any
) -> PairStore:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(str(folder / "rows.jsonl"))
    tokenizer = seeing(kind, folder / "words")
    return load_pairs(
        [source], tokenizer, Limits(**limits), on_bad_row=on_bad_row, cache_dir=folder / "cache", log=lambda line: None
    )


def save(path: Path, height: int = 40, width: int = 60, seed: int = 1, **how: Any) -> str:
    PIL.Image.fromarray(image(height, width, seed)).save(path, **how)
    return path.name


@pytest.mark.parametrize(
    ("row", "content", "images"),
    [
        ({"prompt": user([PART, {"type": "text", "text": "what?"}]), "images": ["a.png"]}, f"{IMAGE}what?", ["a.png"]),
        ({"prompt": user([{"type": "text", "text": "what?"}, {**PART, "image": "a.png"}])}, f"what?{IMAGE}", ["a.png"]),
        ({"prompt": user([{"type": "image_url", "image_url": {"url": "a.png"}}])}, IMAGE, ["a.png"]),
        ({"prompt": user([{**PART, "path": "b.png"}, PART]), "images": ["a.png"]}, IMAGE * 2, ["b.png", "a.png"]),
        ({"prompt": user("<image> or <image>?"), "images": ["a.png", "b.png"]}, f"{IMAGE} or {IMAGE}?", ["a.png", "b.png"]),
        ({"prompt": user("what?"), "images": ["a.png", "b.png"]}, f"{IMAGE}{IMAGE}what?", ["a.png", "b.png"]),
        ({"prompt": "what?", "image": "a.png"}, f"{IMAGE}what?", ["a.png"]),
        ({"prompt": "what?", "images": []}, "what?", []),
    ],
    ids=lambda value: None,
)
def test_where_the_images_of_a_row_stand(row: dict[str, Any], content: str, images: list[str]) -> None:
    found = to_preference({**row, **ANSWERS}, chat_model=True)
    assert found.prompt == user(content)
    assert list(found.images) == images


def test_the_same_text_about_another_image_is_another_message() -> None:
    """Two whole conversations, which share what their prompts share."""
    ask = [{**PART, "image": "a.png"}, {"type": "text", "text": "what?"}]
    chosen, rejected = ([*user(ask), {"role": "assistant", "content": answer}] for answer in ("a cat", "a dog"))
    assert list(to_preference({"chosen": chosen, "rejected": rejected}).images) == ["a.png"]
    other = [{**ask[0], "image": "b.png"}, ask[1]]
    with pytest.raises(RowError, match="share no first message"):
        to_preference({"chosen": chosen, "rejected": [*user(other), *rejected[1:]]})


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl", "llava", "llava_next", "idefics3", "internvl"])
def test_prompts_hold_the_tokens_that_the_familys_processor_writes(kind: str, tmp_path: Path) -> None:
    names = [save(tmp_path / "a.png", 40, 60), save(tmp_path / "b.png", 30, 90)]
    store = stored(tmp_path, [{"prompt": user("so?"), "images": names, **ANSWERS}], kind)
    words, stands_for_image = processor(kind, tmp_path / "others")
    text = f"<|im_start|>user\n{stands_for_image * 2}so?<|im_end|>\n<|im_start|>assistant\n"
    images: Any = [PIL.Image.open(tmp_path / name) for name in names]
    made = words(text=[text], images=[images] if kind == "idefics3" else images, return_tensors="pt")
    assert store[0].prompt.tolist() == made["input_ids"][0].tolist()
    pictures = store.pictures([0])
    assert pictures is not None and pictures.rows[0] is not None
    read = pictures.rows[0].tensors
    config = tiny_vision_config(kind, len(words.tokenizer), words.tokenizer.convert_tokens_to_ids(words.image_token))
    expected = vision.row_images(made, config, b"").tensors
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl", "llava", "llava_next", "idefics3", "internvl"])
def test_prompts_without_answers_are_those_of_pairs_and_what_the_familys_processor_makes(kind: str, tmp_path: Path) -> None:
    """Of a file of prompts: their tokens, what a plain model is given of them, and the text that people are shown."""
    names = [save(tmp_path / "a.png", 40, 60), save(tmp_path / "b.png", 30, 90)]
    parts = [{**PART, "image": names[0]}, {"type": "text", "text": "or"}, {**PART, "image": names[1]}]
    rows: list[dict[str, Any]] = [
        {"prompt": user("so?"), "images": names}, {"prompt": "so?", "images": names}, {"prompt": "so?"},
        {"prompt": user(parts)}, {"prompt": "<image>or<image>", "images": names},
    ]  # fmt: skip
    data = (tmp_path / "a.png").read_bytes()
    rows.append({"prompt": "so?", "images": ["data:image/png;base64," + base64.b64encode(data).decode(), names[1]]})
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = seeing(kind, tmp_path / "words")
    found, sight = read_prompts(tmp_path / "asked.jsonl", tokenizer), sight_of(tokenizer)
    pair = stored(tmp_path, [{**rows[0], **ANSWERS}], kind)
    assert sight is not None and found[0].ids == found[1].ids == pair[0].prompt.tolist() and found[3].ids == found[4].ids
    inline = [f"sha256:{hashlib.sha256(data).hexdigest()}", names[1]]
    assert [own.shown.names for own in found] == [names, names, [], names, names, inline] and found[5].ids == found[0].ids
    texts = ["".join(text_of_prompt(tokenizer, own.ids, own.shown).split()) for own in found]
    both, alone, around = "user<image><image>so?assistant", "userso?assistant", "user<image>or<image>assistant"
    assert texts == [both, both, alone, around, around, both]
    words, stands_for_image = processor(kind, tmp_path / "others")
    for own, text in ((found[0], f"{stands_for_image * 2}so?"), (found[3], f"{stands_for_image}or{stands_for_image}")):
        prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        images: Any = [PIL.Image.open(tmp_path / name) for name in names]
        made = words(text=[prompt], images=[images] if kind == "idefics3" else images, return_tensors="pt")
        ids = np.asarray(own.ids)
        assert own.ids == made["input_ids"][0].tolist()
        assert sight.collapsed(ids, own.shown.pictures).tolist() == words.tokenizer(prompt)["input_ids"]
        given = sight.given(ids, decoded(own.shown))
        assert given.keys() | {"input_ids", "attention_mask"} == made.keys() - {"token_type_ids"}
        assert all(torch.equal(given[name], torch.as_tensor(made[name])) for name in given)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "so?", "images": ["none.png"]}, "images[0]: {}/none.png: no such file; fix: check the path"),
        ({"prompt": "so?", "images": ["rows.txt"]}, "images[0]: no image of a known format"),
        ({"prompt": "so?", "images": ["https://a.b/c.png"]}, "is a URL, and nothing is fetched from the network"),
        ({"prompt": "<image>", "images": []}, "1 image tokens in the prompt, and 0 images"),
        ({"prompt": user("<image>"), "images": ["a.png", "a.png"]}, "images: 2 images, and 1 places for one in the prompt"),
        ({"prompt": "so?", "videos": ["a.mp4"]}, "videos: videos are not read"),
    ],
)
def test_prompts_whose_images_cannot_be_had_are_told(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "rows.txt").write_text("no image")
    (tmp_path / "asked.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError) as caught:
        read_prompts(tmp_path / "asked.jsonl", seeing("llava", tmp_path / "words"))
    assert f"{tmp_path}/asked.jsonl:1: " in str(caught.value) and said.format(tmp_path) in str(caught.value)


def test_images_for_a_model_of_text_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": "so?", "images": ["a.png"]}))
    tokenizer = processor("llava", tmp_path / "words")[0].tokenizer
    with pytest.raises(DataError, match=r"asked\.jsonl:1: images: the model reads text alone"):
        read_prompts(tmp_path / "asked.jsonl", tokenizer)


def test_a_store_knows_its_images_by_their_content(tmp_path: Path) -> None:
    rows = image_rows(tmp_path, 6)
    store = stored(tmp_path, rows)
    assert len(store) == 6
    pictures = store.pictures(range(6))
    assert pictures is not None
    assert [row is not None for row in pictures.rows] == [True, True, False] * 2
    again = stored(tmp_path, rows)
    assert (again.key, again.address) == (store.key, store.address)
    keys = sequence_keys(store)
    save(tmp_path / "0-0.png", seed=99)
    with pytest.raises(DataError, match=r"rows.jsonl:1: images\[0\]: .*0-0.png: has changed since it was looked at"):
        store.pictures([0])
    (tmp_path / "0-0.png").rename(tmp_path / "aside.png")
    os.mkfifo(tmp_path / "0-0.png")  # which nobody writes, and a plain read would wait for
    with pytest.raises(DataError, match=r"images\[0\]: .*0-0.png: is a pipe"):
        store.pictures([0])
    (tmp_path / "aside.png").rename(tmp_path / "0-0.png")
    other = stored(tmp_path, rows)
    assert other.key != store.key and other.address != store.address
    assert (other[0].prompt == store[0].prompt).all(), "an image of the same size has the same tokens"
    changed = (sequence_keys(other) != keys).any(axis=(1, 2))
    assert changed.tolist() == [True, False, False, False, False, False]


def test_prompts_with_other_images_are_other_prompts(tmp_path: Path) -> None:
    names = [save(tmp_path / "a.png", seed=1), save(tmp_path / "b.png", seed=2), save(tmp_path / "c.png", seed=1)]
    rows = [{"prompt": user("so?"), "images": [name], "chosen": f"{k}", "rejected": "no"} for k, name in enumerate(names)]
    first, second, third = stored(tmp_path, rows).same[:, 0].tolist()
    assert first == third != second


def test_bytes_in_rows_are_read_as_files_are(tmp_path: Path) -> None:
    name = save(tmp_path / "a.png")
    inline = "data:image/png;base64," + base64.b64encode((tmp_path / name).read_bytes()).decode()
    store = stored(tmp_path, [{"prompt": user("so?"), "images": [source], **ANSWERS} for source in (name, inline)])
    pictures = store.pictures([0, 1])
    assert pictures is not None
    first, second = pictures.rows
    assert first is second and first is not None
    held = io.BytesIO()
    PIL.Image.open(tmp_path / name).save(held, "PNG")
    for value in ({"bytes": held.getvalue(), "path": None}, PIL.Image.open(tmp_path / name), held.getvalue()):
        found = look(value, tmp_path, "images[0]")
        assert (found.height, found.width, found.path) == (40, 60, None)
        assert np.array_equal(np.asarray(decode(found.data, "x")), image(40, 60, 1))


def test_scored_answers_about_an_image_are_pairs_about_it(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    answers = {"completions": ["a dog", "a cat", "a cow"], "scores": [2, 3, 1]}
    store = stored(tmp_path, [{"prompt": "what?", "images": ["a.png"], **answers}])
    pair = stored(tmp_path, [{"prompt": "what?", "images": ["a.png"], **ANSWERS}])
    assert len(store) == 3 and len(set(store.image_digests(range(3)))) == 1
    assert any(all((a == b).all() for a, b in zip(store[k][:3], pair[0][:3])) for k in range(3))


def test_bytes_in_json_are_base64(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    text = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    wanted = look("a.png", tmp_path, "x").digest
    lines = base64.encodebytes((tmp_path / "a.png").read_bytes()).decode()
    named = f"data:image/png;base64,{lines}"
    for value in ({"bytes": text, "path": None}, {"bytes": f"data:image/png;base64,{text}"}, {"bytes": lines}, named):
        assert look(value, tmp_path, "x").digest == wanted


def test_an_empty_cell_is_no_image_and_a_named_column_must_be_there(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text("prompt,images,chosen,rejected\nwhat?,a.png,a cat,a dog\nand?,,a cat,a dog\n")
    tokenizer = seeing("llava", tmp_path / "words")
    common: Any = {"on_bad_row": "error", "cache_dir": tmp_path / "cache", "log": lambda line: None}
    store = load_pairs([Source(str(tmp_path / "rows.csv"))], tokenizer, Limits(), **common)
    assert [bool(digest) for digest in store.image_digests([0, 1])] == [True, False]
    named = Source(str(tmp_path / "rows.csv"), columns={"images": "imags"})
    with pytest.raises(DataError, match=r"rows.csv:2: images: no column 'imags' among .*did you mean 'images'\?"):
        load_pairs([named], tokenizer, Limits(), **common)


@pytest.mark.parametrize("name", ["patch_size", "num_additional_image_tokens", "vision_feature_select_strategy"])
def test_all_that_a_processor_is_told_is_in_its_digest(name: str, tmp_path: Path) -> None:
    before = seeing("llava", tmp_path).sight.digest
    same, other = (seeing("llava", tmp_path).sight for _ in range(2))
    setattr(other.processor, name, {"patch_size": 7, "num_additional_image_tokens": 0}.get(name, "full"))
    assert same.digest == before != other.digest


def test_a_processor_must_be_the_models_own(tmp_path: Path) -> None:
    words, _ = processor("llava_next", tmp_path)
    token = words.tokenizer.convert_tokens_to_ids(words.image_token)
    with torch.device("meta"):
        llava = AutoModelForImageTextToText.from_config(tiny_vision_config("llava", len(words.tokenizer), token))
        next_ = AutoModelForImageTextToText.from_config(tiny_vision_config("llava_next", len(words.tokenizer), 7))
    with pytest.raises(ConfigError, match="a LlavaNextProcessor, and a llava reads by a LlavaProcessor; use the"):
        processors.sight(words, llava, torch.float32)
    with pytest.raises(ConfigError, match=f"writes images by token {token}, and the model has 7"):
        processors.sight(words, next_, torch.float32)


def test_what_an_older_processor_leaves_out_the_models_config_says(tmp_path: Path) -> None:
    words, _ = processor("llava", tmp_path)
    words.patch_size = words.vision_feature_select_strategy = None
    token = words.tokenizer.convert_tokens_to_ids(words.image_token)
    with torch.device("meta"):
        skeleton = AutoModelForImageTextToText.from_config(tiny_vision_config("llava", len(words.tokenizer), token))
    sight = processors.sight(words, skeleton, torch.float32)
    assert (words.patch_size, words.vision_feature_select_strategy) == (14, "default")
    assert sight.layout.token == token


def test_an_image_is_upright_as_its_camera_says(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a.jpg", 40, 60, exif=exif)
    found = look("a.jpg", tmp_path, "x")
    assert (found.height, found.width) == (60, 40)
    assert decode((tmp_path / "a.jpg").read_bytes(), "x").size == (40, 60)


def bomb(path: Path, width: int = 10_000, height: int = 9_000) -> str:
    """A PNG of a few hundred bytes that says it has too many pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    )
    return path.name


def cut(path: Path, share: float) -> str:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path.name


CONVERSATION = user([PART, {"type": "text", "text": "so?"}])
MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "missing file": ({"images": ["none.png"]}, r"images\[0\]: .*none.png: no such file; fix: check the path; it is"),
    "URL": ({"images": ["https://a.b/c.png"]}, r"images\[0\]: .*is a URL, and nothing is fetched.*; fix: fetch it"),
    "folder": ({"images": ["folder"]}, r"images\[0\]: .*folder: .*fix: check the path"),
    "no image": ({"images": ["text.png"]}, r"images\[0\]: no image of a known format"),
    "empty file": ({"images": ["empty.png"]}, r"images\[0\]: no image of a known format"),
    "cut PNG": ({"images": ["cut.png"]}, r"images\[0\]: broken image: "),
    "cut JPEG": ({"images": ["cut.jpg"]}, r"images\[0\]: broken image: the file ends too early"),
    "bomb": ({"images": ["bomb.png"]}, rf"images\[0\]: 10,000 x 9,000 pixels, more than the {MAX_PIXELS:,}"),
    "number": ({"images": [3]}, r"images\[0\]: int, and no image"),
    "null": ({"images": [None]}, r"images\[0\]: NoneType|images\[0\]: null, and no image"),
    "empty path": ({"images": [""]}, r"images\[0\]: an empty text, and no image"),
    "object": ({"images": [{"file": "a.png"}]}, r"images\[0\]: an object with \['file'\], and no image"),
    "bytes as numbers": ({"images": {"bytes": [1, 2, 3]}}, r"images\[0\]: list for bytes; fix: write base64"),
    "bytes as text": ({"images": [{"bytes": "hello"}]}, r"images\[0\]: broken base64"),
    "object of nulls": ({"images": [{"bytes": None}]}, r"images\[0\]: NoneType, and no image|images\[0\]: null"),
    "too large a file": (
        {"images": ["large.png"]},
        rf"images\[0\]: \S*large.png: 67,108,865 bytes, more than the {MAX_BYTES:,} that are read; fix: make it smaller$",
    ),
    "base64 without its name": ({"images": ["iVBORw0KGgo" * 30]}, r"images\[0\]: bytes as text, and no path; fix: begin it"),
    "of nobody": ({"images": ["~nobody-is-it/a.png"]}, r"images\[0\]: ~nobody-is-it/a.png: no such user; fix: write"),
    "data without base64": ({"images": ["data:image/svg+xml;utf8,<svg/>"]}, r"images\[0\]: bytes as text, and no path"),
    "beyond PIL's own limit": ({"images": ["huge.png"]}, rf"images\[0\]: more than the {MAX_PIXELS:,} pixels that are read"),
    "base64": ({"images": ["data:image/png;base64,@@"]}, r"images\[0\]: broken base64"),
    "too many": ({"images": ["a.png", "a.png"]}, r"images: 2 images, and 1 places for one in the prompt; fix: give as many"),
    "too few": ({"images": []}, r"images: 0 images, and 1 places for one"),
    "in an answer": (
        {"images": ["a.png"], "chosen": [{"role": "assistant", "content": [PART]}]},
        "chosen: an image in an answer",
    ),
    "token in a text": (
        {"images": ["a.png"], "prompt": user([PART, {"type": "text", "text": "<image>?"}])},
        "images: 2 image tokens in the prompt, and 1 images; fix: take '<image>' out",
    ),
    "token in an answer": ({"images": ["a.png"], "rejected": "<image>"}, "images: an image token in an answer"),
    "video": ({"images": ["a.png"], "videos": ["a.mp4"]}, "videos: videos are not read"),
    "video part": (
        {"images": [], "prompt": user([{"type": "video", "video": "a"}])},
        r"prompt\[0\].content\[0\]: 'video' is no text part, and no image",
    ),
    "part without a path": (
        {"images": [], "prompt": user([{**PART, "image": 4}])},
        r"prompt\[0\].content\[0\]: int, and no path",
    ),
    "two columns": ({"images": ["a.png"], "image": "a.png"}, "images: the columns images and image both hold some"),
    "plain text": ({"images": ["a.png"], "prompt": "so?", "as": "text"}, "images: a text has no place for an image"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_row_is_one_line(name: str, tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    save(tmp_path / "cut.png")
    save(tmp_path / "cut.jpg")
    cut(tmp_path / "cut.png", 0.6), cut(tmp_path / "cut.jpg", 0.6)
    bomb(tmp_path / "bomb.png")
    bomb(tmp_path / "huge.png", 20_000, 20_000)
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    more, expected = MALFORMED[name]
    how = more.get("as")
    good = {"prompt": CONVERSATION, "images": ["a.png"], **ANSWERS}
    row = {**good, **{key: value for key, value in more.items() if key != "as"}}
    rows = [row] if how else [good, row]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    tokenizer = seeing("llava", tmp_path / "words")
    sources = [Source(str(tmp_path / "rows.jsonl"), as_=how)]
    common: Any = {"cache_dir": tmp_path / "cache", "log": lambda line: None}
    with pytest.raises(DataError) as caught:
        load_pairs(sources, tokenizer, Limits(), on_bad_row="error", **common)
    said = str(caught.value)
    assert "\n" not in said and "; fix: " in said
    assert re.match(rf"{re.escape(str(tmp_path))}/rows.jsonl:{1 if how else 2}: ({expected})", said), said
    if not how:
        store = load_pairs(sources, tokenizer, Limits(), on_bad_row="drop", **common)
        assert len(store) == 1 and sum(store.report["dropped"].values()) == 1


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
def test_no_image_loses_a_token_by_truncation(mode: str, tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    front = [PART, {"type": "text", "text": "word " * 40}]
    back = front[::-1]
    rows = [{"prompt": user(content), "images": ["a.png"], **ANSWERS} for content in (front, back)]
    limits: dict[str, Any] = {"max_length": 60, "truncation_mode": mode}
    with pytest.raises(DataError, match="images: longer than the limits, and what would be cut has tokens of an image"):
        stored(tmp_path, rows, **limits)
    kept = stored(tmp_path, rows, on_bad_row="drop", **limits)
    assert kept.rows.tolist() == [1 if mode == "keep_end" else 0]
    whole = stored(tmp_path, rows)
    token = tiny_image_token(tmp_path)
    assert (kept[0].prompt == token).sum() == (whole[0].prompt == token).sum() > 0


def tiny_image_token(folder: Path) -> int:
    words, _ = processor("llava", folder / "words")
    return words.tokenizer.convert_tokens_to_ids(words.image_token)


def test_a_model_of_text_reads_no_images(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": CONVERSATION, "images": ["a.png"], **ANSWERS}))
    words, _ = processor("llava", tmp_path / "words")
    words.tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    source = Source(str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=r"rows.jsonl:1: images: the model reads text alone; fix: use a "):
        load_pairs(
            [source], words.tokenizer, Limits(), on_bad_row="error", cache_dir=tmp_path / "cache", log=lambda line: None
        )


def test_sizes_are_learned_as_the_processor_counts(tmp_path: Path) -> None:
    """Of the first sizes by blank images, of later ones by its own count, where that was right."""
    for kind in ("qwen2_vl", "idefics3"):
        sight: Any = seeing(kind, tmp_path / kind).sight
        for k in range(7):
            size = (40 + 20 * k, 60)
            prompt, mask = sight.expanded(np.array([5, sight.token, 6]), [Picture("x", "", *size)])
            expected = sight._processed([PIL.Image.new("RGB", (60, size[0]))])["input_ids"][0].tolist()
            assert prompt.tolist() == [5, *expected, 6]
            assert mask.tolist() == [False, *[True] * len(expected), False]
        assert sight._counts == (kind == "qwen2_vl")
