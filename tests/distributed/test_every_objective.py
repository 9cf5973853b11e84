"""Every objective end to end: loss, metrics and gradients of a step in DeepSpeed are those of the oracle, in any layout.

The oracle (tests/oracle.py) is float64, scores one unpadded sequence at a time and shares no code with dspref.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from test_layout_invariance import assert_same_gradients
from tiny import rows_that_share, write_one_step
from transformers import AutoModelForCausalLM, AutoTokenizer
from workers import Workers

DEEPSPEED = str(Path(sys.executable).parent / "deepspeed")
MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def dpo(loss_type: str | list[str] = "sigmoid", **keys: Any) -> dict[str, Any]:
    return {"name": "dpo", "loss_type": loss_type, **keys}


def cpo(loss_type: str = "sigmoid", **keys: Any) -> dict[str, Any]:
    return {"name": "cpo", "loss_type": loss_type, **keys}


# Betas are such that no term saturates on these models, whose log-ratios are a few nats.
CASES: dict[str, dict[str, Any]] = {
    "sigmoid": dpo(),
    "cDPO": dpo(beta=0.3, label_smoothing=0.1),
    "hinge": dpo("hinge", beta=0.5),
    "ipo": dpo("ipo", beta=0.3),
    "ipo unnormalised": dpo("ipo", ipo_length_normalize=False),
    "exo_pair": dpo("exo_pair"),
    "exo_pair smoothed": dpo("exo_pair", label_smoothing=0.05, beta=0.3),
    "nca_pair": dpo("nca_pair", beta=0.2),
    "robust": dpo("robust", label_smoothing=0.2),
    "robust 0": dpo("robust", beta=0.15),
    "bco_pair": dpo("bco_pair", beta=0.3),
    "sppo_hard": dpo("sppo_hard", beta=0.2),
    "aot": dpo("aot", beta=0.2),
    "aot smoothed": dpo("aot", label_smoothing=0.1),
    "aot_pair": dpo("aot_pair", beta=0.2),
    "aot_unpaired": dpo("aot_unpaired", label_smoothing=0.1),
    "apo_zero": dpo("apo_zero", beta=0.3),
    "apo_down": dpo("apo_down", beta=0.3),
    "discopop": dpo("discopop", beta=0.05),
    "discopop tau": dpo("discopop", discopop_tau=0.2),
    "sigmoid_norm": dpo("sigmoid_norm", beta=5.0),
    "sigmoid_norm smoothed": dpo("sigmoid_norm", beta=5.0, label_smoothing=0.1),
    "dpo_norm": dpo("dpo_norm", beta=2.0),
    "sft": dpo("sft"),
    "dpop": dpo("dpop", beta=0.02),
    "dpop rpo_alpha": dpo("dpop", dpop_lambda=5.0, rpo_alpha=0.4),
    "chi_squared sigmoid": dpo(f_divergence_type="chi_squared", beta=0.01),
    "mpo": {"name": "dpo", **MPO},
    "list of coupled": dpo(["aot", "bco_pair", "hinge"], loss_weights=[0.5, 0.3, 0.2], beta=0.2),
    "list without weights": dpo(["ipo", "exo_pair", "aot_pair"], beta=0.5, label_smoothing=0.1),
    **{f"{name} sigmoid": dpo(f_divergence_type=name, beta=0.2) for name in DIVERGENCES},
    "alpha 0.3 sigmoid": dpo(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3),
    "js ipo": dpo("ipo", f_divergence_type="js_divergence"),
    "alpha sigmoid_norm": dpo("sigmoid_norm", f_divergence_type="alpha_divergence", beta=2.0),
    "forward_kl robust": dpo("robust", f_divergence_type="forward_kl", label_smoothing=0.1),
    "rpo_alpha": dpo(rpo_alpha=0.4),
    "rpo_alpha ipo": dpo("ipo", rpo_alpha=1.0, beta=0.5),
    "wpo": dpo(use_weighting=True),
    "wpo rpo_alpha": dpo(use_weighting=True, rpo_alpha=0.4, beta=0.3),
    "wpo bco_pair": dpo("bco_pair", use_weighting=True, beta=0.3),
    "wpo mpo": {"name": "dpo", "use_weighting": True, **MPO},
    "ld_alpha": dpo(ld_alpha=0.5),
    "ld_alpha 0": dpo(ld_alpha=0.0, beta=0.3),
    "ld_alpha aot": dpo("aot", ld_alpha=0.3),
    "ld_alpha ipo": dpo("ipo", ld_alpha=0.5, beta=0.5),
    "ld_alpha rpo_alpha": dpo(ld_alpha=0.5, rpo_alpha=0.5),
    "ld_alpha wpo": dpo(ld_alpha=0.5, use_weighting=True, beta=0.3),
    "reference_free": dpo(reference_free=True),
    "reference_free bco_pair": dpo("bco_pair", reference_free=True, beta=0.01),
    "reference_free aot": dpo("aot", reference_free=True, beta=0.05),
    "cpo sigmoid": cpo(),
    "cpo sigmoid smoothed": cpo(cpo_alpha=0.5, label_smoothing=0.1),
    "cpo without nll": cpo(cpo_alpha=0.0, beta=0.2),
    "cpo hinge": cpo("hinge", beta=0.05),
    "cpo ipo": cpo("ipo", cpo_alpha=0.3, beta=0.5),
    "cpo ipo alpha": cpo("ipo", alpha=0.25, beta=0.5),
    "cpo simpo": cpo("simpo"),
    "cpo simpo smoothed": cpo("simpo", cpo_alpha=0.05, simpo_gamma=0.3, label_smoothing=0.1),
    "cpo simpo alpha": cpo("simpo", alpha=0.1, beta=2.5, simpo_gamma=0.1),
    "simpo": {"name": "simpo"},
    "simpo gamma": {"name": "simpo", "beta": 2.5, "simpo_gamma": 1.0},
    "simpo ratio": {"name": "simpo", "beta": 2.5, "gamma_beta_ratio": 0.1, "label_smoothing": 0.1},
    "simpo alpha": {"name": "simpo", "alpha": 0.25, "gamma_beta_ratio": 0.2},
    "simper": {"name": "simpo", "loss_type": "simper"},
    "cpo simper": cpo("simper", cpo_alpha=0.3),
    "cpo repo": cpo("repo", cpo_alpha=0.05),
    "repo": {"name": "simpo", "loss_type": "repo"},
    "repo alpha": {"name": "simpo", "loss_type": "repo", "repo_gamma": 1.5, "alpha": 0.25},
    "orpo": {"name": "orpo"},
    "orpo without prompt": {"name": "orpo", "beta": 0.5, "nll_on_prompt": False},
    "rpo_sq": dpo("rpo_sq", rpo_eta=0.5, beta=0.3),
    "rpo_bwd_kl": dpo("rpo_bwd_kl", beta=0.3),
    "rpo_fwd_kl": dpo("rpo_fwd_kl", rpo_eta=0.7, beta=0.3),
    "weighed": dpo(),
    "weighed rpo_alpha": dpo(rpo_alpha=0.4),
    "weighed bco_pair": dpo("bco_pair", beta=0.3),
    "weighed wpo mpo": {"name": "dpo", "use_weighting": True, **MPO},
    "weighed cpo": cpo(),
    "weighed simpo": {"name": "simpo"},
    "weighed orpo": {"name": "orpo"},
    "margins": dpo(),
    "margins sigmoid_norm smoothed": dpo("sigmoid_norm", beta=5.0, label_smoothing=0.1),
    "margins cpo": cpo(label_smoothing=0.1),
    "margins simpo": {"name": "simpo"},
    "weighed margins rpo": dpo(["sigmoid", "rpo_bwd_kl", "bco_pair"], loss_weights=[0.5, 1.0, 0.3], beta=0.2),
    "score_gap": dpo(beta=0.3),
    # Of pairs, each of which counts as two answers; of single ones see test_unpaired_runs.py.
    "kto": {"name": "kto", "beta": 0.3},
    "kto weights": {"name": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.4},
    "apo_zero_unpaired": {"name": "kto", "loss_type": "apo_zero_unpaired", "beta": 0.2},
    "bco": {"name": "bco", "beta": 0.3},
    "weighed kto": {"name": "kto", "beta": 0.2, "undesirable_weight": 0.5},
}
# Columns that are named beside those of the texts, by the words in a case's name.
COLUMNS = {"weighed": ("weight", "w"), "margins": ("margin", "m")}

# Scored by a second model beside the policy; the others' reference is scored before the first step.
LIVE = ("sigmoid", "aot", "bco_pair", "wpo rpo_alpha", "ld_alpha ipo")

LAYOUT_CASES = (
    *("aot", "aot_pair", "bco_pair", "list of coupled", "mpo", "orpo", "simpo", "ld_alpha wpo", "wpo mpo"),
    *("rpo_fwd_kl", "weighed rpo_alpha", "weighed margins rpo", "score_gap"),
)
# (tokens_per_pack, ZeRO stage, prefix_sharing, gradient_checkpointing, live reference): in both halves every value but the
# last, and over the two worlds every case in all six.
LAYOUTS = (
    ((1, 3, "true", "false", False), (300, 1, "false", "true", False), (100_000, 3, "false", "true", False)),
    ((1, 1, "false", "true", False), (300, 3, "true", "true", True), (100_000, 1, "true", "false", False)),
)

# The floor is for log-ratios near zero: differences of sums of some hundred nats, in float32.
RELATIVE, ABSOLUTE = 1e-4, 1e-5


@pytest.fixture(scope="module")
def run_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policy, a different reference, pairs of every shape and a config that trains on all of them in one step."""
    folder = tmp_path_factory.mktemp("objectives")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    write_one_step(folder, {"train": {"path": f"{folder}/pairs.jsonl"}}, {"pairs_per_step": len(rows())})
    return folder


