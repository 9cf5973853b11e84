"""Answers of vision-language models on the way: those of plain transformers with what its processor makes of the images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from peft import PeftModel
from test_vision_runs import train, undone, write
from tiny_vision import image, image_rows, talkative
from transformers import AutoModelForImageTextToText, AutoProcessor

HELD_OUT, NEW = 4, 10
PARTS = [{"type": "text", "text": "is"}, {"type": "image", "image": "own/b.png"}, {"type": "text", "text": "this?"}]
OWN: list[dict[str, Any]] = [
    {"prompt": "text alone"},
    {"prompt": "and what?", "images": ["own/a.png", "own/b.png"], "chosen": "this"},
    {"prompt": "and what?", "images": ["own/b.png", "own/a.png"]},
    {"prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": PARTS}]},
]


def make(folder: Path, kind: str, **sections: Any) -> None:
    """A run that samples: held-out rows lie in a folder of their own, and so do those of `log.samples_file`."""
    asking = {"samples": HELD_OUT, "samples_file": f"{folder}/own.jsonl", "generation": {"max_new_tokens": NEW}}
    write(folder, kind, **{"log": asking, "train": {"pairs_per_step": 3, "max_steps": 4, "learning_rate": 3e-3}} | sections)
    talkative(folder / "model")
    for name in ("held", "own"):
        (folder / name).mkdir()
    held = "".join(json.dumps(row) + "\n" for row in image_rows(folder / "held", HELD_OUT))
    (folder / "held" / "rows.jsonl").write_text(held)
    for k, name in enumerate("ab"):
        PIL.Image.fromarray(image(40, 60 + 8 * k, seed=90 + k)).save(folder / "own" / f"{name}.png")
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in OWN))


def asked_of(folder: Path) -> list[tuple[list[dict[str, Any]], list[str]]]:
    """Messages and paths of the images of all prompts, as anyone would write them."""
    found = []
    for place, rows in (("held/", image_rows(folder / "held", HELD_OUT)), ("", OWN)):
        for row in rows:
            names = row.get("images") or []
            if isinstance(row["prompt"], str):
                parts = [{"type": "image"}] * len(names) + [{"type": "text", "text": row["prompt"]}]
                turns = [{"role": "user", "content": parts}]
            else:
                turns = [
                    turn
                    if isinstance(turn["content"], list)
                    else {**turn, "content": [{"type": "text", "text": turn["content"]}]}
                    for turn in row["prompt"]
                ]
                names = [part["image"] for turn in turns for part in turn["content"] if part["type"] == "image"]
            found.append((turns, [place + name for name in names]))
    return found


def answers_of(weights: Path, folder: Path, kind: str) -> list[str]:
    """By `generate`, one prompt at a time."""
    is_adapter = (weights / "adapter_config.json").exists()
    lm: Any = AutoModelForImageTextToText.from_pretrained(folder / "model" if is_adapter else weights)
    lm = (PeftModel.from_pretrained(lm, str(weights)) if is_adapter else lm).eval()
    words: Any = AutoProcessor.from_pretrained(folder / "model")
    texts = []
    for turns, names in asked_of(folder):
        images = [PIL.Image.open(folder / name) for name in names]
        given: Any = {"images": [images] if kind == "idefics3" else images} if images else {}
        made = words(text=[words.apply_chat_template(turns, add_generation_prompt=True)], return_tensors="pt", **given)
        made = {name: x for name, x in made.items() if name != "token_type_ids"}
        ids = lm.generate(**made, max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0, made["input_ids"].shape[1] :]
        texts.append(words.tokenizer.decode(ids, skip_special_tokens=True))
    return texts


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("kind", "world", "stage", "mode"),
    [
        ("llava", 2, 3, "engine"),
        ("llava_next", 2, 3, "stored"),
        ("idefics3", 1, 1, "engine"),
        ("llava", 1, 1, "adapter"),
        pytest.param("llava_next", 2, 3, "adapter", marks=pytest.mark.slow),
        pytest.param("idefics3", 2, 3, "stored", marks=pytest.mark.slow),
        pytest.param("llava_next", 1, 2, "engine", marks=pytest.mark.slow),
        pytest.param("llava", 1, 2, "stored", marks=pytest.mark.slow),
    ],
)
def test_answers_are_those_of_plain_transformers(
    kind: str, world: int, stage: int, mode: str, tmp_path: Path, all_workers: Any
) -> None:
    """Of the policy at the beginning and at the end, and of the reference, where some ranks have prompts without images."""
    make(tmp_path, kind, reference={"mode": mode} | ({"store": f"{tmp_path}/reference"} if mode == "stored" else {}))
    changes = [f"deepspeed.zero_optimization.stage={stage}", f"data.eval={{path: {tmp_path}/held/rows.jsonl}}"]
    changes += ["model.lora={r: 4, lora_alpha: 16}"] if mode == "adapter" else []
    assert train(all_workers[world], tmp_path, *changes) == [0] * world
    initial, final = answers_of(tmp_path / "model", tmp_path, kind), answers_of(tmp_path / "run" / "final", tmp_path, kind)
    rows = rows_of(tmp_path / "run")
    first, last = ([row for row in rows if row["step"] == step] for step in (0, 4))
    assert [row["policy"] for row in first] == initial and [row["policy"] for row in last] == final
    assert [row["reference"] for row in first] == [row["reference"] for row in last] == initial
    assert initial != final and len(set(final)) > 3
    assert any(answers[-3] != answers[-2] for answers in (initial, final)), "the images, and their order, decide"
    names = [[name.removeprefix("held/") for name in names] for _, names in asked_of(tmp_path)]
    assert [row["images"] for row in first] == names
    assert [row["image_folder"] for row in first if row["images"]] == [f"{tmp_path}/held"] * 3 + [str(tmp_path)] * 3
    assert [row["prompt"].count("<image>") for row in first] == list(map(len, names))
    assert first[-3]["prompt"] == "user\n<image><image>and what?\nassistant\n"
    assert first[-1]["prompt"].split("user\n")[1] == "is<image>this?\nassistant\n"


@pytest.mark.slow
def test_a_run_that_goes_on_asks_no_reference_again_unless_an_image_is_another(tmp_path: Path, all_workers: Any) -> None:
    make(tmp_path, "llava", checkpoint={"save_every": 2, "keep_last": 9})
    changes = [f"data.eval={{path: {tmp_path}/held/rows.jsonl}}", "log.sample_every=1"]
    assert train(all_workers[1], tmp_path, *changes) == [0]
    run, whole = tmp_path / "run", rows_of(tmp_path / "run")
    undone(run)
    assert train(all_workers[1], tmp_path, *changes) == [0] and rows_of(run) == whole
    undone(run)
    PIL.Image.new("RGB", (60, 40), "red").save(tmp_path / "own" / "a.png")
    assert train(all_workers[1], tmp_path, *changes) == [0]
    again = rows_of(run)
    kept, made = ([row for row in again if (row["step"] <= 2) is early] for early in (True, False))
    assert kept == whole[: len(kept)]
    for row, before in zip(made, whole[len(kept) :], strict=True):
        assert (row["reference"] != before["reference"]) == ("own/a.png" in row["images"])


def test_what_is_wrong_with_an_image_of_ones_own_prompts_is_told(tmp_path: Path, all_workers: Any) -> None:
    make(tmp_path, "llava")
    changes = [f"data.eval={{path: {tmp_path}/held/rows.jsonl}}"]
    (tmp_path / "own" / "b.png").unlink()
    assert train(all_workers[1], tmp_path, *changes) == [3]
    assert not (tmp_path / "run").exists()
