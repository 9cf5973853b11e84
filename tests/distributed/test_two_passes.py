"""Objectives that couple the pairs of a step: the pass that looks ahead, and the mean that BCO carries from step to step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_layout_invariance import assert_same_gradients
from tiny import preference_rows, save_tiny, save_tokenizer, tiny_config


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-passes")
    config = tiny_config("qwen2", save_tokenizer(folder / "tokenizer"), attention_dropout=0.2)
    save_tiny(folder / "policy", config, seed=1)
    for name, count, seed in (("pairs", 12, 3), ("held_out", 5, 4)):
        text = "".join(json.dumps(row) + "\n" for row in preference_rows(count, seed))
        (folder / f"{name}.jsonl").write_text(text)
    model = {"name_or_path": f"{folder}/policy", "tokenizer_name_or_path": f"{folder}/tokenizer", "dtype": "float32"}
    values = {
        "model": model,
        "data": {
            "train": {"path": f"{folder}/pairs.jsonl"},
            "eval": {"path": f"{folder}/held_out.jsonl"},
            "tokens_per_pack": 300,
        },
        "objective": {"name": "dpo", "loss_type": "bco_pair"},
        "train": {"pairs_per_step": 6, "max_steps": 4, "learning_rate": 3e-3, "eval_every": 1, "max_grad_norm": 0},
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        "output_dir": f"{folder}/run",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


@pytest.mark.parametrize("world", [1, 2])
def test_dropout_is_the_same_in_both_passes(world, run_file, all_workers):
    """A coupled loss with weight 0 makes two passes of one; the gradient is that of the one, with dropout on."""
    objectives = "{name: dpo}", "{name: dpo, loss_type: [sigmoid, bco_pair], loss_weights: [1, 0]}"
    common = ["model.disable_dropout=false", "reference.mode=engine", "data.tokens_per_pack=1"]
    variants = [[*common, f"objective={objective}"] for objective in objectives]
    one, two = all_workers[world].run("cases:first_steps", config_path=str(run_file), variants=variants)[0]
    assert one["packs"] > 1
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    assert one["rewards/margins"] != 0, "dropout should set policy and reference apart"
    assert_same_gradients(two["gradients"], {n: g.astype(np.float64) for n, g in one["gradients"].items()}, "two passes")


@pytest.mark.parametrize("world", [1, 2])
def test_bcos_delta_is_the_mean_of_the_steps_so_far_and_rests_in_evaluation(world, run_file, all_workers, tmp_path):
    run = tmp_path / "run"
    done = all_workers[world].run("cases:run_training", config_path=str(run_file), overrides=[f"output_dir={run}"])
    assert done == [0] * world
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training, evaluations = ([r for r in records if name in r] for name in ("loss", "eval_loss"))
    means = [(r["rewards/chosen"] + r["rewards/rejected"]) / 2 for r in training]
    assert abs(means[-1]) > 1e-3, "a delta that stays at zero shows nothing"
    for k, (record, evaluation) in enumerate(zip(training, evaluations, strict=True), start=1):
        assert record["bco_delta"] == pytest.approx(sum(means[:k]) / k, rel=1e-5, abs=1e-9)
        assert evaluation["eval_bco_delta"] == pytest.approx(record["bco_delta"], rel=1e-12)
