"""The first step on real pairs equals TRL 1.16's, with a reference other than the policy.

The fixture comes from golden/make_trl_first_step.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import save_tiny, tiny_config

FIXTURE = json.loads((Path(__file__).parents[1] / "golden" / "trl_first_step.json").read_text())
# NLL differs in name only: TRL adds a loss "sft" where dspref says rpo_alpha.
RPO_ALPHA = {"sigmoid": None, "sigmoid+sft": 0.5}


@pytest.fixture(scope="module")
def run_file(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    tokenizer = shared / "tokenizer" / "gpt2-chatml"
    config = tiny_config("qwen2", vocab_size=50_259)
    for name, seed in (("policy", FIXTURE["policy_seed"]), ("reference", FIXTURE["reference_seed"])):
        save_tiny(folder / name, config, seed)
    lines = (shared / "data" / "alpacaeval_test.jsonl").read_text(encoding="utf-8").split("\n")
    (folder / "pairs.jsonl").write_text("".join(lines[row] + "\n" for row in FIXTURE["rows"]), encoding="utf-8")
    values = {
        "model": {
            "name_or_path": f"{folder}/policy",
            "tokenizer_name_or_path": str(tokenizer.resolve()),
            "dtype": "float32",
        },
        "reference": {"mode": "engine", "name_or_path": f"{folder}/reference"},
        "data": {"train": {"path": f"{folder}/pairs.jsonl"}, "shuffle": False, "tokens_per_pack": 1024, "scored": "all"},
        "objective": {"name": "dpo", "loss_type": "sigmoid", "beta": FIXTURE["beta"]},
        "train": {"pairs_per_step": len(FIXTURE["rows"]), "max_steps": 1, "max_grad_norm": 0},
        "output_dir": f"{folder}/run",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


@pytest.mark.parametrize("world", [1, 2])
def test_first_step_equals_trl(world, run_file, all_workers):
    variants = [[] if alpha is None else [f"objective.rpo_alpha={alpha}"] for alpha in RPO_ALPHA.values()]
    results = all_workers[world].run("cases:first_steps", config_path=str(run_file), variants=variants)[0]
    for variant, result in zip(FIXTURE["variants"].values(), results, strict=True):
        # TRL logs grad_norm as torch's fp32 norm of the whole head, which is off by 1e-4; the fixture holds its fp64 norm.
        result["grad_norm"] = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in result["gradients"].values()))
        compared = set(variant["metrics"]) & set(result)
        assert {
            "loss",
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "rewards/accuracies",
            "grad_norm",
        } <= compared
        assert {"logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"} <= compared
        for name in compared:
            theirs = variant["metrics"][name]
            assert math.isclose(result[name], theirs, rel_tol=1e-4), (name, result[name], theirs)
