"""Which tokens of a conversation are scored, counted by hand, under templates in the style of families that people use."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from chats import ADD, calls, characters, model, parts, said, user
from tokenizers import AddedToken

from dspref.data.formats import Preference, RowError, to_preference
from dspref.data.manners import Learned, Manners, learn
from dspref.data.rows import DROP
from dspref.data.sources import Source
from dspref.data.store import load_pairs
from dspref.data.template import Rendering, render
from dspref.data.tokenize import encode
from dspref.data.truncate import Limits, TokenizedPair
from dspref.errors import DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|>{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n{{ tools | tojson }}<|eot_id|>{% endif %}"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{% if m.tool_calls %}"
    "<|python_tag|>{{ m.tool_calls[0].function.name }}({{ m.tool_calls[0].function.arguments | tojson }})<|eom_id|>"
    "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% for m in messages %}"
    "{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no such role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }} [/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS] {{ m.tool_calls | tojson }}</s>{% else %} {{ m.content }}</s>{% endif %}"
    "{% endfor %}"
)
# Thinking stays behind the last question only; there an empty block is written where there is none.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% for call in m.tool_calls or [] %}\n<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
R1 = (
    "<bos>{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<Assistant>{{ m.content.split('</think>')[-1] }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}"
)
NO_GENERATION_PROMPT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ALWAYS_OPEN = NO_GENERATION_PROMPT + "<|im_start|>assistant\n"
# Two tokens end a turn; the model's own stop is the second.
COMMAND = (
    "<bos>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
    "{% if m.role == 'assistant' %}<s>{{ m.content }}</s><|eot_id|>{% else %}{{ m.content }}<|eot_id|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|><s>{% endif %}"
)
# A message of two parts, each with an end of its own.
PARTS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking %}<User>analysis\n{{ m.thinking }}<|eot_id|>"
    "{% endif %}<User>final\n{{ m.content }}<|eot_id|>"
    "{% else %}<User>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<User>{% endif %}"
)
# Ends with the end of the text where it does not ask.
PHI3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<eos>{% endif %}"
)
# Prints arguments as they are, and so wants them as text.
AS_TEXT = (
    "{% for m in messages %}<User>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function.name + call.function.arguments }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<User>assistant\n{% endif %}"
)
THINKS_FIRST = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
NO_END = "{% for m in messages %}<User>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
NO_END_OPEN = NO_END + "<User>assistant\n"


def marked(template: str, row: Preference, scored: str = "assistant") -> tuple[str, str, str] | RowError:
    tokenizer = characters(template)
    (pair,) = encode([row], tokenizer, Limits(), scored)
    if isinstance(pair, RowError):
        return pair
    sides = ((pair.chosen, pair.chosen_scored), (pair.rejected, pair.rejected_scored))
    chosen, rejected = ("".join(parts(tokenizer, *side)) for side in sides)
    return str(tokenizer.decode(pair.prompt)), chosen, rejected


ONE = Preference([user("Hi")], [model("Yes.")], [model("No")])
PROMPTS = {
    CHATML: "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    LLAMA3: "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant"
    "<|end_header_id|>\n\n",
    GEMMA: "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    QWEN3: "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    R1: "<bos><User>Hi<Assistant>",
    NO_GENERATION_PROMPT: "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    ALWAYS_OPEN: "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
}
ENDS = {LLAMA3: "<|eot_id|>", GEMMA: "<end_of_turn>", R1: "<eos>"}


@pytest.mark.parametrize("template", PROMPTS)
def test_one_turn_is_the_text_and_its_end(template: str) -> None:
    """Neither header, nor what follows the end: 5 and 3 tokens, whatever the template has around them."""
    thought = "<think>\n\n</think>\n\n" if template == QWEN3 else ""
    end = ENDS.get(template, "<|im_end|>")
    assert marked(template, ONE) == (PROMPTS[template], f"[[{thought}Yes.{end}]]", f"[[{thought}No{end}]]")
    (pair,) = encode([ONE], characters(template), Limits())
    assert isinstance(pair, TokenizedPair)
    block = 6 * bool(thought)  # <think> \n \n </think> \n \n
    assert (len(pair.chosen), len(pair.rejected)) == (5 + block, 3 + block)


def test_a_space_that_the_template_puts_before_an_answer_belongs_to_its_first_word() -> None:
    prompt, chosen, rejected = marked(MISTRAL, ONE)  # pyright: ignore[reportGeneralTypeIssues]
    # A token per character: here the space is one of its own, and no more the model's than a header is.
    assert (prompt, chosen, rejected) == ("<s>[INST] Hi [/INST] ", "[[Yes.</s>]]", "[[No</s>]]")


SEVERAL = Preference(
    [user("Hi")],
    [model("Hello, who are you?"), user("A tall gardener from far away."), model("Nice!")],
    [model("What?"), user("Rude."), model("Whatever.")],
)


@pytest.mark.parametrize(
    ("template", "between", "end"),
    [
        (CHATML, "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
        (NO_GENERATION_PROMPT, "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
        (ALWAYS_OPEN, "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
        (
            LLAMA3,
            "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|eot_id|>",
        ),
        (GEMMA, "\n<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>"),
        (MISTRAL, "[INST] {} [/INST] ", "</s>"),
        (R1, "<User>{}<Assistant>", "<eos>"),
    ],
)
def test_every_turn_of_the_assistant_is_scored_or_the_last_alone(template: str, between: str, end: str) -> None:
    gardener, rude = between.format("A tall gardener from far away."), between.format("Rude.")
    _, chosen, rejected = marked(template, SEVERAL)  # pyright: ignore[reportGeneralTypeIssues]
    assert chosen == f"[[Hello, who are you?{end}]]{gardener}[[Nice!{end}]]"
    assert rejected == f"[[What?{end}]]{rude}[[Whatever.{end}]]"
    _, chosen, rejected = marked(template, SEVERAL, "last")  # pyright: ignore[reportGeneralTypeIssues]
    assert chosen == f"Hello, who are you?{end}{gardener}[[Nice!{end}]]"
    assert rejected == f"What?{end}{rude}[[Whatever.{end}]]"


def test_counts_of_the_case_file() -> None:
    """F3: 77 and 42 tokens behind the prompt; 19 + 5 and 5 + 9 characters are the assistant's, with an end for each turn."""
    for scored, expected in (("all", (77, 42)), ("assistant", (26, 16)), ("last", (6, 10))):
        (pair,) = encode([SEVERAL], characters(CHATML), Limits(), scored)
        assert isinstance(pair, TokenizedPair)
        masks = (pair.chosen_scored, pair.rejected_scored)
        counts = [len(ids) if mask is None else int(mask.sum()) for ids, mask in zip(pair[1:3], masks)]
        assert tuple(counts) == expected, scored


