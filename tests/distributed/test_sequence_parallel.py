"""Ranks that hold packs between them: loss, metrics and every gradient are those of ranks that have packs of their own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_layout_invariance import assert_same_gradients
from tiny import rows_of_turns, save_tiny, save_tokenizer, tiny_config
from workers import Workers

PAIRS = 9
DPO = {"name": "dpo", "beta": 0.3, "label_smoothing": 0.1, "rpo_alpha": 0.4}


@pytest.fixture(scope="module")
def run_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policy, a different reference, pairs of which some share prompts, and a config that trains on all in one step."""
    folder = tmp_path_factory.mktemp("shared-packs")
    vocabulary = save_tokenizer(folder / "tokenizer")
    config = tiny_config("qwen2", vocabulary)
    save_tiny(folder / "policy", config, seed=1)
    save_tiny(folder / "reference", config, seed=2)
    rows = rows_of_turns(PAIRS, seed=3)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {
            "name_or_path": f"{folder}/policy",
            "tokenizer_name_or_path": f"{folder}/tokenizer",
            "dtype": "float32",
        },
        "reference": {"mode": "engine", "name_or_path": f"{folder}/reference"},
        "data": {"train": {"path": f"{folder}/pairs.jsonl"}, "shuffle": False, "prefix_sharing": True},
        "objective": DPO,
        "train": {"pairs_per_step": PAIRS, "max_steps": 1, "max_grad_norm": 0},
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        "output_dir": f"{folder}/run",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder


def layout(sequence: int, tokens: int = 300, stage: int = 3, shared: str = "true", recompute: str = "true") -> list[str]:
    return [
        f"parallel.sequence={sequence}",
        f"data.tokens_per_pack={tokens}",
        f"deepspeed.zero_optimization.stage={stage}",
        f"data.prefix_sharing={shared}",
        f"model.gradient_checkpointing={recompute}",
    ]


def compare(workers: Workers, run_files: Path, common: list[str], layouts: list[list[str]]) -> list[dict[str, Any]]:
    """The first steps in some layouts, each the same as that of ranks that share nothing, which comes first."""
    variants = [[*common, *own] for own in (layout(1), *layouts)]
    ranks = workers.run("cases:first_steps", config_path=str(run_files / "run.yaml"), variants=variants)
    alone, *others = ranks[0]
    for overrides, found in zip(variants[1:], others, strict=True):
        for name, value in alone.items():
            if isinstance(value, float):
                assert math.isclose(found[name], value, rel_tol=1e-5, abs_tol=1e-7), (overrides, name, found[name], value)
        assert_same_gradients(found["gradients"], alone["gradients"], overrides)
    for other in ranks[1:]:
        assert [result["loss"] for result in other] == [result["loss"] for result in ranks[0]], "ranks disagree"
    return ranks[0]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_two_ranks_hold_a_pack_as_one_does(world, run_files, all_workers):
    layouts = [layout(2), layout(2, tokens=1, stage=1, recompute="false"), layout(2, tokens=100_000, shared="false")]
    results = compare(all_workers[world], run_files, [], layouts)
    assert {result["packs"] for result in results} > {1}, "the budgets should give different packs"
