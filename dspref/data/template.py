"""What a chat template does to a conversation: where the model's own text begins and ends in what it renders.

A template is a program, so it is asked and not read: `learn` renders a probe conversation once per tokenizer, and `render`
renders each pair and marks the assistant's turns in it. What a template drops or rewrites is refused, row by row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from dspref.data.formats import Preference
from dspref.data.messages import refused_by_template
from dspref.data.rows import Message, RowError, one_line
from dspref.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCORED = ("last", "assistant", "all")
# Keys of a row's chat_template_kwargs that would change what is rendered instead of how.
RESERVED_KWARGS = frozenset(
    {
        *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "tokenize"),
        *("continue_final_message", "sanitize_control_tokens", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)
# Keys of a message that hold text of the model's beside its content, by the names that templates read.
REASONING = ("reasoning_content", "reasoning", "thinking")
DECIDE = "set model.chat_template to one that does not, or data.scored: all to train on it as it is"
NO_END = RowError(
    "chat_template",
    "it writes no end token behind an answer, so that the model would never learn to stop",
    "set model.chat_template to one that ends a turn, or data.scored: all to train on it as it is",
)
NO_EOS = RowError(
    "row",
    "the tokenizer has no end token (eos_token), so that the model would never learn to stop",
    "give it one, or set data.scored: all to train on the text as it is",
)
QUESTION, ANSWER, AGAIN, ANSWERED = "first questionword", "first answerword", "second questionword", "second answerword"
FUNCTION = "functionword"


class Turn(NamedTuple):
    """An assistant's turn in a rendered text: all before what the model writes, and the tokens of which one ends it.
    `closing`: all up to the turn's end, where its last end token counts; None where that is not known, and then of the end
    tokens behind the opening the one after `inside` others, which the message itself holds."""

    opening: str
    closing: str | None
    ends: tuple[str, ...]
    inside: int = 0


class Rendering(NamedTuple):
    """The texts of one pair. `special`: the tokenizer adds its own special tokens. `head`: what the template puts before the
    first message's content. `turns`: of each answer, the turns that are scored; None: everything behind the prompt.
    `notes`: what is to be said of the pair, though it is used."""

    prompt: str
    chosen: str
    rejected: str
    special: bool
    head: str = ""
    turns: tuple[tuple[Turn, ...], tuple[Turn, ...]] | None = None
    notes: tuple[str, ...] = ()


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
    arguments_as_text: bool = False
    """Whether it prints the arguments of a tool call as they are, and so wants JSON text of them."""
    unknown: str | None = None
    """Why the template's turns cannot be told; None where they can."""
    tokens: re.Pattern[str] = field(default=re.compile(r"(?!)"), compare=False, repr=False)
    """Matches any added token of the tokenizer."""


# --------------------------------------------------------------------------------------------------------- the probe


def learn(tokenizer: PreTrainedTokenizerBase) -> Manners:
    """What the template of a tokenizer puts around the text of a turn, seen on a probe conversation."""
    if tokenizer.chat_template is None:
        return Manners()
    first = [_said("user", QUESTION), _said("assistant", ANSWER)]
    try:
        alone, asked = _rendered(tokenizer, first[:1]), _rendered(tokenizer, first[:1], add_generation_prompt=True)
        answered = _rendered(tokenizer, first)
        behind_question, middle = _behind(alone, QUESTION), _between(answered, QUESTION, ANSWER)
        tail = _behind(answered, ANSWER)
    except Exception as error:  # a template is a program: it may raise anything
        return Manners(unknown=f"it does not render a plain conversation as it is: {one_line(error, 120)}")
    asks = asked != alone
    if not middle.startswith(behind_question) and not (asks and answered.startswith(asked)):
        return Manners(unknown="it renders a question otherwise once that is answered")
    header = middle[_shared(behind_question, middle) :]
    tokens = _added(tokenizer)
    opens_always = behind_question == middle != ""
    try:
        twice = _rendered(tokenizer, [*first, _said("user", AGAIN), _said("assistant", ANSWERED)])
        between: str | None = _between(twice, ANSWER, AGAIN)
    except Exception:  # it knows conversations of one turn only
        between = None
    # What stands right before a question opens a turn, and does not end one; unless it is an end-of-text token too.
    opens = [token for token in _all(tokens, alone[: alone.index(QUESTION)])[-1:] if token != tokenizer.eos_token]
    last, every = _end_of(tokens, tail, between, opens, opens_always)
    ends = tuple(dict.fromkeys(end for end in (last, every) if end)) if last else ()
    as_text, of_tools = _of_tools(tokenizer, tokens, ends, middle)
    return Manners(header, asks, ends and (*ends, *of_tools), between is None or every is not None, as_text, tokens=tokens)