def test_all_is_everything_behind_the_prompt() -> None:
    _, chosen, rejected = marked(CHATML, ONE, "all")  # pyright: ignore[reportGeneralTypeIssues]
    assert (chosen, rejected) == ("[[Yes.<|im_end|>\n]]", "[[No<|im_end|>\n]]")
    prompt, chosen, _ = marked(NO_GENERATION_PROMPT, ONE, "all")  # pyright: ignore[reportGeneralTypeIssues]
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n"
    assert chosen == "[[<|im_start|>assistant\nYes.<|im_end|>\n]]"


def test_a_turn_that_calls_a_tool_ends_with_what_ends_such_a_turn() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    result = said("tool", "4")
    row = Preference([user("Hi")], [calls("add", x=2), result, model("4.")], [model("5.")], tools)
    prompt, chosen, rejected = marked(LLAMA3, row)  # pyright: ignore[reportGeneralTypeIssues]
    assert prompt.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n[{")
    assert chosen == (
        '[[<|python_tag|>add({"x": 2})<|eom_id|>]]<|start_header_id|>tool<|end_header_id|>\n\n4<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[4.<|eot_id|>]]"
    )
    assert rejected == "[[5.<|eot_id|>]]"
    _, chosen, _ = marked(CHATML, row)  # pyright: ignore[reportGeneralTypeIssues]
    assert chosen == (
        '[[<tool_call>{"name": "add", "arguments": {"x": 2}}</tool_call><|im_end|>]]\n<|im_start|>tool\n4<|im_end|>\n'
        "<|im_start|>assistant\n[[4.<|im_end|>]]"
    )
    _, chosen, _ = marked(QWEN3, row)  # pyright: ignore[reportGeneralTypeIssues]
    assert chosen == (
        '[[<think>\n\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"x": 2}}\n</tool_call><|im_end|>]]\n'
        "<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\n4.<|im_end|>]]"
    )
    _, chosen, _ = marked(MISTRAL, row)  # pyright: ignore[reportGeneralTypeIssues]
    assert chosen.endswith("</s>]][TOOL_RESULTS] 4 [/TOOL_RESULTS] [[4.</s>]]")


def test_a_template_that_strips_thinking_is_refused_and_one_that_keeps_it_is_trained() -> None:
    thinks = Preference([user("Hi")], [model("<think>\nadd them\n</think>\n\n5")], [model("6")])
    error = marked(R1, thinks)
    assert isinstance(error, RowError)
    assert error.field == "chosen[0].content"
    assert "data.scored: all" in error.fix
    _, chosen, _ = marked(R1, thinks, "all")  # pyright: ignore[reportGeneralTypeIssues]
    assert chosen == "[[\n\n5<eos>]]"
    _, chosen, _ = marked(QWEN3, thinks)  # pyright: ignore[reportGeneralTypeIssues]
    assert chosen == "[[<think>\nadd them\n</think>\n\n5<|im_end|>]]"
    earlier = Preference([user("Hi")], [model("<think>\na\n</think>\n\n5"), user("So?"), model("6")], [model("7")])
    assert isinstance(marked(QWEN3, earlier), RowError)
    assert not isinstance(marked(QWEN3, earlier, "last"), RowError)
    kept = Preference([user("Hi")], [model("5", reasoning_content="add them")], [model("6")])
    error = marked(CHATML, kept)
    assert isinstance(error, RowError) and error.field == "chosen[0].reasoning_content"


def test_thinking_that_is_off_belongs_to_the_prompt() -> None:
    row = Preference(ONE.prompt, ONE.chosen, ONE.rejected, chat_template_kwargs={"enable_thinking": False})
    prompt, chosen, _ = marked(QWEN3, row)  # pyright: ignore[reportGeneralTypeIssues]
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert chosen == "[[Yes.<|im_end|>]]"


def test_a_call_that_the_template_drops_is_refused() -> None:
    error = marked(GEMMA, Preference([user("Hi")], [calls("add", x=2)], [model("5.")]))
    assert isinstance(error, RowError)
    assert error.field == "chosen[0].tool_calls"
    assert error.fix == "set model.chat_template to one that prints the calls of tools", "by any rule nothing else is left"


def test_a_call_in_the_older_form_of_openai_is_trained_as_the_tool_call_that_it_is() -> None:
    """Each answer that was trained, once as an empty turn; a result has the role that the template knows."""
    call = {"name": "add", "arguments": '{"x": 2}'}
    asked = [{"role": "user", "content": "Hi"}]
    row = {"prompt": asked, "chosen": [model("See.", function_call=call)], "rejected": [model("No")]}
    assert marked(CHATML, to_preference(row)) == marked(
        CHATML, to_preference({**row, "chosen": [model("See.", tool_calls=[{"type": "function", "function": call}])]})
    )
    _, chosen, _ = marked(LLAMA3, to_preference({**row, "chosen": [model("", function_call=call)]}))  # pyright: ignore[reportGeneralTypeIssues]
    assert chosen == '[[<|python_tag|>add({"x": 2})<|eom_id|>]]'
    error = marked(GEMMA, to_preference(row))
    assert isinstance(error, RowError) and error.field == "chosen[0].tool_calls", "as any call that a template drops"
    history = [*asked, model("", function_call=call), {"role": "function", "name": "add", "content": "4"}]
    prompt, *_ = marked(MISTRAL, to_preference({**row, "prompt": history, "chosen": [model("4")]}))  # pyright: ignore[reportGeneralTypeIssues]
    assert prompt.endswith("</s>[TOOL_RESULTS] 4 [/TOOL_RESULTS] ")
    prompt, *_ = marked(CHATML, to_preference({**row, "prompt": history, "chosen": [model("4")]}))  # pyright: ignore[reportGeneralTypeIssues]
    assert "<|im_start|>function\n4<|im_end|>" in prompt, "it knows neither, and prints what it is given"


@pytest.mark.parametrize("template", [NO_END, NO_END_OPEN])
def test_an_answer_without_an_end_token_is_refused(template: str) -> None:
    error = marked(template, ONE)
    assert isinstance(error, RowError)
    assert "no end token" in error.reason and "data.scored: all" in error.fix
    assert not isinstance(marked(template, ONE, "all"), RowError)


def test_text_without_an_end_token_is_refused() -> None:
    tokenizer = characters(CHATML)
    tokenizer.eos_token = None
    (error,) = encode([Preference("a", "b", "c")], tokenizer, Limits())
    assert isinstance(error, RowError) and "eos_token" in error.reason
    (pair,) = encode([Preference("a", "b", "c")], tokenizer, Limits(), "all")
    assert isinstance(pair, TokenizedPair)


def test_an_end_token_within_the_text_does_not_end_the_turn() -> None:
    row = Preference([user("Hi")], [model("a<|im_end|>b"), user("c"), model("d")], [model("<|im_end|>e")])
    _, chosen, rejected = marked(CHATML, row)  # pyright: ignore[reportGeneralTypeIssues]
    assert chosen == ("[[a<|im_end|>b<|im_end|>]]\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[[d<|im_end|>]]")
    assert rejected == "[[<|im_end|>e<|im_end|>]]"


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (CHATML, "<eos>"), (LLAMA3, "<|eot_id|>"), (LLAMA3, "<|eom_id|>"), (R1, "<eos>")],
)
@pytest.mark.parametrize("space", ["", "\n", " \n\n"])
def test_an_answer_that_was_decoded_with_its_end_token_has_one_end(template: str, end: str, space: str) -> None:
    """As sampling gives it: what follows the end is not the model's, and a second end is not its own."""
    plain = Preference([user("Hi")], [model("a"), user("b"), model("YES")], [model("No")])
    ended = Preference([user("Hi")], [model("a"), user("b"), model(f"YES{end}{space}")], [model(f"No{end}{space}")])
    assert marked(template, ended) == marked(template, plain)
    assert marked(template, ended, "last") == marked(template, plain, "last")
    tokenizer = characters(template)
    rendering = render(ended, tokenizer, Learned(tokenizer))
    assert isinstance(rendering, Rendering)
    told = f"pair with '{end}' at the end of an answer, which the template writes too: it was taken off"
    assert told in rendering.notes


