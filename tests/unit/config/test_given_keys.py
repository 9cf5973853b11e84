"""Weights, margins and scores of rows: what of them goes with which loss, and who reads a column by its own name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dspref import config as configuration
from dspref.errors import ConfigError

SCORES = {"score_chosen": "score_chosen", "score_rejected": "score_rejected"}


def load(folder: Path, train: Any, objective: dict[str, Any] | None = None, held_out: Any = None) -> configuration.Config:
    values = {
        "model": {"name_or_path": "some/model"},
        "data": {"train": train, "eval": held_out},
        "objective": {"name": "dpo", **(objective or {})},
        "deepspeed": {"zero_optimization": {"stage": 2}},
        "output_dir": f"{folder}/run",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return configuration.load(folder / "run.yaml")


def columns(**named: str) -> dict[str, Any]:
    return {"path": "a.jsonl", "columns": named}


RPO = {"loss_type": "rpo_sq"}
GAP = {"path": "a.jsonl", "pair_weights": "score_gap"}
SIMPO, ORPO = {"name": "simpo", "loss_type": "simpo"}, {"name": "orpo", "loss_type": "orpo"}


@pytest.mark.parametrize(
    ("train", "objective"),
    [
        (columns(weight="w"), {}),
        (columns(weight="w"), {"loss_type": ["sigmoid", "sft"]}),
        (columns(weight="w"), ORPO),
        (columns(weight="w", margin="m"), SIMPO),
        (columns(margin="m"), {"loss_type": ["ipo", "sigmoid_norm"]}),
        (columns(score_chosen="hi"), RPO),
        (columns(completions="answers", scores="marks"), RPO),
        (GAP, {}),
        (GAP | columns(score_chosen="hi", score_rejected="lo"), {"loss_type": "hinge"}),
        (GAP | columns(completions="answers.text", scores="answers.mark"), SIMPO),
        (columns(weight="w", margin="m") | {"template": {"prompt": "{q}", "chosen": "{c}", "rejected": "{r}"}}, {}),
    ],
)
def test_what_goes_together(train: Any, objective: dict[str, Any], tmp_path: Path) -> None:
    load(tmp_path, train, objective)


@pytest.mark.parametrize(
    ("train", "objective", "said"),
    [
        (columns(weight="w"), {"loss_type": "aot"}, "columns.weight: does not go with loss_type aot, which sorts"),
        (columns(weight="w"), {"loss_type": ["sigmoid", "aot_pair"]}, "columns.weight: does not go with loss_type aot_pair"),
        (GAP, {"loss_type": "aot_unpaired"}, "pair_weights: does not go with loss_type aot_unpaired, which sorts"),
        (columns(weight="w"), {"loss_type": "sft"}, "columns.weight: has no effect on loss_type sft, a mean over tokens"),
        (GAP | columns(weight="w"), {}, "pair_weights: makes the weights that columns.weight names; give one"),
        (
            columns(margin="m"),
            {"loss_type": "hinge"},
            "columns.margin: has no effect on loss_type hinge; a target margin is",
        ),
        (columns(margin="m"), ORPO, "columns.margin: has no effect on loss_type orpo"),
        (columns(score_chosen="hi"), {}, "columns.score_chosen: has no effect here: a loss of rpo_sq"),
        (
            columns(scores="s", score_rejected="lo"),
            RPO,
            "columns.score_rejected: is for pairs of two answers; columns.scores",
        ),
        (GAP | columns(completions="c", ranks="r"), {}, "pair_weights: cannot be had of columns.ranks"),
        (columns(completions="c", ranks="r"), RPO, "columns.ranks: does not go with loss_type rpo_sq"),
        (columns(weight="x", margin="x"), {}, "columns.weight: names the column of margin once more"),
    ],
)
def test_what_would_have_no_effect_is_one_line(train: Any, objective: dict[str, Any], said: str, tmp_path: Path) -> None:
    for source, held_out, place in (
        (train, None, "data.train"),
        (["b.jsonl", train], None, "data.train.1"),
        ("b.jsonl", train, "data.eval"),
        ("b.jsonl", {"x": train}, "data.eval.x"),
    ):
        with pytest.raises(ConfigError) as refusal:
            load(tmp_path, source, objective, held_out)
        (line,) = str(refusal.value).splitlines()
        assert f"{place}.{said}" in line


def test_a_loss_of_scores_reads_their_columns_in_every_source(tmp_path: Path) -> None:
    sources = ["a.jsonl", columns(score_chosen="hi", weight="w")]
    found = load(tmp_path, sources, RPO, {"x": {"path": "b.jsonl"}})
    train, held_out = found.data_read.train, found.data_read.eval
    assert isinstance(train, list) and isinstance(held_out, dict)
    assert train[0].columns.named == SCORES == held_out["x"].columns.named
    assert train[1].columns.named == SCORES | {"score_chosen": "hi", "weight": "w"}
    assert [source.columns.named for source in found.data.train_sources] == [{}, {"score_chosen": "hi", "weight": "w"}]
    assert load(tmp_path, "a.jsonl", {}, "b.jsonl").data_read == load(tmp_path, "a.jsonl", {}, "b.jsonl").data


def test_the_gap_of_scores_is_read_in_its_own_source(tmp_path: Path) -> None:
    train = load(tmp_path, ["b.jsonl", GAP]).data_read.train_sources
    assert [source.columns.named for source in train] == [{}, SCORES]


@pytest.mark.parametrize(
    ("train", "held_out", "place"),
    [
        (columns(label="good"), None, "data.train"),
        (["a.jsonl", columns(completion="answer")], None, "data.train.1"),
        ("a.jsonl", columns(label="good"), "data.eval"),
        ("a.jsonl", {"easy": {"path": "b.jsonl"}, "1": columns(label="good")}, "data.eval.1"),
    ],
)
def test_columns_of_single_answers_are_for_objectives_that_take_them(
    train: Any, held_out: Any, place: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, train, held_out=held_out)
    (line,) = str(caught.value).splitlines()
    assert f"{place}.columns." in line and "dpo compares two; set objective.name: kto or bco" in line
    load(tmp_path, train, {"name": "bco"}, held_out)


def test_a_reference_point_needs_another_answer_in_the_step(tmp_path: Path) -> None:
    load(tmp_path, "a.jsonl", {"name": "kto", "loss_type": "apo_zero_unpaired"})
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match=r"train.pairs_per_step.* set 2 or more"):
        configuration.load(path, ["objective.loss_type=kto", "train.pairs_per_step=1"])
    configuration.load(path, ["train.pairs_per_step=1"])
