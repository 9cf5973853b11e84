"""Thirty steps of every objective on real pairs: what it optimises improves on the pairs that it is trained on. Minutes."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_every_objective import CASES as OF_PAIRS
from test_list_runs import OBJECTIVES as OF_ROWS
from tiny import save_tokenizer, tiny_config

from dspref.objectives import OBJECTIVES, as_list

pytestmark = pytest.mark.slow

STEPS, PAIRS = 30, 8
CASES = {**OF_PAIRS, **OF_ROWS}


# What must rise beside the fall of the loss, where it is not the margin. DiscoPOP's slope at a margin of 0 is positive (its
# loss has a second valley at negative margins), so that there only the loss says what is optimised.
LEARNED = {"sft": "logps/chosen", "discopop": None, "orpo": "log_odds_chosen"}


# What is trained here on answers that stand alone; `apo_zero_unpaired` on pairs.
ALONE = ("kto", "bco")

# Each loss of each family once, and each modifier: the cases that the end-to-end oracle test has, one of a kind.
LEARNING = [
    "sigmoid", "cDPO", "hinge", "ipo", "ipo unnormalised", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_pair", "apo_zero", "apo_down", "discopop", "sigmoid_norm", "sft", "dpop", "mpo",
    "forward_kl sigmoid", "chi_squared sigmoid",
    "js_divergence sigmoid", "alpha_divergence sigmoid", "rpo_alpha", "wpo", "ld_alpha", "reference_free", "cpo sigmoid",
    "cpo hinge", "cpo ipo", "cpo simpo", "cpo simper", "cpo repo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl", "score_gap",
    "simper", "repo", "simpo", "simpo alpha", "orpo", "kto", "apo_zero_unpaired", "bco", "plackett_luce", "lipo_lambda",
    "tpo", "weighed tpo hinge", "tpo ipo", "tpo_l",
]  # fmt: skip


def test_every_loss_is_among_them() -> None:
    seen = set()
    for objective in map(CASES.__getitem__, LEARNING):
        name = objective["name"]
        first = next(iter(OBJECTIVES[name].losses))
        seen |= {(name, loss) for loss in as_list(objective.get("loss_type", first))}
    aliases = {("dpo", "dpo_norm"), ("dpo", "aot_unpaired")}
    assert {(name, loss) for name, family in OBJECTIVES.items() for loss in family.losses} == seen | aliases


@pytest.fixture(scope="module")
def run_file(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers over bytes, and the first pairs of the real data: every step sees all of them."""
    folder = tmp_path_factory.mktemp("learn")
    tiny_config("qwen2", save_tokenizer(folder / "tokenizer")).save_pretrained(folder / "model")
    lines = (shared / "data" / "alpacaeval_train.jsonl").read_text(encoding="utf-8").split("\n")[: 10 * PAIRS]
    kept = [line for line in lines if len({json.dumps(json.loads(line)[s])[:90] for s in ("chosen", "rejected")}) == 2]
    rows = [json.loads(line) | {"score_chosen": 2 + k / PAIRS, "score_rejected": 1} for k, line in enumerate(kept[:PAIRS])]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    answers = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
    lists = [
        {"prompt": row["prompt"], "completions": [row["rejected"], row["chosen"], other["rejected"]], "scores": [0.5, 1, 0]}
        for row, other in zip(rows, [*rows[1:], rows[0]])
    ]
    (folder / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists), encoding="utf-8")
    triples = [row | {"reference": row["chosen"]} for row in rows]
    (folder / "triples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in triples), encoding="utf-8")
    model = {"name_or_path": f"{folder}/model", "tokenizer_name_or_path": f"{folder}/tokenizer", "init": "random"}
    values = {
        "model": {**model, "dtype": "float32", "gradient_checkpointing": False},
        "data": {
            "train": {"path": f"{folder}/pairs.jsonl"},
            "max_length": 128,
            "max_prompt_length": 32,
            "tokens_per_pack": 2048,
        },
        "train": {"pairs_per_step": PAIRS, "max_steps": STEPS, "learning_rate": 3e-4, "lr_scheduler_type": "constant"},
        "output_dir": f"{folder}/run",
    }
    values["train"]["warmup_ratio"] = 0
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


@pytest.mark.parametrize("case", LEARNING)
def test_thirty_steps_improve_what_is_optimised(case: str, run_file: Path, all_workers: dict, tmp_path: Path) -> None:
    overrides = [f"objective={json.dumps(CASES[case])}", f"output_dir={tmp_path}/run"]
    overrides += ["data.train.pair_weights=score_gap"] if case == "score_gap" else []
    if case in ALONE:
        overrides += [f"data.train={run_file.parent}/answers.jsonl", f"train.pairs_per_step={2 * PAIRS}"]
    if case in OF_ROWS:
        rows = "triples" if CASES[case]["name"] == "tpo" else "lists"
        overrides += [f"data.train={run_file.parent}/{rows}.jsonl"]
    assert all_workers[1].run("cases:run_training", config_path=str(run_file), overrides=overrides) == [0]
    records: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(records) == STEPS

    def change(name: str) -> float:
        return statistics.fmean(r[name] for r in records[-3:]) - statistics.fmean(r[name] for r in records[:3])

    assert change("loss") < 0, (records[0]["loss"], records[-1]["loss"])
    risen = LEARNED.get(case, "rewards/margins")
    assert risen is None or change(risen) > 0, (records[0][risen], records[-1][risen])
    if risen == "rewards/margins":
        assert records[-1]["rewards/accuracies"] >= records[0]["rewards/accuracies"]