def test_of_an_answer_that_is_an_end_token_nothing_is_left() -> None:
    tokenizer = characters(CHATML)
    for chosen, rejected, told in (("<|im_end|>\n", "a", "empty answer"), ("a<|im_end|>", "a", "identical to chosen but")):
        error = render(Preference([user("q")], [model(chosen)], [model(rejected)]), tokenizer, Learned(tokenizer))
        assert isinstance(error, RowError) and error.reason.startswith(told)
    row = Preference([user("q")], [model("a<|im_end|>")], [model("b<|im_end|>")])
    assert marked(CHATML, row, "all")[1] == "[[a<|im_end|><|im_end|>\n]]", "as it is"  # pyright: ignore[reportGeneralTypeIssues,reportIndexIssue]


@pytest.mark.parametrize(
    ("template", "text", "told"),
    [
        (CHATML, "YES<|im_end|>\n<|im_start|>user\nmore", ["<|im_end|>", "<|im_start|>"]),
        (
            LLAMA3,
            "YES<|eot_id|><|start_header_id|>user<|end_header_id|>",
            ["<|end_header_id|>", "<|eot_id|>", "<|start_header_id|>"],
        ),
        (GEMMA, "a <start_of_turn> b", ["<start_of_turn>"]),
        (QWEN3, "<think>\na\n</think>\n\nb", []),
        (CHATML, "<im_end> <s>", []),
    ],
)
def test_marks_of_turns_within_a_text_are_told(template: str, text: str, told: list[str]) -> None:
    tokenizer = characters(template)
    for row in (
        Preference([user("q")], [model(f"{text} c")], [model("b")]),
        Preference([user(text)], [model("c")], [model("b")]),
    ):
        rendering = render(row, tokenizer, Learned(tokenizer))
        assert isinstance(rendering, Rendering)
        assert [note.split("'")[1] for note in rendering.notes if "begins or ends a turn" in note] == told


def test_what_follows_the_last_turn_of_the_assistant_is_left_out() -> None:
    row = Preference([user("Hi")], [model("a"), user("bye")], [model("b")])
    _, chosen, _ = marked(CHATML, row)  # pyright: ignore[reportGeneralTypeIssues]
    assert chosen == "[[a<|im_end|>]]"


def test_a_continued_answer_is_scored_from_its_own_words() -> None:
    row = Preference([user("q"), model("so")], [user("x"), model("a")], [user("y"), model("b")])
    prompt, chosen, _ = marked(CHATML, row)  # pyright: ignore[reportGeneralTypeIssues]
    assert prompt.endswith("<|im_start|>assistant\nso")
    assert chosen == "<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n[[a<|im_end|>]]"