def rows() -> list[dict[str, Any]]:
    """Explicit prompts, implicit ones (texts, conversations), several turns, an answer of one token.

    Sides of equal length are there for aot: where lengths decide, policy and reference sort the pairs alike, and it would be
    plain sigmoid.
    """
    question = [{"role": "user", "content": "which bead?"}, {"role": "assistant", "content": "a bed"}]
    question += [{"role": "user", "content": "no, a bead"}]
    implicit: list[dict[str, Any]] = [
        {"chosen": "a bad cab: he fed a hag", "rejected": "a bad cab: a bag bed"},
        {"chosen": "the bead is blue as a bee", "rejected": "the bead is black as cave"},
        {
            "chosen": [*question, {"role": "assistant", "content": "egg"}],
            "rejected": [*question, {"role": "assistant", "content": "age"}],
        },
    ]
    # What the policy itself would write: WPO's weight is above 1, and clamped.
    likely = {"prompt": "a cab?", "chosen": " iviviviaivia", "rejected": " privivivivia"}
    # The answer is the end of the text, and nothing else.
    single = {"prompt": "abc def:", "chosen": "<|im_end|>", "rejected": " gag gab cafe"}
    drawn = rows_that_share(6, seed=3)
    pairs = [*drawn[:3], implicit[0], single, *drawn[3:5], *implicit[1:], likely, *drawn[5:]]
    return [row | of_row for row, of_row in zip(pairs, numbers(len(pairs)), strict=True)]