def _end_of(
    tokens: re.Pattern[str], tail: str, between: str | None, opens: list[str], opens_always: bool
) -> tuple[str | None, str | None]:
    """The tokens that end the last turn and any other: the last that is behind every answer, before what opens a turn."""
    if between is None:
        found = _all(tokens, tail)
        return (None if opens_always or found[-1:] == opens else next(iter(found[-1:]), None)), None
    common = tail[: _shared(tail, between)]
    behind_all = [token for token in _all(tokens, common) if token not in opens]
    if behind_all:
        end = behind_all[0 if opens_always else -1]
        return end, end
    last, every = _first(tokens, tail), _first(tokens, between)
    return (None if last in opens or opens_always else last), (None if every in opens else every)


def _of_tools(tokenizer: Any, tokens: re.Pattern[str], ends: tuple[str, ...], middle: str) -> tuple[bool, tuple[str, ...]]:
    """Whether the template wants the arguments of a tool call as text, and what else than `ends` ends a turn with a call."""
    tool = {"name": FUNCTION, "description": "", "parameters": {"type": "object", "properties": {}}}
    for as_text in (False, True):
        arguments = json.dumps({"keyword": "valueword"}) if as_text else {"keyword": "valueword"}
        call = {"type": "function", "function": {"name": FUNCTION, "arguments": arguments}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            text = _rendered(tokenizer, [_said("user", QUESTION), turn], tools=[{"type": "function", "function": tool}])
            behind = text[text.rindex(FUNCTION) :].removesuffix(middle)
        except Exception:  # it has no tools, or cannot print such arguments
            continue
        if not as_text and "{'keyword'" in behind:
            continue  # Python's way to print an object
        found = _all(tokens, behind)
        return as_text, () if set(ends) & set(found) else tuple(found[-1:])
    return False, ()


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _rendered(tokenizer: Any, messages: list[Message], **how: Any) -> str:
    return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, **how))


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


def _all(tokens: re.Pattern[str], text: str) -> list[str]:
    return tokens.findall(text)


# ------------------------------------------------------------------------------------------------------------ a pair


def render(
    preference: Preference | RowError, tokenizer: PreTrainedTokenizerBase, manners: Manners, scored: str = "assistant"
) -> Rendering | RowError:
    """The texts of a pair, with the turns of the answers that are `scored` (last | assistant | all), or why there are none.

    Raises DataError when chat rows meet a tokenizer without a chat template.
    """
    if isinstance(preference, RowError):
        return preference
    if isinstance(preference.prompt, str):
        return _render_text(preference, tokenizer, scored)
    if tokenizer.chat_template is None:
        reason = "the rows are conversations and the tokenizer has no chat template"
        raise DataError(f"model.chat_template: {reason}; fix: set model.chat_template to a Jinja file")
    try:
        return _render_chat(preference, tokenizer, manners, "all" if manners.unknown else scored)
    except Exception as error:  # a template is a program: it may raise anything
        return error if isinstance(error, RowError) else refused_by_template(error, preference.prompt)