def test_what_is_learned_of_each_style() -> None:
    learned = {
        name: learn(characters(template)) for name, template in {"chatml": CHATML, "r1": R1, "llama3": LLAMA3}.items()
    }
    assert learned["chatml"] == Manners("<|im_start|>assistant\n", True, ("<|im_end|>",), head="<|im_start|>user\n")
    assert learned["r1"] == Manners("<Assistant>", True, ("<eos>",), head="<bos><User>")
    assert learned["llama3"].ends == ("<|eot_id|>", "<|eom_id|>")
    odd = learn(characters("{% for m in messages %}{{ m.content | upper }}<eos>{% endfor %}"))
    assert odd.unknown is not None


def test_of_two_end_tokens_the_second_is_the_end() -> None:
    prompt, chosen, _ = marked(COMMAND, ONE)  # pyright: ignore[reportGeneralTypeIssues]
    assert prompt.endswith("assistant<|end_header_id|><s>")
    assert chosen == "[[Yes.</s><|eot_id|>]]"


def test_a_message_of_several_parts_is_scored_to_its_last_end() -> None:
    row = Preference([user("Hi")], [model("5", thinking="hm"), user("So?"), model("6")], [model("7")])
    _, chosen, rejected = marked(PARTS, row)  # pyright: ignore[reportGeneralTypeIssues]
    assert chosen == (
        "[[analysis\nhm<|eot_id|><User>final\n5<|eot_id|>]]<User>user\nSo?<|im_end|><User>[[final\n6<|eot_id|>]]"
    )
    assert rejected == "[[final\n7<|eot_id|>]]"


def test_an_end_that_depends_on_the_settings_of_a_row() -> None:
    """Llama-3.1 ends a call of a built-in tool otherwise, where the row says that there are such tools."""
    template = LLAMA3.replace("<|eom_id|>", "{{ '<|eom_id|>' if builtin is defined else '<|eot_id|>' }}")
    answers = [calls("add", x=2), said("tool", "4"), model("4.")], [model("5.")]
    row = Preference([user("Hi")], *answers, chat_template_kwargs={"builtin": True})
    _, chosen, _ = marked(template, row)  # pyright: ignore[reportGeneralTypeIssues]
    assert chosen.startswith('[[<|python_tag|>add({"x": 2})<|eom_id|>]]<|start_header_id|>tool')
    assert chosen.endswith("[[4.<|eot_id|>]]")


def test_keys_of_a_message_that_no_template_reads_change_nothing() -> None:
    row = Preference([user("Hi")], [model("Yes.", raw="Yes.<|im_end|>"), user("x"), model("y")], [model("No")])
    _, chosen, _ = marked(CHATML, row)  # pyright: ignore[reportGeneralTypeIssues]
    assert chosen == "[[Yes.<|im_end|>]]\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n[[y<|im_end|>]]"


@pytest.mark.parametrize(
    ("key", "off", "on"),
    [("weight", 0, 1), ("weight", 0.0, None), ("loss", False, True), ("train", False, True), ("weight", "0", "1")],
)
def test_a_turn_that_the_row_leaves_out_of_the_loss_is_not_scored_against_its_word(key: str, off: Any, on: Any) -> None:
    more = {} if on is None else {key: on}
    row = Preference([user("Hi")], [model("y1", **{key: off}), user("z"), model("y", **more)], [model("n")])
    error = marked(CHATML, row)
    assert isinstance(error, RowError) and error.field == f"chosen[0].{key}" and "set data.scored: last" in error.fix
    assert marked(CHATML, row, "last")[1].endswith("assistant\n[[y<|im_end|>]]"), "the fix works"  # pyright: ignore[reportGeneralTypeIssues,reportIndexIssue]
    last = Preference([user("Hi")], [model("y")], [model("n", **{key: off})])
    for scored in ("assistant", "last", "all"):
        error = marked(CHATML, last, scored)
        assert isinstance(error, RowError) and error.field == f"rejected[0].{key}" and "data.scored" not in error.fix
    asked = Preference([user("Hi"), model("a", **{key: off}), user("z")], [model("y", **more)], [model("n")])
    assert not isinstance(marked(CHATML, asked), RowError), "a prompt is not scored"


def test_words_under_keys_that_the_template_does_not_read_are_told() -> None:
    row = Preference([user("Hi")], [model("y", thought="hm", name="x", refusal=" ", weight=0.5)], [model("n", think="so")])
    for template, told in (
        (CHATML, ["think", "thought", "weight"]),
        (CHATML + "{% if 0 %}{{ m.think }}{# thought #}{% endif %}", ["thought", "weight"]),
    ):
        tokenizer = characters(template)
        rendering = render(row, tokenizer, Learned(tokenizer))
        assert isinstance(rendering, Rendering)
        assert [note.split("'")[1] for note in rendering.notes] == told


def test_an_end_of_the_text_behind_the_last_turn_is_not_scored() -> None:
    _, chosen, rejected = marked(PHI3, SEVERAL)  # pyright: ignore[reportGeneralTypeIssues]
    assert chosen.startswith("[[Hello, who are you?<|im_end|>]]\n<|im_start|>user\n")
    assert chosen.endswith("[[Nice!<|im_end|>]]") and rejected.endswith("[[Whatever.<|im_end|>]]")


def test_arguments_come_as_text_where_the_template_prints_them_so() -> None:
    row = Preference([user("Hi")], [calls("add", x="é")], [model("5.")])
    _, chosen, _ = marked(AS_TEXT, row)  # pyright: ignore[reportGeneralTypeIssues]
    assert chosen == '[[<tool_call>add{"x": "é"}<|im_end|>]]'
    _, chosen, _ = marked(AS_TEXT.replace(" + call.function.arguments }}", " }}{{ call.function.arguments }}"), row)
    assert chosen == '[[<tool_call>add{"x": "é"}<|im_end|>]]'


