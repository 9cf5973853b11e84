"""Rows of several scored answers: which pairs they make, in which shapes, and what is said of those that cannot be used."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_formats import FIXTURES, TEMPLATE, TEMPLATED, assistant, user

from dspref.data.completions import PAIRINGS, to_preferences
from dspref.data.formats import Preference, RowError, to_preference

SCORED = {"prompt": "q", "completions": [" a", " b", " c", " d"], "scores": [1, 4.5, 3, 2]}


def pairs_of(row: dict[str, Any], pairs: str = "all", columns: dict[str, str] | None = None) -> list[tuple[Any, Any]]:
    made = to_preferences(row, columns, None, pairs)
    return [(p.chosen, p.rejected) for p in made if isinstance(p, Preference)]


@pytest.mark.parametrize(
    "pairs, expected",
    [
        ("all", ["bc", "bd", "ba", "cd", "ca", "da"]),
        ("best_against_rest", ["bc", "bd", "ba"]),
        ("best_against_worst", ["ba"]),
    ],
)
def test_scored_answers_become_pairs(pairs: str, expected: list[str]) -> None:
    assert pairs_of(SCORED, pairs) == [(f" {one}", f" {other}") for one, other in expected]
    assert all(isinstance(p, Preference) and p.prompt == "q" for p in to_preferences(SCORED, None, None, pairs))


def test_equal_scores_and_equal_answers_make_no_pair() -> None:
    assert pairs_of(SCORED | {"scores": [1, 1, 2, None]}) == [(" c", " a"), (" c", " b")]
    twice = to_preferences({"prompt": "q", "completions": [" a", " a\n", " b", " c"], "scores": [3, 1, 2, 0]})
    found = [(pair.chosen, pair.rejected) for pair in twice if isinstance(pair, Preference)]
    assert found == [(" a", " c"), (" b", " c"), (" a\n", " c")], "a is above b, and below it"
    assert isinstance(twice[0], Preference) and "equal answers" in twice[0].unused[0]
    alike = {"completions": [" a", " a", " b"], "scores": [3, 1, 2]}
    for row in (SCORED | {"scores": [2, 2, 2, 2]}, SCORED | {"completions": [" a"], "scores": [1]}, SCORED | alike):
        for pairs in PAIRINGS:
            with pytest.raises(RowError, match="no answer is better") as refusal:
                to_preferences(row, None, None, pairs)
            assert refusal.value.droppable


def test_scored_answers_in_other_shapes() -> None:
    """Message lists, single messages, and the columns of UltraFeedback as it was published."""
    turns = [[assistant("a")], [assistant("b")]]
    conversation = {"prompt": [user("q")], "completions": turns, "scores": [0, 1]}
    assert pairs_of(conversation) == [([assistant("b")], [assistant("a")])]
    assert pairs_of(conversation | {"completions": [assistant("a"), assistant("b")]}) == pairs_of(conversation)
    published = {
        "instruction": "q",
        "completions": [{"response": "a", "overall_score": 2.0}, {"response": "b", "overall_score": 7.5}],
    }
    columns = {"prompt": "instruction", "completions": "completions.response", "scores": "completions.overall_score"}
    assert pairs_of(published, columns=columns) == [("b", "a")]


def test_rows_with_two_answers_are_as_they_were() -> None:
    for row, expected in FIXTURES.values():
        assert to_preferences(row) == [to_preference(row)] == [expected]
    assert to_preferences(TEMPLATED, None, TEMPLATE) == [to_preference(TEMPLATED, None, TEMPLATE)]


@pytest.mark.parametrize(
    "change, columns, said",
    [
        ({"scores": [1, 2]}, {}, "2 scores for 4 completions"),
        ({"scores": "1 2 3 4"}, {}, "str, not a list"),
        ({"completions": []}, {}, "empty list"),
        ({}, {"scores": "rating"}, "no column 'rating'"),
        ({"scores": [], "score": [1]}, {}, "an empty list"),
        ({}, {"scores": "completions.rating"}, "an item without 'rating'"),
    ],
)
def test_bad_scored_answers_are_one_line(change: dict[str, Any], columns: dict[str, str], said: str) -> None:
    with pytest.raises(RowError, match=said) as refusal:
        to_preferences(SCORED | change, columns)
    assert not refusal.value.droppable


@pytest.mark.parametrize(
    "change, said",
    [
        ({"scores": [1, 2, "three", 4]}, "scores[2]: not a finite number: 'three'"),
        ({"scores": [1, 2, "3/5", 4]}, "scores[2]: not a finite number: '3/5'"),
        ({"scores": [1, 2, "nan", 4]}, "scores[2]: not a finite number: 'nan'"),
        ({"scores": [1, 2, "1e999", 4]}, "scores[2]: not a finite number: inf"),
        ({"scores": [1, 2, float("nan"), 4]}, "scores[2]: not a finite number: nan"),
        ({"scores": [1, 2, 10**400, 4]}, "not a finite number: 1000"),
        ({"scores": [1, 2, True, 4]}, "scores[2]: not a finite number: True"),
        ({"completions": [" a", " b", 3, " d"]}, "completions[2]: int, not text"),
        ({"completions": [" a", " b", " \n", " d"]}, "completions[2]: empty answer"),
        ({"completions": [" a", " b", ["c"], " d"]}, "completions[2][0]: str, not a message"),
    ],
)
def test_an_answer_that_cannot_be_used_is_named_and_the_others_make_pairs(change: dict[str, Any], said: str) -> None:
    made = to_preferences(SCORED | {"scores": [1, 2, 3, 4]} | change)
    (error,) = [item for item in made if isinstance(item, RowError)]
    assert said in str(error) and not error.droppable
    assert [(p.chosen, p.rejected) for p in made if isinstance(p, Preference)] == [(" d", " b"), (" d", " a"), (" b", " a")]


def test_answers_that_differ_in_white_space_only_make_no_pair() -> None:
    row = {"prompt": "q", "completions": ["Yes", "Yes ", "No"], "scores": [3, 2, 1]}
    assert pairs_of(row) == [("Yes", "No"), ("Yes ", "No")]


def test_named_columns_win_over_a_chosen_answer_beside_them() -> None:
    """Three pairs are in the completions, where the user has named them; one, where nothing is named."""
    row = {**SCORED, "completions": [" a", " b", " c"], "scores": [1, 3, 2], "chosen": " x", "rejected": " y"}
    three = [(" b", " c"), (" b", " a"), (" c", " a")]
    assert pairs_of(row) == [(" x", " y")]
    for columns in (
        {"completions": "completions", "scores": "scores"},
        {"scores": "scores"},
        {"completions": "completions"},
    ):
        assert pairs_of(row, columns=columns) == three
    other = {"answers": [{"text": text, "score": score} for text, score in zip(row["completions"], row["scores"])]}
    columns = {"completions": "answers.text", "scores": "answers.score"}
    assert pairs_of({**row, **other}, columns=columns) == three
    for key in ("chosen", "rejected"):
        with pytest.raises(RowError, match=f"columns.{key}: two answers and several"):
            to_preferences(row | {"worse": " z"}, {"scores": "scores", key: "worse"})


def test_of_ranks_the_lowest_is_the_best() -> None:
    """Nectar: a list of answers, each with its rank."""
    answers = [{"answer": " a", "rank": 2.0}, {"answer": " b", "rank": 1.0}, {"answer": " c", "rank": 3.0}]
    nectar = {"prompt": "\n\nHuman: q\n\nAssistant:", "answers": answers}
    columns = {"completions": "answers.answer", "ranks": "answers.rank"}
    assert pairs_of(nectar, columns=columns) == [(" b", " a"), (" b", " c"), (" a", " c")]
    assert pairs_of(nectar, "best_against_worst", columns) == [(" b", " c")]
    by_name = {"prompt": "q", "completions": [" a", " b"], "ranks": [1, 2]}
    assert pairs_of(by_name) == [(" a", " b")]
    assert pairs_of(by_name | {"scores": [1, 2]}, columns={"ranks": "ranks"}) == [(" a", " b")]
    assert pairs_of(by_name | {"scores": [1, 2]}, columns={"scores": "scores"}) == [(" b", " a")]
    for columns in ({}, {"scores": "scores", "ranks": "ranks"}):
        with pytest.raises(RowError, match="scores and ranks are given"):
            to_preferences(by_name | {"scores": [1, 2]}, columns)


def test_scored_answers_in_the_layouts_of_other_tools() -> None:
    scored = {"completions": ["a", "b"], "scores": [2, 1]}
    pair = [([assistant("a")], [assistant("b")])]
    assert pairs_of({"messages": [user("q")], **scored}) == pair
    assert pairs_of({"conversations": [{"from": "human", "value": "q"}], **scored}) == pair
    assert pairs_of({"prompt": [user("q")], "completions": '["a", "b"]', "scores": "[2, 1]"}) == pair
    (made,) = to_preferences({"prompt": "q", "system": "s", **scored})
    assert made == Preference([{"role": "system", "content": "s"}, user("q")], *pair[0])
    (made,) = to_preferences({"prompt": "q", **scored}, as_="chat", chat_model=True)
    assert made == Preference([user("q")], *pair[0])
    # a score that is null in one item is no key of it once Arrow's nulls are gone
    items = [{"text": "a", "score": 2}, {"text": "b"}, {"text": "c", "score": 1}]
    columns = {"completions": "items.text", "scores": "items.score"}
    assert pairs_of({"prompt": "q", "items": items}, columns=columns) == [("a", "c")]


def test_scored_answers_that_repeat_the_prompt_lose_it() -> None:
    row = {"prompt": "Q: 2? A:", "completions": ["Q: 2? A: a", "Q: 2? A: b"], "scores": [2, 1]}
    (made,) = to_preferences(row)
    assert made == Preference("Q: 2? A:", " a", " b") and made.repeats == 2
    turns = [[user("q"), assistant("a")], [user("q "), assistant("b")], [assistant("c")]]
    made = to_preferences({"prompt": [user("q")], "completions": turns, "scores": [3, 2, 1]})
    assert [(p.chosen[0]["content"], p.rejected[0]["content"]) for p in made if isinstance(p, Preference)] == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    ]


def test_an_answer_behind_another_user_turn_is_one_error_and_the_others_make_pairs() -> None:
    turns = [[assistant("a")], [user("else"), assistant("b")], [assistant("c")]]
    made = to_preferences({"prompt": [user("q")], "completions": turns, "scores": [3, 2, 1]})
    errors = [item for item in made if isinstance(item, RowError)]
    assert {error.reason for error in errors} == {"a user message right behind the prompt's, which ends with one"}
    assert [item.chosen for item in made if isinstance(item, Preference)] == [[assistant("a")]]


@pytest.mark.parametrize(
    "columns, pairs, field",
    [
        ({}, "best_against_rest", "pairs"),
        ({"scores": "scores"}, "all", "columns.scores"),
        ({"ranks": "ranks"}, "all", "columns.ranks"),
    ],
)
def test_what_is_for_several_answers_is_refused_beside_a_template(columns: dict[str, str], pairs: str, field: str) -> None:
    with pytest.raises(RowError) as refusal:
        to_preferences(TEMPLATED, columns, TEMPLATE, pairs)
    assert refusal.value.field == field


def best_and_worst(row: dict[str, Any], **columns: str) -> tuple[Any, Any]:
    made = to_preferences(row, columns, pairs="best_against_worst")
    assert len(made) == 1 and isinstance(made[0], Preference), made
    return made[0].chosen, made[0].rejected


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        # Numbers as text, UltraFeedback's form; what is blank is no score.
        ({"completions": ["x", "y", "z"], "scores": ["2", " 10 ", "4.5e0"]}, {}),
        ({"completions": ["x", "z", "y", "u"], "scores": ["-.5", " ", "+5.", None]}, {}),
        ({"completions": ["x", "y", "z"], "ranks": ["3", "1", "2"]}, {}),
        ({"completions": ["x", "y"], "scores": '["1", "2"]'}, {}),
        # Names within objects and lists, however deep.
        ({"completions": ["x", "y"], "ratings": {"overall": [1, 2]}}, {"scores": "ratings.overall"}),
        ({"completions": ["x", "y"], "ratings": [{"overall": 1}, {"overall": 2}]}, {"scores": "ratings.overall"}),
        ({"completions": ["x", "y"], "ratings.overall": [1, 2]}, {"scores": "ratings.overall"}),
        ({"completions": ["x", "y"], "ratings": '{"overall": [1, 2]}'}, {"scores": "ratings.overall"}),
        (
            {"all": {"answers": [{"t": "x", "by": {"h": "1"}}, {"t": "y", "by": {"h": "2"}}]}},
            {"completions": "all.answers.t", "scores": "all.answers.by.h"},
        ),
        # Arrow gives each row the columns of all of them.
        ({"completions": ["x", "y"], "scores": [1, 2], "ranks": None, "chosen": None, "rejected": None}, {}),
    ],
)
def test_scores_are_found_and_read_as_people_write_them(row: dict[str, Any], columns: dict[str, str]) -> None:
    assert best_and_worst({"prompt": "q", **row}, **columns) == ("y", "x")


def test_a_nested_name_that_is_not_there_is_named() -> None:
    row = {"prompt": "q", "completions": ["x", "y"], "ratings": {"overall": [1, 2]}}
    with pytest.raises(RowError, match=r"ratings: no 'total' in it; fix: set data.eval.columns.scores"):
        to_preferences(row, {"scores": "ratings.total"}, key="data.eval")


def test_answers_that_are_objects_around_a_conversation() -> None:
    answers = [{"messages": [{"role": "Model", "content": text}], "id": 3} for text in ("x", "y")]
    row = {"prompt": [{"role": "User", "content": "q"}], "completions": answers, "scores": [1, 2]}
    assert best_and_worst(row) == tuple([{"role": "assistant", "content": text}] for text in ("y", "x"))


@pytest.mark.parametrize(
    "prompt", [{}, {"prompt": None}, {"prompt": "q"}, {"prompt": None, "messages": [{"role": "user", "content": "q"}]}]
)
@pytest.mark.parametrize("form", [list, json.dumps, lambda messages: {"messages": messages}])
def test_answers_that_are_whole_conversations(prompt: dict[str, Any], form: Any) -> None:
    asked = {"role": "user", "content": "q"}
    answers = [form([asked, {"role": "assistant", "content": text}]) for text in ("x", "y")]
    (pair,) = to_preferences({**prompt, "completions": answers, "scores": [1, 2]})
    assert isinstance(pair, Preference)
    said = tuple([{"role": "assistant", "content": text}] for text in ("y", "x"))
    assert (pair.prompt, pair.chosen, pair.rejected) == ([asked], *said)


def test_one_text_that_looks_like_a_conversation_is_a_text() -> None:
    row = {"prompt": "q", "completions": ['[{"role": "user", "content": "x"}]', "y"], "scores": [1, 2]}
    assert best_and_worst(row) == ("y", row["completions"][0])


TWO, SCORES = {"chosen": "x", "rejected": "y"}, {"completions": ["x", "y"], "scores": [2, 1]}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "q", **TWO, "messages": [user("o"), assistant("p"), user("q")]}, ["messages"]),
        ({"prompt": "q", **TWO, "messages": [user("q"), assistant("x")]}, []),
        ({"prompt": "q", **TWO, "messages": [user("q"), assistant("y")], "conversations": [user("r")]}, ["conversations"]),
        ({"prompt": [user("q")], **TWO, "messages": [user("o"), assistant("p"), user("q")]}, ["messages"]),
        ({"prompt": [user("q")], **TWO, "messages": json.dumps([user("o"), user("q")])}, ["messages"]),
        ({"prompt": [user("q")], **TWO, "messages": [user("q"), assistant("gold")]}, ["messages"]),
        ({"prompt": [user("q")], **TWO, "messages": [user(" q")], "conversation": [{"input": "q"}]}, []),
        ({"messages": [user("o"), assistant("p"), user("q"), assistant("x")], "chosen": [user("o"), assistant("x")],
          "rejected": [user("o"), assistant("y")]}, ["messages"]),
        ({"prompt": "q", **TWO, **SCORES}, ["completions"]),
        ({"prompt": "q", **TWO, "completions": ["x", "y"]}, []),
        ({"prompt": "q", **SCORES, "rejected": "z"}, ["rejected"]),
        ({"prompt": "q", **SCORES, "chosen": None, "rejected": None}, []),
        ({"prompt": "q", **SCORES, "messages": [user("q"), assistant("gold")]}, []),
        ({"prompt": "q", **SCORES, "messages": [user("r")]}, ["messages"]),
        ({"prompt": "q", **TWO, "rejected_response": "y"}, []),
        ({"prompt": "q", **TWO, "rejected_response": "z"}, ["rejected_response"]),
        ({"prompt": [user("q")], **TWO, "rejected_messages": [user("q"), assistant("z")]}, ["rejected_messages"]),
        ({"prompt": "q", **TWO, "tools": [{"name": "f"}], "chat_template_kwargs": {"a": 1}},
         ["tools", "chat_template_kwargs"]),
        ({"prompt": "q", **TWO, "tools": [], "chat_template_kwargs": None}, []),
        ({"prompt": [user("q")], **TWO, "tools": [{"name": "f"}]}, []),
    ],
)  # fmt: skip
def test_what_is_no_part_of_the_pair_is_told(row: dict[str, Any], told: list[str]) -> None:
    (pair,) = to_preferences(row)
    assert isinstance(pair, Preference)
    assert [note.split(" beside ")[1].split()[0].strip(",:") for note in pair.unused] == [
        {"completions": "scored", "rejected": "a"}.get(name, name) for name in told
    ]


def test_functions_in_the_older_form_of_openai_are_told_and_may_be_named() -> None:
    row = {"prompt": [user("q")], "chosen": "a", "rejected": "b", "functions": [{"name": "f", "parameters": {}}]}
    for columns, told in ((None, 1), ({"tools": "functions"}, 0)):
        (pair,) = to_preferences(row, columns)
        assert isinstance(pair, Preference) and len(pair.unused) == told
        assert pair.tools == (None if told else row["functions"])


def test_the_fix_of_what_is_told_uses_it() -> None:
    row = {"prompt": "q", **TWO, **SCORES, "messages": [user("o"), assistant("p"), user("r")]}
    (pair,) = to_preferences(row, {"prompt": "messages", "completions": "completions"})
    assert isinstance(pair, Preference) and pair.prompt == row["messages"] and not pair.unused
    (pair,) = to_preferences({"prompt": "q", **TWO, "tools": [{"name": "f"}]}, as_="chat")
    assert isinstance(pair, Preference) and pair.tools and not pair.unused
    template = {"prompt": "{prompt}", "chosen": "{chosen}", "rejected": "{rejected}"}
    (pair,) = to_preferences(row, None, template)
    assert isinstance(pair, Preference) and not pair.unused, "a template says what is used"


@pytest.mark.parametrize(("name", "field"), [("rank", "ranks"), ("score", "scores"), ("Ranks", "ranks")])
def test_a_column_that_judges_under_another_name_is_told(name: str, field: str) -> None:
    row = {"prompt": "q", "completions": ["x", "y"], name: [1, 2]}
    with pytest.raises(RowError, match=rf"did you mean '{name}'\? set data.train.columns.{field}: {name}$"):
        to_preferences(row)
    assert len(to_preferences(row, {field: name})) == 1, "the fix works"
