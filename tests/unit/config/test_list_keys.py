"""Lists and gold answers in a config: what they imply of the sources, and what does not go with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_given_keys import load

from dspref.errors import ConfigError

TEXTS = {"prompt": "{x}", "chosen": "{y}", "rejected": "{z}"}
LISTWISE, TPO = {"name": "listwise"}, {"name": "tpo"}


def test_the_objective_says_what_rows_are(tmp_path: Path) -> None:
    """Every source is read so, and the YAML stays as it was written."""
    train = ["a.jsonl", {"path": "b.jsonl", "pairs": "list"}]
    found = load(tmp_path, train, LISTWISE, {"x": {"path": "c.jsonl"}})
    data = found.data_read
    assert [source.pairs for source in (*data.train_sources, *data.eval_sources.values())] == ["list"] * 3
    assert [source.pairs for source in found.data.train_sources] == ["all", "list"]
    train = ["a.jsonl", {"path": "b.jsonl", "columns": {"reference": "gold"}}]
    data = load(tmp_path, train, TPO, "c.jsonl").data_read
    named = [source.columns.named for source in (*data.train_sources, *data.eval_sources.values())]
    assert named == [{"reference": "reference"}, {"reference": "gold"}, {"reference": "reference"}]
    for loss in ("plackett_luce", "lipo_lambda"):
        columns = {"scores": "s", "weight": "w", "score_chosen": "x", "score_rejected": "y"}
        load(tmp_path, {"path": "a.jsonl", "columns": {"ranks": "r"}}, {**LISTWISE, "loss_type": loss})
        load(tmp_path, {"path": "a.jsonl", "columns": columns}, {**LISTWISE, "loss_type": loss})


@pytest.mark.parametrize(
    ("source", "objective", "said"),
    [
        ({"pairs": "list"}, {}, "pairs: list makes lists, and dpo compares two; set objective.name: listwise"),
        ({"pairs": "list"}, TPO, "pairs: list makes lists, and tpo compares two"),
        ({"pairs": "best_against_rest"}, LISTWISE, "listwise takes all answers of a row; drop it"),
        ({"pair_weights": "score_gap"}, LISTWISE, "pair_weights: weighs pairs, and listwise has lists"),
        ({"columns": {"reference": "gold"}}, {}, "columns.reference: is the gold answer of objective tpo; dpo has no place"),
        ({"columns": {"reference": "gold"}}, LISTWISE, "listwise has no place for it"),
        ({"template": TEXTS}, TPO, "template.reference: missing: tpo trains on a gold answer"),
        ({"template": TEXTS | {"reference": "{g}"}}, {}, "template.reference: is the gold answer of objective tpo"),
        ({"columns": {"label": "l"}}, TPO, "tpo compares two; set objective.name: kto or bco"),
        ({"columns": {"margin": "m"}}, LISTWISE, "columns.margin: has no effect on loss_type plackett_luce"),
        ({"columns": {"margin": "m"}}, TPO, "columns.margin: has no effect on loss_type sigmoid"),
        ({}, {**TPO, "tpo_alpha": 0}, "tpo_alpha: must be greater than 0"),
        ({}, {**TPO, "tpo_l_gamma": 1}, "tpo_l_gamma: does not apply to loss_type sigmoid; it is for tpo_l"),
        (
            {},
            {**LISTWISE, "score_scale": 2},
            "does not apply to loss_type plackett_luce; it is for lipo_lambda",
        ),
        ({}, {**LISTWISE, "loss_type": "lipo"}, "write loss_type: lipo_lambda"),
        ({}, {"loss_type": "plackett_luce"}, "write name: listwise"),
        ({}, {"loss_type": "tpo"}, "write name: tpo"),
        ({}, {**TPO, "loss_type": "tpo-l"}, "write loss_type: tpo_l"),
    ],
)
def test_what_does_not_go_together(source: dict[str, Any], objective: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, {"path": "a.jsonl", **source}, objective)
    (line,) = str(caught.value).splitlines()
    assert said in line.replace("reference gold", "reference"), line