@pytest.mark.parametrize("call", ["m.tool_calls[:1]", "m.tool_calls"])
def test_a_second_call_or_arguments_that_are_dropped_are_refused(call: str) -> None:
    printed = "{{ c.function | tojson }}" if call.endswith("]") else "{{ c.function.name }}"
    template = CHATML.replace("{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}", "{% for c in "
                              f"({call} if m.tool_calls else []) %}}<tool_call>{printed}")  # fmt: skip
    twice = {"type": "function", "function": {"name": "add", "arguments": {"x": 2}}}
    error = marked(template, Preference([user("Hi")], [model("", tool_calls=[twice, twice])], [model("5.")]))
    assert isinstance(error, RowError) and error.field == "chosen[0].tool_calls", error


def test_white_space_ends_no_turn() -> None:
    """A vocabulary may have newlines among its added tokens."""
    tokenizer = characters("{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n\n{% endfor %}")
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
    (error,) = encode([ONE], tokenizer, Limits())
    assert isinstance(error, RowError) and "no end token" in error.reason


def test_thinking_that_the_generation_prompt_opens_is_trained_from_there() -> None:
    row = Preference([user("Hi")], [model("<think>\nadd\n</think>\n\n5")], [model("<think>\nx\n</think>\n\n6")])
    prompt, chosen, _ = marked(THINKS_FIRST, row)  # pyright: ignore[reportGeneralTypeIssues]
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert chosen == "[[add\n</think>\n\n5<|im_end|>]]"


def test_a_prompt_that_ends_with_a_call_and_no_content() -> None:
    call = calls("add", x=2) | {"content": None}
    row = Preference([user("Hi"), call], [said("tool", "4"), model("4.")], [said("tool", "4"), model("5.")])
    prompt, chosen, _ = marked(CHATML, row)  # pyright: ignore[reportGeneralTypeIssues]
    assert prompt.startswith("<|im_start|>user\nHi<|im_end|>") and chosen.endswith("[[4.<|im_end|>]]")


# ------------------------------------------------------------------------- several templates, and what they leave out

# The same family with other turns for rows with tools: another header, another end.
TOOL_USE = (
    "<bos>{{ tools | tojson }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<end_of_turn>"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)


def with_tools(row: Preference, tools: list[Any] | None = ADD, **settings: Any) -> Preference:
    return Preference(row.prompt, row.chosen, row.rejected, tools, settings or None)


@pytest.mark.parametrize(
    ("template", "plain", "tooled"),
    [
        ({"default": CHATML, "tool_use": TOOL_USE}, "<|im_end|>", "<end_of_turn>"),
        ({"default": CHATML, "tool_use": TOOL_USE, "rag": NO_END}, "<|im_end|>", "<end_of_turn>"),
        ({"default": NO_END, "tool_use": TOOL_USE}, None, "<end_of_turn>"),
        ({"default": CHATML}, "<|im_end|>", "<|im_end|>"),
        # One text that writes otherwise where there are tools.
        ("{% if tools %}" + TOOL_USE + "{% else %}" + CHATML + "{% endif %}", "<|im_end|>", "<end_of_turn>"),
    ],
)
def test_the_template_that_a_row_is_rendered_with_is_the_one_that_is_learned(
    template: Any, plain: str | None, tooled: str
) -> None:
    for row, end in ((ONE, plain), (with_tools(ONE), tooled), (with_tools(ONE, []), plain)):
        found = marked(template, row)
        if end is None:
            assert isinstance(found, RowError) and found.field == "chat_template", found
        else:
            assert found[1:] == (f"[[Yes.{end}]]", f"[[No{end}]]")


def test_settings_of_a_row_that_change_how_turns_end_are_learned() -> None:
    template = CHATML.replace("<|im_end|>\n", "{{ '<eos>' if plain is defined else '<|im_end|>\n' }}")
    both = (ONE, with_tools(ONE, None, plain=True))
    (first, second) = encode(both, characters(template), Limits())
    assert isinstance(first, TokenizedPair) and isinstance(second, TokenizedPair)
    decoded = [characters(template).decode(pair.chosen) for pair in (first, second)]
    assert decoded == ["Yes.<|im_end|>", "Yes.<eos>"]


def test_a_template_that_wants_a_system_message_is_learned_with_one() -> None:
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    row = Preference([said("system", "Be brief."), *ONE.prompt], ONE.chosen, ONE.rejected)
    assert marked(template, row)[1:] == ("[[Yes.<|im_end|>]]", "[[No<|im_end|>]]")


FAULTS = ["{{ 'a' + foo }}", "{% include 'x' %}", "{% for i in range(10**9) %}{% endfor %}", "{{ [1, 2, 3] | random }}"]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_the_template_is_no_fault_of_the_rows(fault: str) -> None:
    error = marked(fault + CHATML, ONE)
    assert isinstance(error, RowError) and error.field == "chat_template"
    assert "set model.chat_template to another" in error.fix and "row" not in error.fix
    row = Preference([user("q"), model("a"), model("b")], ONE.chosen, ONE.rejected)
    strict = (
        "{% if messages | length > 2 and messages[1].role == messages[2].role %}{{ raise_exception('no') }}{% endif %}"
        + CHATML
    )
    error = marked(strict, row)
    assert isinstance(error, RowError) and error.fix == DROP, "here it is the row's"


@pytest.mark.parametrize("name", ["add", "functionword", "assistant"])
def test_a_dropped_call_of_the_prompt_is_told_though_its_name_stands_elsewhere(name: str) -> None:
    plain = CHATML.replace("{% for call in m.tool_calls or [] %}", "{% for call in [] %}")
    for template, told in ((plain, True), (CHATML, False)):
        tokenizer = characters(template)
        row = Preference([user(name), calls(name), user("so?")], ONE.chosen, ONE.rejected)
        rendering = render(row, tokenizer, Learned(tokenizer))
        assert isinstance(rendering, Rendering)
        assert any("tool_calls of an assistant's turn" in note for note in rendering.notes) is told


