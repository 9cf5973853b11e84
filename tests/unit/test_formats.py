"""Each layout of a row becomes the preference that it means; bad rows say what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from dspref.data.formats import FORMATS, Preference, RowError, to_preference
from dspref.errors import ConfigError


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **extra: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **extra}


SYSTEM = {"role": "system", "content": "s"}
TEXT = {"prompt": "q ", "chosen": " a\n", "rejected": "b", "score": 3}
CHAT = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
FIXTURES: dict[str, tuple[dict[str, Any], Preference]] = {
    "text": (TEXT, Preference("q ", " a\n", "b")),
    "implicit_text": (
        {"chosen": "The sky is blue", "rejected": "The sky is green"},
        Preference("The sky is", " blue", " green"),
    ),
    "chat": (CHAT, Preference([user("q")], [assistant("a")], [assistant("b")])),
    "implicit_chat": (
        {
            "chosen": [SYSTEM, user("q"), assistant("a")],
            "rejected": [SYSTEM, user("q"), assistant("b"), user("why")],
        },
        Preference([SYSTEM, user("q")], [assistant("a")], [assistant("b"), user("why")]),
    ),
    "chat_with_text_prompt": (
        {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        Preference([user("q")], [assistant("a")], [assistant("b")]),
    ),
}


def test_every_format_has_a_fixture_row() -> None:
    assert FIXTURES.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_format_converts_its_fixture_row_and_no_other_claims_it(name: str) -> None:
    row, expected = FIXTURES[name]
    assert to_preference(row) == expected
    assert [other for other, layout in FORMATS.items() if layout.recognises(row)] == [name]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [("is blue", "is black", "is bl"), ("abc", "abcdef", "ab"), ("a  b", "a  c", "a "), ("ab", "ac", "a")],
)
def test_implicit_text_prompt_is_the_common_prefix_less_one_space(chosen: str, rejected: str, prompt: str) -> None:
    preference = to_preference({"chosen": chosen, "rejected": rejected})
    assert preference == Preference(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def test_a_conversation_that_is_a_prefix_of_the_other_keeps_an_answer() -> None:
    short = [user("q"), assistant("a")]
    preference = to_preference({"chosen": short, "rejected": [*short, user("more"), assistant("b")]})
    assert preference.prompt == [user("q")]
    assert preference.chosen == [assistant("a")]


def test_ultrafeedback_rows_hold_the_whole_conversation() -> None:
    row = {
        "prompt": "q",
        "chosen": [user("q"), assistant("a")],
        "rejected": [user("q"), assistant("b")],
        "prompt_id": "7",
    }
    assert to_preference(row) == Preference([user("q")], [assistant("a")], [assistant("b")])


def test_answers_that_repeat_a_chat_prompt_lose_it() -> None:
    row = CHAT | {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    assert to_preference(row) == FIXTURES["chat"][1]


def test_an_implicit_row_may_have_a_prompt_id() -> None:
    assert to_preference({"chosen": "x a", "rejected": "x b", "prompt_id": "7"}).prompt == "x"


def test_columns_rename_and_may_swap() -> None:
    row = {"question": "q", "chosen": "a", "rejected": "b"}
    columns = {"prompt": "question", "chosen": "rejected", "rejected": "chosen"}
    assert to_preference(row, columns) == Preference("q", "b", "a")
    with pytest.raises(RowError, match=r"chosen: no column 'good' .* fix: set data.columns.chosen"):
        to_preference(TEXT, {"chosen": "good"})


def test_arrow_nulls_leave_messages_but_tool_calls_stay() -> None:
    call = [{"function": {"name": "f", "arguments": {}}}]
    row = CHAT | {
        "chosen": [assistant(None, tool_calls=call, name=None)],
        "rejected": [assistant("b", tool_calls=None)],
    }
    preference = to_preference(row)
    assert preference.chosen == [assistant(None, tool_calls=call)]
    assert preference.rejected == [assistant("b")]


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_template_kwargs_are_kept(as_text: bool) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = CHAT | {
        "tools": json.dumps(tools) if as_text else tools,
        "chat_template_kwargs": {"thinking": True},
    }
    preference = to_preference(row)
    assert preference.tools == tools
    assert preference.chat_template_kwargs == {"thinking": True}
    assert to_preference(CHAT | {"tools": None, "chat_template_kwargs": None}) == FIXTURES["chat"][1]


TEMPLATE = {"prompt": "Translate {{}}: {input text}", "chosen": "{good}", "rejected": "{bad}"}
TEMPLATED = {"input text": "x{y}", "good": "g", "bad": 3, "prompts": "unused"}


def test_template_builds_text_or_chat_with_system() -> None:
    assert to_preference(TEMPLATED, None, TEMPLATE) == Preference("Translate {}: x{y}", "g", "3")
    with_system = TEMPLATE | {"system": "s"}
    expected = Preference([SYSTEM, user("Translate {}: x{y}")], [assistant("g")], [assistant("3")])
    assert to_preference(TEMPLATED, {"prompt": "prompt"}, with_system) == expected


@pytest.mark.parametrize(
    "hostile",
    [
        "{x.__class__}",
        "{x[0]}",
        "{}",
        "{0}",
        "{x!r}",
        "{x:>10}",
        "{x",
        "x}",
        "{x:{y}}",
        "{x.__init__.__globals__}",
    ],
)
def test_template_refuses_anything_but_columns(hostile: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.template\.chosen: .*; fix: .*$"):
        to_preference({"x": "a", "bad": "b"}, None, {"chosen": hostile, "rejected": "{bad}"})


@pytest.mark.parametrize("template", [{"chosen": "a"}, {"choosen": "a"}, {"system": "s", "chosen": "a", "rejected": "b"}])
def test_template_keys_are_checked(template: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"^data\.template\.\w+: .*; fix: "):
        to_preference({}, None, template)


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"prompt": "q", "choosen": "a", "rejected": "b"}, "chosen", "no column 'chosen'"),
        ({"prompt": "q", "chosen": "a"}, "rejected", "no column 'rejected'"),
        ({"Prompt": "q", "chosen": "a", "rejected": "b"}, "prompt", "no column 'prompt'"),
        ({"promt": "q", "chosen": "xa", "rejected": "xb"}, "prompt", "no column 'prompt'"),
        (TEXT | {"prompt": None}, "prompt", "null"),
        (TEXT | {"rejected": None}, "rejected", "null"),
        (TEXT | {"chosen": 3}, "chosen", "int, not text"),
        (TEXT | {"chosen": {"role": "assistant"}}, "chosen", "dict, not text"),
        (TEXT | {"chosen": True}, "chosen", "bool, not text"),
        (TEXT | {"rejected": float("nan")}, "rejected", "float, not text"),
        (TEXT | {"chosen": CHAT["chosen"]}, "row", "mixes text and chat"),
        (CHAT | {"chosen": "a"}, "row", "mixes text and chat"),
        (CHAT | {"chosen": "a", "rejected": "b"}, "row", "mixes text and chat"),
        ({"chosen": "abc", "rejected": "xyz"}, "prompt", "share no text"),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
            "prompt",
            "share no",
        ),
        (TEXT | {"chosen": ""}, "chosen", "empty answer"),
        (TEXT | {"rejected": " \n"}, "rejected", "empty answer"),
        ({"chosen": "x: ", "rejected": "x: yes"}, "chosen", "empty answer"),
        (CHAT | {"chosen": []}, "chosen", "empty message list"),
        (CHAT | {"prompt": []}, "prompt", "empty message list"),
        (CHAT | {"rejected": [assistant(" ")]}, "rejected", "empty answer"),
        (TEXT | {"chosen": "b"}, "rejected", "identical"),
        (TEXT | {"chosen": "b "}, "rejected", "identical to chosen but for white space"),
        (CHAT | {"chosen": CHAT["rejected"]}, "rejected", "identical"),
        (CHAT | {"chosen": [{"role": "gpt", "content": "a"}]}, "chosen[0].role", "unknown role 'gpt'"),
        (CHAT | {"chosen": [{"content": "a"}]}, "chosen[0].role", "missing"),
        (CHAT | {"chosen": [{"role": "assistant"}]}, "chosen[0].content", "missing"),
        (CHAT | {"chosen": [assistant(None)]}, "chosen[0].content", "null without tool_calls"),
        (CHAT | {"chosen": [{"role": "assistant", "content": [1]}]}, "chosen[0].content", "list, not text"),
        (CHAT | {"chosen": ["a"]}, "chosen[0]", "str, not a message"),
        (CHAT | {"prompt": [user("q"), SYSTEM]}, "prompt", "system message is not first"),
        (CHAT | {"prompt": [SYSTEM, SYSTEM, user("q")]}, "prompt", "two system messages"),
        (CHAT | {"chosen": [SYSTEM, assistant("a")]}, "chosen", "system message is not first"),
        (CHAT | {"chosen": [user("a")]}, "chosen", "no assistant message"),
        (CHAT | {"tools": "[{"}, "tools", "broken JSON"),
        (CHAT | {"tools": 3}, "tools", "not a list"),
        (CHAT | {"chat_template_kwargs": "x"}, "chat_template_kwargs", "not an object"),
    ],
)
def test_bad_row_names_field_reason_and_fix(row: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        to_preference(row)
    assert caught.value.field == field
    assert reason in caught.value.reason
    assert caught.value.fix
    assert "\n" not in str(caught.value)


def test_messages_do_not_depend_on_the_hash_seed() -> None:
    code = (
        "from dspref.data.formats import *\n"
        "rows = {'zeta': 1, 'choosen': 'a', 'alpha': 2}, {'chosen': 'a', 'rejected': ['b'], 'prompt': 1}\n"
        "for row in rows:\n"
        "    try: to_preference(row)\n"
        "    except RowError as error: print(error)\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(outputs) == 1
    assert "did you mean 'choosen'?" in outputs.pop()
