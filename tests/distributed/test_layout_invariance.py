"""The law: loss and gradient of a step depend on its pairs alone, not on ranks, packs, ZeRO stage, checkpointing or sharing.

Compared with the oracle: a plain loop over single, unpadded sequences with transformers, in float64.
"""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import yaml
from tiny import rows_of_turns, save_tiny, save_tokenizer, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

PAIRS = 11
BETA, SMOOTHING, RPO = 0.3, 0.1, 0.4
FAMILIES = {"qwen2": {}, "llama-tied": {"tie_word_embeddings": True}}


# Tied weights change what the engine shards, not how packs are laid out.
@pytest.fixture(scope="module", params=["qwen2", pytest.param("llama-tied", marks=pytest.mark.slow)])
def run_files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policy, a different reference, pairs and a config that trains on all of them in one step."""
    folder = tmp_path_factory.mktemp(request.param)
    vocabulary = save_tokenizer(folder / "tokenizer")
    config = tiny_config(request.param.split("-")[0], vocabulary, **FAMILIES[request.param])
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
        "data": {"train": {"path": f"{folder}/pairs.jsonl"}, "shuffle": False},
        "objective": {"name": "dpo", "beta": BETA, "label_smoothing": SMOOTHING, "rpo_alpha": RPO},
        "train": {"pairs_per_step": PAIRS, "max_steps": 1, "max_grad_norm": 0},
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        "output_dir": f"{folder}/run",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module")
def expected(run_files: Path) -> dict[str, Any]:
    """Loss and gradients by the book: one unpadded forward per sequence, no pack, no engine."""
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(run_files / name, dtype=torch.float64) for name in ("policy", "reference")
    )
    tokenizer = AutoTokenizer.from_pretrained(run_files / "tokenizer")
    pairs = [oracle.render(json.loads(line), tokenizer) for line in (run_files / "pairs.jsonl").read_text().splitlines()]
    objective = {"name": "dpo", "beta": BETA, "label_smoothing": SMOOTHING, "rpo_alpha": RPO}
    result = oracle.step(policy, reference, pairs, objective)
    result["loss"].backward()
    gradients = {name: p.grad.numpy() for name, p in policy.named_parameters()}
    return result | {"loss": result["loss"].item(), "gradients": gradients}


def zero(stage: int) -> str:
    return f"deepspeed.zero_optimization.stage={stage}"


# One pair per pack, a few packs, one pack.
PACKS, SHARING, CHECKPOINTING, STAGES = (1, 300, 100_000), ("true", "false"), ("true", "false"), (0, 1, 2, 3)
VARIANTS = [
    [
        zero(stage),
        f"data.tokens_per_pack={tokens}",
        f"data.prefix_sharing={shared}",
        f"model.gradient_checkpointing={recompute}",
    ]
    for stage, tokens, shared, recompute in product(STAGES, PACKS, SHARING, CHECKPOINTING)
    # every value of every axis at ZeRO-3, and each other stage with every size of pack
    if stage == 3 or (shared, recompute) == ("true", "false")
]


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_loss_and_gradients_are_those_of_the_oracle_in_every_layout(world, run_files, expected, all_workers):
    ranks = all_workers[world].run("cases:first_steps", config_path=str(run_files / "run.yaml"), variants=VARIANTS)
    packs = set()
    for overrides, result in zip(VARIANTS, ranks[0], strict=True):
        packs.add(result["packs"])
        for name in ("loss", "nll_loss", "rewards/accuracies"):
            assert math.isclose(result[name], expected[name], rel_tol=1e-5), (overrides, name, result[name], expected[name])
        assert_same_gradients(result["gradients"], expected["gradients"], overrides)
    assert min(packs) == 1 and max(packs) == -(-PAIRS // world) and len(packs) > 2, "the budgets should give different packs"
    norms = [result["grad_norm"] for result in ranks[0]]
    assert np.allclose(norms, norms[0], rtol=1e-5)
    for other in ranks[1:]:
        assert [r["loss"] for r in other] == [r["loss"] for r in ranks[0]], "ranks disagree on a reduced metric"


def test_zero3_partitions_every_parameter(run_files, all_workers):
    for result in all_workers[2].run("cases:first_steps", config_path=str(run_files / "run.yaml"), variants=[[zero(3)]]):
        assert result[0]["full_sizes"] == 0, "between steps no rank holds a gathered parameter"


def test_stored_reference_gives_the_loss_of_the_live_one(run_files, expected, all_workers):
    variants = [["reference.mode=stored", zero(stage)] for stage in (2, 3)] + [
        ["reference.offload=cpu"],
        ["reference.zero_stage=0"],
    ]
    for world in (1, 2):
        ranks = all_workers[world].run("cases:first_steps", config_path=str(run_files / "run.yaml"), variants=variants)
        for overrides, result in zip(variants, ranks[0], strict=True):
            assert math.isclose(result["loss"], expected["loss"], rel_tol=1e-5), overrides
            assert_same_gradients(result["gradients"], expected["gradients"], overrides)


# KTO, whose reference point is that of the step: every size of pack, and prompts that answers share or do not.
ALONE = {"name": "kto", "beta": BETA, "desirable_weight": 0.5, "undesirable_weight": 1.5}
FEW = [(3, 1, "true"), (1, 300, "false"), (2, 100_000, "true")]
MORE = [(3, 1, "false"), (3, 300, "true"), (0, 300, "false"), (1, 1, "true"), (3, 100_000, "false")]


def answers_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers that stand alone, in two runs over the rows: several of one prompt lie beside one another, and apart."""
    sides = [("chosen",), ("rejected", "chosen"), ("rejected",)]
    both = [(row, side) for k, row in enumerate(rows) for side in sides[k % 3]]
    both += [(row, side) for k, row in enumerate(rows) for side in sides[(k + 1) % 3]]
    return [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"} for row, side in both]


@pytest.mark.parametrize(
    ("world", "layouts"),
    [(2, FEW), pytest.param(1, MORE, marks=pytest.mark.slow)],
    ids=["2", "1"],
)
def test_single_answers_are_those_of_the_oracle_in_every_layout(world, layouts, run_files, all_workers):
    """One example per pack, a few packs, one pack; mismatched pairs lie in packs of their own."""
    rows = answers_of(rows_of_turns(PAIRS, seed=3))
    (run_files / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    load = AutoModelForCausalLM.from_pretrained
    models = ("reference", "policy")  # this way round the reference point is not clamped
    policy, reference = (load(run_files / name, dtype=torch.float64) for name in models)
    tokenizer = AutoTokenizer.from_pretrained(run_files / "tokenizer")
    examples = [oracle.render(row, tokenizer) for row in rows]
    assert len({str(prompt) for prompt, *_ in examples}) < len(examples), "some prompts have several answers"
    expected = oracle.step(policy, reference, examples, ALONE)
    assert expected["kl"] > 0
    expected["loss"].backward()
    expected["loss"] = expected["loss"].item()
    gradients = {name: p.grad.numpy() for name, p in policy.named_parameters()}
    common = [f"objective={json.dumps(ALONE)}", f"data.train={run_files}/answers.jsonl", f"train.pairs_per_step={len(rows)}"]
    common += [f"{section}.name_or_path={run_files}/{name}" for section, name in zip(("model", "reference"), models)]
    variants = [
        [*common, zero(stage), f"data.tokens_per_pack={tokens}", f"data.prefix_sharing={shared}"]
        for stage, tokens, shared in layouts
    ]
    ranks = all_workers[world].run("cases:first_steps", config_path=str(run_files / "run.yaml"), variants=variants)
    for overrides, result in zip(variants, ranks[0], strict=True):
        for name in ("loss", "kl", "rewards/accuracies", "logps/chosen", "logps/rejected"):
            assert math.isclose(result[name], expected[name], rel_tol=1e-5, abs_tol=1e-5), (overrides, name)
        assert_same_gradients(result["gradients"], gradients, overrides, relative=5e-5)
    assert len({result["packs"] for result in ranks[0]}) > 2, "the budgets should give different packs"
    for other in ranks[1:]:
        assert [(r["loss"], r["kl"]) for r in other] == [(r["loss"], r["kl"]) for r in ranks[0]], "ranks disagree"


def assert_same_gradients(
    found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], context: object, relative: float = 1e-5
) -> None:
    """Each parameter's gradient to `relative`. The floor is for gradients that vanish by symmetry (a key's bias)."""
    assert set(found) == set(wanted)
    whole = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in wanted.values()))
    for name, gradient in wanted.items():
        difference = float(np.linalg.norm(found[name].astype(np.float64).reshape(gradient.shape) - gradient))
        allowed = relative * float(np.linalg.norm(gradient)) + 1e-7 * whole
        assert difference <= allowed, (context, name, difference, allowed)