def test_several_templates_without_one_for_the_row_are_refused_in_words() -> None:
    error = marked({"tool_use": TOOL_USE, "rag": CHATML}, ONE)  # pyright: ignore[reportArgumentType]
    assert isinstance(error, RowError)
    assert "none is called default" in error.reason and error.fix == "set model.chat_template to a Jinja file"
    found = marked({"tool_use": TOOL_USE, "rag": CHATML}, with_tools(ONE))  # pyright: ignore[reportArgumentType]
    assert found[1:] == ("[[Yes.<end_of_turn>]]", "[[No<end_of_turn>]]")


USERS_ONLY = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role in ('user', 'assistant') %}")
SYSTEM = [said("system", "Be brief, please."), *ONE.prompt]


@pytest.mark.parametrize(
    ("template", "row", "place"),
    [
        (USERS_ONLY, Preference(SYSTEM, ONE.chosen, ONE.rejected), "prompt[0].content"),
        (R1, Preference([said("developer", "Be brief."), *ONE.prompt], ONE.chosen, ONE.rejected), "prompt[0].content"),
        # Of several questions, the first is lost.
        (
            CHATML.replace("in messages %}", "in messages[-2:] %}", 1),
            Preference([user("One"), model("two"), *ONE.prompt], ONE.chosen, ONE.rejected),
            "prompt[0].content",
        ),
        (
            USERS_ONLY,
            Preference(ONE.prompt, [calls("add", x=2), said("tool", "4.5 apples"), model("4.")], ONE.rejected),
            "chosen[1].content",
        ),
    ],
)
def test_a_message_that_the_template_does_not_print_is_refused(template: str, row: Preference, place: str) -> None:
    error = marked(template, row)
    assert isinstance(error, RowError), error
    assert error.field == place and "does not print" in error.reason and "data.scored: all" in error.fix
    tokenizer = characters(template)
    rendering = render(row, tokenizer, Learned(tokenizer), "all")  # the fix works, and it is counted
    role = "tool" if place.startswith("chosen") else row.prompt[0]["role"]  # pyright: ignore[reportArgumentType]
    assert isinstance(rendering, Rendering)
    assert f"pair with a message ({role}) that the chat template does not print" in rendering.notes


NO_CALLS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_ARGUMENTS = CHATML.replace("call.function | tojson", "call.function.name")
LAST_ALONE = NO_CALLS.replace("messages %}", "messages %}{% if m.role != 'assistant' or loop.last %}", 1).replace(
    "{% endfor %}", "{% endif %}{% endfor %}", 1
)
TWICE = {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}] * 2}


@pytest.mark.parametrize(
    ("template", "prompt", "answer", "place"),
    [
        (LAST_ALONE, ONE.prompt, [model("ok"), user("ok then, more"), model("good")], "chosen[0].content"),
        (LAST_ALONE, ONE.prompt, [model("a"), user("b"), model("a")], "chosen[0].content"),
        (LAST_ALONE, ONE.prompt, [model("user"), user("b"), model("c")], "chosen[0].content"),
        (NO_CALLS, ONE.prompt, [model("Paris is nice", reasoning_content="Paris")], "chosen[0].reasoning_content"),
        (NO_CALLS, ONE.prompt, [model("I add now", tool_calls=calls("add")["tool_calls"])], "chosen[0].tool_calls"),
        (NO_ARGUMENTS, ONE.prompt, [model("x is 2", tool_calls=calls("add", x=2)["tool_calls"])], "chosen[0].tool_calls"),
        (
            CHATML.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
            ONE.prompt,
            [model("", **TWICE)],
            "chosen[0].tool_calls",
        ),
        (USERS_ONLY, [said("system", "Be terse"), user("Be terse. Who?")], ONE.chosen, "prompt[0].content"),
        (USERS_ONLY, [said("system", "user"), user("Who?")], ONE.chosen, "prompt[0].content"),
        (USERS_ONLY, [said("system", "assistant"), user("Who?")], ONE.chosen, "prompt[0].content"),
    ],
)
def test_what_is_dropped_is_found_though_its_words_stand_elsewhere(
    template: str, prompt: Any, answer: Any, place: str
) -> None:
    error = marked(template, Preference(prompt, answer, ONE.rejected))
    assert isinstance(error, RowError) and error.field == place, error


def test_words_that_stand_twice_are_no_loss() -> None:
    """Roles, tags and names of the format, and what another message says too."""
    for words in ("user", "assistant", "im_end", "ok", "name", "function"):
        prompt = [said("system", words), user(words), model(words), user(words)]
        call = {"type": "function", "function": {"name": words, "arguments": {words: words}}}
        assert notes(CHATML, Preference(prompt, [model(words, tool_calls=[call])], [model("No")])) == ()


def test_what_the_template_leaves_out_of_the_history_is_told() -> None:
    """It is the prompt's, and nothing of it is trained."""
    thought, called = model("<think>a</think>5"), model("", **TWICE)
    assert notes(QWEN3, Preference([user("a"), thought, user("b")], ONE.chosen, ONE.rejected)) == (
        "pair with content of an assistant's turn that the chat template drops or rewrites",
    )
    assert notes(NO_CALLS, Preference([user("a"), called, said("tool", "5"), user("b")], ONE.chosen, ONE.rejected)) == (
        "pair with tool_calls of an assistant's turn that the chat template drops or rewrites",
    )
    assert notes(CHATML, Preference([user("a"), called, said("tool", "5"), user("b")], ONE.chosen, ONE.rejected)) == ()
    reasoned = model("5", reasoning_content="a")
    assert notes(CHATML, Preference([user("a"), reasoned, user("b")], ONE.chosen, ONE.rejected)) == (
        "pair with reasoning_content of an assistant's turn that the chat template drops or rewrites",
    )
    assert notes(LAST_ALONE, Preference([user("a"), model("ok"), user("ok")], ONE.chosen, ONE.rejected)) == (
        "pair with content of an assistant's turn that the chat template drops or rewrites",
    )


