"""Runs of vision-language models through the launcher: what a step computes is that of plain forwards, whatever the ranks
and ZeRO stage; a run that is interrupted goes on to the bit, and plain transformers generates with what it exports."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from tiny_vision import NAMES, image_rows, save_vision
from transformers import AutoModelForImageTextToText, AutoProcessor

PAIRS = 9
KINDS = ["llava", "llava_next", "idefics3"]  # those whose processors load without torchvision
# Those that have a part for videos, which needs it: without this part, by code in the model's folder, and as they are.
MORE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl"]
NESTED = ("idefics3", "smolvlm")  # take images by rows
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None


def write(folder: Path, kind: str, videos: bool = False, **sections: Any) -> Path:
    save_vision(folder / "model", kind, seed=1, videos=videos)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in image_rows(folder, PAIRS)))
    values = {
        "model": {
            "name_or_path": f"{folder}/model", "dtype": "float32", "trust_remote_code": kind in MORE and not videos,
        },
        "reference": {"store": f"{folder}/reference"},
        "data": {"train": {"path": f"{folder}/rows.jsonl"}, "shuffle": False, "max_length": 512, "tokens_per_pack": 400},
        "objective": {"name": "dpo", "beta": 0.3, "rpo_alpha": 1.0},
        "train": {"pairs_per_step": PAIRS, "max_steps": 1, "max_grad_norm": 0},
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        "output_dir": f"{folder}/run",
    } | sections  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder


def plain_nll(folder: Path, kind: str) -> float:
    """The mean over the chosen answers' tokens of -log p, by one plain forward for each."""
    lm: Any = AutoModelForImageTextToText.from_pretrained(folder / "model").eval()
    words: Any = AutoProcessor.from_pretrained(folder / "model", trust_remote_code=True)
    rows = image_rows(folder, PAIRS)
    return float(np.mean([-logp for row in rows for logp in plain_logps(lm, words, folder, kind, row, row["chosen"])]))


def plain_logps(lm: Any, words: Any, folder: Path, kind: str, row: dict[str, Any], answer: str) -> list[float]:
    """log p of an answer's tokens behind the prompt of a row, by one plain forward."""
    prompt, given = asked_of(words, folder, kind, row)
    asked, made = (words(text=[text], return_tensors="pt", **given) for text in (prompt, f"{prompt}{answer}<|im_end|>"))
    start, ids = asked["input_ids"].shape[1], made["input_ids"]
    with torch.no_grad():
        logps = lm(**made).logits[0, start - 1 : -1].log_softmax(-1)
    return logps.gather(1, ids[0, start:, None])[:, 0].tolist()


