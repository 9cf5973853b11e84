"""Each layout of a row becomes the preference that it means; bad rows say what is wrong."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis.strategies import randoms

from dspref.data.completions import to_preferences
from dspref.data.formats import FORMATS, Preference, RowError, check_template, to_preference
from dspref.data.rows import DROP, missing
from dspref.data.template import refused_by_template
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


TURNS = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("is blue", "is black", "is"),
        ("a  b", "a  c", "a "),
        ("The answer is", "The answer is 4", "The answer"),
        ("It is 3.14.", "It is 3.15.", "It is"),
        ("Do not", "Do nothing", "Do"),
        ("line\none", "line\ntwo", "line\n"),
        ("it's", "it is", None),
        ("ab", "ac", None),
        ("abc", "abcdef", None),
        ("\u5929\u7a7a\u662f\u84dd\u8272", "\u5929\u7a7a\u662f\u7eff\u8272", "\u5929\u7a7a\u662f"),
        ("Q: Is it?\n\nAssistant: Yes, it is cold.", "Q: Is it?\n\nAssistant: Yes, it is", "Q: Is it?\n\nAssistant:"),
        ("Is it? Assistant: Yes, it is", "Is it? Assistant: Yes, it is cold.", "Is it? Assistant:"),
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d e",
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d f",
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
        ),
        (
            "\n\nHuman: a\n\nAssistant: The word Assistant: is",
            "\n\nHuman: a\n\nAssistant: The word Assistant: was",
            "\n\nHuman: a\n\nAssistant:",
        ),
    ],
)
def test_implicit_text_prompt_is_what_the_answers_share_in_whole_words(
    chosen: str, rejected: str, prompt: str | None
) -> None:
    if prompt is None:
        with pytest.raises(RowError, match="the answers share no text"):
            to_preference({"chosen": chosen, "rejected": rejected})
        return
    for answers in ((chosen, rejected), (rejected, chosen)):
        preference = to_preference(dict(zip(("chosen", "rejected"), answers)))
        first, second = (answer[len(prompt) :] for answer in answers)
        assert preference == Preference(prompt, first, second)


@pytest.mark.parametrize(
    "prompt",
    [
        "[INST] Is it? [/INST]",
        "<s>[INST] a [/INST] b </s><s>[INST] c [/INST]",
        "### Instruction:\nIs it?\n\n### Response:",
        "Below is an instruction.\n\n### Question:\nIs it?\n\n### Answer:",
        "Human: Is it?\nAI:",
        "USER: Is it? ASSISTANT:",
        "USER: a ASSISTANT: b USER: c ASSISTANT:",
        "User: Is it? AI:",
        "User: Is it?\nGPT:",
        "**User:** Is it?\n\n**Assistant:**",
        "Q: a\nA: b\nQ: c\nA:",
        "Question: Is it?\nOptions:\nA: yes\nB: no\nAnswer:",
        "Customer: Is it?\nAgent:",
        "\n\nH: a\n\nA: b\n\nH: c\n\nA:",
        "SUBREDDIT: r/x\nPOST: It was cold.\nTL;DR:",
        "GPT4 Correct User: Is it?<|end_of_turn|>GPT4 Correct Assistant:",
        "### Human: Is it?### Assistant:",
        "<|user|>\nIs it?</s>\n<|assistant|>",
        "<\uff5cUser\uff5c>Is it?<\uff5cAssistant\uff5c>",
        "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n",
        "<|start_header_id|>user<|end_header_id|>\n\nIs it?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<bos><start_of_turn>user\nIs it?<end_of_turn>\n<start_of_turn>model\n",
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
    ],
)
@pytest.mark.parametrize(
    ("left", "right"), [(" Yes, it is.", " Yes, it was."), (" Yes.\n\nHuman: So?\n\nAssistant: So.", " Yes")]
)
def test_an_implied_prompt_ends_where_the_assistant_begins_to_speak(prompt: str, left: str, right: str) -> None:
    """Whatever the answers share there, and whatever turns follow."""
    for answers in ((left, right), (right, left)):
        row = dict(zip(("chosen", "rejected"), (prompt + answer for answer in answers)))
        assert to_preference(row) == Preference(prompt, *answers)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        # Letters of choices, headings and words that are no turns.
        ("Which?\nA: yes\nB: no\nIt is A", "Which?\nA: yes\nB: no\nIt is B", "Which?\nA: yes\nB: no\nIt is"),
        ("### Responses to war", "### Response: none", "###"),
        ("The model: a car. It is red", "The model: a car. It is blue", "The model: a car. It is"),
        # They part within the user's turn: what both say before is no prompt of the assistant's last words.
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: e\n\nAssistant: f",
            "\n\nHuman: a\n\nAssistant:",
        ),
    ],
)
def test_what_is_no_turn_ends_no_implied_prompt(chosen: str, rejected: str, prompt: str) -> None:
    assert to_preference({"chosen": chosen, "rejected": rejected}).prompt == prompt


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
    with pytest.raises(RowError, match=r"chosen: no column 'good' .* fix: set data.train.columns.chosen"):
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
    as_texts = [{"type": "function", "function": {"name": "f", "parameters": '{"type": "object"}'}}, '{"name": "g"}']
    parsed = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}, {"name": "g"}]
    assert to_preference(row | {"tools": as_texts}).tools == parsed
    assert preference.chat_template_kwargs == {"thinking": True}
    assert to_preference(CHAT | {"tools": None, "chat_template_kwargs": None}) == FIXTURES["chat"][1]


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 2}}}
CALL_AS_TEXT = {"type": "function", "function": {"name": "f", "arguments": '{"x": 2}'}}
LATER = {"role": "system", "content": "later"}
TOOL_TURN = {"role": "tool", "content": "3"}
PAIR = FIXTURES["chat"][1]
WHOLE = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


def said(speaker: str, text: str) -> dict[str, Any]:
    return {"from": speaker, "value": text}


# Layouts of other tools: the row, columns, and what it means.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, str], Preference]] = {
    "messages and single messages": (
        {"messages": [user("q")], "chosen": assistant("a"), "rejected": assistant("b")}, {}, PAIR
    ),
    "messages and texts": ({"messages": [user("q")], "chosen": "a", "rejected": "b"}, {}, PAIR),
    "context and responses": (
        {"context": [user("q")], "response1": "a", "response2": "b"},
        {"prompt": "context", "chosen": "response1", "rejected": "response2"},
        PAIR,
    ),
    "chat prompt, text answers": ({"prompt": [user("q")], "chosen": "a", "rejected": "b"}, {}, PAIR),
    "chat prompt, a text and a message": ({"prompt": [user("q")], "chosen": "a", "rejected": assistant("b")}, {}, PAIR),
    "a prompt that is one message": ({"prompt": user("q"), "chosen": "a", "rejected": "b"}, {}, PAIR),
    "text prompt, single messages": ({"prompt": "q", "chosen": assistant("a"), "rejected": assistant("b")}, {}, PAIR),
    "content in parts": (
        {"prompt": [{"role": "user", "content": parts("q", "2")}], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {},
        Preference([user("q2")], [assistant("a")], [assistant("b")]),
    ),
    "answers in parts": (
        CHAT | {"chosen": [assistant("") | {"content": parts("a")}], "rejected": assistant("") | {"content": parts("b")}},
        {},
        PAIR,
    ),
    "ShareGPT (LLaMA-Factory)": (
        {"conversations": [said("human", "q")], "chosen": said("gpt", "a"), "rejected": said("gpt", "b")},
        {},
        PAIR,
    ),
    "ShareGPT with system, tools and calls": (
        {
            "conversations": [
                said("human", "q"), said("function_call", '{"name": "f", "arguments": {"x": 2}}'), said("observation", "3")
            ],
            "chosen": said("gpt", "a"),
            "rejected": said("gpt", "b"),
            "system": "s",
        },
        {},
        Preference([SYSTEM, user("q"), assistant("", tool_calls=[CALL]), TOOL_TURN], [assistant("a")], [assistant("b")]),
    ),
    "whole conversations of ShareGPT": (
        {"chosen": [said("human", "q"), said("gpt", "a")], "rejected": [said("human", "q"), said("gpt", "b")]},
        {},
        PAIR,
    ),
    "ms-swift": ({"messages": [user("q"), assistant("a")], "rejected_response": "b"}, {}, PAIR),
    "ms-swift, several turns": (
        {"messages": [SYSTEM, user("p"), assistant("o"), user("q"), assistant("a")], "rejected_response": "b"},
        {},
        Preference([SYSTEM, user("p"), assistant("o"), user("q")], [assistant("a")], [assistant("b")]),
    ),
    "ms-swift, an agent's turns": (
        {
            "messages": [user("q"), assistant(None, tool_calls=[CALL]), TOOL_TURN, assistant("a")],
            "rejected_response": [assistant("b")],
        },
        {},
        Preference([user("q")], [assistant(None, tool_calls=[CALL]), TOOL_TURN, assistant("a")], [assistant("b")]),
    ),
    "ms-swift, rejected messages": (
        {"messages": WHOLE["chosen"], "rejected_messages": WHOLE["rejected"]},
        {},
        PAIR,
    ),
    "rejected named by columns": (
        {"messages": [user("q"), assistant("a")], "worse": "b"},
        {"rejected": "worse"},
        PAIR,
    ),
    "messages beside whole conversations": (WHOLE | {"messages": WHOLE["chosen"]}, {}, PAIR),
    "messages that end on the chosen text": (
        {"messages": WHOLE["chosen"], "chosen": "a", "rejected": "b"}, {}, PAIR
    ),
    "messages that end on the chosen message": (CHAT | {"prompt": None, "messages": WHOLE["chosen"]}, {}, PAIR),
    "messages beside a prompt": (CHAT | {"messages": WHOLE["chosen"]}, {}, PAIR),
    "system column and text (Orca)": (
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "question"},
        Preference([SYSTEM, user("q")], [assistant("a")], [assistant("b")]),
    ),
    "an empty system": ({"system": "", "prompt": "q", "chosen": "a", "rejected": "b"}, {}, PAIR),
    "a null system": ({"system": None, "prompt": "q", "chosen": "a", "rejected": "b"}, {}, PAIR),
    "system column of another name": (
        {"sys": "s", "prompt": "q", "chosen": "a", "rejected": "b"},
        {"system": "sys"},
        Preference([SYSTEM, user("q")], [assistant("a")], [assistant("b")]),
    ),
    "system column and whole conversations": (
        WHOLE | {"system": "s"},
        {},
        Preference([SYSTEM, user("q")], [assistant("a")], [assistant("b")]),
    ),
    "system column that the conversation has": (
        CHAT | {"prompt": [SYSTEM, user("q")], "system": " s "},
        {},
        Preference([SYSTEM, user("q")], [assistant("a")], [assistant("b")]),
    ),
    "a system column that is the prompt": (
        {"system": "q", "chosen": " a", "rejected": " b"},
        {"prompt": "system"},
        Preference("q", " a", " b"),
    ),
    "JSON text in a cell": ({field: json.dumps(value) for field, value in CHAT.items()}, {}, PAIR),
    "JSON text of whole conversations": ({field: json.dumps(value) for field, value in WHOLE.items()}, {}, PAIR),
    "JSON text of messages": ({"messages": json.dumps(WHOLE["chosen"]), "rejected_response": "b"}, {}, PAIR),
    "JSON text, text answers": ({"prompt": json.dumps(CHAT["prompt"]), "chosen": "a", "rejected": "b"}, {}, PAIR),
    "a text about JSON": (
        {"prompt": "Write a chat.", "chosen": json.dumps(WHOLE["chosen"]), "rejected": "no"},
        {},
        Preference("Write a chat.", json.dumps(WHOLE["chosen"]), "no"),
    ),
    "a text that begins with JSON": (
        {"prompt": '[{"role": "user", "content": "q"}] What is this?', "chosen": " a", "rejected": " b"},
        {},
        Preference('[{"role": "user", "content": "q"}] What is this?', " a", " b"),
    ),
    "texts that are other JSON": (
        {"prompt": '[{"role": 3}]', "chosen": '{"x": NaN}', "rejected": '{"x": "\\ud800"}'},
        {},
        Preference('[{"role": 3}]', '{"x": NaN}', '{"x": "\\ud800"}'),
    ),
    "roles of templates": (
        CHAT | {"prompt": [user("q"), {"role": "ipython", "content": "1"}, {"role": "environment", "content": "2"},
                           {"role": "observation", "content": "3"}]},
        {},
        Preference([user("q"), *({"role": role, "content": text} for role, text in
                   (("ipython", "1"), ("environment", "2"), ("observation", "3")))], [assistant("a")], [assistant("b")]),
    ),
    "a second and a later system message": (
        CHAT | {"prompt": [SYSTEM, SYSTEM, user("q"), SYSTEM], "chosen": [LATER, assistant("a")]},
        {},
        Preference([SYSTEM, SYSTEM, user("q"), SYSTEM], [LATER, assistant("a")], [assistant("b")]),
    ),
    "human and gpt as roles": (
        CHAT | {"prompt": [{"role": "human", "content": "q"}], "chosen": [{"role": "gpt", "content": "a"}]},
        {},
        PAIR,
    ),
    "arguments as JSON text": (
        CHAT | {"chosen": [assistant(None, tool_calls=[CALL_AS_TEXT])]},
        {},
        Preference([user("q")], [assistant(None, tool_calls=[CALL])], [assistant("b")]),
    ),
    "flat arguments, an empty text, and all calls as JSON text": (
        CHAT | {
            "chosen": [
                assistant("", tool_calls=[{"name": "f", "arguments": '{"x": null}'}, {"name": "g", "arguments": ""}])
            ],
            "rejected": [assistant("", tool_calls=json.dumps([CALL_AS_TEXT]))],
        },
        {},
        Preference(
            [user("q")],
            [assistant("", tool_calls=[{"name": "f", "arguments": {"x": None}}, {"name": "g", "arguments": {}}])],
            [assistant("", tool_calls=[CALL])],
        ),
    ),
    "OpenAI's pairs": (
        {"input": {"messages": [user("q")]}, "preferred_output": [assistant("a")], "non_preferred_output": [assistant("b")]},
        {"prompt": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"},
        PAIR,
    ),
    "objects of lists": (
        {
            "prompt": {"role": ["system", "user"], "content": ["s", "q"]},
            "chosen": {"role": ["assistant"], "content": ["a"]},
            "rejected": {"from": ["gpt"], "value": ["b"]},
        },
        {},
        Preference([SYSTEM, user("q")], [assistant("a")], [assistant("b")]),
    ),
    "JSON text with another key first": (
        CHAT | {"prompt": '[{"name": "x", "role": "user", "content": "q"}]'},
        {},
        Preference([user("q") | {"name": "x"}], [assistant("a")], [assistant("b")]),
    ),
    "an Alpaca row with two answers": (
        {"instruction": "q", "input": "", "history": [], "chosen": "a", "rejected": "b"},
        {"prompt": "instruction"},
        Preference("q", "a", "b"),
    ),
    "a legacy function call": (
        CHAT | {"chosen": [assistant(None, function_call={"name": "f", "arguments": '{"x": 2}'})]},
        {},
        Preference([user("q")], [assistant(None, tool_calls=[CALL])], [assistant("b")]),
    ),
    "a legacy function call beside the same tool call, one in the prompt, and none": (
        {
            "prompt": [user("q"), {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 2}'}}, user("r")],
            "chosen": [assistant("a", tool_calls=[CALL], function_call={"name": "f", "arguments": {"x": 2}})],
            "rejected": [assistant("b", function_call={})],
        },
        {},
        Preference(
            [user("q"), {"role": "assistant", "tool_calls": [CALL]}, user("r")],
            [assistant("a", tool_calls=[CALL])],
            [assistant("b")],
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_other_tools_load_unchanged(name: str) -> None:
    row, columns, expected = LAYOUTS[name]
    before = json.dumps(row)
    assert to_preference(row, columns) == expected
    assert json.dumps(row) == before  # the row is as it was
    assert to_preference(json.loads(before), columns) == expected


# Answers that repeat the prompt, or a part of it: prompt, answer before, answer after; and what the prompt becomes, if that.
REPEATS: dict[str, tuple[Any, Any, Any, Any]] = {
    "the last turn": ([SYSTEM, user("q")], [user("q")], [], None),
    "with white space of difference": ([SYSTEM, user("q x")], [user(" q \n x ")], [], None),
    "the end of a long prompt": (
        [SYSTEM, user("p"), assistant("o"), user("q")],
        [user("p"), assistant("o"), user("q")],
        [],
        None,
    ),
    "all of it": ([SYSTEM, user("q")], [SYSTEM, user("q")], [], None),
    "a tool's turn": ([user("q"), assistant(None, tool_calls=[CALL]), TOOL_TURN], [TOOL_TURN], [], None),
    "the whole conversation, of which the prompt lacks the system message": (
        [user("q")],
        [SYSTEM, user("q")],
        [],
        [SYSTEM, user("q")],
    ),
    "text": ("Q: 2+2? A:", "Q: 2+2? A:", "", None),
    "text, with white space of difference": ("The sky is ", " The  sky is", "", "The sky is"),
    "text, a line": ("Translate.\nEnglish: hi\nGerman:", "German:", "", None),
}


@pytest.mark.parametrize("name", REPEATS)
def test_answers_that_repeat_the_prompt_lose_it(name: str) -> None:
    prompt, before, after, becomes = REPEATS[name]
    one, other = (" a", " b") if isinstance(prompt, str) else ([assistant("a")], [assistant("b")])
    made = to_preference({"prompt": prompt, "chosen": before + one, "rejected": before + other})
    assert made == Preference(becomes or prompt, after + one, after + other)
    assert made.repeats == 2
    if becomes is None and not isinstance(prompt, str):  # one answer alone does so too
        alone = to_preference({"prompt": prompt, "chosen": before + one, "rejected": other})
        assert (alone, alone.repeats) == (made, 1)


@pytest.mark.parametrize(
    "prompt, chosen, rejected",
    [
        ("The sky is", "The sky is blue", " green"),  # one answer alone: that may be its fault
        ("The sky is", "The sky isn", "The sky isle"),
        ("Hi ", "there", "you"),
        (" ", " a", " b"),
        ([user("Hello")], "Hello! I am here.", "Hello yourself."),  # a conversation has its turns apart
        ([user("q"), assistant("Sure")], [assistant("Sure"), user("go on"), assistant("a")], [assistant("b")]),
    ],
)
def test_what_is_no_repeat_stays(prompt: Any, chosen: Any, rejected: Any) -> None:
    made = to_preference({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert made.repeats == 0
    if isinstance(chosen, list) or isinstance(prompt, str):
        assert (made.chosen, made.rejected) == (chosen, rejected)


def test_white_space_does_not_part_the_turns_that_answers_share() -> None:
    row = {"chosen": [SYSTEM, user("q"), assistant("a")], "rejected": [SYSTEM, user("q "), assistant("b")]}
    assert to_preference(row) == Preference([SYSTEM, user("q")], [assistant("a")], [assistant("b")])
    assert to_preference(row | {"prompt": "q"}).prompt == [SYSTEM, user("q")]


COLOURS = {
    "chosen": [SYSTEM, user("Hi"), assistant("Yo"), user("Name a colour."), assistant("Blue")],
    "rejected": [SYSTEM, user("Hi"), assistant("Yo"), user("Name a colour."), assistant("Red")],
}


@pytest.mark.parametrize(
    "prompt",
    [
        "Name a  colour.", "Hi", "a colour", "", "s Hi Yo Name a colour.",
        "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Name a colour.\n\nAssistant:",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\nUser: Name a colour.",
    ],
)  # fmt: skip
def test_a_prompt_that_whole_conversations_say_goes_with_them(prompt: str) -> None:
    expected = Preference(COLOURS["chosen"][:4], [assistant("Blue")], [assistant("Red")])
    assert to_preference({"prompt": prompt, **COLOURS}) == expected
    as_text = {field: json.dumps({"messages": messages}) for field, messages in COLOURS.items()}
    assert to_preference({"prompt": prompt, **as_text}) == expected


@pytest.mark.parametrize(
    "prompt",
    [
        "What is two plus two?",
        "Name a colour. Be quick.",
        "Hi and name a colour.",
        "User: Hi\nUser: Never\nUser: Name a colour.",
    ],
)
def test_a_prompt_that_whole_conversations_do_not_say_is_refused(prompt: str) -> None:
    """The row says two things; trained on the conversations alone it would lose one without a word."""
    as_text = {field: json.dumps({"messages": messages}) for field, messages in COLOURS.items()}
    for answers in (COLOURS, as_text):
        with pytest.raises(RowError, match=r"^prompt: .* and it does not stand in them; fix: mend the row, or set data\.on"):
            to_preference({"prompt": prompt, **answers})


def test_messages_hold_the_chosen_answer_beside_a_prompt_too() -> None:
    """And where another row of the file has answers of its own, so that Arrow gives this one nulls."""
    row = {"messages": [SYSTEM, user("q"), assistant("a")], "rejected_response": "b"}
    expected = Preference([SYSTEM, user("q")], [assistant("a")], [assistant("b")])
    nulls = {"prompt": None, "chosen": None, "rejected": None}
    for more in ({"prompt": "q"}, {"prompt": " q "}, {"prompt": [user("q")]}, nulls, {"prompt": "s q", "chosen": None}):
        assert to_preference(row | more) == expected
    with_chosen = {"prompt": "q", "messages": [user("q")], "chosen": [assistant("a")], "rejected_response": "b"}
    assert to_preference(with_chosen | {"rejected_response": [assistant("b")]}) == PAIR
    assert to_preference(with_chosen | {"prompt": [user("q")]}) == PAIR
    assert to_preference(with_chosen | {"prompt": None, "rejected_response": json.dumps([assistant("b")])}) == PAIR
    by_messages = {"messages": [user("q"), assistant("a")], "rejected_messages": [user("q"), assistant("b")]}
    assert to_preference(by_messages | {"chosen": by_messages["messages"]}) == PAIR
    for more in ({"prompt": "q"}, nulls):
        assert to_preference(by_messages | more) == PAIR
    assert to_preference({"messages": None, "rejected_response": None, **TEXT}) == to_preference(TEXT)
    for prompt in ("else", [user("q"), user("r")]):
        with pytest.raises(RowError, match=r"^prompt: says other things than messages; fix: drop it"):
            to_preference(row | {"prompt": prompt})
    with pytest.raises(RowError, match="a chat row"):
        to_preference({"messages": [user("q"), assistant("a")], **nulls})


def test_what_lies_beside_a_conversation_in_its_object_is_used() -> None:
    def held(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"messages": list(messages), **more}

    expected = Preference([SYSTEM, user("q")], [assistant("a")], [assistant("b")])
    both = [held(user("q"), assistant(text), system="s") for text in "ab"]
    for form in (lambda value: value, json.dumps):
        assert to_preference({"chosen": form(both[0]), "rejected": form(both[1])}) == expected
        row = {"prompt": form(held(user("q"), system_prompt="s", tools=[{"name": "f"}])), "chosen": "a", "rejected": "b"}
        assert to_preference(row) == Preference(expected.prompt, expected.chosen, expected.rejected, [{"name": "f"}])
        assert to_preference(row | {"tools": [{"name": "f"}]}).tools == [{"name": "f"}]
        with pytest.raises(RowError, match=r"^prompt\.tools: the row has other tools"):
            to_preference(row | {"tools": [{"name": "g"}]})
    same = held(SYSTEM, user("q"), assistant("a"), system=" s ")
    assert to_preference({"chosen": same, "rejected": both[1]}) == expected
    for chosen, reason in (
        (held({"role": "system", "content": "t"}, user("q"), assistant("a"), system="s"), "another system message"),
        (held(assistant("a"), system="s"), "beside an answer alone"),
        (held(user("q"), assistant("a"), system=3), "int, not text"),
        (held(user("q"), assistant("a"), system="s", system_prompt="t"), "say different things"),
        (held(user("q"), assistant("a")), "share no first message"),
    ):
        with pytest.raises(RowError, match=reason):
            to_preference({"chosen": chosen, "rejected": both[1]})


def test_a_turn_of_the_assistant_that_ends_the_prompt_is_not_said_twice() -> None:
    prompt, hm = [user("q"), assistant("hm")], assistant(" hm")
    for more in ([], [user("and?")]):
        made = to_preference(
            {"prompt": prompt, "chosen": [hm, *more, assistant("a")], "rejected": [hm, *more, assistant("b")]}
        )
        assert made == Preference(prompt, [*more, assistant("a")], [*more, assistant("b")]) and made.repeats == 2
    two = [*prompt, assistant("well")]
    row = {field: [hm, assistant("well"), assistant(text)] for field, text in (("chosen", "a"), ("rejected", "b"))}
    assert to_preference({"prompt": two, **row}) == Preference(two, [assistant("a")], [assistant("b")])
    for chosen, rejected, reason in (
        ([hm], [assistant("b")], "^chosen: repeats the assistant's message that the prompt ends with"),
        ("a", "hm", "^rejected: repeats the assistant's message"),
        ("hm, a", "hm, b", None),
        ("hm so", "hm no", "^prompt: ends with a message of the assistant that both answers repeat and go on with"),
        ("hm so", "no", None),
        ([user("q"), hm], [assistant("b")], "^chosen: empty answer"),
    ):
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        if reason is None:
            assert to_preference(row).prompt == prompt
        else:
            with pytest.raises(RowError, match=reason):
                to_preference(row)


def test_a_column_of_another_kind_that_is_called_conversation_takes_no_part() -> None:
    assert to_preference(WHOLE | {"conversation": [{"input": "q", "output": "a"}]}) == PAIR
    with pytest.raises(RowError, match=r"^conversation\[0\]\.role: missing"):
        to_preference({"conversation": [{"input": "q", "output": "a"}], "chosen": "a", "rejected": "b"})


TEMPLATE = {"prompt": "Translate {{}}: {input text}", "chosen": "{good}", "rejected": "{bad}"}
TEMPLATED = {"input text": "x{y}", "good": "g", "bad": 3, "prompts": "unused"}


def test_template_builds_text_or_chat_with_system() -> None:
    assert to_preference(TEMPLATED, None, TEMPLATE) == Preference("Translate {}: x{y}", "g", "3")
    with_system = TEMPLATE | {"system": "s"}
    expected = Preference([SYSTEM, user("Translate {}: x{y}")], [assistant("g")], [assistant("3")])
    assert to_preference(TEMPLATED, {"prompt": "prompt"}, with_system) == expected


def test_texts_are_a_conversation_where_the_tokenizer_has_a_template_or_the_source_says_so() -> None:
    as_chat = Preference([user("Translate {}: x{y}")], [assistant("g")], [assistant("3")])
    as_text = Preference("Translate {}: x{y}", "g", "3")
    assert to_preference(TEMPLATED, None, TEMPLATE, chat_model=True) == as_chat
    assert to_preference(TEMPLATED, None, TEMPLATE, as_="chat") == as_chat
    assert to_preference(TEMPLATED, None, TEMPLATE, chat_model=True, as_="text") == as_text
    # columns of text are text, as the file has them, unless the source says otherwise
    row = {"prompt": "q", "chosen": " a", "rejected": " b"}
    assert to_preference(row, chat_model=True) == Preference("q", " a", " b")
    assert to_preference(row, as_="chat") == Preference([user("q")], [assistant(" a")], [assistant(" b")])
    as_json = {"prompt": json.dumps([user("q")]), "chosen": " a", "rejected": " b"}
    assert to_preference(as_json, as_="text").prompt == as_json["prompt"]
    for bad, field in ((CHAT, "as"), (row | {"system": "s"}, "system")):
        with pytest.raises(RowError) as refusal:
            to_preference(bad, as_="text")
        assert refusal.value.field == field


@pytest.mark.parametrize("empty", ["", " \n", None])
def test_an_empty_system_message_is_none(empty: str | None) -> None:
    row, template = TEMPLATED | {"sys": empty}, TEMPLATE | {"system": "{sys}"}
    assert to_preference(row, None, template) == Preference([user("Translate {}: x{y}")], [assistant("g")], [assistant("3")])
    assert to_preference(row | {"sys": "s"}, None, template).prompt == [SYSTEM, user("Translate {}: x{y}")]
    if empty is None:
        with pytest.raises(RowError, match="null"):
            to_preference(row, None, template | {"system": "Be {sys}."})


@pytest.mark.parametrize(
    "row, columns, template, field",
    [
        (TEMPLATED, {"prompt": "input text"}, TEMPLATE, "columns.prompt"),
        (TEXT | {"tool": []}, {"tools": "tool"}, None, "columns.tools"),
        ({**WHOLE, "other": "unrelated"}, {"prompt": "other"}, None, "columns.prompt"),
        (TEXT, {"system": "sys"}, None, "system"),
        (TEXT, {"chosen": "rejected"}, None, "rejected"),
        (TEXT | {"instruction": "q", "input": "x"}, {"prompt": "instruction"}, None, "input"),
        (TEXT | {"history": [["p", "o"]]}, {}, None, "history"),
    ],
)
def test_a_key_without_effect_is_named(row: dict[str, Any], columns: dict[str, str], template: Any, field: str) -> None:
    with pytest.raises(RowError) as refusal:
        to_preference(row, columns, template)
    assert refusal.value.field == field


def test_errors_name_the_keys_of_their_own_source() -> None:
    error = RowError("chosen", "no column", "set data.train.columns.chosen")
    assert error.of("data.eval.held_out").fix == "set data.eval.held_out.columns.chosen"
    assert str(error.of("data.train")) == str(error)
    taken = missing("rejected", {"rejected": "x"}, "rejected").of("data.eval")
    assert "by data.eval.columns" in taken.reason and taken.fix == "set data.eval.columns.rejected"
    with pytest.raises(ConfigError, match=r"^data\.eval\.template\.chosen: "):
        check_template({"chosen": "{a.b}", "rejected": "x"}, "data.eval")


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
    with pytest.raises(ConfigError, match=r"^data\.train\.template\.chosen: .*; fix: .*$"):
        to_preference({"x": "a", "bad": "b"}, None, {"chosen": hostile, "rejected": "{bad}"})


@pytest.mark.parametrize("template", [{"chosen": "a"}, {"choosen": "a"}, {"system": "s", "chosen": "a", "rejected": "b"}])
def test_template_keys_are_checked(template: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"^data\.train\.template\.\w+: .*; fix: "):
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
        ({"chosen": "a", "rejected": [assistant("b")]}, "row", "mixes text and chat"),
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
        (CHAT | {"chosen": [{"role": "a b", "content": "a"}]}, "chosen[0].role", "unknown role 'a b'"),
        (CHAT | {"chosen": [{"role": 3, "content": "a"}]}, "chosen[0].role", "unknown role 3"),
        (CHAT | {"chosen": [{"content": "a"}]}, "chosen[0].role", "missing"),
        (CHAT | {"chosen": [{"role": "assistant"}]}, "chosen[0].content", "missing"),
        (CHAT | {"chosen": [assistant(None)]}, "chosen[0].content", "null without tool_calls"),
        (CHAT | {"chosen": [{"role": "assistant", "content": [1]}]}, "chosen[0].content", "list, not text"),
        (CHAT | {"chosen": ["a"]}, "chosen[0]", "str, not a message"),
        (
            CHAT | {"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]},
            "chosen",
            "an image in an answer",
        ),
        (CHAT | {"chosen": [{"role": "assistant", "content": [{"text": 1}]}]}, "chosen[0].content[0]", "no text part"),
        (CHAT | {"chosen": [{"from": 3, "value": "a"}]}, "chosen[0].role", "unknown role 3"),
        (CHAT | {"chosen": [{"from": "gpt"}]}, "chosen[0].content", "missing"),
        (CHAT | {"chosen": [user("q")]}, "chosen", "empty answer"),
        (CHAT | {"chosen": [user("q again"), assistant("a")]}, "chosen[0]", "a user message right behind"),
        (CHAT | {"chosen": [SYSTEM, user("q"), assistant("a")]}, "chosen[1]", "repeats the user message"),
        (
            CHAT | {"chosen": [assistant("", tool_calls=[{"name": "f", "arguments": "{x"}])]},
            "chosen[0].tool_calls[0].arguments",
            "broken JSON",
        ),
        (
            CHAT | {"chosen": [assistant("", tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}])]},
            "chosen[0].tool_calls[0].function.arguments",
            "JSON text of list",
        ),
        (
            CHAT | {"chosen": [assistant("", function_call={"name": "f", "arguments": '{"x": "\\ud800"}'})]},
            "chosen[0].function_call.arguments",
            "lone surrogate",
        ),
        (CHAT | {"chosen": [assistant("", function_call={"arguments": "{}"})]}, "chosen[0].function_call.name", "missing"),
        (
            CHAT | {"chosen": [assistant("", tool_calls=[CALL], function_call={"name": "g"})]},
            "chosen[0].function_call",
            "tool_calls that say something else",
        ),
        *(
            (CHAT | {"prompt": [user("q"), {"role": role, "content": content}]}, "prompt[1].content", f"{what}, not text")
            for role, content, what in (
                ("tool", {"r": 3}, "an object"),
                ("tool", [{"r": 3}], "a list"),
                ("function", [1], "a list"),
                ("ipython", {"type": "celsius", "r": 3}, "an object"),
            )
        ),
        (CHAT | {"chosen": [assistant("", tool_calls="[")]}, "chosen[0].tool_calls", "broken JSON"),
        (CHAT | {"chosen": [assistant("", tool_calls={"name": "f"})]}, "chosen[0].tool_calls", "dict, not a list"),
        (CHAT | {"chosen": [assistant("", tool_calls=["f"])]}, "chosen[0].tool_calls[0]", "str, not an object"),
        (CHAT | {"chosen": [{"from": "function_call", "value": "f(x)"}]}, "chosen[0].value", "broken JSON"),
        (
            CHAT | {"system": "s", "prompt": [{"role": "system", "content": "t"}, user("q")]},
            "system",
            "another system message",
        ),
        (TEXT | {"system": ["s"]}, "system", "list, not text"),
        ({"system": "s", "chosen": "x a", "rejected": "x b"}, "prompt", "a conversation needs one"),
        ({"system": "s", "prompt": "q", "rejected": "b"}, "chosen", "no column 'chosen'"),
        ({"system": "s", "prompt": "q"}, "chosen", "no column 'chosen'"),
        (TEXT | {"prompt": "[{'role': 'user', 'content': 'q'}]"}, "prompt", "looks like a conversation"),
        (TEXT | {"prompt": '[{"role": "user", "content": "q"}'}, "prompt", "looks like a conversation"),
        ({"messages": [user("q")], "rejected_response": "b"}, "messages[0]", "is to be the chosen answer"),
        ({"messages": [assistant("a")], "rejected_response": "b"}, "messages", "no message before the answer"),
        ({"messages": [user("q")], "choosen": "a", "rejected": "b"}, "chosen", "no column 'chosen'"),
        ({"instruction": "q", "chosen": "The sky", "rejected": "The sea"}, "prompt", "'instruction' may be meant"),
        ({"instruction": "q", "input": "x", "chosen": "The sky", "rejected": "The sea"}, "prompt", "'instruction' may be"),
        # what is no pair says what it is
        ({"prompt": "q", "completion": "a", "label": True}, "row", "a KTO row"),
        ({"messages": [user("q"), assistant("a")], "label": False}, "row", "a KTO row"),
        ({"instruction": "q", "input": "", "output": "a"}, "row", "an Alpaca row"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "row", "a ShareGPT row"),
        ({"messages": [user("q"), assistant("a")]}, "row", "a chat row (messages: one conversation, one answer)"),
        ({"prompt": "q", "completion": "a"}, "row", "a row for supervised training"),
        (CHAT | {"chosen": [{"role": "tool", "content": "a"}]}, "chosen", "no assistant message"),
        *(
            (
                {
                    **prompt,
                    "chosen": [*before, user("q"), assistant("a")],
                    "rejected": [*before, user("r"), *more, assistant("b")],
                },
                "prompt",
                "nothing but a system message",
            )
            for prompt, before in (
                ({}, [SYSTEM]),
                ({"prompt": [SYSTEM]}, []),
                ({"prompt": [SYSTEM]}, [SYSTEM]),
                ({"system": "s"}, [SYSTEM]),
            )
            for more in ([], [assistant("o"), user("p")])
        ),
        (CHAT | {"chosen": [assistant(""), user("r"), assistant("a")]}, "chosen[0]", "empty answer"),
        (CHAT | {"rejected": [assistant("a"), user("r"), assistant(" \n")]}, "rejected[2]", "empty answer"),
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


PIECES: list[Any] = [
    None, True, 3, 2.5, "", " ", "q", "q a", '[{"role": "user", "content": "q"}]', '{"x": 2}', "[", [], {}, [[]], [None],
    user("q"), assistant("a"), assistant(None, tool_calls=[CALL_AS_TEXT]), said("human", "q"), said("function_call", "{"),
    [user("q")], [assistant("a")], [SYSTEM, user("q"), assistant("b")], parts("a"), {"role": ["x"], "content": {}},
    {"function": "f"}, {"name": "f", "arguments": "[1]"}, [1, 2], [0.5, None, "x"],
]  # fmt: skip
KEYS = [
    *(
        "prompt",
        "chosen",
        "rejected",
        "messages",
        "conversations",
        "rejected_response",
        "rejected_messages",
        "system",
        "tools",
    ),
    *(
        "chat_template_kwargs",
        "completions",
        "scores",
        "ranks",
        "label",
        "instruction",
        "input",
        "output",
        "role",
        "content",
    ),
    *("from", "value", "tool_calls", "function_call", "function", "arguments", "name", "type", "text", "a.b"),
]
SEEDS = [TEXT, CHAT, WHOLE, *(row for row, *_ in LAYOUTS.values()), TEMPLATED]
SETTINGS: list[dict[str, Any]] = [
    {}, {"as_": "chat"}, {"as_": "text"}, {"chat_model": True}, {"columns": {"prompt": "messages"}},
    {"columns": {"completions": "completions.text", "scores": "scores"}}, {"columns": {"ranks": "ranks", "system": "value"}},
    {"template": {"prompt": "{prompt}", "chosen": "{chosen}", "rejected": "{rejected}", "system": "{system}"}},
]  # fmt: skip


def mutated(row: Any, random: Random) -> Any:
    """A row with something in it, at any depth, taken away, put in or put in another place."""
    if random.random() < 0.3 or not isinstance(row, dict | list) or not row:
        return copy.deepcopy(random.choice(PIECES))
    row = copy.copy(row)
    if isinstance(row, list):
        place = random.randrange(len(row))
        row[place] = mutated(row[place], random)
        return row if random.random() < 0.8 else row * 2
    key = random.choice([*row, *KEYS[: random.choice((9, len(KEYS)))]])
    if key in row and random.random() < 0.2:
        del row[key]
    else:
        row[key] = mutated(row.get(key), random)
    return row


def check_mutated(random: Random) -> None:
    row = copy.deepcopy(random.choice(SEEDS))
    for _ in range(random.randint(1, 6)):
        row = mutated(row, random)
    row = row if isinstance(row, dict) else {"prompt": row}
    before = json.dumps(row)
    try:
        made = to_preferences(row, **random.choice(SETTINGS))
    except RowError as error:
        made = [error]
    assert json.dumps(row) == before
    for item in made:
        assert isinstance(item, Preference | RowError)
        if isinstance(item, RowError):
            assert str(item).isprintable() and item.fix
        else:
            kinds = {type(part) for part in (item.prompt, item.chosen, item.rejected)}
            assert len(kinds) == 1 and all((item.prompt or "x", item.chosen, item.rejected))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(randoms(use_true_random=False))
def test_a_mutated_row_is_a_preference_or_one_line(random: Random) -> None:
    check_mutated(random)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, derandomize=True)
@given(randoms(use_true_random=True))
def test_2000_mutated_rows_are_preferences_or_one_line_each(random: Random) -> None:
    check_mutated(random)


def test_a_row_that_is_nested_too_deeply_is_one_line() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    for row in (
        CHAT | {"chosen": [assistant("a", x=deep)], "rejected": [assistant("a", x=copy.copy(deep))]},
        TEXT | {"prompt": deep},
    ):
        with pytest.raises(RowError):
            to_preference(row)


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


def test_a_repeat_is_taken_out_before_texts_become_a_conversation() -> None:
    row = {"prompt": "Count to three:", "chosen": "Count to three: 1 2 3", "rejected": "Count to three: 3"}
    preference = to_preference(row, as_="chat", chat_model=True)
    assert [part[0]["content"] for part in (preference.prompt, preference.chosen, preference.rejected)] == [
        *("Count to three:", "1 2 3", "3")
    ]
    assert preference.repeats == 2
    preference = to_preference({"prompt": "Q: hi\nA: ", "chosen": "A: yes", "rejected": "A: no"})
    assert (preference.prompt, preference.chosen, preference.rejected) == ("Q: hi\nA:", " yes", " no"), "one space, not two"


Q, X, Y = user("q"), assistant("x"), assistant("y")
OF_TWO = Preference([Q], [X], [Y])


@pytest.mark.parametrize(
    "row",
    [
        # Objects around a conversation, as text too.
        {"chosen": {"messages": [Q, X]}, "rejected": {"messages": [Q, Y]}},
        {"chosen": {"conversations": [Q, X], "id": 1}, "rejected": {"conversations": [Q, Y], "id": 2}},
        {"prompt": {"messages": [Q]}, "chosen": {"messages": [X]}, "rejected": "y"},
        {"chosen": json.dumps({"messages": [Q, X]}), "rejected": json.dumps({"messages": [Q, Y]})},
        # Whole conversations beside the prompt of other rows.
        {"prompt": None, "chosen": [Q, X], "rejected": [Q, Y]},
        {"prompt": [], "chosen": [Q, X], "rejected": [Q, Y]},
        {"prompt": None, "chosen": json.dumps([Q, X]), "rejected": json.dumps([Q, Y])},
        {"prompt": None, "chosen": {"messages": [Q, X]}, "rejected": {"messages": [Q, Y]}, "completions": None},
        # Two forms of messages in one file: Arrow gives each the keys of both.
        {
            "prompt": [{"role": None, "content": None, "from": "human", "value": "q"}],
            "chosen": [{"role": "assistant", "content": "x", "from": None, "value": None}],
            "rejected": "y",
        },
        {"messages": {"messages": [Q]}, "chosen": "x", "rejected": "y"},
        # Other names of who speaks, and in capitals.
        *(
            {"prompt": [{"role": asks, "content": "q"}], "chosen": [{"role": says, "content": "x"}], "rejected": "y"}
            for asks, says in (
                ("User", "Assistant"), ("USER", "ASSISTANT"), ("human", "gpt"), ("Human", "AI"), ("user", "model"),
                ("user", "bot"), ("prompter", "assistant"), ("user", "chatgpt"),
            )
        ),
        *(
            {"conversations": [{"from": "Human", "value": "q"}], "chosen": {"from": says, "value": "x"}, "rejected": "y"}
            for says in ("GPT", "Assistant", "model", "bot", "Bard")
        ),
    ],
)  # fmt: skip
def test_conversations_as_people_store_them(row: dict[str, Any]) -> None:
    assert to_preference(row) == OF_TWO


@pytest.mark.parametrize("role", ["ipython", "Observation", "critic"])
def test_roles_that_only_a_template_knows_are_left_to_it(role: str) -> None:
    prompt = [Q, {"role": role, "content": "4"}]
    found = to_preference({"prompt": prompt, "chosen": "x", "rejected": "y"}).prompt
    assert [message["role"] for message in found] == ["user", role.lower()]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("prompt", [None, 3])
def test_a_null_prompt_is_an_error_where_the_answers_do_not_hold_it(prompt: Any) -> None:
    for answers in (("q x", "q y"), ([X], [Y]), ([Q, X], "y")):
        with pytest.raises(RowError, match=r"^prompt: (null|int)"):
            to_preference({"prompt": prompt, **dict(zip(("chosen", "rejected"), answers))})
    with pytest.raises(RowError, match=r"^prompt: null"):
        to_preference({"text": None, "chosen": [Q, X], "rejected": [Q, Y]}, {"prompt": "text"})


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_a_system_message_in_a_column_of_its_own(name: str) -> None:
    row, system = {"prompt": "q", "chosen": "x", "rejected": "y"}, {"role": "system", "content": "Be brief."}
    expected = Preference([system, Q], [X], [Y])
    assert to_preference({**row, name: "Be brief."}) == expected
    assert to_preference({**row, name: "Be brief.", "prompt": [Q]}) == expected
    assert to_preference({**row, name: None}) == to_preference({**row, name: ""}) == OF_TWO
    assert to_preference({**row, "system": None, name: "Be brief."}) == expected
    assert to_preference({**row, name: "x"}, {"prompt": name}).prompt == "x"


def test_two_system_messages_are_refused_and_the_fix_works() -> None:
    row = {"system": "a", "system_prompt": "b", "prompt": "q", "chosen": "x", "rejected": "y"}
    with pytest.raises(RowError, match=r"system and system_prompt say different things; fix: .*data.train.columns.system"):
        to_preference(row)
    assert to_preference(row, {"system": "system_prompt"}).prompt == [{"role": "system", "content": "b"}, Q]
    assert to_preference(row | {"system_prompt": " a "}).prompt == [{"role": "system", "content": "a"}, Q]


def test_a_name_may_lead_into_objects_and_lists() -> None:
    columns = {"prompt": "ask.text", "chosen": "answers.0", "rejected": "answers.1.text"}
    row = {"ask": {"text": "q"}, "answers": ["x", {"text": "y"}]}
    assert to_preference(row, columns) == Preference("q", "x", "y")
    with pytest.raises(RowError, match=r"no column 'answers\.2'"):
        to_preference(row, columns | {"chosen": "answers.2"})


@pytest.mark.parametrize(
    ("said", "prompt", "merge"),
    [
        ("Conversation roles must alternate user/assistant/user/assistant/...", [SYSTEM, Q], True),
        ("After the optional system message, conversation roles must alternate", [SYSTEM, Q, X, Q], True),
        ("Only user and assistant roles are supported!", [SYSTEM, Q], True),
        ("System role not supported", [SYSTEM, Q, Q], True),
        ("Conversation roles must alternate user/assistant/user/assistant/...", [Q, Q], False),
        ("Conversation roles must alternate user/assistant/user/assistant/...", [SYSTEM, Q, Q], False),
        ("no bad words", [SYSTEM, Q], False),
        ("Conversation roles must alternate", "q", False),
    ],
)
def test_a_template_without_a_place_for_a_system_message_has_a_remedy(said: str, prompt: Any, merge: bool) -> None:
    """Mistral's counts it as a turn. Where turns do not alternate by themselves, that is what is wrong."""
    error = refused_by_template(ValueError(said), prompt)
    assert ("into the first user message" in error.fix) == merge and (error.fix == DROP) != merge


def test_a_prompt_that_is_a_system_message_takes_the_question_that_both_answers_begin_with() -> None:
    whole = {name: [user("q"), assistant(text)] for name, text in (("chosen", "a"), ("rejected", "b"))}
    made = to_preference({"prompt": [SYSTEM], **whole})
    assert made == Preference([SYSTEM, user("q")], [assistant("a")], [assistant("b")]) and made.repeats == 0
    greeting = Preference([SYSTEM], [assistant("a")], [assistant("b")])
    assert to_preference({"prompt": [SYSTEM], "chosen": "a", "rejected": "b"}) == greeting, "the assistant may begin"
    assert to_preference({"chosen": [SYSTEM, assistant("a")], "rejected": [SYSTEM, assistant("b")]}) == greeting
