"""`data.scored` under the chat templates of four families, with tools and several turns: every token counted by hand.

The templates are of our own writing, and have the manners of their families: what they strip, where they put what tools
say, and which token ends which turn. A token is a character, a special token or a tag.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pytest
from chats import ADD, characters, model, runs, said, user

from dspref.data.formats import Preference, RowError
from dspref.data.manners import Learned
from dspref.data.template import Rendering, render
from dspref.data.tokenize import encode
from dspref.data.truncate import Limits, TokenizedPair

CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ '\n' if m.content or not loop.first }}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Tools stand in the first question; a call of a tool that is built in ends otherwise; what else such a turn says is dropped.
LLAMA3 = (
    "<|begin_of_text|>{% if builtin_tools is defined %}<|start_header_id|>system<|end_header_id|>\n\n"
    "Environment: ipython<|eot_id|>{% endif %}"
    "{% for m in messages %}{% set role = 'ipython' if m.role == 'tool' else m.role %}"
    "<|start_header_id|>{{ role }}<|end_header_id|>\n\n"
    "{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    "{% if builtin_tools is defined and call.name in builtin_tools %}"
    '<|python_tag|>{{ call.name }}.call({% for key, value in call.arguments | items %}{{ key }}="{{ value }}"{% endfor %})'
    '{% else %}{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}{% endif %}'
    "{{ '<|eom_id|>' if builtin_tools is defined else '<|eot_id|>' }}"
    "{% else %}{{ 'Call: ' ~ (tools | tojson) ~ '\n' if tools and loop.first }}{{ m.content | trim }}<|eot_id|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Results of tools are one turn of the user's. Thoughts stay behind the last question alone, where the last turn always has a
# block for them, and a turn before it only where it has thoughts.
QWEN3 = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set said = m.content %}{% set thought = '' %}"
    "{% if m.reasoning_content %}{% set thought = m.reasoning_content %}{% elif '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\n' ~ thought ~ '\n</think>\n\n' }}{% endif %}"
    "{{ said }}"
    "{% for call in m.tool_calls or [] %}{{ '\n' if said or not loop.first }}{{ '<tool_call>\n' }}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% elif m.role == 'tool' %}{{ '<|im_start|>user' if loop.previtem.role != 'tool' }}"
    "{{ '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}"
    "{{ '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' }}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Thoughts are opened by the generation prompt, and every turn behind the last question has them.
QWEN3_5 = QWEN3.replace(" and (loop.last or thought)", "").replace(
    "<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
    "<think>\n\n</think>\n\n' }}{% else %}<think>\n{% endif %}{% endif %}",
)
# No generation prompt; tools stand before the last question, and a system message in it if no answer follows.
MISTRAL = (
    "<s>{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% set questions = rest | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{% if tools and m == questions[-1] %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ messages[0].content ~ '\n\n' if loop.last and messages[0].role == 'system' }}{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for call in m.tool_calls %}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}'
    "{{ ', ' if not loop.last }}{% endfor %}]</s>"
    "{% elif m.role == 'tool' %}"
    '[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def adds(*calls: Any, content: str = "", **more: Any) -> dict[str, Any]:
    """A turn that calls the tool, once for each value."""
    return model(
        content,
        tool_calls=[
            {"id": f"00000000{k}", "type": "function", "function": {"name": "add", "arguments": {"x": value}}}
            for k, value in enumerate(calls)
        ],
        **more,
    )


def result(content: str, k: int = 0) -> dict[str, Any]:
    return said("tool", content, name="add", tool_call_id=f"00000000{k}")


HI, SO, NO = [user("Hi")], user("So?"), [model("No.")]
FOUR, YES = model("It is 4."), model("Yes.")
TOOL = Preference(HI, [adds(2), result("4"), FOUR], NO, ADD)
TURNS = Preference(HI, [model("One."), SO, model("Two.")], NO)
BOTH = Preference(HI, [adds(2), result("4"), FOUR, SO, YES], NO, ADD)
BOTH_UNOFFERED = Preference(HI, BOTH.chosen, NO)
BUILT_IN = Preference(HI, TOOL.chosen, NO, None, {"builtin_tools": ["add"]})
BESIDE = Preference(HI, [adds(2, content="Let me see."), result("4"), FOUR], NO, ADD)
THOUGHTS = Preference(
    HI, [adds(2, reasoning_content="add"), result("4"), model("<think>\ndone\n</think>\n\nIt is 4.")], NO, ADD
)
EARLIER = Preference([*HI, model("<think>\nhm\n</think>\n\nOne."), SO], [model("<think>\ngo\n</think>\n\nTwo.")], NO)
NO_THOUGHTS = Preference(HI, TOOL.chosen, NO, ADD, {"enable_thinking": False})
TWICE = Preference(HI, [adds(2, 3), result("4"), result("5", 1), FOUR], NO, ADD)
ENDS_WITHIN = Preference(HI, [adds("<|im_end|>"), result("4"), FOUR], NO, ADD)
CALL_LAST = Preference([*HI, adds(2), result("4")], [adds(3)], NO, ADD)

OFFERED = '[{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]'
CALL = '{"name": "add", "arguments": {"x": 2}}'  # 38
TAGGED = f"<tool_call>\n{CALL}\n</tool_call>"  # 42
CHATML_HI = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
CHATML_TOOLS = f"<|im_start|>system\n{OFFERED}<|im_end|>\n"
CHATML_FOUR = "\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n"  # 21
CHATML_SO = "\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n"  # 23
LLAMA3_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"  # 13
LLAMA3_HI = f"<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>{LLAMA3_HEADER}"
LLAMA3_TOOLS = LLAMA3_HI.replace("Hi", f"Call: {OFFERED}\nHi")
LLAMA3_CALL = '{"name": "add", "parameters": {"x": 2}}<|eot_id|>'  # 40
LLAMA3_FOUR = f"<|start_header_id|>ipython<|end_header_id|>\n\n4<|eot_id|>{LLAMA3_HEADER}"  # 26
LLAMA3_SO = f"<|start_header_id|>user<|end_header_id|>\n\nSo?<|eot_id|>{LLAMA3_HEADER}"  # 25
QWEN3_FOUR = "\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n"  # 25
NO_THOUGHT = "<think>\n\n</think>\n\n"  # 6
MISTRAL_TOOLS = f"<s>[AVAILABLE_TOOLS] {OFFERED}[/AVAILABLE_TOOLS][INST] Hi[/INST]"
MISTRAL_CALL = '[TOOL_CALLS] [{"name": "add", "arguments": {"x": 2}, "id": "000000000"}]</s>'  # 62
MISTRAL_FOUR = '[TOOL_RESULTS] {"content": 4, "call_id": "000000000"}[/TOOL_RESULTS] '  # 42


class Case(NamedTuple):
    """A row under a template. Of each answer: a text that the model writes, one that it does not, and so on by turns, each
    with its tokens; what follows the last that it writes is nobody's."""

    template: str
    row: Preference
    prompt: str
    chosen: list[tuple[str, int]]
    rejected: list[tuple[str, int]]


