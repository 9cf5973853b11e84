"""`dspref evaluate`: what a run writes of its held-out pairs, of any model and without the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import preference_rows, save_tiny, save_tokenizer, tiny_config, write_run
from typer.testing import CliRunner

from dspref.cli import app
from dspref.report import evaluations

SUBSETS = ("chat", "safety", None, "chat", "chat")
ZERO2 = {"zero_optimization": {"stage": 2}}


def train(workers, file: Path, *overrides: str) -> Path:
    run = file.parent / "run"
    run = next((Path(text.removeprefix("output_dir=")) for text in overrides if text.startswith("output_dir=")), run)
    assert workers.run("cases:run_training", config_path=str(file), overrides=list(overrides)) == [0] * workers.size
    return run


def evaluate(workers, file: Path, source: Path | None, *overrides: str) -> dict[str, Any]:
    asked = {"config_path": str(file), "overrides": list(overrides), "source": str(source) if source else None}
    found = workers.run("cases:evaluated", **asked)
    assert all(one == found[0] for one in found), "ranks differ"
    assert isinstance(found[0], dict), found[0]
    return found[0]


def refused(workers, file: Path, source: Path | None, *overrides: str) -> str:
    asked = {"config_path": str(file), "overrides": list(overrides), "source": str(source) if source else None}
    found = workers.run("cases:evaluated", **asked)[0]
    assert isinstance(found, str) and "\n" not in found, found
    return found


def evaluations_of(run: Path) -> dict[int, dict[str, float]]:
    """What the run wrote of its held-out pairs, by step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: {k.removeprefix("eval_"): v for k, v in line.items() if k.startswith("eval_")} for line in lines}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose held-out rows have subsets, all but one."""
    folder = tmp_path_factory.mktemp("held-out")
    path = write_run(folder, deepspeed=ZERO2)
    rows = preference_rows(len(SUBSETS), seed=5)
    rows = [row | ({"subset": name} if name else {}) for row, name in zip(rows, SUBSETS, strict=True)]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row.get("subset") == "chat"))
    return path


@pytest.fixture(scope="module")
def run(file: Path, all_workers) -> Path:
    return train(all_workers[1], file)


def test_any_model_is_evaluated_as_the_run_would(file: Path, run: Path, all_workers) -> None:
    wrote = evaluations_of(run)
    for source, step in ((run, 4), (run / "final", 4), (run / "checkpoints/step-000002", 2)):
        one = evaluate(all_workers[1], file, source)["sets"]["eval"]
        assert one["pairs"] == 5 and one["metrics"] == pytest.approx(wrote[step], abs=1e-5), source
    several = evaluate(all_workers[2], file, run, "deepspeed={zero_optimization: {stage: 3}}")["sets"]["eval"]
    assert several["metrics"] == pytest.approx(wrote[4], abs=1e-4)
    begun = evaluate(all_workers[1], file, None)["sets"]["eval"]["metrics"]
    assert begun["rewards/margins"] == pytest.approx(0, abs=1e-5) and begun["loss/sigmoid"] == pytest.approx(
        0.693147, abs=1e-5
    )


def test_accuracy_by_subset(file: Path, run: Path, all_workers) -> None:
    for workers in (all_workers[1], all_workers[2]):
        one = evaluate(workers, file, run)["sets"]["eval"]
        assert {name: of["pairs"] for name, of in one["subsets"].items()} == {"chat": 3, "safety": 1}
        assert one["pairs_without_subset"] == 1
        accuracies = [of["accuracy"] for of in one["subsets"].values()]
        assert one["mean_over_subsets"] == pytest.approx(sum(accuracies) / 2)
        alone = evaluate(workers, file, run, f"data.eval={file.parent}/chat.jsonl")["sets"]["eval"]
        assert one["subsets"]["chat"]["accuracy"] == alone["metrics"]["rewards/accuracies"] == alone["mean_over_subsets"]


def test_sets_of_several_names_and_none_without_subsets(file: Path, run: Path, all_workers, tmp_path: Path) -> None:
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(4, seed=8)))
    sets = f"data.eval={{a: {{path: {file.parent}/chat.jsonl}}, a_b: {{path: {tmp_path}/plain.jsonl}}}}"
    found = evaluate(all_workers[1], file, run, sets)["sets"]
    assert (
        found.keys() == {"eval_a", "eval_a_b"} and found["eval_a"]["metrics"].keys() == found["eval_a_b"]["metrics"].keys()
    )
    assert "subsets" in found["eval_a"] and "subsets" not in found["eval_a_b"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.lora={r: 4, lora_alpha: 64, init_lora_weights: false}", "reference.mode=adapter"),
        ("objective={name: dpo, loss_type: bco_pair}",),
        ("objective={name: orpo}",),
        ("reference={bema: {update_freq: 9}}",),
        ("objective={name: kto}",),
        pytest.param(("objective={name: bco}", "data.prefix_sharing=true"), marks=pytest.mark.slow),
        pytest.param(("model.init=random",), marks=pytest.mark.slow),
    ],
)
def test_objectives_and_references(overrides: tuple[str, ...], file: Path, all_workers, tmp_path: Path) -> None:
    """An adapter over its own model, BCO's running mean, no reference and prompts that are scored, a reference before its
    first move, KTO's reference point, drawn weights."""
    overrides = (*overrides, f"output_dir={tmp_path}/run")
    run = train(all_workers[1], file, *overrides)
    one = evaluate(all_workers[1], file, run, *overrides)["sets"]["eval"]["metrics"]
    assert one == pytest.approx(evaluations_of(run)[4], abs=1e-5)


