"""What a chat template does to a conversation: where the model's own text begins and ends in what it renders.

`manners` has learned how the template writes a turn; `render` renders each pair and marks the assistant's turns in it. What
a template drops or rewrites of an answer is refused, row by row; so is a message that it does not print at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from dspref.data.formats import Preference
from dspref.data.manners import Learned, Manners, rendered, shared_length
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
PRINT_IT = "set model.chat_template to one that does, or data.scored: all to train on what is printed"
# A system message may have another place.
MERGE_IT = f'{PRINT_IT}, or write it into the user\'s message (a template can: prompt: "{{system}} {{prompt}}")'
# What is said of a pair with things that the template ignores.
IGNORED = {"tools": "tools that the chat template does not print"}
NOT_READ = "chat_template_kwargs.{} that the chat template does not read"
ANOTHER = "set model.chat_template to another"
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


class Hidden(RowError):
    """Where a turn of a conversation lies cannot be told."""


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


# ------------------------------------------------------------------------------------------------------------ a pair


def render(
    preference: Preference | RowError, tokenizer: PreTrainedTokenizerBase, learned: Learned, scored: str = "assistant"
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
        return _render_chat(preference, tokenizer, learned, scored)
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


def _render_chat(preference: Preference, tokenizer: Any, learned: Learned, scored: str) -> Rendering:
    settings = preference.chat_template_kwargs or {}
    if reserved := sorted(RESERVED_KWARGS & set(settings)):
        raise RowError("chat_template_kwargs", f"{reserved[0]!r} is not for a row to set", "remove the key")
    how = {**settings, "tools": preference.tools or None}
    _refuse_unnamed(tokenizer, preference.tools)
    manners = learned.of(cast("list[Message]", preference.prompt), preference.tools, settings)
    parts = (preference.prompt, preference.chosen, preference.rejected)
    prompt, *answers = ([_as_templates_read(message, manners) for message in cast("list[Message]", part)] for part in parts)
    unfinished = prompt[-1]["role"] == "assistant" and not prompt[-1].get("tool_calls")
    ending = {"continue_final_message": True} if unfinished else {"add_generation_prompt": True}
    asked = rendered(tokenizer, prompt, **ending, **how)
    chosen, rejected = cast(
        "list[str]", tokenizer.apply_chat_template([prompt + answer for answer in answers], tokenize=False, **how)
    )
    if chosen == rejected:
        reason = "the chat template writes it as it does chosen: it does not print what they differ in"
        raise RowError("rejected", reason, "mend the row, set data.on_bad_row: drop, or set model.chat_template to another")
    writers = [
        _Conversation(tokenizer, manners, how, prompt, answer, full, side)
        for side, full, answer in (("chosen", chosen, answers[0]), ("rejected", rejected, answers[1]))
    ]
    strict = scored != "all" and not manners.unknown
    notes = [f"pair with {IGNORED.get(name, NOT_READ.format(name))}" for name in manners.ignores]
    notes += _unprinted("prompt", prompt, asked, lambda messages: rendered(tokenizer, messages, **ending, **how), strict)
    for writer in writers:
        notes += _unprinted(writer.field, writer.answer, writer.full, writer.again, strict)
    rendering = Rendering(asked, chosen, rejected, False, _before_content(asked, prompt[0]))
    if strict:
        rendering, more = _marked(rendering, writers, scored, unfinished)
        notes += more
    elif scored != "all":
        learned.unknown = learned.unknown or manners.unknown
        for writer in writers:
            writer.refuse_losses()
    return rendering._replace(notes=tuple(dict.fromkeys(map(one_line, notes))))


def _marked(
    rendering: Rendering, writers: Sequence[_Conversation], scored: str, unfinished: bool
) -> tuple[Rendering, list[str]]:
    """A rendering with its turns, and what is to be said of it. `unfinished`: the prompt ends within an assistant's turn."""
    asked, manners = rendering.prompt, writers[0].manners
    if not manners.asks and not unfinished and all(writer.full.startswith(asked + manners.header) for writer in writers):
        asked += manners.header
    sides, lacking = [], set()
    for writer in writers:
        try:
            sides.append(tuple(writer.turns(scored, asked if manners.asks and not unfinished else None)))
        except Hidden as error:
            if scored == "last" or not all(writer.can_score_last() for writer in writers):
                raise
            raise RowError(error.field, error.reason, f"{ANOTHER}, or data.scored: last or all") from None
        if not sides[-1]:
            raise RowError(writer.field, "no assistant message in the answer")
        if not unfinished and manners.asks:
            lacking.add(asked[shared_length(asked, writer.full) :])
    notes = [f"prompt without the {text!r} that the template puts before a new answer" for text in sorted(lacking - {""})]
    if any(writer.answer[-1]["role"] != "assistant" for writer in writers):
        notes.append("pair with turns behind the assistant's last, which are left out")
    return rendering._replace(prompt=asked, turns=(sides[0], sides[1])), notes


