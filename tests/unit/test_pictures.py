"""The picture example's data is what its generator writes, its captions are right, and its held-out pictures are new."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from dspref import config
from dspref.data.sight import load_processor
from dspref.training import trainer

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "launch" / "pictures"

_spec = importlib.util.spec_from_file_location("pictures_generate", FOLDER / "generate.py")
assert _spec and _spec.loader
generate: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def test_the_committed_files_are_the_generators_output() -> None:
    for path, content in generate.files().items():
        assert (FOLDER / path).read_bytes() == content, f"{path}: run python launch/pictures/generate.py"


def seen(path: str) -> str:
    """What a picture shows, by its pixels."""
    pixels = np.asarray(PIL.Image.open(io.BytesIO((FOLDER / path).read_bytes())).convert("RGB")).astype(int)
    shape = pixels.max(axis=-1) > 60
    red, green, blue = pixels[shape].mean(axis=0)
    colour = "white" if min(red, green, blue) > 150 else ("red", "green", "blue")[int(np.argmax([red, green, blue]))]
    ys, xs = np.where(shape)
    height, width = np.ptp(ys) + 1, np.ptp(xs) + 1
    if height < width:
        return f"a {colour} bar"
    return f"a {colour} {'square' if shape.sum() == height * width else 'cross'}"


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl"])
def test_every_chosen_caption_is_right_and_every_rejected_one_wrong(name: str) -> None:
    for row in rows(name):
        assert seen(row["images"][0]) == row["chosen"] != row["rejected"]


def test_no_held_out_picture_is_trained_on() -> None:
    train, held_out = (
        {(FOLDER / row["images"][0]).read_bytes() for row in rows(name)} for name in ("train.jsonl", "eval.jsonl")
    )
    assert len(held_out) == generate.HELD_OUT and len(train) == generate.PICTURES - generate.HELD_OUT
    assert not train & held_out


def test_the_processor_loads_from_its_folder() -> None:
    assert type(load_processor(str(FOLDER / "model"))).__name__ == "LlavaProcessor"


@pytest.mark.slow
def test_it_learns_what_held_out_pictures_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    trainer.train(config.load("launch/configs/pictures.yaml", [f"output_dir={tmp_path}/run"]))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval_rewards/accuracies"] for line in lines if "eval_loss" in line][-1] >= 0.9
    said = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert sum(row["policy"] == row["chosen"] for row in said if row["step"] == 400) >= 2
    assert all(len(row["images"]) == 1 and row["image_folder"].endswith("launch/pictures") for row in said)