def numbers(count: int) -> list[dict[str, Any]]:
    """What rows give beside their texts: some weigh nothing, or say nothing of it; equal scores are among them."""
    drawn = np.random.default_rng(5).uniform(0, 3, (3, count)).round(2)
    drawn[0, 1] = drawn[2, 2] = 0
    rows: list[dict[str, Any]] = [
        {"w": w, "m": m - 1, "score_chosen": m + gap, "score_rejected": m} for w, m, gap in drawn.T.tolist()
    ]
    rows[3] |= {"w": None, "m": None}
    return rows


def given(case: str) -> list[dict[str, float]]:
    """What of that a case reads, for the oracle."""
    found = []
    for row in numbers(len(rows())):
        scores = {name: row[name] for name in ("score_chosen", "score_rejected")}
        named = {name: row[column] for word, (name, column) in COLUMNS.items() if word in case.split()}
        named |= {"weight": row["score_chosen"] - row["score_rejected"]} if case == "score_gap" else {}
        found.append(scores | {name: value for name, value in named.items() if value is not None})
    return found


@pytest.fixture(scope="module")
def expected(run_files: Path) -> Callable[[str], dict[str, Any]]:
    """Case -> the oracle's loss, metrics and gradients. The sequences are scored once for all cases."""
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(run_files / name, dtype=torch.float64) for name in ("policy", "reference")
    )
    tokenizer = AutoTokenizer.from_pretrained(run_files / "tokenizer")
    pairs = [oracle.render(row, tokenizer) for row in rows()]
    assert min(len(answer) for _, *answers in pairs for answer in answers) == 1
    ours = oracle.score_pairs(policy, pairs)
    with torch.no_grad():
        theirs = oracle.score_pairs(reference, pairs)
    point = oracle.reference_point(policy, reference, pairs)
    assert point > 0, "clamped, it would be no reference point"
    weights = [oracle.wpo_weight(*pair).item() for pair in ours]
    assert min(weights) < 1 == max(weights), "some pair should be clamped, and some not"
    parameters = dict(policy.named_parameters())

    @cache
    def of(case: str) -> dict[str, Any]:
        result = oracle.loss_of_scores(ours, theirs, CASES[case], point=point, given=given(case))
        gradients = torch.autograd.grad(result["loss"], list(parameters.values()), retain_graph=True)
        result["gradients"] = {name: gradient.numpy() for name, gradient in zip(parameters, gradients)}
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
        return result | {"loss": result["loss"].item(), "grad_norm": norm}

    return of


