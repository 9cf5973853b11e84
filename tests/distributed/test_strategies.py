"""Every DeepSpeed strategy that is shipped trains, in every precision that it accepts, to the same place."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from tiny import preference_rows, save_tiny, save_tokenizer, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer
from workers import SECONDS_PER_CASE, Workers

STRATEGIES = sorted(str(path) for path in Path(__file__).parents[2].glob("ds_configs/*.json"))


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strategies")
    save_tiny(folder / "model", tiny_config("llama", save_tokenizer(folder / "tokenizer")), seed=4)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(12, seed=7)))
    values = {
        "model": {
            "name_or_path": f"{folder}/model",
            "tokenizer_name_or_path": f"{folder}/tokenizer",
            "dtype": "float32",
        },
        "data": {
            "train": {"path": f"{folder}/pairs.jsonl"},
            "eval": {"path": f"{folder}/pairs.jsonl", "split": "train"},
            "tokens_per_pack": 400,
        },
        "objective": {"name": "dpo", "beta": 0.5},
        "train": {
            "pairs_per_step": 4,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
        },
        "output_dir": f"{folder}/run",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def train(workers, run_file: Path, run: Path, *overrides: str, seconds: float = SECONDS_PER_CASE) -> list[float]:
    arguments = {"config_path": str(run_file), "overrides": [*overrides, f"output_dir={run}"]}
    assert workers.run("cases:run_training", seconds=seconds, **arguments) == [0] * workers.size
    assert AutoTokenizer.from_pretrained(run / "final").chat_template
    return losses(run)


@pytest.fixture(scope="module")
def expected(run_file, all_workers, tmp_path_factory) -> tuple[list[float], dict[str, np.ndarray]]:
    run = tmp_path_factory.mktemp("expected") / "run"
    trace = train(all_workers[1], run_file, run, "deepspeed={zero_optimization: {stage: 0}}")
    return trace, load_file(run / "final" / "model.safetensors")


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda path: Path(path).stem)
def test_every_strategy_learns_the_same(strategy, run_file, expected, all_workers, tmp_path):
    trace = train(all_workers[2], run_file, tmp_path / "run", f"deepspeed={strategy}")
    assert math.isclose(trace[0], math.log(2), abs_tol=1e-5)
    assert np.allclose(trace, expected[0], rtol=1e-4) and trace[1] != trace[0]
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    for name, weight in expected[1].items():
        assert np.allclose(final[name], weight, atol=2e-5), name


@pytest.mark.parametrize(("dtype", "stage"), [("bfloat16", 1), ("bfloat16", 2), ("bfloat16", 3)])
def test_half_precision_follows_fp32(dtype, stage, run_file, expected, all_workers, tmp_path):
    zero = f"deepspeed.zero_optimization.stage={stage}"
    trace = train(all_workers[2], run_file, tmp_path / "run", zero, f"model.dtype={dtype}")
    assert math.isclose(trace[0], math.log(2), abs_tol=1e-3)
    assert np.allclose(trace, expected[0], rtol=0.05)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final", dtype="auto")
    assert str(lm.dtype).endswith(dtype)


def test_fp16_is_refused_where_the_device_has_none(run_file, all_workers, tmp_path):
    arguments = {"config_path": str(run_file), "overrides": ["model.dtype=float16", f"output_dir={tmp_path}/run"]}
    assert all_workers[2].run("cases:run_training", **arguments) == [4, 4]
    assert not (tmp_path / "run").exists()


def test_the_exported_model_gives_the_trained_models_log_probs(run_file, all_workers, tmp_path):
    """A live reference that is the export of a run: its loss starts at ln 2 only if the weights are those of the policy."""
    train(all_workers[2], run_file, tmp_path / "first", "deepspeed.zero_optimization.stage=3")
    final = f"{tmp_path}/first/final"
    again = train(
        all_workers[1], run_file, tmp_path / "second", f"model.name_or_path={final}", f"reference.name_or_path={final}",
        "reference.mode=engine", "deepspeed.zero_optimization.stage=2",
    )  # fmt: skip
    assert math.isclose(again[0], math.log(2), abs_tol=1e-5) and again[1] != again[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_deepspeeds_cpu_adam_learns_the_same(run_file, expected, all_workers, tmp_path):
    """Compiled on first use: a minute, or several beside other work."""
    trace = train(
        all_workers[1], run_file, tmp_path / "run", "deepspeed=ds_configs/zero3_offload.json", "train.optim=cpu_adam",
        seconds=800,
    )  # fmt: skip
    assert np.allclose(trace, expected[0], rtol=1e-4)


@pytest.mark.slow
def test_loading_under_zero3_never_holds_the_model_on_one_rank(run_file, tmp_path):
    config = tiny_config("llama", 260, hidden_size=1024, intermediate_size=4096, num_hidden_layers=10)
    save_tiny(tmp_path / "model", config, seed=1)
    overrides = [f"model.name_or_path={tmp_path}/model", "deepspeed.zero_optimization.stage=3"]
    # glibc would keep freed blocks of a layer's size; told to give them back, the figure is what is really held.
    ranks = Workers(2, MALLOC_MMAP_THRESHOLD_=str(2**20))
    try:
        measured = ranks.run("cases:memory_of_loading", config_path=str(run_file), overrides=overrides)
    finally:
        ranks.stop()
    for rank in measured:
        assert rank["own"] < 0.51 * rank["whole"], rank
        assert rank["peak"] < 0.75 * rank["whole"], rank