def _render_text(preference: Preference, tokenizer: PreTrainedTokenizerBase, scored: str) -> Rendering | RowError:
    eos = cast("str | None", tokenizer.eos_token) or ""
    if not eos and scored != "all":
        return NO_EOS
    prompt = cast(str, preference.prompt)
    answers = (cast(str, preference.chosen), cast(str, preference.rejected))
    chosen, rejected = (prompt + (text if text.endswith(eos) else text + eos) for text in answers)
    return Rendering(prompt, chosen, rejected, special=True)


def _render_chat(preference: Preference, tokenizer: Any, manners: Manners, scored: str) -> Rendering:
    parts = (preference.prompt, preference.chosen, preference.rejected)
    prompt, *answers = ([_as_templates_read(message, manners) for message in cast("list[Message]", part)] for part in parts)
    how = dict(preference.chat_template_kwargs or {})
    if reserved := sorted(RESERVED_KWARGS & set(how)):
        raise RowError("chat_template_kwargs", f"{reserved[0]!r} is not for a row to set", "remove the key")
    how["tools"] = preference.tools
    unfinished = prompt[-1]["role"] == "assistant" and not prompt[-1].get("tool_calls")
    ending = {"continue_final_message": True} if unfinished else {"add_generation_prompt": True}
    asked = _rendered(tokenizer, prompt, **ending, **how)
    chosen, rejected = cast(
        "list[str]", tokenizer.apply_chat_template([prompt + answer for answer in answers], tokenize=False, **how)
    )
    head = _before_content(asked, prompt[0])
    if scored == "all":
        return Rendering(asked, chosen, rejected, special=False, head=head)
    if not manners.asks and not unfinished and all(full.startswith(asked + manners.header) for full in (chosen, rejected)):
        asked += manners.header
    sides, lacking = [], set()
    for side, full, answer in (("chosen", chosen, answers[0]), ("rejected", rejected, answers[1])):
        writer = _Conversation(tokenizer, manners, how, prompt, answer, full, side)
        sides.append(tuple(writer.turns(scored, asked if manners.asks and not unfinished else None)))
        if not sides[-1]:
            raise RowError(side, "no assistant message in the answer")
        if not unfinished and manners.asks:
            lacking.add(asked[_shared(asked, full) :])
    notes = [f"prompt without the {text!r} that the template puts before a new answer" for text in sorted(lacking - {""})]
    if any(answer[-1]["role"] != "assistant" for answer in answers):
        notes.append("pair with turns behind the assistant's last, which are left out")
    return Rendering(asked, chosen, rejected, False, head, (sides[0], sides[1]), tuple(map(one_line, notes)))


def _as_templates_read(message: Message, manners: Manners) -> Message:
    """A message with content that is text, if none, as templates ask for it without a look, and arguments in their form."""
    message = message if message.get("content") is not None else {**message, "content": ""}
    calls = message.get("tool_calls")
    if not calls or not manners.arguments_as_text:
        return message
    return {**message, "tool_calls": [_with_text(call) for call in calls]}


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_text(call["function"])}
    arguments = call.get("arguments")
    return call if isinstance(arguments, str | None) else {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}


def _before_content(text: str, message: Message) -> str:
    content = message.get("content")
    start = text.find(content.strip()) if isinstance(content, str) and content.strip() else -1
    return text[: max(start, 0)]