def asked_of(words: Any, folder: Path, kind: str, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The prompt of a row as text, and its images as the processor takes them."""
    if isinstance(row["prompt"], str):
        parts = [{"type": "image"}] * len(row["images"]) + [{"type": "text", "text": row["prompt"]}]
    else:
        parts = row["prompt"][0]["content"]
    names = row["images"] or [part["image"] for part in parts if part["type"] == "image"]
    images = [PIL.Image.open(folder / name) for name in names]
    prompt = words.tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    return prompt, {"images": [images] if kind in NESTED else images} if images else {}


VARIANTS = [
    ["data.tokens_per_pack=1"],
    ["data.tokens_per_pack=400", "data.prefix_sharing=false"],
    ["data.tokens_per_pack=100000", "model.gradient_checkpointing=false"],
    ["deepspeed.zero_optimization.stage=1"],
]

FAST = (1, "qwen2_5_vl")
LAYOUTS = [pytest.param(world, kind, marks=pytest.mark.slow) for world in (1, 2) for kind in MORE if (world, kind) != FAST]


@pytest.mark.parametrize(("world", "kind"), [*itertools.product((1, 2), KINDS), FAST, *LAYOUTS])
def test_a_step_is_that_of_plain_forwards_in_every_layout(world: int, kind: str, tmp_path: Path, all_workers) -> None:
    write(tmp_path, kind)
    is_that_of_plain_forwards(tmp_path, kind, all_workers[world])


@pytest.mark.slow
def test_mismatched_pairs_have_the_images_of_their_prompts(tmp_path: Path, all_workers) -> None:
    """KTO's reference point, from the prompt of each row, images included, with the answer of the one before it."""
    kind, folder = "llava", write(tmp_path, "llava", objective={"name": "kto", "beta": 0.3})
    save_vision(folder / "other", kind, seed=2)
    rows = image_rows(folder, PAIRS)
    told = [{k: v for k, v in row.items() if k not in ("chosen", "rejected")} for row in rows]
    told = [row | {"completion": rows[k]["chosen"], "label": k % 2 == 0} for k, row in enumerate(told)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    words: Any = AutoProcessor.from_pretrained(folder / "model")
    prompts = [(asked_of(words, folder, kind, row)[0], row["images"]) for row in rows]
    assert len({str(prompt) for prompt in prompts}) == PAIRS, "each answer would go to the row behind its own"
    points = []
    for policy, reference in (("model", "other"), ("other", "model")):
        sums = []
        for name in (policy, reference):
            lm: Any = AutoModelForImageTextToText.from_pretrained(folder / name).eval()
            one = [sum(plain_logps(lm, words, folder, kind, rows[k], rows[k - 1]["chosen"])) for k in range(PAIRS)]
            sums.append(sum(one) / PAIRS)
        points.append(max(0.0, sums[0] - sums[1]))
        models = [f"model.name_or_path={folder}/{policy}", f"reference.name_or_path={folder}/{reference}"]
        variants = [[*models, *layout] for layout in VARIANTS[:2]]
        ranks = all_workers[2].run("cases:first_steps", config_path=str(folder / "run.yaml"), variants=variants)
        for overrides, result in zip(variants, ranks[0], strict=True):
            assert math.isclose(result["kl"], points[-1], rel_tol=1e-4, abs_tol=1e-4), overrides
    assert max(points) > 0.01, points


@pytest.mark.skipif(not HAS_TORCHVISION, reason="torchvision is not here")
@pytest.mark.slow
@pytest.mark.parametrize("kind", MORE)
def test_so_it_is_with_processors_that_read_videos_too(kind: str, tmp_path: Path, all_workers) -> None:
    write(tmp_path, kind, videos=True)
    is_that_of_plain_forwards(tmp_path, kind, all_workers[2])
    assert train(all_workers[2], tmp_path) == [0, 0]
    assert AutoProcessor.from_pretrained(tmp_path / "run" / "final").video_processor is not None


def is_that_of_plain_forwards(tmp_path: Path, kind: str, workers: Any) -> None:
    expected = plain_nll(tmp_path, kind)
    ranks = workers.run("cases:first_steps", config_path=str(tmp_path / "run.yaml"), variants=VARIANTS)
    first = ranks[0][0]
    for overrides, result in zip(VARIANTS, ranks[0], strict=True):
        assert math.isclose(result["nll_loss"], expected, rel_tol=1e-5), (overrides, result["nll_loss"], expected)
        assert math.isclose(result["loss"], expected + math.log(2), rel_tol=1e-5), overrides
        whole = math.sqrt(sum(float((g**2).sum()) for g in first["gradients"].values()))
        for name, gradient in first["gradients"].items():
            difference = np.linalg.norm(result["gradients"][name] - gradient)
            assert difference <= 1e-4 * np.linalg.norm(gradient) + 1e-6 * whole, (overrides, name)
    assert any(is_of_tower(name) and gradient.any() for name, gradient in first["gradients"].items()), "the tower is trained"


def is_of_tower(name: str) -> bool:
    return "vision" in name or "visual" in name


def train(workers: Any, folder: Path, *overrides: str) -> list[int]:
    return workers.run("cases:run_training", config_path=str(folder / "run.yaml"), overrides=list(overrides))


def undone(folder: Path) -> None:
    """A run as an interruption after step 2 of 4 leaves it."""
    for checkpoint in (folder / "checkpoints").glob("step-*4"):
        shutil.rmtree(checkpoint)
    shutil.rmtree(folder / "final")
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({k: v for k, v in state.items() if k != "summary"} | {"state": "running"}))


LONG: dict[str, Any] = {
    "train": {"pairs_per_step": 3, "max_steps": 4, "learning_rate": 3e-3},
    "checkpoint": {"save_every": 2, "keep_last": 9},
}


@pytest.mark.parametrize(
    ("kind", "world", "stage"),
    [
        ("llava", 2, 3),
        ("llava_next", 1, 1),
        ("idefics3", 2, 1),
        *(pytest.param(kind, 2, 3, marks=pytest.mark.slow) for kind in MORE),
    ],
)
def test_a_run_goes_on_to_the_bit_and_plain_transformers_generates_with_it(
    kind: str, world: int, stage: int, tmp_path: Path, all_workers
) -> None:
    write(tmp_path, kind, **LONG)
    strategy, parts = f"deepspeed.zero_optimization.stage={stage}", tmp_path / "parts"
    assert train(all_workers[world], tmp_path, strategy) == [0] * world
    whole = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert train(all_workers[world], tmp_path, strategy, f"output_dir={parts}") == [0] * world
    undone(parts)
    assert train(all_workers[world], tmp_path, strategy, f"output_dir={parts}") == [0] * world
    again = load_file(parts / "final" / "model.safetensors")
    assert whole.keys() == again.keys()
    assert all(np.array_equal(whole[name], again[name]) for name in whole)

    lm: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "final")
    before = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").state_dict()
    assert any(is_of_tower(name) and not torch.equal(x, before[name]) for name, x in lm.state_dict().items())
    words: Any = AutoProcessor.from_pretrained(tmp_path / "run" / "final", trust_remote_code=True)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    prompt = words.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    image: Any = [PIL.Image.open(tmp_path / "0-0.png")]
    made = words(text=[prompt], images=[image] if kind in NESTED else image, return_tensors="pt")
    answer = lm.generate(**made, max_new_tokens=4, do_sample=False)
    assert made["input_ids"].shape[1] < answer.shape[1] <= made["input_ids"].shape[1] + 4


