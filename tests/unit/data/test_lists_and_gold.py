"""Rows as lists of answers, and pairs with a gold answer: what they become, which of it is in one step, and in one pack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_formats import SYSTEM, assistant, user
from test_store import contents, load, words, write
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dspref.data.completions import to_preferences
from dspref.data.converting import Converter
from dspref.data.formats import Preference, RowError
from dspref.data.loader import Packing, StepLoader, count, place, sweep
from dspref.data.plan import alone
from dspref.data.sources import Source, find
from dspref.data.store import PairStore, load_pairs
from dspref.data.truncate import Limits
from dspref.data.whole_rows import examples_of, joined, numbered, rows_of_sources, starts
from dspref.errors import DataError
from dspref.objectives import build_objective
from dspref.training.preparation import refuse_for_objective

SCORED = {"prompt": "q", "completions": [" a", " b", " c"], "scores": [1, 4.5, 1]}
GOLD = {"reference": "reference"}


def made_of(row: dict[str, Any], columns: dict[str, str] | None = None, **how: Any) -> list[tuple[Any, ...]]:
    made = to_preferences(row, columns, None, how.pop("pairs", "list"), **how)
    assert all(isinstance(item, Preference) for item in made), made
    return [(p.chosen, p.label, p.given["score_chosen"]) for p in made if isinstance(p, Preference)]


def test_all_answers_of_a_row_are_one_list() -> None:
    """The best first, each alone with its score, also those that are equal; a score that is not there leaves one out."""
    assert made_of(SCORED) == [(" b", True, 4.5), (" a", False, 1), (" c", False, 1)]
    assert made_of(SCORED | {"scores": [2, None, 2.5]}) == [(" c", True, 2.5), (" a", False, 2)]
    assert made_of(SCORED | {"scores": [3, 3, 0]}) == [(" a", True, 3), (" b", True, 3), (" c", False, 0)]
    chats = SCORED | {"prompt": [user("q")], "completions": [[assistant("a")], [assistant("b")], [assistant("c")]]}
    assert [answer for answer, *_ in made_of(chats)] == [[assistant(x)] for x in "bac"]
    assert all(p.chosen == p.rejected and p.prompt == "q" for p in to_preferences(SCORED, None, None, "list"))  # type: ignore[union-attr]


def test_ranks_and_pairs_are_labelled_by_the_share_of_the_list_that_is_worse() -> None:
    """Liu et al. 2024 (arXiv:2402.01878), section 5.4."""
    ranked = {"prompt": "q", "completions": [" a", " b", " c", " d"], "ranks": [2, 1, 4, 2]}
    assert made_of(ranked) == [(" b", True, 0.75), (" a", False, 0.25), (" d", False, 0.25), (" c", False, 0)]
    (pair,) = to_preferences({"prompt": "q", "chosen": " a", "rejected": " b"}, None, None, "list")
    assert isinstance(pair, Preference) and pair.label is None
    assert pair.given == {"score_chosen": 0.5, "score_rejected": 0.0}
    named = {"score_chosen": "s", "score_rejected": "t", "weight": "w"}
    row = {"prompt": "q", "chosen": " a", "rejected": " b", "s": 0.9, "t": 0.2, "w": 3}
    (pair,) = to_preferences(row, named, None, "list")
    assert isinstance(pair, Preference) and pair.given == {"score_chosen": 0.9, "score_rejected": 0.2, "weight": 3}


def test_of_a_pair_with_scores_the_better_answer_is_the_one_with_the_higher_score() -> None:
    row = {"prompt": "q", "chosen": " a", "rejected": " b", "s": 1, "t": 4}
    (pair,) = to_preferences(row, {"score_chosen": "s", "score_rejected": "t"}, None, "list")
    assert isinstance(pair, Preference)
    assert (pair.chosen, pair.rejected, pair.given) == (" b", " a", {"score_chosen": 4, "score_rejected": 1})
    assert pair.unused == ("pair whose rejected answer has the higher score, and is the better one of its list",)


@pytest.mark.parametrize(
    ("row", "columns", "reason", "droppable"),
    [
        (SCORED | {"scores": [2, 2, 2]}, None, "no answer is better than another", True),
        (SCORED | {"completions": [" a"], "scores": [1]}, None, "no answer is better than another", True),
        ({"prompt": "q", "completion": " a", "label": True}, None, "one answer alone", False),
        (
            {"prompt": "q", "chosen": " a", "rejected": " b", "s": 1, "t": 1},
            {"score_chosen": "s", "score_rejected": "t"},
            "no answer is better than another",
            True,
        ),
    ],
)
def test_what_makes_no_list(row: dict[str, Any], columns: Any, reason: str, droppable: bool) -> None:
    with pytest.raises(RowError, match=reason) as refusal:
        to_preferences(row, columns, None, "list")
    assert refusal.value.droppable == droppable


def test_an_answer_that_cannot_be_used_is_an_error_in_its_place() -> None:
    made = to_preferences(SCORED | {"completions": [" a", " b", "  "]}, None, None, "list")
    assert [item.field for item in made if isinstance(item, RowError)] == ["completions[2]"]
    assert [item.chosen for item in made if isinstance(item, Preference)] == [" b", " a"]


HISTORY = [SYSTEM, user("q"), assistant("a"), user("r")]
TRIPLES: list[tuple[dict[str, Any], Any]] = [
    ({"prompt": "q", "chosen": " a", "rejected": " b", "reference": " g"}, " g"),
    ({"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")], "reference": "g"}, [assistant("g")]),
    (
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")], "reference": [assistant("g")]},
        [assistant("g")],
    ),
    (
        {side: [*HISTORY, assistant(text)] for side, text in (("chosen", "a"), ("rejected", "b"), ("reference", "g"))},
        [assistant("g")],
    ),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "reference": "g", "system": "s"}, [assistant("g")]),
    ({"prompt": "q ", "chosen": "q a", "rejected": "q b", "reference": "q g"}, "g"),  # all repeat their prompt
]


@pytest.mark.parametrize(("row", "gold"), TRIPLES)
def test_the_gold_answer_stands_alone_behind_its_pair(row: dict[str, Any], gold: Any) -> None:
    pair, alone = to_preferences(row, GOLD)
    assert isinstance(pair, Preference) and isinstance(alone, Preference)
    assert (alone.prompt, alone.chosen, alone.rejected, alone.label) == (pair.prompt, gold, gold, True)
    assert pair.label is None and pair.tools == alone.tools


@pytest.mark.parametrize(
    ("reference", "field", "reason"),
    [
        (None, "reference", "null"),
        ("  ", "reference", "empty answer"),
        (7, "reference", "int, not text"),
        ([user("x")], "reference", "messages behind a prompt that is text"),
    ],
)
def test_gold_answers_that_cannot_be_used(reference: Any, field: str, reason: str) -> None:
    with pytest.raises(RowError, match=reason) as refusal:
        to_preferences({"prompt": "q", "chosen": " a", "rejected": " b", "reference": reference}, GOLD)
    assert refusal.value.field == field
    with pytest.raises(RowError, match="no column 'reference'"):
        to_preferences({"prompt": "q", "chosen": " a", "rejected": " b"}, GOLD)
    with pytest.raises(RowError, match="one answer alone"):
        to_preferences({"prompt": "q", "completion": " a", "label": True, "reference": " g"}, GOLD)


TEMPLATE = {"prompt": "{x}?", "chosen": " {y}", "rejected": " {z}", "reference": " {g}!"}


def test_a_template_may_make_the_gold_answer() -> None:
    row = {"x": "q", "y": "a", "z": "b", "g": "c"}
    pair, gold = to_preferences(row, None, TEMPLATE)
    assert isinstance(pair, Preference) and isinstance(gold, Preference)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("q?", " a", " b")
    assert (gold.prompt, gold.chosen, gold.label) == ("q?", " c!", True)
    pair, gold = to_preferences(row, None, TEMPLATE, chat_model=True)
    assert isinstance(gold, Preference) and gold.chosen == [assistant(" c!")] and gold.prompt == [user("q?")]
    with pytest.raises(RowError, match="its template's column 'g' is missing"):
        to_preferences({"x": "q", "y": "a", "z": "b"}, None, TEMPLATE)
    assert Source("x", template=TEMPLATE).takes == "gold"


# -------------------------------------------------------------------------------------------------------------- stores


def listed(path: Path, rows: list[dict[str, Any]]) -> Source:
    source = write(path, rows)
    return Source(source.path, pairs="list")


def rows_of(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Lists of 2 to 5 answers, some of them about the same prompt, and a pair."""
    draws = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for k in range(count):
        size = int(draws.integers(2, 6))
        answers = [" " + " ".join(draws.choice(["a", "b", "c"], int(draws.integers(1, 9)))) for _ in range(size)]
        rows.append({"prompt": f"p{k // 2}", "completions": answers, "scores": [*range(size)]})
    return [*rows, {"prompt": "p99", "chosen": " a b", "rejected": " c"}]


