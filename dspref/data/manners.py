"""How a chat template writes an assistant's turn, learned by rendering a probe conversation.

A template is a program, so it is asked and not read. It is asked anew for rows with a system message, with tools or with
settings of their own (chat_template_kwargs): a tokenizer may have another template for those, and a template other ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from dspref.data.image_rows import as_parts
from dspref.data.rows import Message, one_line
from dspref.data.sight import sight_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dspref.data.formats import Preference

QUESTION, ANSWER, AGAIN, ANSWERED = "first questionword", "first answerword", "second questionword", "second answerword"
FUNCTION, SYSTEM = "functionword", "systemword"
# By what a template may write something else each time.
RANDOM = re.compile(r"\|\s*random\b|\blipsum\b")
# So many kinds of rows are remembered: settings may hold a date or a document.
MAX_KINDS = 256


@dataclass(frozen=True)
class Manners:
    """How a template writes an assistant's turn."""

    header: str = ""
    """What stands between the end of a question and the text of its answer."""
    asks: bool = True
    """Whether the template has a generation prompt, which opens the turn."""
    ends: tuple[str, ...] = ()
    """Tokens that end a turn; any of them."""
    ends_every_turn: bool = True
    """Whether turns before the last have an end token too."""
    head: str = ""
    """What stands before the content of the first message."""
    frame: str = field(default="", compare=False, repr=False)
    """What it writes between and around the texts behind the first question."""
    joints: Mapping[tuple[str, str], str] = field(default_factory=dict, compare=False, repr=False)
    """What it writes between two messages, by their roles."""
    arguments_as_text: bool = False
    """Whether it prints the arguments of a tool call as they are, and so wants JSON text of them."""
    unknown: str | None = None
    """Why the template's turns cannot be told; None where they can."""
    fails: bool = False
    """Whether it raised an error for a plain conversation."""
    unsteady: bool = False
    """Whether it renders one conversation in several ways."""
    ignores: tuple[str, ...] = ()
    """What of tools and settings has no part in what it renders."""
    opens: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """Tokens that open a turn, the user's and the assistant's."""
    tokens: re.Pattern[str] = field(default=re.compile(r"(?!)"), compare=False, repr=False)
    """Matches any added token of the tokenizer."""


class Learned:
    """The manners of a tokenizer's templates, learned once for each kind of rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer
        self.unknown: str | None = None
        """Why the turns of some row that was rendered could not be told; None where all could."""
        self._kinds: dict[tuple[Any, ...], Manners] = {}
        self._function_is_tool: dict[str, bool] = {}

    def of(self, prompt: Sequence[Message], tools: list[Any] | None, settings: Mapping[str, Any]) -> Manners:
        """The manners with which a row of such a prompt, tools and chat_template_kwargs is written."""
        role = prompt[0]["role"]
        speaker = None if role in ("user", "assistant") else role
        kind = (speaker, bool(tools), json.dumps(settings, sort_keys=True, default=str) if settings else "")
        if kind not in self._kinds:
            if len(self._kinds) >= MAX_KINDS:
                self._kinds.clear()
            opening = [_said(speaker, SYSTEM)] if speaker else []
            self._kinds[kind] = learn(self.tokenizer, opening, tools, settings)
        return self._kinds[kind]

    def fails(self, row: Preference) -> bool:
        """Whether the template raises an error for a plain conversation too, rendered in the way of some row of messages."""
        return self.of(cast("list[Message]", row.prompt), row.tools, row.chat_template_kwargs or {}).fails

    def knows_tool_only(self, tools: list[Any] | None, settings: Mapping[str, Any]) -> bool:
        """Whether the template knows what the role `tool` is, and not that of OpenAI's older `function`."""
        kind = json.dumps([bool(tools), settings], sort_keys=True, default=str)
        if kind not in self._function_is_tool:
            if len(self._function_is_tool) >= MAX_KINDS:
                self._function_is_tool.clear()
            how = {**settings, "tools": tools or None}
            tool, function = (_knows(self.tokenizer, role, how) for role in ("tool", "function"))
            self._function_is_tool[kind] = tool and not function
        return self._function_is_tool[kind]


