"""Rows of one answer and a label: in which shapes they are read, and what is said of those that cannot be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_formats import SYSTEM, assistant, user
from test_store import contents, load, words, write

from dspref.data.completions import to_preferences
from dspref.data.formats import Preference, RowError
from dspref.data.tokenize import Limits
from dspref.errors import DataError

TEXT = {"prompt": "q", "completion": " a", "label": True}
CHAT = {"prompt": [user("q")], "completion": [assistant("a")], "label": False}
WHOLE = {"messages": [user("q"), assistant("a")], "label": True}
QUESTION, ANSWER = [user("q")], [assistant("a")]
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}}


def one(row: dict[str, Any], columns: dict[str, str] | None = None, **how: Any) -> Preference:
    (made,) = to_preferences(row, columns, **how)
    assert isinstance(made, Preference)
    return made


TURNS = [SYSTEM, user("q"), assistant("a"), user("r"), assistant("b"), {"role": "tool", "content": "t"}, assistant("c")]
ROWS: list[tuple[dict[str, Any], Any, Any, bool]] = [
    (TEXT, "q", " a", True),
    (TEXT | {"label": False}, "q", " a", False),
    (CHAT, QUESTION, ANSWER, False),
    (CHAT | {"completion": "a"}, QUESTION, ANSWER, False),
    (CHAT | {"completion": [user("q"), assistant("a")]}, QUESTION, ANSWER, False),  # repeats its prompt
    (CHAT | {"completion": json.dumps(ANSWER)}, QUESTION, ANSWER, False),
    (TEXT | {"completion": ANSWER}, QUESTION, ANSWER, True),
    ({"completion": [user("q"), assistant("a")], "label": True}, QUESTION, ANSWER, True),
    (WHOLE, QUESTION, ANSWER, True),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "kto_tag": False},
     QUESTION, ANSWER, False),
    (WHOLE | {"completion": None}, QUESTION, ANSWER, True),  # as tables write what a row does not have
    (WHOLE | {"messages": TURNS}, TURNS[:4], TURNS[4:], True),  # all that follows the last of the user's
    # an answer may begin with the words of its prompt: nothing says that it repeats them
    ({"prompt": "The sky", "completion": "The sky is blue", "label": True}, "The sky", "The sky is blue", True),
    (TEXT | {"system": "s"}, [{"role": "system", "content": "s"}, *QUESTION], [assistant(" a")], True),
    (CHAT | {"system": "s"}, [{"role": "system", "content": "s"}, *QUESTION], ANSWER, False),
    (TEXT | {"chosen": None, "rejected": None}, "q", " a", True),
]  # fmt: skip


@pytest.mark.parametrize(("row", "prompt", "answer", "label"), ROWS)
def test_rows_become_one_answer(row: dict[str, Any], prompt: Any, answer: Any, label: bool) -> None:
    found = one(row)
    assert (found.prompt, found.chosen, found.rejected) == (prompt, answer, answer)
    assert found.label is label


@pytest.mark.parametrize("name", ["label", "kto_tag"])
@pytest.mark.parametrize("good", [True, 1, 1.0, "true", "True", " TRUE ", "1", "1.0"])
def test_labels_as_people_write_them(name: str, good: Any) -> None:
    bad = good.lower().replace("true", "false").replace("1", "0") if isinstance(good, str) else type(good)(0)
    row = {"prompt": "q", "completion": " a"}
    assert one(row | {name: good}).label is True
    assert one(row | {name: bad}).label is False


def test_two_labels_of_a_row_must_agree_unless_one_is_named() -> None:
    assert one(TEXT | {"kto_tag": "true"}).label is True
    assert one(TEXT | {"label": None, "kto_tag": False}).label is False
    assert one(TEXT | {"kto_tag": False}, {"label": "kto_tag"}).label is False
    with pytest.raises(RowError, match=r"label and kto_tag say different things.*columns.label"):
        one(TEXT | {"kto_tag": False})


def test_tools_and_images_of_a_row() -> None:
    assert one(CHAT | {"tools": [TOOL]}).tools == one(CHAT | {"tools": json.dumps([TOOL])}).tools != one(CHAT).tools
    found = one({"prompt": [user("so?")], "completion": ANSWER, "images": ["a.png"], "label": True})
    assert list(found.images) == ["a.png"] and found.label is True


NAMED: list[tuple[dict[str, Any], dict[str, str], Any, Any, bool]] = [
    ({"q": "x", "a": "y", "good": 0}, {"prompt": "q", "completion": "a", "label": "good"}, "x", "y", False),
    # a name says what is meant, whatever else the row has
    (TEXT | {"chosen": "x", "rejected": "y"}, {"label": "label"}, "q", " a", True),
    (TEXT | {"chosen": "x", "rejected": "y"}, {"completion": "rejected", "label": "label"}, "q", "y", True),
    ({"prompt": "q", "a": {"text": "x"}, "label": True}, {"completion": "a.text"}, "q", "x", True),
    ({"talk": [user("q"), assistant("a")], "label": True}, {"completion": "talk"}, QUESTION, ANSWER, True),
    (WHOLE | {"good": False}, {"label": "good"}, QUESTION, ANSWER, False),
]


@pytest.mark.parametrize(("row", "columns", "prompt", "answer", "label"), NAMED)
def test_columns_that_are_named(row: Any, columns: dict[str, str], prompt: Any, answer: Any, label: bool) -> None:
    found = one(row, columns)
    assert (found.prompt, found.chosen, found.label) == (prompt, answer, label)


def test_pairs_and_several_answers_stay_what_they_are() -> None:
    """A column of labels beside two answers is no business of ours."""
    pair = one({"prompt": "q", "chosen": "x", "rejected": "y", "completion": None, "label": None})
    assert (pair.chosen, pair.rejected, pair.label) == ("x", "y", None)
    assert one({"prompt": "q", "chosen": "x", "rejected": "y", "label": 3}).label is None
    many = to_preferences({"prompt": "q", "completions": [" a", " b"], "scores": [1, 2], "label": True})
    assert [(p.chosen, p.label) for p in many if isinstance(p, Preference)] == [(" b", None)]


WRONG: list[tuple[dict[str, Any], str, str]] = [
    (TEXT | {"label": "maybe"}, "label", "'maybe', neither true nor false"),
    (TEXT | {"label": "yes"}, "label", "'yes', neither true nor false"),
    (TEXT | {"label": 2}, "label", "2, neither"),
    (TEXT | {"label": -1}, "label", "-1, neither"),
    (TEXT | {"label": 0.5}, "label", "0.5, neither"),
    (TEXT | {"label": float("nan")}, "label", "nan, neither"),
    (TEXT | {"label": None}, "label", "null, neither"),
    (TEXT | {"label": ""}, "label", "'', neither"),
    (TEXT | {"label": [True]}, "label", "list, neither"),
    (TEXT | {"label": {"good": True}}, "label", "dict, neither"),
    ({"prompt": "q", "completion": " a", "kto_tag": None}, "label", "null, neither"),
    (TEXT | {"completion": ""}, "completion", "empty answer"),
    (TEXT | {"completion": " \n"}, "completion", "nothing but white space"),
    (TEXT | {"completion": None}, "completion", "null"),
    (TEXT | {"completion": 3}, "completion", "int, not text"),
    (TEXT | {"completion": ["a", "b"]}, "completion[0]", "str, not a message"),
    (TEXT | {"prompt": None}, "prompt", "null"),
    ({"completion": "a", "label": True}, "prompt", "one text alone does not say where its answer begins"),
    ({"instruction": "q", "completion": "a", "label": True}, "prompt", "'instruction' may be meant"),
    (CHAT | {"completion": []}, "completion", "empty message list"),
    (CHAT | {"completion": [assistant("")]}, "completion", "empty answer"),
    (CHAT | {"completion": [user("a")]}, "completion", "no assistant message"),
    (CHAT | {"completion": [{"role": "assistant"}]}, "completion[0].content", "missing"),
    (WHOLE | {"messages": [user("q")]}, "messages[0]", "no answer follows it"),
    (WHOLE | {"messages": [*TURNS, user("s")]}, "messages[7]", "no answer follows it"),
    (WHOLE | {"messages": [assistant("a")]}, "messages", "no user's message"),
    (WHOLE | {"messages": [SYSTEM, assistant("a")]}, "messages", "no user's message"),
    (WHOLE | {"messages": []}, "messages", "empty message list"),
    (WHOLE | {"messages": "q"}, "messages", "str, not a conversation"),
    (WHOLE | {"messages": [user("q"), assistant("")]}, "completion", "empty answer"),
    (TEXT | {"system": ["s"]}, "system", "list, not text"),
    (TEXT | {"tools": "["}, "tools", "broken JSON"),
]


@pytest.mark.parametrize(("row", "field", "reason"), WRONG)
def test_a_malformed_row_is_one_line(row: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(RowError) as refusal:
        to_preferences(row)
    error = refusal.value
    assert error.field == field and reason in error.reason
    line = f"{error.field}: {error.reason}; {error.fix}"
    assert "\n" not in line and "chosen" not in line and "rejected" not in line, line
    assert error.fix and not error.droppable


@pytest.mark.parametrize(
    ("row", "columns", "field", "reason"),
    [
        (TEXT, {"completion": "b"}, "completion", "no column 'b'"),
        (TEXT, {"label": "b"}, "label", "no column 'b'"),
        (TEXT, {"completion": "completion", "chosen": "x"}, "columns.chosen", "an answer with a label and others"),
        (WHOLE, {"completion": "text"}, "completion", "no column 'text'"),
    ],
)
def test_columns_that_are_not_there(row: Any, columns: dict[str, str], field: str, reason: str) -> None:
    with pytest.raises(RowError) as refusal:
        to_preferences(row, columns)
    assert refusal.value.field == field and reason in refusal.value.reason


# ------------------------------------------------------------------------------------------------------ token ids


def test_one_answer_has_tokens_and_the_other_none(tmp_path: Any) -> None:
    """Beside pairs, in one file; an answer without a token has no mask, and no length before truncation."""
    rows = [
        {"prompt": "p1", "completion": " a b", "label": True},
        {"prompt": "p2", "chosen": " a", "rejected": " b c"},
        {"prompt": "p3", "completion": " c", "label": False},
    ]
    store = load([write(tmp_path / "rows.jsonl", rows)], tmp_path / "cache")
    ids = words().get_vocab()
    end, a, b, c = (ids[word] for word in ("</s>", "a", "b", "c"))
    assert contents(store) == [
        [[ids["p1"]], [a, b, end], []],
        [[ids["p2"]], [a, end], [b, c, end]],
        [[ids["p3"]], [], [c, end]],
    ]
    assert store.scored.tolist() == [[3, 0], [2, 3], [0, 2]]
    assert store.lengths.tolist() == store.uncut.tolist() == [[1, 3, 0], [1, 2, 3], [1, 0, 2]]
    assert [pair[3:] for pair in store] == [(None, None)] * 3


def test_answers_beyond_the_limits_are_cut_and_those_that_are_not_there_are_no_fault(tmp_path: Any) -> None:
    rows = [{"prompt": "p1 p2 p3 p4", "completion": " a b c a b c", "label": label} for label in (True, False)]
    source = write(tmp_path / "rows.jsonl", rows)
    store = load([source], tmp_path / "cache", Limits(max_length=8, max_prompt_length=3))
    assert store.lengths.tolist() == [[2, 6, 0], [2, 0, 6]]
    assert [len(answer) for pair in store for answer in pair[1:3]] == [6, 0, 0, 6]
    with pytest.raises(DataError, match=r"rows.jsonl:1: pair: longer than max_length 8"):
        load([source], tmp_path / "cache", Limits(max_length=8, on_overlong="error"))


def test_truncation_that_leaves_nothing_of_the_answer_is_told_of_it(tmp_path: Any) -> None:
    rows = [{"prompt": "p1 p2 p3 p4", "completion": " a b", "label": False}]
    with pytest.raises(DataError) as refusal:
        load([write(tmp_path / "rows.jsonl", rows)], tmp_path / "cache", Limits(max_length=4, min_prompt_length=4))
    assert "completion: no scored token is left after truncation" in str(refusal.value)
    assert "rejected" not in str(refusal.value)