def test_a_model_of_another_vocabulary(file: Path, all_workers, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other/tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 259, "content": "<|more|>"})
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(tokenizer))
    save_tiny(tmp_path / "other", tiny_config("llama", 300), seed=9)
    assert "has another vocabulary than the reference" in refused(all_workers[1], file, tmp_path / "other")
    found = evaluate(all_workers[1], file, tmp_path / "other", "objective={name: simpo}")
    assert 0 <= found["sets"]["eval"]["metrics"]["rewards/accuracies"] <= 1


def test_what_is_refused(file: Path, run: Path, all_workers, tmp_path: Path) -> None:
    assert "data.eval: names no held-out pairs" in refused(
        all_workers[1], file, run, "data.eval=null", "train.eval_every=null"
    )
    assert "--model: " in refused(all_workers[1], file, tmp_path / "nowhere")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/run.json").write_text('{"run_id": "1", "state": "running"}')
    assert "has no model yet" in refused(all_workers[1], file, tmp_path / "begun")
    assert "trained on too" in refused(all_workers[1], file, run, f"data.eval={file.parent}/pairs.jsonl")
    random = ("model.init=random", f"output_dir={tmp_path}/none")
    assert "random weights are drawn when the run begins" in refused(all_workers[1], file, None, *random)


def test_what_people_read() -> None:
    found = {
        "model": "runs/\x1b[31mmine", "objective": "dpo", "reference": "stored",
        "sets": {
            "eval": {
                "pairs": 1200, "metrics": {"lengths/chosen": 3.0, "rewards/accuracies": 0.75, "loss": 0.5},
                "subsets": {"chat": {"pairs": 3, "accuracy": 1.0}}, "mean_over_subsets": 1.0, "pairs_without_subset": 2,
            }
        },
    }  # fmt: skip
    text = evaluations.in_text(found)
    assert "\x1b" not in text and "eval: 1,200 pairs" in text and "mean over subsets" in text and "2 pairs without" in text
    assert text.index("loss") < text.index("rewards/accuracies") < text.index("lengths/chosen") < text.index("chat (3)")


def test_the_command(file: Path) -> None:
    """Its mistakes; what it prints is run by tests/unit/test_docs.py."""
    said = CliRunner().invoke(app, ["evaluate", str(file), "--model", "$HOME/x"], prog_name="dspref")
    assert said.exit_code == 2 and "not expanded" in said.output, said.output