def learn(
    tokenizer: PreTrainedTokenizerBase,
    opening: Sequence[Message] = (),
    tools: list[Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Manners:
    """What a template puts around the text of a turn, seen on a probe conversation of such an opening and such settings."""
    if tokenizer.chat_template is None:
        return Manners()
    how: dict[str, Any] = {**(settings or {}), "tools": tools or None}
    first = [*opening, _said("user", QUESTION), _said("assistant", ANSWER)]
    try:
        alone, asked = rendered(tokenizer, first[:-1], **how), rendered(tokenizer, first[:-1], True, **how)
        answered = rendered(tokenizer, first, **how)
    except Exception as error:  # a template is a program: it may raise anything
        return Manners(unknown=f"it does not render a plain conversation: {one_line(error, 120)}", fails=True)
    may_vary = RANDOM.search(tokenizer.get_chat_template(tools=how["tools"]))
    if may_vary and any(rendered(tokenizer, first, **how) != answered for _ in range(8)):
        return Manners(unknown="it renders one conversation in several ways", unsteady=True)
    ignores = tuple(_ignored(tokenizer, alone, tools, settings or {}))
    if QUESTION not in alone or not re.search(f"{QUESTION}.*{ANSWER}", answered, re.S):
        return Manners(unknown="it drops or rewrites the text of a plain conversation", ignores=ignores)
    behind_question, middle, tail = _behind(alone, QUESTION), _between(answered, QUESTION, ANSWER), _behind(answered, ANSWER)
    asks = asked != alone
    if not middle.startswith(behind_question) and not (asks and answered.startswith(asked)):
        return Manners(unknown="it renders a question otherwise once that is answered", ignores=ignores)
    header = middle[shared_length(behind_question, middle) :]
    tokens = _added(tokenizer)
    opens_always = behind_question == middle != ""
    twice, between = answered, None
    try:
        twice = rendered(tokenizer, [*first, _said("user", AGAIN), _said("assistant", ANSWERED)], **how)
        between = _between(twice, ANSWER, AGAIN)
    except Exception:  # it knows conversations of one turn only
        pass
    # What stands right before a question opens a turn, and does not end one; unless it is an end-of-text token too.
    opens = [token for token in tokens.findall(alone[: alone.index(QUESTION)])[-1:] if token != tokenizer.eos_token]
    last, every = _end_of(tokens, tail, between, opens, opens_always)
    ends = tuple(dict.fromkeys(end for end in (last, every) if end)) if last else ()
    as_text, of_tools, calling = _of_tools(tokenizer, tokens, ends, middle, opening, how)
    return Manners(
        header, asks, ends and (*ends, *of_tools), between is None or every is not None, _head(alone),
        "\0".join(map(_frame, (answered, twice, calling))), _joints(alone, middle, between), as_text,
        ignores=ignores, opens=tuple(dict.fromkeys((*opens, *_openers(tokens, header)))), tokens=tokens,
    )  # fmt: skip


def _frame(text: str) -> str:
    """What a probe has behind its first question, without the words of the probe."""
    return re.sub(f"{ANSWER}|{AGAIN}|{ANSWERED}|{FUNCTION}|keyword|valueword", "\0", text.rpartition(QUESTION)[2])


def _joints(alone: str, middle: str, between: str | None) -> dict[tuple[str, str], str]:
    found = {("user", "assistant"): middle}
    if between is not None:
        found["assistant", "user"] = between
    if SYSTEM in alone[: alone.index(QUESTION)]:
        found["system", "user"] = _between(alone, SYSTEM, QUESTION)
    return found


def _openers(tokens: re.Pattern[str], header: str) -> list[str]:
    """The token that opens an assistant's turn; what opens its thoughts is a part of what it says."""
    return [token for token in tokens.findall(header)[:1] if "think" not in token]


def _head(alone: str) -> str:
    """What a probe has before its first message, which may be a system message that the template leaves out."""
    return alone[: min(alone.index(word) for word in (SYSTEM, QUESTION) if word in alone)]


def _ignored(tokenizer: Any, alone: str, tools: list[Any] | None, settings: Mapping[str, Any]) -> Iterator[str]:
    """`tools` where none is named in what was rendered, and settings whose names the template does not have: their values
    may be its defaults, so that the text would be no other without them."""
    names = [name for name in map(_name_of, tools or ()) if name]
    if names and not any(name in alone for name in names):
        yield "tools"
    source = tokenizer.get_chat_template(tools=tools)
    yield from (name for name in settings if not re.search(rf"\b{re.escape(name)}\b", source))


def _name_of(tool: Any) -> str:
    function = tool.get("function") if isinstance(tool, dict) else None
    name = (function if isinstance(function, dict) else tool).get("name") if isinstance(tool, dict) else None
    return name if isinstance(name, str) else ""


def _end_of(
    tokens: re.Pattern[str], tail: str, between: str | None, opens: list[str], opens_always: bool
) -> tuple[str | None, str | None]:
    """The tokens that end the last turn and any other: the last that is behind every answer, before what opens a turn."""
    if between is None:
        found = tokens.findall(tail)
        return (None if opens_always or found[-1:] == opens else next(iter(found[-1:]), None)), None
    common = tail[: shared_length(tail, between)]
    behind_all = [token for token in tokens.findall(common) if token not in opens]
    if behind_all:
        end = behind_all[0 if opens_always else -1]
        return end, end
    last, every = _first(tokens, tail), _first(tokens, between)
    return (None if last in opens or opens_always else last), (None if every in opens else every)


def _of_tools(
    tokenizer: Any,
    tokens: re.Pattern[str],
    ends: tuple[str, ...],
    middle: str,
    opening: Sequence[Message],
    how: Mapping[str, Any],
) -> tuple[bool, tuple[str, ...], str]:
    """Whether the template wants the arguments of a tool call as text, what else than `ends` ends a turn with a call, and
    the probe that shows it."""
    for as_text in (False, True):
        arguments = json.dumps({"keyword": "valueword"}) if as_text else {"keyword": "valueword"}
        call = {"type": "function", "function": {"name": FUNCTION, "arguments": arguments}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            text = rendered(tokenizer, [*opening, _said("user", QUESTION), turn], **how)
            behind = text[text.rindex(FUNCTION) :].removesuffix(middle)
        except Exception:  # it has no tools, or cannot print such arguments
            continue
        if not as_text and "{'keyword'" in behind:
            continue  # Python's way to print an object
        found = tokens.findall(behind)
        return as_text, () if set(ends) & set(found) else tuple(found[-1:]), text
    return False, (), ""


def _knows(tokenizer: Any, role: str, how: Mapping[str, Any]) -> bool:
    """Whether a template has a form of its own for what a role says, other than for a role that there is not."""
    call = {"type": "function", "id": "123456789", "function": {"name": FUNCTION, "arguments": {"keyword": "valueword"}}}
    turns = [_said("user", QUESTION), {"role": "assistant", "content": "", "tool_calls": [call]}]
    texts = []
    for name in (role, "no" + role):
        result = {"role": name, "name": FUNCTION, "tool_call_id": "123456789", "content": ANSWER}
        try:
            texts.append(rendered(tokenizer, [*turns, result], **how))
        except Exception:  # it does not know the role, or has no tools
            texts.append("")
    return ANSWER in texts[0] and texts[0] != texts[1].replace("no" + role, role)


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def rendered(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False, **how: Any) -> str:
    """A conversation as text."""
    how["add_generation_prompt"] = add_generation_prompt
    return cast(str, tokenizer.apply_chat_template(spoken(tokenizer, messages), tokenize=False, **how))


def spoken(tokenizer: Any, messages: Sequence[Message]) -> list[Message]:
    """Messages as the template of a tokenizer reads them."""
    return list(messages) if sight_of(tokenizer) is None else as_parts(messages)


def _behind(text: str, part: str) -> str:
    return text[text.rindex(part) + len(part) :]


def _between(text: str, left: str, right: str) -> str:
    start = text.index(left) + len(left)
    return text[start : text.index(right, start)]


def _added(tokenizer: Any) -> re.Pattern[str]:
    """Matches any token that a text is cut at before its words are."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()} | {str(tokenizer.eos_token or "")}
    written = sorted((token for token in added if token.strip()), key=len, reverse=True)  # white space ends nothing
    return re.compile("|".join(map(re.escape, written)) or r"(?!)")


def _first(tokens: re.Pattern[str], text: str) -> str | None:
    return found.group() if (found := tokens.search(text)) else None


def shared_length(left: str, right: str) -> int:
    """How many leading characters are equal."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle)
    return low