def test_thinking_that_a_setting_has_ended_is_refused_for_what_it_is() -> None:
    row = with_tools(
        Preference(ONE.prompt, [model("<think>\nadd\n</think>\n\n5")], ONE.rejected), None, enable_thinking=False
    )
    error = marked(QWEN3, row)
    assert isinstance(error, RowError) and error.field == "chosen[0].content"
    assert "does not go on from what opens an answer" in error.reason and "chat_template_kwargs" in error.fix
    assert not isinstance(marked(QWEN3, row, "all"), RowError)


@pytest.mark.parametrize("words", ["s", "a", "system", "user", "", "m"])
def test_the_opening_is_the_templates_whatever_the_first_message_says(words: str) -> None:
    """Case F4: it survives truncation."""
    for template in (CHATML, LLAMA3, GEMMA):
        tokenizer = characters(template)
        rendering = render(Preference([user(words)], ONE.chosen, ONE.rejected), tokenizer, Learned(tokenizer))
        assert isinstance(rendering, Rendering)
        assert rendering.head == PROMPTS[template].split("Hi")[0]


def test_the_end_of_a_header_is_no_answer_in_whatever_tokens_it_comes() -> None:
    """Two line ends are one token where no word follows them, and two where one does."""
    tokenizer = characters(LLAMA3, merges=(("\u010a", "\u010a"),))
    row = Preference([user("Hi")], [model("Yes."), user("b"), model("\u00e9")], [model("No")])
    (pair,) = encode([row], tokenizer, Limits())
    assert isinstance(pair, TokenizedPair)
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert parts(tokenizer, pair.chosen, pair.chosen_scored) == [
        "\n\n",
        "[[Yes.<|eot_id|>]]",
        f"<|start_header_id|>user<|end_header_id|>\n\nb<|eot_id|>{header}",
        "[[\u00e9<|eot_id|>]]",
    ]
    assert parts(tokenizer, pair.rejected, pair.rejected_scored) == ["\n\n", "[[No<|eot_id|>]]"]


def test_text_that_has_its_end_gets_no_second_one() -> None:
    tokenizer = characters(CHATML, "<|im_end|>")
    row = Preference("Q: Hi\n", "Yes.<|im_end|>\n", "No<|im_end|>")
    (pair,) = encode([row], tokenizer, Limits())
    assert isinstance(pair, TokenizedPair)
    assert (tokenizer.decode(pair.chosen), tokenizer.decode(pair.rejected)) == ("Yes.<|im_end|>", "No<|im_end|>")


def notes(template: str, row: Preference) -> tuple[str, ...]:
    tokenizer = characters(template)
    rendering = render(row, tokenizer, Learned(tokenizer))
    assert isinstance(rendering, Rendering), rendering
    return rendering.notes


def test_tools_and_settings_without_effect_are_told() -> None:
    ignored = "pair with tools that the chat template does not print"
    assert notes(CHATML, with_tools(ONE)) == (ignored,)
    assert notes(LLAMA3, with_tools(ONE)) == ()
    assert notes(LLAMA3, with_tools(ONE, [ADD[0]["function"]])) == ()
    assert notes(LLAMA3, with_tools(ONE, [{"type": "web_search"}])) == ()
    unread = "pair with chat_template_kwargs.thinking that the chat template does not read"
    assert notes(QWEN3, with_tools(ONE, None, thinking=False)) == (unread,)
    # The template's own default changes nothing, and is no key without effect.
    assert notes(QWEN3, with_tools(ONE, None, enable_thinking=True)) == ()
    assert notes(CHATML, with_tools(ONE, enable_thinking=False)) == (ignored, unread.replace("thinking", "enable_thinking"))
    louder = CHATML.replace("{{ m.content }}", "{{ m.content | upper if m.role == 'user' else m.content }}")
    assert notes(louder, with_tools(ONE)) == (ignored, "pair with a message (user) that the chat template rewrites")


def test_messages_that_come_in_another_form_are_no_loss() -> None:
    """Spaces, JSON, and flags that a template obeys instead of printing them."""
    as_json = CHATML.replace("{{ m.content }}", "{{ m.content | tojson if m.role == 'tool' else m.content }}")
    result = [calls("add", x=2), said("tool", 'a "b"\n\u00e9'), model("4.")]
    assert notes(as_json, Preference(ONE.prompt, result, ONE.rejected)) == ()
    folded = CHATML.replace("{{ m.content }}", "{{ m.content | replace('  ', ' ') | trim }}")
    assert notes(folded, Preference([user(" two  words ")], ONE.chosen, ONE.rejected)) == ()
    obeyed = CHATML.replace("{{ m.content }}", "{{ m.content | replace('/no_think', '') }}")
    flagged = Preference([said("system", "/no_think Be brief."), *ONE.prompt], ONE.chosen, ONE.rejected)
    assert notes(obeyed, flagged) == ("pair with a message (system) that the chat template rewrites",)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("{{ m.content | upper if m.role == 'user' else m.content }}", "drops or rewrites"),
        ("{{ m.content | replace('word', ' word') if m.role == 'user' else m.content }}", "drops or rewrites"),
        ("{{ m.content if loop.last or messages[-1].role == 'user' else 'x' }}", "drops or rewrites"),
        ("{{ m.content }}{{ 'more' if loop.last and m.role == 'user' }}", "otherwise once"),
        ("{{ raise_exception('no') if m.content.startswith('first q') }}{{ m.content }}", "does not render"),
    ],
)
def test_where_turns_cannot_be_told_all_is_scored_and_the_reason_is_true(change: str, reason: str) -> None:
    tokenizer = characters(CHATML.replace("{{ m.content }}", change))
    learned = Learned(tokenizer)
    rendering = render(ONE, tokenizer, learned)
    assert isinstance(rendering, Rendering) and rendering.turns is None
    assert learned.unknown is not None and reason in learned.unknown


def test_an_answer_that_is_rewritten_is_refused_where_turns_cannot_be_told_too() -> None:
    error = marked(CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), ONE)
    assert isinstance(error, RowError) and error.field == "chosen[0].content" and "rewrites" in error.reason