def overrides(case: str, live: bool = False) -> list[str]:
    """The case as a command line would say it; what needs no reference is given none."""
    objective = CASES[case]
    section = [f"objective={json.dumps(objective)}"]
    columns = [of_word for word, of_word in COLUMNS.items() if word in case.split()]
    section += [f"data.train.columns.{name}={column}" for name, column in columns]
    section += ["data.train.pair_weights=score_gap"] if case == "score_gap" else []
    if objective["name"] in ("cpo", "simpo", "orpo") or objective.get("reference_free"):
        return [*section, "reference={mode: auto}"]
    return [*section, f"reference.mode={'engine' if live else 'stored'}"]


def compare(found: dict[str, Any], wanted: dict[str, Any], relative: float, context: str) -> list[str]:
    """One line for each number that is missing or off."""
    faults = []
    for name in wanted.keys() - {"gradients"}:
        # A difference of two sums is as exact as these are in fp32.
        sums = max(abs(wanted.get(f"logps/{side}", 0.0)) for side in ("chosen", "rejected"))
        rounding = 2e-7 * sums if name.startswith(("kl", "rewards/", "bco")) else 0.0
        if name not in found:
            faults.append(f"{context}: {name} is missing")
        elif not math.isclose(found[name], wanted[name], rel_tol=relative, abs_tol=ABSOLUTE + rounding):
            faults.append(f"{context}: {name} is {found[name]}, the oracle says {wanted[name]}")
    return sorted(faults)


