"""The first step on real pairs equals TRL 1.16's, with a reference other than the policy.

The fixture comes from golden/make_trl_first_step.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import yaml
from tiny import save_tiny, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

FIXTURE = json.loads((Path(__file__).parents[1] / "golden" / "trl_first_step.json").read_text())
# NLL differs in name only: TRL adds a loss "sft" where dspref says rpo_alpha.
# The first loss by what is scored.
LOSSES = {"all": 0.9152453, "assistant": 0.9124018}
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


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
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
        assert {"entropy", "mean_token_accuracy"} <= compared
        for name in compared:
            theirs = variant["metrics"][name]
            assert math.isclose(result[name], theirs, rel_tol=1e-4), (name, result[name], theirs)


def test_by_default_the_newline_behind_the_end_token_is_not_scored(run_file, all_workers):
    """Both numbers, and why: ChatML puts a newline behind `<|im_end|>`, which TRL scores (`data.scored: all`) and no model
    ever writes. One token less in each answer moves the mean rewards; the oracle says by how much."""
    tokenizer = AutoTokenizer.from_pretrained(yaml.safe_load(run_file.read_text())["model"]["tokenizer_name_or_path"])
    rows = [json.loads(line) for line in (run_file.parent / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    ours, theirs = ([oracle.render(row, tokenizer, scored) for row in rows] for scored in ("assistant", "all"))
    newline = tokenizer.encode("\n")
    for own, whole in zip(ours, theirs, strict=True):
        assert [[*answer, *newline] for answer in own[1:]] == whole[1:] and own[0] == whole[0]
    load = AutoModelForCausalLM.from_pretrained
    policy, reference = (load(run_file.parent / name, dtype=torch.float32) for name in ("policy", "reference"))
    with torch.no_grad():
        book = oracle.step(policy, reference, ours, {"name": "dpo", "beta": FIXTURE["beta"]})
    (result,) = all_workers[1].run("cases:first_steps", config_path=str(run_file), variants=[["data.scored=assistant"]])[0]
    trl = FIXTURE["variants"]["sigmoid"]["metrics"]
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert math.isclose(result[name], float(book[name]), rel_tol=1e-4), (name, result[name], float(book[name]))
    assert trl["loss"] == pytest.approx(LOSSES["all"], abs=1e-6)
    assert result["loss"] == pytest.approx(LOSSES["assistant"], abs=1e-5)
