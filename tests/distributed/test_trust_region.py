"""TR-DPO: the reference follows the policy exactly, on every layout, across a resume, without gathering a model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from test_resume import forget_everything_after, training_records
from tiny import preference_rows, save_tiny, save_tokenizer, tiny_config
from workers import Workers

STEPS = 6


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reference = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 2}
    return write_run(tmp_path_factory.mktemp("trust_region"), reference)


def write_run(folder: Path, reference: dict) -> Path:
    """A run of six steps whose reference follows the policy."""
    config = tiny_config("qwen2", save_tokenizer(folder / "tokenizer"), tie_word_embeddings=True)
    save_tiny(folder / "model", config, seed=4)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(14, seed=7)))
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(3, seed=8)))
    values = {
        "model": {
            "name_or_path": f"{folder}/model",
            "tokenizer_name_or_path": f"{folder}/tokenizer",
            "dtype": "float32",
        },
        "reference": reference,
        "data": {
            "train": {"path": f"{folder}/pairs.jsonl"},
            "eval": {"path": f"{folder}/held_out.jsonl"},
            "tokens_per_pack": 400,
        },
        "objective": {"name": "dpo", "beta": 0.5},
        "train": {"pairs_per_step": 4, "max_steps": STEPS, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
        | {"warmup_ratio": 0.0},
        "checkpoint": {"save_every": 3, "keep_last": 9},
        "output_dir": f"{folder}/run",
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


def train(workers, run_file: Path, run: Path, *overrides: str) -> list[dict]:
    arguments = {"config_path": str(run_file), "overrides": [*overrides, f"output_dir={run}"]}
    assert workers.run("cases:run_training", **arguments) == [0] * workers.size
    return training_records(run)


def stage(number: int, threshold: int = 0) -> str:
    """Threshold 0: everything is in shards; large: small parameters stay gathered, of which a sync must drop the copies."""
    more = f", stage3_param_persistence_threshold: {threshold}" if number == 3 else ""
    return f"deepspeed={{zero_optimization: {{stage: {number}{more}}}}}"


# The layouts that differ most stand for all in the short run.
SLOW = pytest.mark.slow
LAYOUTS = [
    (2, stage(3, 10**6), ()),
    (2, stage(2), ("reference.offload=cpu",)),
    pytest.param(1, stage(0), (), marks=SLOW),
    pytest.param(1, stage(3), (), marks=SLOW),
    pytest.param(2, stage(1), (), marks=SLOW),
    pytest.param(2, stage(2), ("reference.zero_stage=3",), marks=SLOW),
    pytest.param(2, stage(3), (), marks=SLOW),
    pytest.param(2, stage(3), ("reference.offload=cpu",), marks=SLOW),
]


@pytest.mark.parametrize(("world", "zero", "more"), LAYOUTS)
def test_a_hard_update_after_every_step_keeps_the_loss_at_ln_2(world, zero, more, run_file, all_workers, tmp_path):
    every_step = ("reference.ref_model_mixup_alpha=1", "reference.ref_model_sync_steps=1", "train.max_steps=4")
    records = train(all_workers[world], run_file, tmp_path / "run", zero, *every_step, *more)
    losses = [r.get("loss", r.get("eval_loss")) for r in records]
    assert len(losses) == 5 and all(math.isclose(loss, math.log(2), abs_tol=1e-5) for loss in losses), losses
    logps = [r["logps/chosen"] for r in records if "loss" in r]
    assert len(set(logps)) == 4, "the policy does move"


@pytest.fixture(scope="module")
def expected(run_file, all_workers, tmp_path_factory) -> list[dict]:
    return train(all_workers[1], run_file, tmp_path_factory.mktemp("expected") / "run", stage(0))


@pytest.mark.slow
@pytest.mark.parametrize(("world", "zero", "more"), LAYOUTS)
def test_losses_do_not_depend_on_the_layout(world, zero, more, run_file, expected, all_workers, tmp_path):
    records = train(all_workers[world], run_file, tmp_path / "run", zero, *more)
    for record, other in zip(records, expected, strict=True):
        for name in record.keys() & {"loss", "eval_loss", "rewards/chosen", "eval_rewards/margins"}:
            assert math.isclose(record[name], other[name], rel_tol=1e-4, abs_tol=2e-5), (record["step"], name)
    losses = [r["loss"] for r in expected if "loss" in r]
    assert not math.isclose(losses[1], math.log(2), abs_tol=1e-3) and not math.isclose(losses[3], losses[1], abs_tol=1e-4)


@pytest.mark.parametrize(("world", "zero", "more"), LAYOUTS)
@pytest.mark.parametrize(("dtype", "alpha"), [("float32", 0.6), ("bfloat16", 0.02)])
def test_the_reference_is_the_mean_that_the_formula_gives(dtype, alpha, world, zero, more, run_file, all_workers):
    """A slow mean of 16-bit weights shows the fp32 masters: rounded to bfloat16, its steps would vanish."""
    if dtype == "bfloat16" and "stage: 0" in zero:
        zero = stage(1)
    rate = "train.learning_rate=1e-3" if dtype == "float32" else "train.learning_rate=2e-2"
    overrides = [zero, *more, f"model.dtype={dtype}", f"reference.ref_model_mixup_alpha={alpha}", rate]
    overrides += ["reference.ref_model_sync_steps=2", "train.max_steps=5"]
    arguments = {"config_path": str(run_file), "overrides": overrides, "steps": 5}
    states = all_workers[world].run("cases:followed_reference", **arguments)[0]
    initial = {
        name: weight.astype(np.float64) for name, weight in load_file(run_file.parent / "model/model.safetensors").items()
    }
    if dtype == "bfloat16":
        initial = {name: rounded(weight) for name, weight in initial.items()}
    mean = dict(initial)
    for number, state in enumerate(states, start=1):
        assert state["policy"].keys() == state["reference"].keys() >= mean.keys()
        if number % 2 == 0:
            mean = {name: alpha * state["policy"][name] + (1 - alpha) * value for name, value in mean.items()}
        for name, value in mean.items():
            # In 16 bits a value that lies half-way may be rounded to either side.
            kwargs = {"rtol": 0, "atol": 1e-6} if dtype == "float32" else {"rtol": 2**-8, "atol": 1e-7}
            assert np.allclose(state["reference"][name], value, **kwargs), (number, name)
    moved = [name for name in mean if not np.array_equal(states[0]["reference"][name], states[-1]["reference"][name])]
    assert len(moved) > len(mean) / 2
    if dtype == "bfloat16":
        name = "model.layers.0.mlp.up_proj.weight"
        held, naive = states[-1]["reference"][name], rounded(initial[name])
        for state in states[1::2]:
            naive = rounded(alpha * state["policy"][name] + (1 - alpha) * naive)
        assert np.abs(held - mean[name]).mean() < 0.8 * np.abs(naive - mean[name]).mean()


def rounded(weight: np.ndarray) -> np.ndarray:
    import torch

    return torch.from_numpy(np.asarray(weight, dtype=np.float32)).bfloat16().double().numpy()


@pytest.mark.parametrize(
    ("world", "zero", "more"),
    [
        (2, stage(3, 10**6), ("model.dtype=bfloat16",)),
        pytest.param(1, stage(2), (), marks=SLOW),
        pytest.param(2, stage(1), ("reference.zero_stage=3", "model.dtype=bfloat16"), marks=SLOW),
        pytest.param(2, stage(3), ("reference.offload=cpu",), marks=SLOW),
    ],
)
def test_a_resume_across_a_sync_ends_bit_identical(world, zero, more, run_file, all_workers, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    records = train(all_workers[world], run_file, whole, zero, *more)
    shutil.copytree(whole, resumed)
    forget_everything_after(resumed, 3)  # one sync lies before, one after
    assert train(all_workers[world], run_file, resumed, zero, *more) == records
    one, other = (run / "final" / "model.safetensors" for run in (whole, resumed))
    assert one.read_bytes() == other.read_bytes()
    # Without the saved reference the run would go on from the initial weights.
    files = sorted(path.name for path in (whole / "checkpoints/step-000003").glob("reference*"))
    sharded = "stage: 3" in zero or "reference.zero_stage=3" in more
    expected = ["reference-rank-0.safetensors", "reference-rank-1.safetensors"] if sharded else ["reference.safetensors"]
    assert files == expected


def test_a_reference_that_is_made_otherwise_cannot_follow(run_file, all_workers, tmp_path):
    """Another family; the same one with a head of its own, of which only a part would follow."""
    vocabulary = json.loads((run_file.parent / "model/config.json").read_text())["vocab_size"]
    save_tiny(tmp_path / "llama", tiny_config("llama", vocabulary), seed=1)
    save_tiny(tmp_path / "untied", tiny_config("qwen2", vocabulary, tie_word_embeddings=False), seed=1)
    for name in ("llama", "untied"):
        overrides = [f"reference.name_or_path={tmp_path}/{name}", f"output_dir={tmp_path}/run"]
        assert all_workers[1].run("cases:run_training", config_path=str(run_file), overrides=overrides) == [2], name


# glibc would keep freed blocks; told to give them back, the figures are what is really held.
HONEST_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


@pytest.mark.soak
def test_memory_of_a_reference_on_two_ranks(run_file, tmp_path):
    """`stored` keeps one model in memory, `engine` two; TR-DPO moves without a third, BEMA with two more; no rank ever holds
    a whole model."""
    vocabulary = json.loads((run_file.parent / "model/config.json").read_text())["vocab_size"]
    config = tiny_config("llama", vocabulary, hidden_size=1024, intermediate_size=4096, num_hidden_layers=10)
    save_tiny(tmp_path / "model", config, seed=1)
    save_tiny(tmp_path / "other", config, seed=2)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(4, seed=7)))
    common = [f"model.name_or_path={tmp_path}/model", stage(3), f"data.train.path={tmp_path}/pairs.jsonl", "data.eval=null"]
    common += ["reference.sync_ref_model=false", "reference.ref_model_mixup_alpha=0.6", "reference.ref_model_sync_steps=512"]
    variants = {
        "stored": ["reference.mode=stored", f"reference.store={tmp_path}/a"],
        "stored, another model": [
            "reference.mode=stored", f"reference.store={tmp_path}/b", f"reference.name_or_path={tmp_path}/other",
        ],
        "engine": ["reference.mode=engine", "reference.offload=cpu"],
        "moving": ["reference.mode=engine", "reference.offload=cpu", "reference.sync_ref_model=true"],
        "bema": ["reference.mode=engine", "reference.offload=cpu", "reference.bema={update_freq: 512}"],
    }  # fmt: skip
    for name, overrides in variants.items():
        ranks = Workers(2, **HONEST_MALLOC)
        try:
            measured = ranks.run("cases:memory_of_reference", config_path=str(run_file), overrides=[*common, *overrides])
        finally:
            ranks.stop()
        for rank in measured:
            print(name, {key: round(value) for key, value in rank.items()})
            # BEMA's mean and beginning are two models more, over both ranks.
            kept = {"engine": 0.5, "moving": 0.5, "bema": 1.5}.get(name, 0.0)
            assert abs(rank["kept"] - kept * rank["whole"]) < 0.1 * rank["whole"], (name, rank)
            assert rank["building"] - max(kept - 0.5, 0) * rank["whole"] < 0.8 * rank["whole"], (name, rank)
            assert rank["moving"] < 0.2 * rank["steady"], (name, rank)