def test_what_is_left_of_a_list_must_compare_something(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p1", "completions": [" a", " b" * 30, " c"], "scores": [1, 2, 3]},  # loses one
        {"prompt": "p2", "completions": [" a", " b" * 30], "scores": [1, 2]},  # is one no more
        {"prompt": "p3", "completions": [" a", " b" * 30, " c"], "scores": [1, 2, 1]},  # compares nothing any more
        {"prompt": "p4", "completions": [" a", " b"], "scores": [1, 2]},
    ]
    store = load([listed(tmp_path / "rows.jsonl", rows)], tmp_path / "cache", Limits(max_length=9, on_overlong="drop"))
    assert store.rows.tolist() == [0, 0, 3, 3]
    assert store.report["dropped"] == {"row: what is left of the row compares no two answers": 3} | {
        reason: 3 for reason in store.report["dropped"] if "max_length" in reason
    }
    gold = Source(write(tmp_path / "gold.jsonl", [
        {"prompt": "p1", "chosen": " a", "rejected": " b", "reference": " c" * 30},
        {"prompt": "p2", "chosen": " a", "rejected": " b" * 30, "reference": " c"},
        {"prompt": "p3", "chosen": " a", "rejected": " b", "reference": " c"},
    ]).path, columns=GOLD)  # fmt: skip
    kept = load([gold], tmp_path / "cache", Limits(max_length=9, on_overlong="drop"))
    assert kept.rows.tolist() == [2, 2] and (kept.scored[:, 1] == 0).tolist() == [False, True]


