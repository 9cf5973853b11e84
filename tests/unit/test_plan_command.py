"""`dspref plan`: what it reads, what it assumes, and that its figures are those of the run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import save_tiny, save_tokenizer, tiny_config, tiny_encoder_decoder
from tiny_vision import save_vision
from typer.testing import CliRunner

from dspref import config as configuration
from dspref.cli import app
from dspref.data.loader import Packing, place
from dspref.machine import gpus
from dspref.objectives import build_objective
from dspref.training import preparation

PAIRS = 90


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a tiny model and its data, in the working directory."""
    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "model")
    save_tiny(tmp_path / "model", tiny_config("qwen2", 1000), 1)
    rows = [
        {"prompt": "say a b " * (1 + n % 7), "chosen": "yes " * (3 + n % 5), "rejected": "no " * 4} for n in range(PAIRS)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = {
        "model": {"name_or_path": "model"},
        "data": {"train": "pairs.jsonl", "tokens_per_pack": 256},
        "train": {"pairs_per_step": 20},
        "deepspeed": {"zero_optimization": {"stage": 2}},
        "output_dir": "runs/x",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", "run.yaml", *arguments], prog_name="dspref")
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def found(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["plan", "run.yaml", "--format", "json", *arguments], prog_name="dspref")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_what_the_run_refuses_of_ways_for_long_pairs_is_refused_here(folder: Path) -> None:
    """Ranks, heads, models whose packs are not shared, and MLPs that do not run in tiles."""
    assert call("--gpus", "3", "parallel.sequence=2") == (
        2, "parallel.sequence: 2 does not divide the 3 ranks; use 1, or ranks that it divides\n",
    )  # fmt: skip
    code, said = call("--gpus", "8", "parallel.sequence=8")
    assert code == 2 and "parallel.sequence: 8 does not divide the model's 4 attention heads; use 4" in said
    save_tiny(folder / "model", tiny_encoder_decoder("t5", 1000), 1)
    code, said = call("--gpus", "2", "parallel.sequence=2")
    assert code == 2 and "parallel.sequence: 2, but t5 has an encoder, and its packs are not shared; use 1" in said
    code, said = call("model.tiled_mlp=true")
    assert code == 2 and "model.tiled_mlp: t5 has an encoder, and its MLPs are not tiled; drop the key" in said


def test_packs_and_tokens_are_those_that_the_run_will_have(folder: Path) -> None:
    plan = found("--gpus", "2", "--nodes", "2", "train.num_train_epochs=3")
    config = configuration.load(folder / "run.yaml", [])
    tokenizer = preparation.tokenizer_of(config.model)
    pairs = preparation.load_sources(config.data, tokenizer, [preparation.listing_of(config.data.train, "data.train")])
    packing, loader = preparation.steps_of(config.data, config.train, pairs, build_objective("dpo", "sigmoid"), 3, 4)
    assert isinstance(packing, Packing) and packing.world_size == 4
    steps = [place(pairs, ids, packing) for ids in loader.epoch(0)][:-1]
    load = plan["load"]
    assert plan["machine"]["ranks"] == 4 and load["measured"] and load["pairs"] == PAIRS
    assert load["computed"] == pytest.approx(sum(step.tokens for step in steps) / len(steps))
    assert load["scored"] == pytest.approx(sum(step.scored for step in steps) / len(steps))
    assert load["largest"] == max(step.largest for step in steps)
    assert plan["steps"] == {"per_epoch": 5, "run": 15}
    assert found("train.overfit=7")["steps"]["run"] == found("train.max_steps=7")["steps"]["run"] == 7
    assert plan["flops"]["run"] == 15 * plan["flops"]["step"] > 0
    assert plan["seconds"]["epoch"] == 5 * plan["seconds"]["step"]
    assert plan["seconds"]["step"] == pytest.approx(plan["flops"]["executed_step"] / (4 * 989e12 * plan["assumed"]["hfu"]))


def test_without_data_lengths_are_assumed_and_said(folder: Path) -> None:
    (folder / "pairs.jsonl").unlink()
    load = found("data.max_length=100")["load"]
    assert not load["measured"] and "100 tokens a sequence (data.max_length), as pairs.jsonl is not here" in load["source"]
    assert load["computed"] == 20 * 200 and load["largest"] == 200
    named = found("--mean-tokens", "50", "--gpus", "1")
    assert named["load"]["computed"] == 20 * 100 and "--mean-tokens 50" in named["load"]["source"]
    assert named["load"]["packs"] == 10 and named["steps"]["per_epoch"] is None and named["seconds"]["epoch"] is None
    code, said = call("--mean-tokens", "50")
    assert code == 0 and "assumed: --mean-tokens 50" in said


def test_globs_are_read_and_a_tokenizer_that_is_missing_is_said(folder: Path) -> None:
    (folder / "pairs.jsonl").rename(folder / "pairs-0.jsonl")
    assert found("data.train=pairs-*.jsonl")["load"]["pairs"] == PAIRS
    load = found("data.train=pairs-*.jsonl", "model.tokenizer_name_or_path=some/tokenizer", "data.max_length=null")["load"]
    assert not load["measured"] and load["source"].startswith("assumed: 2048 tokens a sequence, as the data could not be")


def test_all_stages_are_there_and_parts_add_up(folder: Path) -> None:
    plan = found()
    rows = plan["strategies"]
    assert [row["stage"] for row in rows] == [1, 2, 2, 3, 3, 3]
    assert [row["name"] for row in rows if row["configured"]] == ["ZeRO-2"]
    assert all(sum(row["parts"].values()) == row["bytes"] for row in rows)
    (own,) = [row for row in rows if row["configured"]]
    assert own["bytes"] == plan["memory"]["bytes"] and own["fits"]
    assert plan["disk"]["checkpoints"] == 0 and plan["disk"]["checkpoint"] == 14 * plan["model"]["weights"]


def test_what_lets_a_reference_move_is_counted(folder: Path) -> None:
    """In memory and in checkpoints, in bf16 and on two ranks that hold the whole of it."""
    plans = {
        name: found("--gpus", "2", "reference.mode=engine", *more)
        for name, more in {
            "stays": (),
            "tr_dpo": ("reference.sync_ref_model=true",),
            "bema": ("reference.bema=true",),
            "sharded": ("reference.bema=true", "reference.zero_stage=3"),
        }.items()
    }
    weights = plans["stays"]["model"]["weights"]
    bytes_ = {name: plan["memory"]["parts"]["reference"] / weights for name, plan in plans.items()}
    assert bytes_ == pytest.approx({"stays": 2, "tr_dpo": 6, "bema": 2, "sharded": 1}, abs=1e-3)
    host = {name: plan["memory"]["host_bytes_per_node"] / weights for name, plan in plans.items()}
    assert host == pytest.approx({"stays": 0, "tr_dpo": 0, "bema": 12, "sharded": 6}, abs=1e-3)
    disk = {name: plan["disk"]["checkpoint"] / weights for name, plan in plans.items()}
    assert disk == {"stays": 14, "tr_dpo": 18, "bema": 22, "sharded": 22}
    assert all("reference.mode=stored" not in str(plan["changes"]) for plan in plans.values())


def test_a_small_card_is_told_what_to_change(folder: Path) -> None:
    code, said = call("--gpu-gib", "0.1", "reference.mode=engine")
    assert code == 0 and "it does not fit" in said and "use more GPUs" in said
    assert not found("--gpu-gib", "0.1")["memory"]["fits"]


def test_the_live_reference_and_the_stored_one(folder: Path) -> None:
    stored, live, none = (found(*more) for more in ([], ["reference.mode=engine"], ["objective={name: simpo}"]))
    assert stored["seconds"]["scoring_reference"] > 0 and live["seconds"]["scoring_reference"] is None
    assert none["seconds"]["scoring_reference"] is None
    assert live["flops"]["executed_step"] > stored["flops"]["executed_step"] == none["flops"]["executed_step"]
    assert [plan["memory"]["parts"]["reference"] > 0 for plan in (stored, live, none)] == [False, True, False]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--gpu", "h1000"], 2, "--gpu: h1000 is not known"),
        (["model.name_or_path=some/model"], 2, "hf download some/model config.json"),
        (["train.lerning_rate=1"], 2, "did you mean 'learning_rate'"),
        (["--gpus", "0"], 2, "--gpus"),
        (
            ["model.freeze=[embed_token]"],
            2,
            "model.freeze: no parameter of the model has 'embed_token' in its name; did you",
        ),
        (["model.freeze=['*']"], 2, "model.freeze: leaves nothing to be trained"),
        (["data.on_bad_row=drop", "data.train.columns={prompt: better}"], 3, "better"),
    ],
)
def test_mistakes_are_one_line(folder: Path, arguments: list[str], code: int, said: str) -> None:
    got, output = call(*arguments)
    assert got == code and said in output and "Traceback" not in output