def test_a_frozen_tower_and_an_adapter_leave_it_as_it_is(tmp_path: Path, all_workers) -> None:
    write(tmp_path, "llava", **LONG)
    frozen = f"output_dir={tmp_path}/frozen"
    assert train(all_workers[1], tmp_path, "model.freeze=[vision_tower]", frozen) == [0]
    folders = tmp_path / "model", tmp_path / "frozen" / "final"
    before, after = (AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in folders)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("vision" in name for name in changed)
    assert train(all_workers[1], tmp_path, "model.lora={r: 4}", f"output_dir={tmp_path}/lora") == [0]
    adapter = load_file(tmp_path / "lora" / "final" / "adapter_model.safetensors")
    assert adapter and all("language_model" in name for name in adapter)
    assert AutoProcessor.from_pretrained(tmp_path / "lora" / "final").image_processor is not None


def test_an_image_that_changes_under_a_run_is_told(tmp_path: Path, all_workers) -> None:
    write(tmp_path, "llava", **LONG)
    assert train(all_workers[1], tmp_path) == [0]
    undone(tmp_path / "run")
    PIL.Image.new("RGB", (60, 40), "red").save(tmp_path / "0-0.png")
    assert train(all_workers[1], tmp_path) == [3], "the pairs have changed since this run began"


@pytest.mark.skipif(HAS_TORCHVISION, reason="torchvision is here")
@pytest.mark.parametrize("kind", MORE)
def test_whose_machine_lacks_torchvision_is_told_what_to_install(kind: str, tmp_path: Path, all_workers) -> None:
    write(tmp_path, kind)
    file = tmp_path / "model" / "processor_config.json"
    own = {name: value for name, value in json.loads(file.read_text()).items() if name != "auto_map"}
    of_videos = {"qwen2_5_vl": "Qwen2VL"}.get(kind, NAMES[kind])
    published = {"processor_class": f"{NAMES[kind]}Processor"}
    published["video_processor"] = {"video_processor_type": f"{of_videos}VideoProcessor"}
    file.write_text(json.dumps(own | published))
    told(all_workers[1], tmp_path, "torchvision", "pip install 'dspref[vision]'")


def test_a_processor_with_code_of_its_own_has_to_be_trusted(tmp_path: Path, all_workers) -> None:
    write(tmp_path, "qwen2_vl")
    told(all_workers[1], tmp_path, "code of its own", "set model.trust_remote_code: true", "model.trust_remote_code=false")


def told(workers: Any, folder: Path, what: str, fix: str, *overrides: str) -> None:
    """A run ends before it begins, by one line with the remedy."""
    ((code, said),) = workers.run("cases:command_line", arguments=[["--config", f"{folder}/run.yaml", *overrides]])[0]
    assert code == 2 and said.count("\n") == 1, said
    assert what in said.lower() and f"fix: {fix}" in said and not (folder / "run").exists(), said