def test_an_answer_is_in_a_list_once(tmp_path: Path) -> None:
    """The one with the higher score, also where only truncation makes them equal; a pair of equals is no list."""
    rows = [
        {"prompt": "p1", "completions": [" a", " b", " a"], "scores": [1, 2, 3]},
        {"prompt": "p2", "completions": [" a b c a", " a b c b", " c"], "scores": [3, 2, 1]},
        {"prompt": "p3", "completions": [" a b c a", " a b c b"], "scores": [3, 2]},
        {"prompt": "p4", "chosen": " a b c a", "rejected": " a b c b"},
    ]
    store = load([listed(tmp_path / "rows.jsonl", rows)], tmp_path / "cache", Limits(max_completion_length=3))
    assert store.rows.tolist() == [0, 0, 1, 1]
    assert store.given.columns["score_chosen"].tolist() == [3, 2, 3, 1]
    told = store.report["dropped"]
    assert told["completions: equal to an answer of its list with a score as high or higher"] == 3
    assert told["row: what is left of the row compares no two answers"] == 1 and sum(told.values()) == 5


def merging() -> PreTrainedTokenizerFast:
    """Letters, and the two of "ba" as one token: such an answer takes the end of a prompt with it."""
    backend = Tokenizer(BPE({"</s>": 0, "a": 1, "b": 2, "c": 3, "ba": 4}, [("b", "a")]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_a_list_is_split_where_all_of_its_answers_can_be(tmp_path: Path) -> None:
    """Where one answer merges with the end of the prompt, that token is an answer's in all: a list of two is as the pair."""
    tokens = {"cb": [3], "a": [4, 0], "c": [2, 3, 0], "b": [2, 2, 0]}
    how: dict[str, Any] = {"on_bad_row": "error", "log": lambda line: None, "cache_dir": tmp_path / "cache"}
    rows = [{"prompt": "cb", "completions": ["c", "a", "b"], "scores": [3, 2, 1]}]
    store = load_pairs([listed(tmp_path / "rows.jsonl", rows)], merging(), Limits(), **how)
    assert contents(store) == [[[3], tokens["c"], []], [[3], [], tokens["a"]], [[3], [], tokens["b"]]]
    two = [{"prompt": "cb", "completions": ["c", "a"], "scores": [1, 0]}]
    of_two = load_pairs([listed(tmp_path / "two.jsonl", two)], merging(), Limits(), **how)
    pair = load_pairs(
        [write(tmp_path / "pair.jsonl", [{"prompt": "cb", "chosen": "c", "rejected": "a"}])], merging(), Limits(), **how
    )
    (whole,), (first, second) = contents(pair), contents(of_two)
    assert whole == [first[0], first[1], second[2]] and store.same[0, 0] == store.same[1, 0] == store.same[2, 0]


def test_a_prompt_is_cut_alike_for_all_answers_of_a_row(tmp_path: Path) -> None:
    """As both sides of a pair have the same: the longest answer says how much of it is left."""
    prompt = "p1 p2 p3 p4 p5 p6"
    rows = [{"prompt": prompt, "completions": [" a", " a b c a", " b c"], "scores": [1, 2, 3]}]
    store = load([listed(tmp_path / "rows.jsonl", rows)], tmp_path / "cache", Limits(max_length=8))
    assert [pair[0] for pair in contents(store)] == [[words().get_vocab()[f"p{k}"] for k in (4, 5, 6)]] * 3
    assert store.lengths[:, 1:].sum(axis=1).tolist() == [3, 5, 2]
    triple = {"prompt": prompt, "chosen": " a", "rejected": " b", "reference": " a b c a"}
    gold = Source(write(tmp_path / "gold.jsonl", [triple]).path, columns=GOLD)
    assert load([gold], tmp_path / "cache", Limits(max_length=8)).lengths[:, 0].tolist() == [3, 3]
    short = load([gold], tmp_path / "cache", Limits(max_length=8, max_completion_length=3))
    assert short.lengths.tolist() == [[5, 2, 2], [5, 3, 0]]


def test_the_same_rows_as_pairs_are_other_stores(tmp_path: Path) -> None:
    source = listed(tmp_path / "rows.jsonl", rows_of(3))
    of_lists, of_pairs = (load([one], tmp_path / "cache") for one in (source, Source(source.path)))
    assert of_lists.key != of_pairs.key and of_lists.address != of_pairs.address


# --------------------------------------------------------------------------------------------------------------- steps


@pytest.fixture
def store(tmp_path: Path) -> PairStore:
    sources = [listed(tmp_path / f"{name}.jsonl", rows_of(n, seed)) for name, n, seed in (("a", 9, 1), ("b", 4, 2))]
    return load(sources, tmp_path / "cache")


def loader_of(store: PairStore, **how: Any) -> StepLoader:
    packing = Packing(how.pop("tokens", 40), how.pop("sharing", True), world_size=how.pop("world", 1), takes="list")
    settings: dict[str, Any] = {"weights": [1.0, 1.0], "pairs_per_step": 4, "seed": 3, "shuffle": True}
    return StepLoader(store, packing=packing, **settings | how)


def lists_in(store: PairStore, ids: np.ndarray) -> list[int]:
    """The rows of some examples, each once, after a look at whether all that a row gives is there."""
    rows = store.rows[ids].tolist()
    for row in set(rows):
        assert rows.count(row) % (store.rows == row).sum() == 0, "a part of a list"
    return [row for k, row in enumerate(rows) if k == 0 or rows[k - 1] != row or ids[k] <= ids[k - 1]]


@pytest.mark.parametrize("together", [None, "row", "prompt"])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [2.0, 1.0], [1.0, 0.5]])
def test_steps_are_measured_in_rows_and_hold_whole_ones(
    store: PairStore, weights: list[float], together: str | None
) -> None:
    numbers = {None: None, "row": store.rows, "prompt": store.same[:, 0]}[together]
    loader = loader_of(store, weights=weights, together=numbers)
    assert loader.counted == [10, 5]
    steps = loader.epoch(0)
    found = [lists_in(store, step) for step in steps]
    per_epoch = round(10 * weights[0] + 5 * weights[1])
    assert [len(rows) for rows in found] == [4] * (per_epoch // 4) + [per_epoch % 4] * (per_epoch % 4 > 0)
    assert loader.steps_per_epoch == len(steps)
    seen = [row for rows in found for row in rows]
    assert all(seen.count(row) == weights[0] for row in range(10))
    assert {tuple(step.tolist()) for step in steps} != {tuple(step.tolist()) for step in loader.epoch(1)}
    assert loader.pairs_of(0, 2).tolist() == list(dict.fromkeys(np.concatenate(steps[:2]).tolist()))


def test_without_a_shuffle_rows_come_as_in_the_files(store: PairStore) -> None:
    assert np.concatenate(loader_of(store, shuffle=False).epoch(0)).tolist() == list(range(len(store)))


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 25, 60, 10_000])
def test_a_list_lies_in_one_pack_where_there_is_room(store: PairStore, tokens: int, world: int, sharing: bool) -> None:
    loader = loader_of(store, tokens=tokens, world=world, sharing=sharing, weights=[2.0, 1.0], shuffle=False)
    for ids in loader.epoch(0):
        placed = place(store, ids, loader.packing)
        assert placed.lists is not None
        everywhere = [i for rank in placed.ids for own in rank for i in own.tolist()]
        assert sorted(everywhere) == sorted(ids.tolist()), "each example once"
        packs = [set(own.tolist()) for rank in placed.lists for own in rank if len(own)]
        split = {number for number in set.union(*packs) if sum(number in own for own in packs) > 1}
        assert placed.splits_lists == bool(split)
        lengths = store.lengths[ids]
        for number in set.union(*packs):
            of_list = numbered(store.rows, ids) == number
            parts = lengths[of_list]
            apart = (parts[:, 0] * (parts[:, 1:] > 0).sum(axis=1) + parts[:, 1:].sum(axis=1)).sum()
            assert number not in split or apart > tokens, "there was room for it"
        batch = next(iter(placed.packs(store, loader.packing)))
        assert batch.given is not None and batch.given["list"].tolist() == placed.lists[0][0].tolist()
        assert batch.given["opens"].tolist() == starts(store.rows)[placed.ids[0][0]].tolist()
        assert count(store, ids, "list")["lists"] == len(set.union(*packs))


