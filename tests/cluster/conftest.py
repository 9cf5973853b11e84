"""One run for all tests on a cluster, and what becomes of it where nothing interrupts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jobs import EVERY, ROOT, STEPS, weights
from tiny import preference_rows, save_tiny, save_tokenizer, tiny_config


@pytest.fixture(scope="session")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    save_tiny(folder / "model", tiny_config("qwen2", save_tokenizer(folder / "tokenizer")), seed=3)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(18, seed=5)))
    model = {"name_or_path": f"{folder}/model", "tokenizer_name_or_path": f"{folder}/tokenizer"}
    values = {
        "model": {**model, "dtype": "float32"},
        "data": {"train": {"path": f"{folder}/pairs.jsonl"}, "tokens_per_pack": 300},
        "train": {"pairs_per_step": 4, "max_steps": STEPS, "learning_rate": 3e-3},
        "deepspeed": {"zero_optimization": {"stage": 2}},
        "checkpoint": {"save_every": EVERY},
        "output_dir": "unset",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


@pytest.fixture(scope="session")
def whole(run_file: Path) -> str:
    """The weights of a run of two ranks that knows of no SLURM and that nothing interrupts."""
    run = run_file.parent / "whole"
    ranks = ["torch.distributed.run", "--nproc-per-node=2"]
    command = [*ranks, "launch/train.py", "--config", str(run_file), f"output_dir={run}"]
    subprocess.run([sys.executable, "-m", *command], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=200)
    return weights(run)