def written(run: Path) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """The steps of a run, and its evaluations by step under the names of training."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in records if "eval_loss" in record]
    named = {record["step"]: {key.removeprefix("eval_"): value for key, value in record.items()} for record in evaluations}
    return [record for record in records if "loss" in record], named


def compare_gradients(found: dict[str, Any], wanted: dict[str, Any], relative: float, context: str) -> list[str]:
    """As `assert_same_gradients`, less strict: discopop and forward_kl multiply what float32 loses in the sums."""
    faults = []
    whole = math.sqrt(sum(float((gradient**2).sum()) for gradient in wanted["gradients"].values()))
    for name, gradient in wanted["gradients"].items():
        difference = float(np.linalg.norm(found["gradients"][name].astype(np.float64).reshape(gradient.shape) - gradient))
        if not difference <= relative * (float(np.linalg.norm(gradient)) + 0.01 * whole):
            faults.append(f"{context}: gradient of {name}: off by {difference} of {np.linalg.norm(gradient)}")
    return faults


def test_the_oracle_tells_all_cases_apart(expected):
    """Two cases with one gradient would test one objective; aot is sigmoid at the same beta where nothing is sorted anew."""
    by_gradient: dict[bytes, list[str]] = {}
    for case in CASES:
        whole = np.concatenate([gradient.ravel() for gradient in expected(case)["gradients"].values()])
        assert np.isfinite(whole).all() and np.linalg.norm(whole) > 1e-3, case
        by_gradient.setdefault((np.round(whole, 9) + 0.0).tobytes(), []).append(case)
    same = [cases for cases in by_gradient.values() if len(cases) > 1]
    assert same == [], same


def first_steps(workers: Workers, run_files: Path, variants: list[list[str]]) -> list[dict[str, Any]]:
    """What rank 0 saw of each variant's step, after a look at whether the others saw the same."""
    path = str(run_files / "run.yaml")
    # ZeRO-3 collects garbage whenever an engine starts, and would walk all that the imports made: half of this file's time.
    workers.run("cases:first_steps", config_path=path, variants=[])
    workers.run("gc:freeze")
    ranks = workers.run("cases:first_steps", config_path=path, variants=variants)
    for variant, *results in zip(variants, *ranks, strict=True):
        assert len({result["loss"] for result in results}) == 1, (variant, "ranks disagree on a reduced metric")
    return ranks[0]


def test_every_objective_is_that_of_the_oracle(run_files, expected, all_workers):
    """Two ranks, ZeRO-3 with every parameter sharded, several packs per rank. (One rank: through the launcher, below.)"""
    variants = [overrides(case, live=case in LIVE) for case in CASES]
    faults = []
    for case, found in zip(CASES, first_steps(all_workers[2], run_files, variants), strict=True):
        assert found["packs"] > 1, "the budget should give several packs per rank"
        faults += compare(found, expected(case), RELATIVE, case)
        faults += compare_gradients(found, expected(case), RELATIVE, case)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_layouts_do_not_change_what_couples_pairs(world, run_files, expected, all_workers):
    """One pair per pack, a few packs, one pack, and what else must not matter; both halves of the table at either world."""
    plan = [(case, layout) for i, case in enumerate(LAYOUT_CASES) for layout in LAYOUTS[(i + world) % 2]]
    variants = [
        [
            *overrides(case, live),
            f"data.tokens_per_pack={tokens}",
            f"deepspeed.zero_optimization.stage={stage}",
            f"data.prefix_sharing={sharing}",
            f"model.gradient_checkpointing={recompute}",
        ]
        for case, (tokens, stage, sharing, recompute, live) in plan
    ]
    faults, packs = [], set()
    for (case, layout), found in zip(plan, first_steps(all_workers[world], run_files, variants), strict=True):
        packs.add(found["packs"])
        faults += compare(found, expected(case), 1e-5, f"{case} {layout}")
        assert_same_gradients(found["gradients"], expected(case)["gradients"], (case, layout))
    assert not faults, "\n".join(faults)
    assert min(packs) == 1 and max(packs) == -(-len(rows()) // world) and len(packs) > 2, packs


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", [1, 2])
def test_every_objective_through_the_launcher(world, run_files, expected, tmp_path):
    """Whole runs, as `deepspeed` starts them: what metrics.jsonl says of step 1."""
    names = {case: f"{tmp_path}/{number}" for number, case in enumerate(CASES)}
    listing = [
        [f"{run_files}/run.yaml", [*overrides(case, live=case in LIVE), f"output_dir={names[case]}"]] for case in CASES
    ]
    (tmp_path / "runs.json").write_text(json.dumps(listing))
    command = [DEEPSPEED, "--num_gpus", str(world), str(Path(__file__).with_name("launched.py")), f"{tmp_path}/runs.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=850, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    faults = []
    for case, folder in names.items():
        record = json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[0])
        assert record["perf/packs"] > 1
        faults += compare(record, expected(case), RELATIVE, case)
    assert not faults, "\n".join(faults)