def test_a_sweep_numbers_lists_alike_in_all_its_parts(store: PairStore) -> None:
    packing = Packing(25, True, takes="list")
    seen: dict[int, set[int]] = {}
    for _, batch in sweep(store, packing):
        assert batch.given is not None
        for pair, number in zip(batch.pair_ids.tolist(), batch.given["list"].tolist()):
            seen.setdefault(number, set()).add(int(store.rows[pair]))
    assert all(len(rows) == 1 for rows in seen.values()) and len(seen) == len(set(store.rows.tolist()))


def test_gold_answers_are_counted_apart(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{k}", "chosen": " a b", "rejected": " b", "reference": " c c c"} for k in range(5)]
    store = load([Source(write(tmp_path / "rows.jsonl", rows).path, columns=GOLD)], tmp_path / "cache")
    loader = StepLoader(store, [1.0], 2, 0, True, Packing(1, True, takes="gold"))
    step = next(loader.steps(0, 3))
    assert {name: step.counts[name] for name in ("pairs", "answers", "chosen_tokens", "rejected_tokens", "gold_tokens")} == {
        "pairs": 2, "answers": 4, "chosen_tokens": 6, "rejected_tokens": 4, "gold_tokens": 8,
    }  # fmt: skip
    marks = [batch.given["gold"].tolist() for batch in step.packs if batch.given]
    assert sorted(mark for own in marks for mark in own) == [0, 0, 1, 1]
    assert loader.steps_per_epoch == 3 and not step.splits_lists


# -------------------------------------------------------------------------------------------------------------- pieces


def test_rows_and_their_examples() -> None:
    rows = np.array([0, 0, 2, 3, 3, 3])
    assert starts(rows).tolist() == [True, False, True, True, False, False]
    assert rows_of_sources(rows, [2, 0, 4]) == [1, 0, 2]
    assert examples_of(rows, np.array([2, 0])).tolist() == [3, 4, 5, 0, 1]
    assert examples_of(rows, np.arange(0)).tolist() == []
    assert starts(rows[:0]).tolist() == [] and rows_of_sources(rows[:0], [0]) == [0]


def test_a_list_that_comes_twice_in_a_step_is_two() -> None:
    rows = np.array([0, 0, 2, 3, 3, 3])
    found = numbered(rows, np.array([3, 4, 5, 0, 1, 3, 4, 5])).tolist()
    assert found[:3] == [found[0]] * 3 and found[5:] == [found[5]] * 3 and found[3] == found[4]
    assert len({found[0], found[3], found[5]}) == 3
    assert numbered(rows, np.arange(6)).tolist() == rows.tolist()


def test_examples_of_a_list_are_joined_while_there_is_room() -> None:
    """Lists 7 and 8 have no example in common; 9 is too long for a pack and stays apart."""
    groups = alone(np.array([[2, 3, 0], [2, 0, 1], [1, 1, 0], [1, 0, 2], [5, 30, 0], [5, 0, 30]]))
    found = joined(groups, np.array([7, 7, 8, 8, 9, 9]), tokens_per_pack=40)
    assert found.of_pair.tolist() == [0, 0, 1, 1, 2, 3]
    assert found.tokens.tolist() == [8, 5, 35, 35] and found.answers.tolist() == [4, 3, 30, 30]
    assert found.attention.sum() == groups.attention.sum() and found.cost.sum() == pytest.approx(groups.cost.sum())


def test_a_list_is_no_effect_that_nobody_has(tmp_path: Path) -> None:
    """`pairs: list` holds for pairs too, and is not refused where no row has several answers."""
    source = Source(write(tmp_path / "rows.jsonl", [{"prompt": "p1", "chosen": " a", "rejected": " b"}]).path, pairs="list")
    assert Converter(find(source), chat_model=False).pairs_made
    assert json.loads((tmp_path / "rows.jsonl").read_text())["prompt"] == "p1"


def test_a_format_that_gives_several_rows_for_one_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be one list of answers to two prompts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "several_lists.py").write_text("def both(row):\n    return [row, {**row, 'prompt': 'p2'}]\n")
    rows = [{"prompt": "p1", "completions": [" a", " b"], "scores": [1, 2]}]
    source = Source(write(tmp_path / "rows.jsonl", rows).path, pairs="list", format="several_lists:both")
    with pytest.raises(DataError, match=r"rows.jsonl:1: several_lists:both: gave 2 rows for one.*give one dict"):
        load([source], tmp_path / "cache")
    assert len(load([Source(source.path, format=source.format)], tmp_path / "cache")) == 2


def test_scores_that_are_no_labels_of_lipo_are_told(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{k}", "completions": [" a", " b"], "scores": [1, 5 + 20 * k]} for k in range(3)]
    store = load([listed(tmp_path / "rows.jsonl", rows)], tmp_path / "cache")
    lipo = {"name": "listwise", "loss_type": "lipo_lambda"}
    with pytest.raises(DataError) as refusal:
        refuse_for_objective([store], build_objective(**lipo))
    assert str(refusal.value) == (
        f"{tmp_path}/rows.jsonl:3: a score of 45 is a gain of 2^45 under lipo_lambda; fix: set objective.score_scale: "
        "0.0222, so that labels go up to 1"
    )
    refuse_for_objective([store], build_objective(**lipo, score_scale=0.0222))
    refuse_for_objective([store], build_objective("listwise", "plackett_luce"))