@dataclass
class _Conversation:
    """One answer of a pair, and the text that it was rendered to together with its prompt."""

    tokenizer: Any
    manners: Manners
    how: dict[str, Any]
    prompt: list[Message]
    answer: list[Message]
    full: str
    field: str

    def turns(self, scored: str, asked: str | None) -> Iterator[Turn]:
        """The assistant's turns of the answer, or the last of them. Raises RowError where the template hides one."""
        own = [i for i, message in enumerate(self.answer) if message["role"] == "assistant"]
        if own and not self.manners.ends:
            raise NO_END
        if own[:-1] and scored == "assistant" and not self.manners.ends_every_turn:
            reason = "it ends the last turn of a conversation alone, and the answer has several"
            raise RowError("chat_template", reason, "set data.scored: last or all")
        for i in own if scored == "assistant" else own[-1:]:
            opening = self._opening(i, asked if i == 0 else None)
            behind = self.full[_shared(opening, self.full) :]
            self._refuse_loss(i, opening, behind, self.answer[i])
            yield self._turn(i, opening)

    def _turn(self, i: int, opening: str) -> Turn:
        """The turn of message `i`, with the tokens that end it under the settings of this row."""
        ends = self.manners.ends
        closing = self.full
        if i + 1 < len(self.answer):
            closing = _rendered(self.tokenizer, [*self.prompt, *self.answer[: i + 1]], **self.how)
        if not self.full.startswith(closing):  # what follows changes it
            content = str(self.answer[i].get("content"))
            return Turn(opening, None, ends, sum(content.count(end) for end in ends))
        own = closing[_shared(opening, closing) :]
        if not any(end in own for end in ends):
            found = list(self.manners.tokens.finditer(own.rstrip()))
            if not found or found[-1].end() < len(own.rstrip()):
                raise NO_END
            ends = (found[-1].group(),)
        return Turn(opening, closing, ends)

    def _opening(self, i: int, asked: str | None) -> str:
        """The text before what message `i` of the answer says; `asked`: with the generation prompt, where that is known."""
        before = [*self.prompt, *self.answer[:i]]
        if self.manners.asks:
            asked = asked or _rendered(self.tokenizer, before, add_generation_prompt=True, **self.how)
            if self.full.startswith(asked):
                return asked
        base = _rendered(self.tokenizer, before, **self.how)
        if not self.full.startswith(base):
            reason = f"it renders what comes before {self.field}[{i}] otherwise than in the whole, which hides the turn"
            raise RowError("chat_template", reason, "set model.chat_template to another, or data.scored: last or all")
        return base + self.manners.header

    def _refuse_loss(self, i: int, opening: str, rendered: str, message: Message) -> None:
        """Raise RowError where the template drops or rewrites text that the model is to write."""
        place = f"{self.field}[{i}]"
        for key in ("content", *REASONING):
            text = message.get(key)
            if isinstance(text, str) and not _stands_in(text, rendered, opening):
                raise RowError(f"{place}.{key}", f"the chat template drops or rewrites it: {one_line(text, 80)!r}", DECIDE)
        calls = [call.get("function") or call for call in message.get("tool_calls") or () if isinstance(call, dict)]
        names = [call["name"] for call in calls if isinstance(call.get("name"), str)]
        for name in dict.fromkeys(names):
            if rendered.count(name) < names.count(name):
                raise RowError(f"{place}.tool_calls", f"the chat template drops the call of {one_line(name, 80)!r}", DECIDE)
        for call in calls:
            arguments = call.get("arguments")
            lost = next((key for key in arguments if key not in rendered), None) if isinstance(arguments, dict) else None
            if lost is not None:
                raise RowError(f"{place}.tool_calls", f"the chat template drops the argument {one_line(lost, 80)!r}", DECIDE)


def _shared(left: str, right: str) -> int:
    """How many leading characters are equal."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle)
    return low


def _stands_in(text: str, rendered: str, opening: str) -> bool:
    """Whether a text is there, white space aside; what the opening ends with, such as `<think>`, need not be there again."""
    if text.strip() in rendered:
        return True
    wanted, there, before = ("".join(part.split()) for part in (text, rendered, opening[-200:]))
    if wanted in there:
        return True
    opened = next((n for n in range(min(len(wanted), len(before)), 0, -1) if before.endswith(wanted[:n])), 0)
    return opened > 0 and there.startswith(wanted[opened:])