def test_a_plan_writes_nothing_beside_the_token_cache(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    assert call()[0] == 0
    assert sorted(folder.rglob("*")) == before


def test_the_help_names_every_card() -> None:
    said = " ".join(CliRunner().invoke(app, ["plan", "--help"], prog_name="dspref", env={"COLUMNS": "200"}).output.split())
    assert all(f"{name}," in said for name in gpus.GPUS) and "or cpu" in said


def test_cpu_is_this_machine(folder: Path) -> None:
    plan = found("--gpu", "cpu", "--gpus", "2", "model.dtype=float32")
    assert plan["machine"]["gib"] == pytest.approx(gpus.machine_gib() / 2)
    assert plan["seconds"]["step"] is None and [row["stage"] for row in plan["strategies"]] == [0, 1, 2, 3]


def test_small_figures_have_their_units_and_what_is_not_known_its_reason(folder: Path) -> None:
    said = call("--gpu", "cpu", "--gpus", "1", "model.dtype=float32", "data.tokens_per_pack=4096")[1]
    assert " pairs in 1 pack a rank" in said and "TFLOPs  " in said
    assert "not estimated: no peak is known of float32 on CPU\n" in said
    said = call("model.dtype=float32")[1]
    assert "no peak is known of float32 on H100; with model.dtype=bfloat16 it is\n" in said
    assert "not estimated: a step has under 0.1 s of arithmetic" in call("model.dtype=bfloat16")[1]


@pytest.mark.parametrize("kind", ["encoder-decoder", "vision"])
def test_models_of_several_stacks_are_planned_whole(folder: Path, kind: str) -> None:
    """Their weights, what their encoder or tower computes, and what is assumed where there are no data."""
    model = (
        save_tiny(folder / "other", tiny_encoder_decoder("t5"), 1)
        if kind != "vision"
        else save_vision(folder / "other", "llava", 1)
    )
    of_model = ["model.name_or_path=other", "--mean-tokens", "50"]
    plan, frozen = found(*of_model), found(*of_model, f"model.freeze=[{'encoder' if kind != 'vision' else 'vision_tower'}]")
    weights = sum(p.numel() for p in model.parameters())
    assert plan["model"]["weights"] == plan["model"]["trained"] == weights > frozen["model"]["trained"]
    assert len(plan["model"]["others"]) == 1 and frozen["model"]["others"] == []
    assert frozen["flops"]["step"] <= plan["flops"]["step"]
    said = plan["load"]["source"]
    assert ("each prompt encoded once" in said) == (kind != "vision") and ("no images" in said) == (kind == "vision")


def test_the_arithmetic_loads_no_torch() -> None:
    code = "import sys; from dspref.machine import run_plan, fitting, gpus; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