ENDED = ("\n", 1)
NO_CHATML = [("No.<|im_end|>", 4), ENDED]
NO_LLAMA3 = [("No.<|eot_id|>", 4)]
NO_QWEN3 = [(f"{NO_THOUGHT}No.<|im_end|>", 10), ENDED]
NO_QWEN3_5 = [("\n</think>\n\nNo.<|im_end|>", 8), ENDED]
NO_MISTRAL = [("", 0), (" ", 1), ("No.</s>", 4)]
CASES = {
    "chatml, tool": Case(
        CHATML,
        TOOL,
        CHATML_TOOLS + CHATML_HI,
        [(f"{TAGGED}<|im_end|>", 43), (CHATML_FOUR, 21), ("It is 4.<|im_end|>", 9), ENDED],
        NO_CHATML,
    ),
    "chatml, turns": Case(
        CHATML, TURNS, CHATML_HI, [("One.<|im_end|>", 5), (CHATML_SO, 23), ("Two.<|im_end|>", 5), ENDED], NO_CHATML
    ),
    "chatml, tool and turns": Case(
        CHATML,
        BOTH,
        CHATML_TOOLS + CHATML_HI,
        [
            (f"{TAGGED}<|im_end|>", 43),
            (CHATML_FOUR, 21),
            ("It is 4.<|im_end|>", 9),
            (CHATML_SO, 23),
            ("Yes.<|im_end|>", 5),
            ENDED,
        ],
        NO_CHATML,
    ),
    "chatml, words beside a call": Case(
        CHATML,
        BESIDE,
        CHATML_TOOLS + CHATML_HI,
        [(f"Let me see.\n{TAGGED}<|im_end|>", 55), (CHATML_FOUR, 21), ("It is 4.<|im_end|>", 9), ENDED],
        NO_CHATML,
    ),
    "chatml, an end token within a call": Case(
        CHATML,
        ENDS_WITHIN,
        CHATML_TOOLS + CHATML_HI,
        [
            (TAGGED.replace("2", '"<|im_end|>"') + "<|im_end|>", 45),
            (CHATML_FOUR, 21),
            ("It is 4.<|im_end|>", 9),
            ENDED,
        ],
        NO_CHATML,
    ),
    "llama-3, tool": Case(
        LLAMA3,
        TOOL,
        f"<|begin_of_text|>{LLAMA3_TOOLS}",
        [(LLAMA3_CALL, 40), (LLAMA3_FOUR, 26), ("It is 4.<|eot_id|>", 9)],
        NO_LLAMA3,
    ),
    "llama-3, turns": Case(
        LLAMA3,
        TURNS,
        f"<|begin_of_text|>{LLAMA3_HI}",
        [("One.<|eot_id|>", 5), (LLAMA3_SO, 25), ("Two.<|eot_id|>", 5)],
        NO_LLAMA3,
    ),
    "llama-3, tool and turns": Case(
        LLAMA3,
        BOTH,
        f"<|begin_of_text|>{LLAMA3_TOOLS}",
        [
            (LLAMA3_CALL, 40),
            (LLAMA3_FOUR, 26),
            ("It is 4.<|eot_id|>", 9),
            (LLAMA3_SO, 25),
            ("Yes.<|eot_id|>", 5),
        ],
        NO_LLAMA3,
    ),
    "llama-3, a tool that is built in": Case(
        LLAMA3,
        BUILT_IN,
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython<|eot_id|>{LLAMA3_HI}",
        [('<|python_tag|>add.call(x="2")<|eom_id|>', 17), (LLAMA3_FOUR, 26), ("It is 4.<|eot_id|>", 9)],
        NO_LLAMA3,
    ),
    "qwen-3, tool": Case(
        QWEN3,
        TOOL,
        CHATML_TOOLS + CHATML_HI,
        [(f"{TAGGED}<|im_end|>", 43), (QWEN3_FOUR, 25), (f"{NO_THOUGHT}It is 4.<|im_end|>", 15), ENDED],
        NO_QWEN3,
    ),
    "qwen-3, turns": Case(
        QWEN3,
        TURNS,
        CHATML_HI,
        [("One.<|im_end|>", 5), (CHATML_SO, 23), (f"{NO_THOUGHT}Two.<|im_end|>", 11), ENDED],
        NO_QWEN3,
    ),
    "qwen-3, tool and turns": Case(
        QWEN3,
        BOTH,
        CHATML_TOOLS + CHATML_HI,
        [
            (f"{TAGGED}<|im_end|>", 43),
            (QWEN3_FOUR, 25),
            ("It is 4.<|im_end|>", 9),
            (CHATML_SO, 23),
            (f"{NO_THOUGHT}Yes.<|im_end|>", 11),
            ENDED,
        ],
        NO_QWEN3,
    ),
    "qwen-3, thoughts": Case(
        QWEN3,
        THOUGHTS,
        CHATML_TOOLS + CHATML_HI,
        [
            (f"<think>\nadd\n</think>\n\n{TAGGED}<|im_end|>", 52),
            (QWEN3_FOUR, 25),
            ("<think>\ndone\n</think>\n\nIt is 4.<|im_end|>", 19),
            ENDED,
        ],
        NO_QWEN3,
    ),
    "qwen-3, thoughts that are stripped of the prompt": Case(
        QWEN3,
        EARLIER,
        CHATML_HI + "One.<|im_end|>" + CHATML_SO,
        [("<think>\ngo\n</think>\n\nTwo.<|im_end|>", 13), ENDED],
        NO_QWEN3,
    ),
    # The prompt ends where the block that ends the thoughts would begin: the call has none.
    "qwen-3, thinking off": Case(
        QWEN3,
        NO_THOUGHTS,
        CHATML_TOOLS + CHATML_HI,
        [(f"{TAGGED}<|im_end|>", 43), (QWEN3_FOUR + NO_THOUGHT, 31), ("It is 4.<|im_end|>", 9), ENDED],
        [("", 0), (NO_THOUGHT, 6), *NO_CHATML],
    ),
    "qwen-3, two calls": Case(
        QWEN3,
        TWICE,
        CHATML_TOOLS + CHATML_HI,
        [
            (f"{TAGGED}\n{TAGGED.replace('2', '3')}<|im_end|>", 86),
            (QWEN3_FOUR.replace("<|im_end|>", "\n<tool_response>\n5\n</tool_response><|im_end|>"), 31),
            (f"{NO_THOUGHT}It is 4.<|im_end|>", 15),
            ENDED,
        ],
        NO_QWEN3,
    ),
    # The call's turn is rendered otherwise once another follows, so that its end is found by counting.
    "qwen-3, an end token within a call": Case(
        QWEN3,
        ENDS_WITHIN,
        CHATML_TOOLS + CHATML_HI,
        [
            (TAGGED.replace("2", '"<|im_end|>"') + "<|im_end|>", 45),
            (QWEN3_FOUR, 25),
            (f"{NO_THOUGHT}It is 4.<|im_end|>", 15),
            ENDED,
        ],
        NO_QWEN3,
    ),
    "qwen-3.5, tool": Case(
        QWEN3_5,
        TOOL,
        CHATML_TOOLS + CHATML_HI + "<think>\n",
        [
            (f"\n</think>\n\n{TAGGED}<|im_end|>", 47),
            (QWEN3_FOUR + "<think>\n", 27),
            ("\n</think>\n\nIt is 4.<|im_end|>", 13),
            ENDED,
        ],
        NO_QWEN3_5,
    ),
    "qwen-3.5, turns": Case(
        QWEN3_5,
        TURNS,
        CHATML_HI,
        [("One.<|im_end|>", 5), (CHATML_SO + "<think>\n", 25), ("\n</think>\n\nTwo.<|im_end|>", 9), ENDED],
        [("", 0), ("<think>\n", 2), *NO_QWEN3_5],
    ),
    "qwen-3.5, thoughts": Case(
        QWEN3_5,
        THOUGHTS,
        CHATML_TOOLS + CHATML_HI + "<think>\n",
        [
            (f"add\n</think>\n\n{TAGGED}<|im_end|>", 50),
            (QWEN3_FOUR + "<think>\n", 27),
            ("done\n</think>\n\nIt is 4.<|im_end|>", 17),
            ENDED,
        ],
        NO_QWEN3_5,
    ),
    "qwen-3.5, thoughts that are stripped of the prompt": Case(
        QWEN3_5,
        EARLIER,
        CHATML_HI + "One.<|im_end|>" + CHATML_SO + "<think>\n",
        [("go\n</think>\n\nTwo.<|im_end|>", 11), ENDED],
        NO_QWEN3_5,
    ),
    "mistral, tool": Case(
        MISTRAL, TOOL, MISTRAL_TOOLS, [(MISTRAL_CALL, 62), (MISTRAL_FOUR, 42), ("It is 4.</s>", 9)], NO_MISTRAL
    ),
    "mistral, turns": Case(
        MISTRAL,
        TURNS,
        "<s>[INST] Hi[/INST]",
        [("", 0), (" ", 1), ("One.</s>", 5), ("[INST] So?[/INST] ", 7), ("Two.</s>", 5)],
        NO_MISTRAL,
    ),
    "mistral, tool and turns": Case(
        MISTRAL,
        BOTH_UNOFFERED,
        "<s>[INST] Hi[/INST]",
        [(MISTRAL_CALL, 62), (MISTRAL_FOUR, 42), ("It is 4.</s>", 9), ("[INST] So?[/INST] ", 7), ("Yes.</s>", 5)],
        NO_MISTRAL,
    ),
    "mistral, a call is the answer": Case(
        MISTRAL,
        CALL_LAST,
        MISTRAL_TOOLS + MISTRAL_CALL + MISTRAL_FOUR[:-1],
        [(MISTRAL_CALL.replace("2", "3"), 62)],
        NO_MISTRAL,
    ),
}