# The end of the last turn alone; and one that writes earlier turns otherwise, once others follow.
LAST_ENDS = (
    "{% for m in messages %}<User>{{ m.role }}\n{{ m.content }}{% if loop.last and m.role == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<User>assistant\n{% endif %}"
)
COUNTS = (
    "{% for m in messages %}<User>{{ m.role }} of {{ messages | length if messages | length > 2 else 'few' }}\n"
    "{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<User>assistant of 9\n{% endif %}"
)


@pytest.mark.parametrize(("template", "fix"), [(LAST_ENDS, "last or all"), (COUNTS, "all")])
def test_a_rule_that_is_proposed_works(template: str, fix: str) -> None:
    row = Preference([user("Hi")], [model("a"), user("b"), model("c")], [model("d"), user("b"), model("e")])
    error = marked(template, row)
    assert isinstance(error, RowError) and error.fix.endswith(f"data.scored: {fix}"), error
    assert isinstance(marked(template, row, "last"), RowError) == ("last" not in fix)
    assert not isinstance(marked(template, row, "all"), RowError)


def test_answers_that_differ_in_what_the_template_drops_are_no_pair_by_any_rule() -> None:
    row = Preference([user("Hi")], [model("<think>a</think>5")], [model("<think>b</think>5")])
    for rule in ("assistant", "last", "all"):
        error = marked(R1, row, rule)
        assert isinstance(error, RowError) and error.field == "rejected" and "scored" not in error.fix


def told(template: Any, rows: list[dict[str, Any]], folder: Path, **settings: Any) -> list[str]:
    """What a run says of such rows."""
    lines: list[str] = []
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: Any = {"on_bad_row": "error", "cache_dir": folder / "cache", "log": lines.append} | settings
    load_pairs([Source(str(folder / "rows.jsonl"))], characters(template), Limits(), **options)
    return lines


def test_the_log_speaks_of_the_templates_that_were_used(tmp_path: Path) -> None:
    louder = CHATML.replace("{{ m.content }}", "{{ m.content | upper if m.role == 'user' else m.content }}")
    plain = {"prompt": [user("Hi")], "chosen": "Yes", "rejected": "No"}
    tooled = plain | {"tools": ADD}
    templates = {"default": louder, "tool_use": TOOL_USE}
    assert told(templates, [tooled], tmp_path) == []
    (warning, note) = told(templates, [tooled, plain], tmp_path)
    assert "it drops or rewrites the text of a plain conversation" in warning and "data.scored: all" in warning
    assert note == "data: 1 x pair with a message (user) that the chat template rewrites"
    assert told(louder, [plain], tmp_path, scored="all") == [note]
    assert told(CHATML, [tooled, plain], tmp_path) == ["data: 1 x pair with tools that the chat template does not print"]


def test_a_message_that_is_lost_is_said_by_file_and_row_and_may_be_dropped(tmp_path: Path) -> None:
    plain = {"prompt": [user("Hi")], "chosen": "Yes", "rejected": "No"}
    rows = [plain, plain | {"system_prompt": "Be brief."}]
    with pytest.raises(
        DataError, match=r"rows\.jsonl:2: prompt\[0\]\.content: the chat template does not print this message \(system\)"
    ):
        told(USERS_ONLY, rows, tmp_path)
    (line,) = told(USERS_ONLY, rows, tmp_path, on_bad_row="drop")
    assert line.startswith(
        "data: left out 1 of 2 rows: 1 x prompt[0].content: the chat template does not print this message (system)"
    )


WORDS = (
    "user",
    "assistant",
    "model",
    "system",
    "s",
    "a",
    "role",
    "content",
    "INST",
    "im_end",
    "name",
    "Hi",
    "Hi Hi",
    "x\n\ny",
)
FAMILIES = (
    CHATML,
    LLAMA3,
    GEMMA,
    MISTRAL,
    QWEN3,
    R1,
    NO_GENERATION_PROMPT,
    ALWAYS_OPEN,
    COMMAND,
    PHI3,
    LAST_ALONE,
    USERS_ONLY,
)


@pytest.mark.parametrize("template", FAMILIES)
def test_of_random_conversations_what_is_scored_is_what_the_assistant_says(template: str) -> None:
    """In words that templates have too, and that are said more than once; or the row is refused."""
    draws = random.Random(FAMILIES.index(template))
    tokenizers = [characters(template, merges=merges) for merges in ((), (("\u010a", "\u010a"), ("H", "i")))]
    used = 0
    for _ in range(60):
        prompt, chosen, rejected = ([model(draws.choice(WORDS))] for _ in range(3))
        for messages in (chosen, rejected, prompt):
            for _ in range(draws.choice((0, 0, 1, 2))):
                messages += [user(draws.choice(WORDS)), model(draws.choice(WORDS))]
        opening = [said("system", draws.choice(WORDS))] * (template in (CHATML, USERS_ONLY) and draws.random() < 0.3)
        row = Preference([*opening, user("Q"), *prompt, user(draws.choice(WORDS))], chosen, rejected)
        tokenizer = draws.choice(tokenizers)
        (pair,) = encode([row], tokenizer, Limits())
        if isinstance(pair, RowError):
            assert "does not print" in pair.reason or "drops" in pair.reason or "as it does chosen" in pair.reason, pair
            continue
        used += 1
        for answer, ids, mask in (
            (chosen, pair.chosen, pair.chosen_scored),
            (rejected, pair.rejected, pair.rejected_scored),
        ):
            runs = [run[2:-2] for run in parts(tokenizer, ids, mask) if run.startswith("[[")]
            own = [
                re.sub(r"^<think>\n\n</think>\n\n|(<\|im_end\|>|<\|eot_id\|>|<end_of_turn>|<eos>|</s>)+$", "", run)
                for run in runs
            ]
            assert [run.strip() for run in own] == [message["content"] for message in answer[::2]], row
            assert all(run != text for run, text in zip(runs, own)), "each with its end"
    assert used > 10