def _refuse_unnamed(tokenizer: Any, tools: list[Any] | None) -> None:
    """Raise RowError where a tokenizer has several templates, and none for such a row."""
    own = tokenizer.chat_template
    if isinstance(own, dict) and "default" not in own and not (tools and "tool_use" in own):
        reason = f"the tokenizer has several ({', '.join(sorted(own))}), and none is called default"
        raise RowError("chat_template", one_line(reason), "set model.chat_template to a Jinja file")


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

    def again(self, answer: list[Message]) -> str:
        """The whole text with another answer."""
        return rendered(self.tokenizer, [*self.prompt, *answer], **self.how)

    def turns(self, scored: str, asked: str | None) -> Iterator[Turn]:
        """The assistant's turns of the answer, or the last of them. Raises RowError where the template hides one."""
        own = [i for i, message in enumerate(self.answer) if message["role"] == "assistant"]
        if own and not self.manners.ends:
            raise NO_END
        if own[:-1] and scored == "assistant" and not self.manners.ends_every_turn:
            reason = "it ends the last turn of a conversation alone, and the answer has several"
            raise Hidden("chat_template", reason, f"{ANOTHER}, or data.scored: all")
        for i in own if scored == "assistant" else own[-1:]:
            opening = self._opening(i, asked if i == 0 else None)
            behind = self.full[shared_length(opening, self.full) :]
            self._refuse_loss(i, opening, behind, self.answer[i])
            yield self._turn(i, opening)

    def can_score_last(self) -> bool:
        """Whether `data.scored: last` would mend what the other rule cannot."""
        try:
            return bool(list(self.turns("last", None)))
        except RowError:
            return False

    def _turn(self, i: int, opening: str) -> Turn:
        """The turn of message `i`, with the tokens that end it under the settings of this row."""
        ends = self.manners.ends
        closing = self.full
        if i + 1 < len(self.answer):
            closing = self.again(self.answer[: i + 1])
        if not self.full.startswith(closing):  # what follows changes it
            content = str(self.answer[i].get("content"))
            return Turn(opening, None, ends, sum(content.count(end) for end in ends))
        own = closing[shared_length(opening, closing) :]
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
            asked = asked or rendered(self.tokenizer, before, add_generation_prompt=True, **self.how)
            if self.full.startswith(asked):
                return asked
        base = rendered(self.tokenizer, before, **self.how)
        if not self.full.startswith(base):
            reason = f"it renders what comes before {self.field}[{i}] otherwise than in the whole, which hides the turn"
            raise Hidden("chat_template", reason, f"{ANOTHER}, or data.scored: all")
        return base + self.manners.header

    def _refuse_loss(self, i: int, opening: str, written: str, message: Message) -> None:
        """Raise RowError where the template drops or rewrites text that the model is to write."""
        place = f"{self.field}[{i}]"
        for key in ("content", *REASONING):
            text = message.get(key)
            if isinstance(text, str) and not _stands_in(text, written, opening):
                raise RowError(f"{place}.{key}", f"the chat template drops or rewrites it: {one_line(text, 80)!r}", DECIDE)
        calls = [call.get("function") or call for call in message.get("tool_calls") or () if isinstance(call, dict)]
        names = [call["name"] for call in calls if isinstance(call.get("name"), str)]
        for name in dict.fromkeys(names):
            if written.count(name) < names.count(name):
                raise RowError(f"{place}.tool_calls", f"the chat template drops the call of {one_line(name, 80)!r}", DECIDE)
        for call in calls:
            arguments = call.get("arguments")
            lost = next((key for key in arguments if key not in written), None) if isinstance(arguments, dict) else None
            if lost is not None:
                raise RowError(f"{place}.tool_calls", f"the chat template drops the argument {one_line(lost, 80)!r}", DECIDE)

    def refuse_losses(self) -> None:
        """The same of all turns, where it is not known where each stands."""
        for i, message in enumerate(self.answer):
            if message["role"] == "assistant":
                self._refuse_loss(i, "", self.full, message)


def _unprinted(
    field: str, messages: Sequence[Message], text: str, again: Callable[[list[Message]], str], strict: bool
) -> Iterator[str]:
    """Notes on messages that are not the assistant's and do not stand in their rendering `text`; `again` renders them anew.
    Raises RowError for one that does not come in there at all, where `strict`."""
    for i, message in enumerate(messages):
        content, role = message.get("content") or "", message["role"]
        if role == "assistant" or _is_printed(content, text):
            continue
        if not _same_text(again, [*messages[:i], {**message, "content": "otherword"}, *messages[i + 1 :]], text):
            yield f"pair with a message ({role}) that the chat template rewrites"
        elif strict:
            reason = f"the chat template does not print this message ({role})"
            fix = MERGE_IT if role in ("system", "developer") else PRINT_IT
            raise RowError(f"{field}[{i}].content", reason, fix)
        else:
            yield f"pair with a message ({role}) that the chat template does not print"


def _is_printed(content: str, text: str) -> bool:
    """Whether a text stands in a rendering, white space aside, or as JSON, as templates print what tools say."""
    if content.strip() in text or _stands_in(content, text, ""):
        return True
    return any(json.dumps(content.strip(), ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))


def _same_text(again: Callable[[list[Message]], str], messages: list[Message], text: str) -> bool:
    try:
        return again(messages) == text
    except Exception:  # a template is a program: it may raise anything
        return False


def _stands_in(text: str, written: str, opening: str) -> bool:
    """Whether a text is there, white space aside; what the opening ends with, such as `<think>`, need not be there again."""
    if text.strip() in written:
        return True
    wanted, there, before = ("".join(part.split()) for part in (text, written, opening[-200:]))
    if wanted in there:
        return True
    opened = next((n for n in range(min(len(wanted), len(before)), 0, -1) if before.endswith(wanted[:n])), 0)
    return opened > 0 and there.startswith(wanted[opened:])
