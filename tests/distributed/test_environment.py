"""What a machine lacks ends a run before it begins: one line, exit code 4, no run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run of a model with 70 billion weights, of which there is the config only."""
    layers = {"num_hidden_layers": 80, "num_attention_heads": 64, "hidden_size": 8192, "intermediate_size": 28672}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 128256, **layers}))
    values = {
        "model": {"name_or_path": f"{tmp_path}/model", "init": "random", "dtype": "float32"},
        "data": {"train": {"path": f"{tmp_path}/pairs.jsonl"}},
        "checkpoint": {"save_every": 1, "keep_last": 100},
        "output_dir": f"{tmp_path}/out",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml"


def test_a_disk_that_is_too_small(run_file, all_workers):
    ((code, said),) = all_workers[1].run("cases:command_line", arguments=[["--config", str(run_file)]])[0]
    assert code == 4 and said.count("\n") == 1 and f"output_dir: {run_file.parent}/out" in said and "are free" in said
    assert not (run_file.parent / "out").exists()


def test_ranks_with_another_config(run_file, all_workers):
    said = all_workers[2].run("cases:environment_of_unlike_ranks", config_path=str(run_file))
    assert said[0] == said[1]
    assert said[0].startswith("rank 1 on ") and "has the config" in said[0]
