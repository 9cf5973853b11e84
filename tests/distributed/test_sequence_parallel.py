"""Ranks that hold packs between them: loss, metrics and every gradient are those of ranks that have packs of their own.

Those are held to the oracle elsewhere (test_layout_invariance, test_every_objective, test_moe, test_lora).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from long_runs import long_run, needed
from test_layout_invariance import assert_same_gradients
from test_moe import leaning_model
from tiny import preference_rows, rows_of_turns, save_tiny, save_tokenizer, tiny_config
from tiny_families import LISTED
from workers import Workers

PAIRS = 9
DPO = {"name": "dpo", "beta": 0.3, "label_smoothing": 0.1, "rpo_alpha": 0.4}
SLOW = pytest.mark.slow


def write_run(folder: Path) -> Path:
    """A config that trains the policy in `folder`, beside a different reference, on all pairs in one step; some of these
    share a prompt."""
    rows = {"pairs": rows_of_turns(PAIRS, seed=3), "held_out": preference_rows(5, seed=4)}
    for name, of_file in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_file))
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


@pytest.fixture(scope="module")
def run_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared-packs")
    config = tiny_config("qwen2", save_tokenizer(folder / "tokenizer"))
    for name, seed in (("policy", 1), ("reference", 2)):
        save_tiny(folder / name, config, seed)
    return write_run(folder)


def layout(sequence: int, tokens: int = 300, stage: int = 3, shared: str = "true", recompute: str = "true") -> list[str]:
    return [
        f"parallel.sequence={sequence}",
        f"data.tokens_per_pack={tokens}",
        f"deepspeed.zero_optimization.stage={stage}",
        f"data.prefix_sharing={shared}",
        f"model.gradient_checkpointing={recompute}",
    ]


def compare(
    workers: Workers, run_files: Path, common: list[str], layouts: list[list[str]], relative: float = 1e-5
) -> list[dict[str, Any]]:
    """The first steps in some layouts, each the same as in the first of them, in which ranks share no pack."""
    variants = [[*common, *own] for own in layouts]
    assert "parallel.sequence=1" in variants[0] and not any("parallel.sequence=1" in own for own in variants[1:])
    ranks = workers.run("cases:first_steps", config_path=str(run_files / "run.yaml"), variants=variants)
    alone, *others = ranks[0]
    assert alone["grad_norm"] > 1e-3
    for overrides, found in zip(variants[1:], others, strict=True):
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            if isinstance(value, float):
                # A difference of two sums is as exact as these are in fp32.
                rounding = 2e-7 * abs(alone["logps/chosen"]) if name.startswith(("kl", "rewards/", "bco", "log_odds")) else 0
                close = math.isclose(found[name], value, rel_tol=relative, abs_tol=1e-6 + rounding)
                assert close, (overrides, name, found[name], value)
        assert_same_gradients(found["gradients"], alone["gradients"], overrides, relative)
    for other in ranks[1:]:
        assert [result["loss"] for result in other] == [result["loss"] for result in ranks[0]], "ranks disagree"
    return ranks[0]


# One pair per pack, a few packs, one pack; every stage; with and without recomputation and shared prompts.
OF_TWO = [
    layout(1),
    layout(2),
    layout(2, tokens=1, stage=1, recompute="false"),
    layout(2, tokens=100, stage=2, recompute="false"),
    layout(2, tokens=100_000, shared="false"),
]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=SLOW)])
def test_two_ranks_hold_a_pack_as_one_does(world, run_files, all_workers):
    results = compare(all_workers[world], run_files, [], OF_TWO)
    packs = {result["packs"] for result in results[1:]}
    assert 1 in packs and len(packs) > 2, "the budgets should give different packs"
    # As many groups as ranks have a pair each.
    assert results[2]["packs"] == -(-PAIRS // (world // 2))


@SLOW
def test_four_ranks_hold_a_pack_with_fewer_key_value_heads(run_files, all_workers):
    layouts = [layout(1), layout(4), layout(4, tokens=1, stage=0, recompute="false"), layout(4, tokens=100, shared="false")]
    compare(all_workers[4], run_files, [], layouts)


# By name, objectives that read what a rank's own tokens do not tell: prompts, common lengths, collisions, the whole step.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "orpo": {"name": "orpo", "beta": 0.3},
    "aot": {"name": "dpo", "loss_type": "aot", "beta": 0.3},
    "bco and sft": {"name": "dpo", "loss_type": ["bco_pair", "sft"], "beta": 0.3},
    "kto": {"name": "kto", "beta": 0.3},
    "ld": {"name": "dpo", "beta": 0.3, "ld_alpha": 0.5},
    "weighted": {"name": "dpo", "beta": 0.3, "use_weighting": True},
    "simpo": {"name": "simpo", "beta": 2.5},
}
WITHOUT_REFERENCE = ("orpo", "simpo")


@pytest.mark.parametrize(
    "name", [name if name in ("orpo", "aot") else pytest.param(name, marks=SLOW) for name in OBJECTIVES]
)
def test_every_kind_of_objective(name, run_files, all_workers):
    """In one pass and in two, over several packs and in one."""
    common = [f"objective={json.dumps(OBJECTIVES[name])}"]
    common += ["reference={mode: auto}"] if name in WITHOUT_REFERENCE else []
    if name == "kto":  # this way round the reference point is not clamped
        common += [f"model.name_or_path={run_files}/reference", f"reference.name_or_path={run_files}/policy"]
    found = compare(
        all_workers[2], run_files, common, [layout(1), layout(2, tokens=100, stage=1), layout(2, tokens=100_000)]
    )
    assert name != "kto" or found[0]["kl"] > 0.01


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=SLOW)])
def test_an_adapter(stage, run_files, all_workers):
    """Whose reference is the model below it, live."""
    common = ["model.lora={r: 4, lora_alpha: 8, init_lora_weights: false}", "reference={mode: adapter}"]
    compare(all_workers[2], run_files, common, [layout(1, stage=stage), layout(2, tokens=100, stage=stage)])


def test_a_stored_reference_is_the_same(run_files, all_workers, tmp_path):
    """Each scored by the ranks that read it."""
    layouts = [
        [*own, f"reference.store={tmp_path}/{number}"] for number, own in enumerate([layout(1), layout(2, tokens=100)])
    ]
    compare(all_workers[2], run_files, ["reference.mode=stored"], layouts)


@pytest.fixture(scope="module")
def moe_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared-packs-of-experts")
    vocabulary = save_tokenizer(folder / "tokenizer")
    for name, seed in (("policy", 1), ("reference", 2)):
        leaning_model("qwen3_moe", vocabulary, seed).save_pretrained(folder / name)
    return write_run(folder)


@pytest.mark.parametrize(("scope", "tokens"), [("micro", 100_000), pytest.param("step", 100, marks=SLOW)])
def test_experts_are_balanced_over_the_same_tokens(scope, tokens, moe_files, all_workers):
    """With scope `micro` where all packs run at once, as then these are the same tokens."""
    common = ["model.router_aux_loss_coef=0.7", f"model.router_aux_scope={scope}"]
    first = layout(1, tokens=100_000)
    found = compare(all_workers[2], moe_files, common, [first, layout(2, tokens=tokens), layout(2, tokens, 1)])
    assert found[0]["aux_loss"] > 2.2, "routers without preferences would show nothing"


# Windows and soft caps, sinks, latent keys.
FAST = ["gemma2", "gpt_oss", "deepseek_v3"]


@pytest.mark.parametrize(
    "families", [FAST, pytest.param([f for f in LISTED if f not in FAST], marks=SLOW)], ids=["few", "all"]
)
def test_every_family_is_the_same(families, all_workers):
    """Log-probs and gradients, with shared prompts and without; what is no pack for one rank is none for two."""
    for sharing in (True, False):
        ranks = all_workers[2].run("sequence_cases:faults_of_families", families=families, sharing=sharing)
        assert ranks[0] == ranks[1]
        refused = {family for family, fault in ranks[0].items() if fault.startswith("refused: ")}
        assert {family: fault for family, fault in ranks[0].items() if family not in refused} == {}
        assert len(refused) < len(families) / 2


def test_a_run_evaluates_and_exports_as_without(run_files, all_workers, tmp_path):
    """Held-out pairs, each once; what couples pairs sees all of them once. The largest pack is tried before."""
    common = [
        f"data.eval={run_files}/held_out.jsonl",
        "objective={name: dpo, loss_type: [aot, bco_pair], beta: 0.3}",
        "train={pairs_per_step: 4, max_steps: 3, learning_rate: 3.0e-3, eval_every: 2, max_grad_norm: 0, dry_run: true}",
        "data.tokens_per_pack=100",
        "log={samples: 2, generation: {max_new_tokens: 5}}",
    ]
    runs = [tmp_path / "alone", tmp_path / "shared"]
    for number, run in enumerate(runs, start=1):
        line = [*common, f"parallel.sequence={number}", f"output_dir={run}"]
        assert all_workers[2].run("cases:run_training", config_path=f"{run_files}/run.yaml", overrides=line) == [0, 0]
    records = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert [record["step"] for record in records[1]] == [record["step"] for record in records[0]]
    assert sum("eval_loss" in record for record in records[0]) == 2
    for alone, shared in zip(*records, strict=True):
        assert shared.keys() == alone.keys()
        for name, value in alone.items():
            if not name.startswith("perf/"):
                assert shared[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (alone["step"], name)
    answers = [(run / "samples.jsonl").read_text().splitlines() for run in runs]
    assert answers[0] == answers[1] and len(answers[0]) > 2


@pytest.mark.parametrize(
    ("world", "overrides", "said"),
    [
        (1, ["parallel.sequence=2"], "parallel.sequence: 2 does not divide the 1 rank; use 1, or ranks that it divides"),
        (2, ["parallel.sequence=3"], "parallel.sequence: 3 does not divide the 2 ranks; use 1, or ranks that it divides"),
        (2, ["parallel.sequence=0"], "parallel.sequence: must be greater than 0, not 0"),
    ],
)
def test_what_cannot_be_shared_is_refused_in_one_line(world, overrides, said, run_files, all_workers, tmp_path):
    line = ["--config", f"{run_files}/run.yaml", *overrides, f"output_dir={tmp_path}/run"]
    answers = [ranks[0] for ranks in all_workers[world].run("cases:command_line", arguments=[line])]
    assert {code for code, _ in answers} == {2}
    assert said in "".join(text for _, text in answers)
    assert len("".join(text for _, text in answers).strip().splitlines()) == 1


@SLOW
@pytest.mark.parametrize(("recompute", "shared"), [(False, False), (True, False), (True, True)])
def test_a_long_pair_takes_little_more_than_half_the_memory(recompute, shared, tmp_path):
    """Beyond what stays between steps, a pair of 16k tokens: of ranks that hold it together, and of one that has it all."""
    parts = {"prompt": 1300, "chosen": 900, "rejected": 880}
    # A pair goes beyond what one rank has room for, and so it is alone in its pack.
    run = long_run(tmp_path, parts, recompute, pairs_per_step=2, tokens_per_pack=6144, prefix_sharing=shared)
    alone, found = needed(tmp_path, run | {"parallel": {"sequence": 1}}, ranks=2, name="alone")
    assert found["tokens"] > (15_000 if shared else 16_000)
    together, _ = needed(tmp_path, run | {"parallel": {"sequence": 2}}, ranks=2, name="together")
    assert together < 0.6 * alone
