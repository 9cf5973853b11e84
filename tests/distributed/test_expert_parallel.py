"""Experts that ranks hold between them (DeepSpeed's AutoEP): losses, metrics and weights are those of ranks that have them
all, which are held to the oracle elsewhere (test_moe)."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ds_settings import SPREAD, Settings, zero
from safetensors.torch import load_file
from test_consolidate import assert_same_model, export
from test_moe import leaning_model, load_of, write_rows, write_run
from test_resume import forget_everything_after, training_records
from tiny import preference_rows, rows_that_share, save_tokenizer, tiny_config, tiny_model
from transformers import PreTrainedModel
from workers import Workers

SLOW = pytest.mark.slow
STEPS = 3
FAMILIES = ["qwen3_moe", "mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3"]
# A dense layer, then one with a shared expert beside the routed ones. They have no load-balancing loss.
DEEPSEEK = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4, "head_dim": 8, "routed_scaling_factor": 1.5,
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**DEEPSEEK, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**DEEPSEEK, "n_group": 4, "topk_group": 2},
}
# Sums of fp32 in another order; the optimizer's epsilon is so large that it does not make much of little.
SAME = 1e-6
MEASURED = ("loss", "aux_loss", "grad_norm", "nll_loss", "rewards/margins")


def model_of(family: str, vocabulary: int, seed: int) -> PreTrainedModel:
    """With routers that have preferences."""
    if family not in OTHERS:
        return leaning_model(family, vocabulary, seed)
    lm = tiny_model(tiny_config(family, vocabulary, **OTHERS[family]), seed)
    with torch.no_grad():
        for name, tensor in [*lm.named_parameters(), *lm.named_buffers()]:
            if name.endswith("gate.weight"):
                tensor *= 6
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.1)
    return lm


@pytest.fixture(scope="module")
def run_file_of(tmp_path_factory: pytest.TempPathFactory):
    """A run of some steps of several packs per rank, beside another model as a live reference."""

    def made(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        vocabulary = save_tokenizer(folder / "tokenizer")
        for name, seed in (("policy", 1), ("reference", 2)):
            model_of(family, vocabulary, seed).save_pretrained(folder / name)
        write_rows(folder / "pairs.jsonl", rows_that_share(11, seed=6))
        write_rows(folder / "held_out.jsonl", preference_rows(5, seed=4))
        path = write_run(folder)
        values = yaml.safe_load(path.read_text())
        values["train"] |= {
            "max_steps": STEPS, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_ratio": 0.0,
            "adam_epsilon": 1e-2, "max_grad_norm": 0.5,
        }  # fmt: skip
        values["data"] |= {"tokens_per_pack": 300}
        if family in OTHERS:
            del values["model"]["router_aux_loss_coef"]
        path.write_text(yaml.safe_dump(values))
        return path

    return functools.cache(made)


def train(workers: Workers, run_file: Path, run: Path, settings: Settings, *overrides: str, code: int = 0) -> Path:
    own = [f"deepspeed={json.dumps(settings.strategy)}", f"model.dtype={settings.dtype}", f"output_dir={run}"]
    arguments = {"config_path": str(run_file), "overrides": [*own, *overrides]}
    assert workers.run("cases:run_training", **arguments) == [code] * workers.size
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def measured(run: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name in MEASURED} for record in training_records(run)]


def assert_same(found: Path, expected: Path, tolerance: float = SAME) -> None:
    steps = [[record for record in training_records(run) if "loss" in record] for run in (found, expected)]
    assert len(steps[0]) == STEPS
    for one, other in zip(*steps, strict=True):
        assert {name: one[name] for name in MEASURED if name in one} == pytest.approx(
            {name: other[name] for name in MEASURED if name in other}, rel=1e-5, abs=1e-5
        )
        assert load_of(one) == pytest.approx(load_of(other))
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert (ours[name].float() - weight.float()).abs().max() <= tolerance, name


def first_steps(workers: Workers, run_file: Path, stage: int, *more: list[str]) -> list[dict[str, Any]]:
    """Of ranks that have all experts, then of ranks that share them, and of these with further overrides."""
    own = [f"deepspeed.zero_optimization.stage={stage}", "train.max_grad_norm=0"]
    spread = [*own, "deepspeed.expert_parallel={enabled: true, autoep_size: 2}"]
    variants = [own, spread, *([*spread, *each] for each in more)]
    arguments = {"config_path": str(run_file), "variants": variants, "gradients": False}
    return workers.run("cases:first_steps", **arguments)[0]


def assert_same_step(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert expected["aux_loss"] > 2 and load_of(expected)
    for name, value in expected.items():
        if isinstance(value, float):
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_a_step_is_that_of_ranks_that_have_all_experts(run_file_of, all_workers):
    """Loss, load-balancing loss, load of each expert, norm of the gradient, at stage 2."""
    without, spread = first_steps(all_workers[2], run_file_of("qwen3_moe"), 2)
    assert spread["full_sizes"] < 0.8 * without["full_sizes"], "each rank has all experts"
    assert_same_step(spread, without)


@SLOW
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_in_other_layouts(stage, run_file_of, all_workers):
    """Without recomputation, and with the inputs of layers in host memory; experts that are balanced over the step, in any
    number of packs."""
    workers, run_file = all_workers[2], run_file_of("qwen2_moe")
    plain, large = ["model.gradient_checkpointing=false"], ["data.tokens_per_pack=100000"]
    host = ["model.gradient_checkpointing=offload"]
    own, *same, first, second = first_steps(
        workers, run_file, stage, plain, host, *([*each, "model.router_aux_scope=step"] for each in (plain, large))
    )
    for found in same:
        assert_same_step(found, own)
    assert_same_step(first, second)
    assert first["packs"] > second["packs"]


@SLOW
@pytest.mark.parametrize("name", SPREAD)
def test_spread_experts_leave_the_numbers_as_they_are(name, run_file_of, all_workers, tmp_path):
    """Over clipped steps, with weights and states in all the places where they may lie."""
    settings, run_file = SPREAD[name], run_file_of("qwen3_moe")
    expected = train(all_workers[2], run_file, tmp_path / "without", Settings(zero(settings.stage)))
    assert_same(train(all_workers[2], run_file, tmp_path / "run", settings), expected)


@SLOW
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_on_and_is_exported(family, stage, run_file_of, all_workers, tmp_path):
    """As without, to the bit after a resume, and out of a checkpoint too."""
    run_file, spread = run_file_of(family), Settings(zero(stage, SPREAD["3"].strategy | zero(stage)))
    expected = train(all_workers[2], run_file, tmp_path / "without", Settings(zero(stage)))
    run = train(all_workers[2], run_file, tmp_path / "run", spread, "checkpoint.save_every=2")
    assert_same(run, expected)
    whole, records = weights(run), measured(run)
    code, said = export(run / "checkpoints/step-000003", tmp_path / "exported")
    assert code == 0, said
    assert_same_model(tmp_path / "exported", run / "final")
    forget_everything_after(run, 2)
    train(all_workers[2], run_file, run, spread, "checkpoint.save_every=2")
    assert measured(run)[-1] == records[-1]
    assert all(torch.equal(weight, whole[name]) for name, weight in weights(run).items())


@SLOW
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_groups_of_ranks_that_have_the_experts_twice(stage, run_file_of, all_workers, tmp_path):
    """Of four ranks each expert is on two, whose gradients are added up."""
    run_file, spread = run_file_of("qwen3_moe"), Settings(zero(stage, SPREAD["3"].strategy | zero(stage)))
    more = ("data.tokens_per_pack=150", "checkpoint.save_every=2")
    expected = train(all_workers[4], run_file, tmp_path / "without", Settings(zero(stage)), *more)
    run = train(all_workers[4], run_file, tmp_path / "run", spread, *more)
    assert_same(run, expected)
    whole = weights(run)
    code, said = export(run / "checkpoints/step-000003", tmp_path / "exported")
    assert code == 0, said
    assert_same_model(tmp_path / "exported", run / "final")
    forget_everything_after(run, 2)
    # Fewer ranks are refused in a line, which leaves the run as it was.
    train(all_workers[2], run_file, run, spread, *more, code=4)
    train(all_workers[4], run_file, run, spread, *more)
    assert all(torch.equal(weight, whole[name]) for name, weight in weights(run).items())


@SLOW
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_in_bf16_as_close_as_bf16_is(stage, run_file_of, all_workers, tmp_path):
    run_file = run_file_of("mixtral")
    settings = Settings(zero(stage), "bfloat16"), Settings(zero(stage, SPREAD["3"].strategy | zero(stage)), "bfloat16")
    runs = [train(all_workers[2], run_file, tmp_path / f"{i}", each) for i, each in enumerate(settings)]
    for one, other in zip(*map(training_records, runs), strict=True):
        for name in ("loss", "aux_loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=2e-2), name
    assert_same_model_but_for_rounding(*map(weights, runs))


def assert_same_model_but_for_rounding(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name].float(), weight.float(), rtol=2**-7, atol=2e-3), name


@SLOW
@pytest.mark.parametrize("stage", [2, 3])
def test_what_a_run_does_beside_its_steps(stage, run_file_of, all_workers, tmp_path):
    """Its reference is the policy that it began as, scored once; held-out pairs are evaluated, and prompts answered, of
    which ranks have different numbers with different numbers of tokens."""
    run_file = run_file_of("qwen3_moe")
    beside = (
        "reference={mode: stored}", f"data.eval.path={run_file.parent}/held_out.jsonl", "train.eval_every=2",
        "log.samples=3", "log.generation={max_new_tokens: 7, temperature: 0}",
    )  # fmt: skip
    expected = train(all_workers[2], run_file, tmp_path / "without", Settings(zero(stage)), *beside)
    spread = Settings(zero(stage, SPREAD["3"].strategy | zero(stage)))
    run = train(all_workers[2], run_file, tmp_path / "run", spread, *beside)
    assert_same(run, expected)
    evaluated = [[line for line in lines_of(each / "metrics.jsonl") if "eval_loss" in line] for each in (run, expected)]
    assert len(evaluated[0]) == len(evaluated[1]) >= 2
    for one, other in zip(*evaluated):
        for name in ("eval_loss", "eval_aux_loss"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
        assert load_of(one, "eval_") == pytest.approx(load_of(other, "eval_"))
    answers = [[line.get("policy") for line in lines_of(each / "samples.jsonl")] for each in (run, expected)]
    assert answers[0] == answers[1] and any(answers[0])


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@SLOW
def test_a_run_that_began_otherwise_is_left_as_it_was(run_file_of, all_workers, tmp_path):
    run_file, run, more = run_file_of("qwen3_moe"), tmp_path / "run", "checkpoint.save_every=2"
    train(all_workers[2], run_file, run, Settings(zero(3)), more)
    forget_everything_after(run, 2)
    before = training_records(run)
    spread = SPREAD["3"].strategy
    settings = [f"deepspeed={json.dumps(spread)}", f"output_dir={run}", more]
    said = all_workers[2].run("cases:said_by_training", config_path=str(run_file), overrides=settings)
    assert [code for code, _ in said] == [2, 2]
    assert f"deepspeed.expert_parallel.autoep_size: 2, but the run in {run} has " in "".join(text for _, text in said)
    assert training_records(run) == before
    three = {**spread, "expert_parallel": {"enabled": True, "autoep_size": 4}}
    elsewhere = [f"deepspeed={json.dumps(three)}", f"output_dir={tmp_path}/other"]
    said = all_workers[2].run("cases:said_by_training", config_path=str(run_file), overrides=elsewhere)
    assert [code for code, _ in said] == [2, 2] and not (tmp_path / "other").exists()
    # By the rank that came to it first.
    assert "autoep_size: 4 does not divide the 2 ranks; use 2, or use other ranks" in "".join(text for _, text in said)
