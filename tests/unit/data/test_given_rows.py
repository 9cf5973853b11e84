"""Numbers that rows give beside their texts: read where they are named, kept in the store, laid beside each pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_store import ROWS, contents, load, write

from dspref.data.batch import collate
from dspref.data.completions import to_preferences
from dspref.data.formats import Preference, RowError
from dspref.data.loader import Packing, place
from dspref.data.sources import Source
from dspref.data.store import PairStore
from dspref.errors import DataError
from dspref.model.logps import TokenLogps, pair_logps
from dspref.reference.store import sequence_keys

PAIR = {"prompt": "q", "chosen": " a", "rejected": " b"}
SCORED = {"prompt": "q", "completions": [" a", " b", " c"], "scores": [1, "4.5", 3]}
BOTH = {"score_chosen": "score_chosen", "score_rejected": "score_rejected"}
TEMPLATE = {"prompt": "{q}", "chosen": "{c}", "rejected": "{r}"}


def numbers_of(row: dict[str, Any], columns: dict[str, str] | None = None, **how: Any) -> list[dict[str, float]]:
    made = to_preferences(row, columns, **how)
    return [dict(item.given) for item in made if isinstance(item, Preference)]


def test_what_is_named_is_read_and_nothing_else() -> None:
    row = PAIR | {"w": "2.50", "m": -1, "weight": 7, "margin": 8, "score_chosen": 3, "score_rejected": 1.5}
    assert numbers_of(row) == [{}]
    assert numbers_of(row, {"weight": "w"}) == [{"weight": 2.5}]
    assert numbers_of(row, {"weight": "w", "margin": "m"}) == [{"weight": 2.5, "margin": -1.0}]
    assert numbers_of(row, {"weight": "weight"} | BOTH) == [{"weight": 7.0, "score_chosen": 3.0, "score_rejected": 1.5}]
    assert numbers_of(PAIR | {"by": {"w": 2}}, {"weight": "by.w"}) == [{"weight": 2.0}]


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_weight_or_margin_may_be_null(value: Any) -> None:
    assert numbers_of(PAIR | {"w": value, "m": 1}, {"weight": "w", "margin": "m"}) == [{"margin": 1.0}]


def test_numbers_stand_beside_a_template() -> None:
    row = {"q": "q", "c": " a", "r": " b", "w": 2, "hi": 3, "lo": 1}
    columns = {"weight": "w", "score_chosen": "hi", "score_rejected": "lo"}
    found = numbers_of(row, columns, template=TEMPLATE)
    assert found == [{"weight": 2.0, "score_chosen": 3.0, "score_rejected": 1.0}]


def test_scored_answers_hand_their_scores_to_each_pair() -> None:
    scores = [(4.5, 3.0), (4.5, 1.0), (3.0, 1.0)]
    assert numbers_of(SCORED) == [{}] * 3
    assert numbers_of(SCORED | {"w": 2}, BOTH | {"weight": "w"}) == [
        {"weight": 2.0, "score_chosen": best, "score_rejected": worst} for best, worst in scores
    ]
    found = numbers_of(SCORED, BOTH, pair_weights="score_gap", pairs="best_against_rest")
    assert [one["weight"] for one in found] == [1.5, 3.5]


def test_a_pair_of_two_answers_may_weigh_the_gap_of_its_scores() -> None:
    columns = {"score_chosen": "s.hi", "score_rejected": "s.lo"}
    for high, low, gap in ((3, 1, 2.0), ("1.5", 1.5, 0.0), (-1, -4.5, 3.5)):
        (found,) = numbers_of(PAIR | {"s": {"hi": high, "lo": low}}, columns, pair_weights="score_gap")
        assert found["weight"] == gap


@pytest.mark.parametrize(
    ("row", "columns", "pair_weights", "said"),
    [
        ({"w": "heavy"}, {"weight": "w"}, None, "w: not a finite number: 'heavy'"),
        ({"w": True}, {"weight": "w"}, None, "w: not a finite number: True"),
        ({"w": float("nan")}, {"weight": "w"}, None, "w: not a finite number: nan"),
        ({"w": [1]}, {"weight": "w"}, None, r"w: not a finite number: \[1\]"),
        ({"w": -0.5}, {"weight": "w"}, None, "w: a weight below 0: -0.5"),
        ({"w": 1e39}, {"weight": "w"}, None, "w: too large: 1e[+]39"),
        ({"m": 1e39}, {"margin": "m"}, None, "m: too large"),
        ({"weigth": 1}, {"weight": "weight"}, None, "weight: no column 'weight' among .*did you mean 'weigth'"),
        ({}, BOTH, None, "score_chosen: scores of both answers are read, and there is no column 'score_chosen'"),
        ({"score_chosen": 1}, BOTH, None, "score_rejected: scores of both answers are read, and there is no column"),
        ({"score_chosen": 1, "score_rejected": None}, BOTH, None, "score_rejected: null, and the scores of both"),
        ({"score_chosen": 1, "score_rejected": 2}, BOTH, "score_gap", "score_rejected: 2 is above score_chosen, 1: "),
        (
            {"chosen": None, "rejected": None, "completion": " a", "label": True},
            BOTH,
            "score_gap",
            "pair_weights weighs pairs",
        ),
        ({"score_chosen": 3e38, "score_rejected": -3e38}, BOTH, "score_gap", "too large: 6e[+]38"),
    ],
)
def test_what_is_no_number_is_one_line(
    row: dict[str, Any], columns: dict[str, str], pair_weights: str | None, said: str
) -> None:
    with pytest.raises(RowError, match=said) as refusal:
        to_preferences(PAIR | row, columns, pair_weights=pair_weights)
    assert not refusal.value.droppable


def test_ranks_are_no_scores() -> None:
    row = {"prompt": "q", "completions": [" a", " b"], "ranks": [1, 2]}
    assert numbers_of(row, {"weight": "ranks.0"}) == [{"weight": 1.0}], "weights go with them"
    with pytest.raises(RowError, match="ranks: a rank says which answer is the better one, and not by how much"):
        to_preferences(row, BOTH)


def test_columns_that_look_like_them_are_told() -> None:
    def notes(row: dict[str, Any], columns: dict[str, str] | None = None) -> list[str]:
        (pair,) = to_preferences(row, columns)
        assert isinstance(pair, Preference)
        return [note.split(",")[0] for note in pair.unused]

    assert notes(PAIR | {"weight": 2, "margin": 0.5}) == ["pair beside a weight", "pair beside a margin"]
    assert notes(PAIR | {"weight": 2, "margin": 0.5}, {"weight": "weight"}) == ["pair beside a margin"]
    assert notes(PAIR | {"weight": "60 kg", "score_chosen": 3}) == []


# ---------------------------------------------------------------------------------------------------------- the store


NUMBERS = [
    {"w": w, "m": m, "score_chosen": w, "score_rejected": 0} for w, m in ((2, 0.5), (0, None), (None, 1), (1.5, -1), (3, 0))
]
GIVEN = [row | numbers for row, numbers in zip(ROWS, NUMBERS)]


def read(folder: Path, columns: dict[str, str] | None = None, rows: list[dict[str, Any]] = GIVEN, **more: Any) -> PairStore:
    source = write(folder / "a.jsonl", rows)
    return load([Source(source.path, columns=columns, **more)], folder / "cache")


def test_a_store_keeps_what_is_named_with_1_and_0_for_what_is_null(tmp_path: Path) -> None:
    store = read(tmp_path, {"weight": "w", "margin": "m"})
    assert store.given.columns.keys() == {"weight", "margin"}
    found = store.given.of([4, 1, 2])
    assert found["weight"].tolist() == [3, 0, 1] and found["margin"].tolist() == [0, 0, 1]
    assert all(column.dtype == np.float32 for column in found.values())
    table = np.load(tmp_path / "cache" / store.address / "given.npy")
    assert table.shape == (5, 4) and np.isnan(table[:, 2:]).all() and np.isnan(table[2, 0])
    assert read(tmp_path, {"weight": "w", "margin": "m"}).address == store.address


def test_without_such_columns_a_store_is_what_it_was(tmp_path: Path) -> None:
    """No file, and the same key; with them, other content of the same tokens, under other addresses."""
    plain = read(tmp_path / "plain", rows=ROWS)
    assert "given.npy" not in plain.report["files"] and plain.given.columns == {} == plain.given.of([0])
    beside = read(tmp_path / "beside")
    assert beside.key == plain.key and "given.npy" not in beside.report["files"]
    weighed, scored = (read(tmp_path / "beside", columns) for columns in ({"weight": "w"}, {"margin": "m"}))
    assert len({plain.key, weighed.key, scored.key}) == 3
    assert len({beside.address, weighed.address, scored.address}) == 3
    assert contents(weighed) == contents(plain)
    every = np.arange(5)
    assert np.array_equal(sequence_keys(weighed, every), sequence_keys(plain, every)), "a reference's values are the same"


def test_another_weight_is_another_content(tmp_path: Path) -> None:
    first = read(tmp_path / "a", {"weight": "w"})
    other = read(tmp_path / "b", {"weight": "w"}, [*GIVEN[:4], GIVEN[4] | {"w": 3.5}])
    assert first.key != other.key and first.address != other.address


def test_of_a_mixture_the_pairs_of_other_sources_weigh_1(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", GIVEN[:2]), write(tmp_path / "b.jsonl", GIVEN[2:])
    gaps = Source(first.path, columns=BOTH, pair_weights="score_gap")
    store = load([gaps, Source(second.path)], tmp_path / "cache")
    assert store.given.columns["weight"].tolist() == [2, 0, 1, 1, 1]


def test_a_row_that_lacks_a_column_which_others_have_has_null_there(tmp_path: Path) -> None:
    rows = [ROWS[0], *GIVEN[1:]]
    assert read(tmp_path, {"weight": "w"}, rows).given.columns["weight"].tolist() == [1, 0, 1, 1.5, 3]
    with pytest.raises(DataError, match=r"weight: no column 'wieght' among .*set data\.train\.columns\.weight"):
        read(tmp_path, {"weight": "wieght"}, rows)
    with pytest.raises(DataError, match="null, and the scores of both answers are read"):
        read(tmp_path, BOTH, rows)


def test_rows_that_are_left_out_take_their_numbers_along(tmp_path: Path) -> None:
    rows = [GIVEN[0], GIVEN[1] | {"w": -1}, GIVEN[2] | {"rejected": GIVEN[2]["chosen"]}, GIVEN[3]]
    source = write(tmp_path / "a.jsonl", rows)
    store = load([Source(source.path, columns={"weight": "w"})], tmp_path / "cache", on_bad_row="drop")
    assert store.given.columns["weight"].tolist() == [2, 1.5]
    with pytest.raises(DataError, match="w: a weight below 0: -1"):
        load([Source(source.path, columns={"weight": "w"})], tmp_path / "cache")


# ---------------------------------------------------------------------------------------------------------- the packs


@pytest.mark.parametrize("sharing", [False, True])
def test_every_pack_has_the_numbers_of_its_pairs(tmp_path: Path, sharing: bool) -> None:
    rows = [row | {"w": k, "score_chosen": k} for k, row in enumerate(GIVEN)]
    store = read(tmp_path, {"weight": "w", "margin": "m"} | BOTH, rows)
    seen = {}
    for rank in range(2):
        packing = Packing(8, sharing, rank, 2)
        for batch in place(store, np.arange(5), packing).packs(store, packing):
            count = batch.num_pairs
            assert batch.given is not None and batch.given.keys() == {"weight", "margin", *BOTH}, "fillers too"
            assert all(x.shape == (count,) and x.dtype == torch.float32 for x in batch.given.values())
            moved = batch.to("meta").given
            assert moved is not None and all(x.device.type == "meta" for x in moved.values())
            logps = pair_logps(TokenLogps(*(torch.zeros(len(batch.span_index)) for _ in range(2))), batch)
            assert logps.weight is not None and torch.equal(logps.weight, batch.given["weight"])
            seen |= dict(zip(batch.pair_ids.tolist(), logps.weight.tolist()))
    assert seen == {k: float(k) for k in range(5)}


def test_a_pack_of_a_store_without_numbers_has_none() -> None:
    batch = collate([], [], prefix_sharing=True, given={})
    assert batch.given is None
    assert pair_logps(TokenLogps(torch.zeros(0), torch.zeros(0)), batch).weight is None


def test_a_format_of_ones_own_gives_numbers_under_the_names_of_the_columns(tmp_path: Path, monkeypatch: Any) -> None:
    text = "def halved(row):\n    return {**row, 'half': row['w'] and row['w'] / 2}\n"
    (tmp_path / "formats_of_numbers.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "a.jsonl", GIVEN)
    columns = {"weight": "half"} | BOTH
    with pytest.raises(DataError, match="null, and the scores of both answers are read"):
        load([Source(source.path, columns=columns, format="formats_of_numbers:halved")], tmp_path / "cache")
    source = write(tmp_path / "a.jsonl", [row | {"score_chosen": 2} for row in GIVEN])
    store = load([Source(source.path, columns=columns, format="formats_of_numbers:halved")], tmp_path / "cache")
    assert store.given.columns["weight"].tolist() == [1, 0, 1, 0.75, 1.5]
    assert store.given.columns["score_chosen"].tolist() == [2] * 5