def expected(prompt: str, pieces: list[tuple[str, int]], rule: str) -> Iterator[tuple[bool, str, int]]:
    """Runs of prompt and answer under a rule; those of the prompt count nothing."""
    own = range(0, len(pieces), 2)
    scored = {"last": [own[-1]], "assistant": own, "all": range(len(pieces))}[rule]
    used = pieces if rule == "all" else pieces[: own[-1] + 1]
    marked = [(False, prompt, 0), *((i in scored, *piece) for i, piece in enumerate(used) if piece[0])]
    for is_scored, run in groupby(marked, key=lambda piece: piece[0]):
        _, texts, counts = zip(*run, strict=True)
        yield is_scored, "".join(texts), sum(counts)


@pytest.mark.parametrize("rule", ["last", "assistant", "all"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_scored_is_what_was_counted_by_hand(name: str, rule: str) -> None:
    case = CASES[name]
    tokenizer = characters(case.template)
    (pair,) = encode([case.row], tokenizer, Limits(), rule)
    assert isinstance(pair, TokenizedPair), pair
    size = len(tokenizer(case.prompt, add_special_tokens=False)["input_ids"])
    for pieces, ids, mask in (
        (case.chosen, pair.chosen, pair.chosen_scored),
        (case.rejected, pair.rejected, pair.rejected_scored),
    ):
        # A space that opens an answer may be the prompt's or the answer's own, and is scored by `all` alone.
        mask = np.ones(len(ids), dtype=bool) if mask is None else mask
        whole = np.concatenate([pair.prompt, ids]), np.concatenate([np.zeros(len(pair.prompt), dtype=bool), mask])
        (_, opening, length), *rest = runs(tokenizer, *whole)
        assert [(False, opening, length - size), *rest] == list(expected(case.prompt, pieces, rule))


def refused(template: str, row: Preference, rule: str = "assistant") -> RowError:
    (error,) = encode([row], characters(template), Limits(), rule)
    assert isinstance(error, RowError)
    return error


def test_thoughts_that_are_stripped_of_an_earlier_turn_leave_the_last() -> None:
    row = Preference(HI, [model("<think>\na\n</think>\n\nOne."), SO, model("<think>\nb\n</think>\n\nTwo.")], NO)
    error = refused(QWEN3, row)
    assert error.field == "chosen[0].content" and "data.scored: last or all" in error.fix, error
    tokenizer = characters(QWEN3)
    (pair,) = encode([row], tokenizer, Limits(), "last")
    assert isinstance(pair, TokenizedPair)
    assert runs(tokenizer, pair.chosen, pair.chosen_scored) == [
        (False, f"One.<|im_end|>{CHATML_SO}", 28),
        (True, "<think>\nb\n</think>\n\nTwo.<|im_end|>", 12),
    ]
    # Where the last turn loses something too, there is one way less.
    lost = Preference(HI, [*row.chosen[:2], adds(2, content="See.")], NO)  # pyright: ignore[reportArgumentType]
    error = refused(LLAMA3, lost)
    assert error.field == "chosen[2].content" and "data.scored: all" in error.fix, error


def test_tools_that_move_to_the_last_question_hide_the_turns_before_it() -> None:
    """Before the first turn the whole has no tools, and the model would learn to call what it is not offered."""
    error = refused(MISTRAL, BOTH)
    assert "otherwise than in the whole" in error.reason and error.fix.endswith("data.scored: last or all"), error
    tokenizer = characters(MISTRAL)
    (pair,) = encode([BOTH], tokenizer, Limits(), "last")
    assert isinstance(pair, TokenizedPair)
    assert runs(tokenizer, pair.chosen, pair.chosen_scored)[-1] == (True, "Yes.</s>", 5)


@pytest.mark.parametrize("chosen", [[YES], TURNS.chosen, TOOL.chosen])
def test_a_system_message_that_is_gone_once_an_answer_follows_is_said_for_what_it_is(chosen: Any) -> None:
    row = Preference([said("system", "Be kind."), *HI], chosen, NO)
    for rule in ("assistant", "last"):
        error = refused(MISTRAL, row, rule)
        assert error.field == "prompt[0].content" and "(system) once an answer follows" in error.reason, error
        assert 'prompt: "{system} {prompt}"' in error.fix
    tokenizer = characters(MISTRAL)
    rendering = render(row, tokenizer, Learned(tokenizer), "all")
    assert isinstance(rendering, Rendering) and "Be kind." in rendering.prompt and "Be kind." not in rendering.chosen
    assert rendering.notes == ("pair with a message (system) that the chat template does not print",)
    merged = Preference([user("Be kind. Hi")], chosen, NO)
    (pair,) = encode([merged], tokenizer, Limits())
    assert isinstance(pair, TokenizedPair), "the fix works"
