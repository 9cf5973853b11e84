"""What a chat template does to a conversation: where the model's own text begins and ends in what it renders.

`manners` has learned how the template writes a turn; `render` renders each pair and marks the assistant's turns in it. What
a template drops or rewrites of an answer is refused, row by row; so is a message that it does not print at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from dspref.data.apart import refuse_languages, start_of
from dspref.data.beside import refuse_switched_off, unread
from dspref.data.formats import Preference
from dspref.data.image_files import Picture
from dspref.data.image_rows import IMAGE, NO_IMAGES
from dspref.data.labelled import of_one
from dspref.data.manners import Learned, Manners, rendered, shared_length, spoken
from dspref.data.marks import ending_once, marks_in
from dspref.data.printed import Printed, called, said
from dspref.data.rows import DROP, Languages, Message, RowError, Text, one_line
from dspref.data.sight import sight_of
from dspref.data.turns import ANOTHER, Conversation, Hidden, Turn
from dspref.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Keys of a row's chat_template_kwargs that would change what is rendered instead of how.
RESERVED_KWARGS = frozenset(
    {
        *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "tokenize"),
        *("continue_final_message", "sanitize_control_tokens", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)
PRINT_IT = "set model.chat_template to one that does, or data.scored: all to train on what is printed"
# A system message may have another place.
MERGE_IT = f'{PRINT_IT}, or write it into the user\'s message (a template can: prompt: "{{system}} {{prompt}}")'
# What is said of a pair with things that the template ignores.
IGNORED = {"tools": "tools that the chat template does not print"}
NOT_READ = "chat_template_kwargs.{} that the chat template does not read"
UNSTEADY = RowError(
    "chat_template",
    "it renders one conversation now in one way, now in another: what is random in it would be trained",
    f"take that out of it, or {ANOTHER}",
)
TEXT_OF_IT = "make texts of it by data.train.template, or set data.train.as: text"
NO_EOS = RowError(
    "row",
    "the tokenizer has no end token (eos_token), so that the model would never learn to stop",
    "give it one, or set data.scored: all to train on the text as it is",
)


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
    languages: Languages | None = None
    """Of an encoder-decoder model, whose answers do not repeat the prompt: those of prompt and answers."""
    images: tuple[Picture, ...] = ()
    """Of the prompt, in which one token stands for each."""
    label: bool | None = None
    """Of an answer that stands alone, as in `Preference`."""


# ------------------------------------------------------------------------------------------------------------ a pair


def render(
    preference: Preference | RowError, tokenizer: PreTrainedTokenizerBase, learned: Learned, scored: str = "assistant"
) -> Rendering | RowError:
    """The texts of a pair, with the turns of the answers that are `scored` (last | assistant | all), or why there are none.

    Raises DataError when chat rows meet a tokenizer without a chat template.
    """
    if isinstance(preference, RowError):
        return preference
    found = _render(preference, tokenizer, learned, scored)
    return of_one(found) if isinstance(found, RowError) and preference.label is not None else found


def _render(
    preference: Preference, tokenizer: PreTrainedTokenizerBase, learned: Learned, scored: str
) -> Rendering | RowError:
    if preference.images and sight_of(tokenizer) is None:
        return NO_IMAGES
    if start_of(tokenizer) is not None:
        return _render_apart(preference, tokenizer)
    if preference.languages is not None:
        return RowError("columns.target_language", "has no effect: the model is no encoder-decoder model", "drop it")
    if isinstance(preference.prompt, str):
        return _render_text(preference, tokenizer, scored)
    if tokenizer.chat_template is None:
        reason = "the rows are conversations and the tokenizer has no chat template"
        raise DataError(f"model.chat_template: {reason}; fix: set model.chat_template to a Jinja file")
    try:
        return _render_chat(preference, tokenizer, learned, scored)
    except Exception as error:  # a template is a program: it may raise anything
        if isinstance(error, RowError):
            return error
        refusal = refused_by_template(error, preference.prompt)
        return refusal if refusal.fix != DROP or not learned.fails(preference) else _broken(refusal)


def refused_by_template(error: Exception, prompt: Text) -> RowError:
    """What a chat template raised. Some have no place for a system message: that has a remedy of its own. Some of these
    count it as a turn, and only say that turns must alternate."""
    roles = [] if isinstance(prompt, str) else [message["role"] for message in prompt]
    turns = [role for role in roles if role != "system"]
    alternate = turns == (["user", "assistant"] * len(turns))[: len(turns)]
    said = str(error).lower()
    fix = DROP
    if "system" in roles and ("system" in said or (alternate and re.search("alternat|role|user", said))):
        fix = (
            'write it into the first user message (a template can: prompt: "{system} {prompt}"), or set model.chat_template'
        )
    return RowError("chat_template", f"{type(error).__name__}: {error}", fix)


def _broken(refusal: RowError) -> RowError:
    """What a template raised that does so whatever it is given: no row is to blame."""
    return RowError(
        refusal.field, f"{refusal.reason} (it renders no plain conversation either)", f"mend the template, or {ANOTHER}"
    )


def _render_text(preference: Preference, tokenizer: PreTrainedTokenizerBase, scored: str) -> Rendering | RowError:
    eos = cast("str | None", tokenizer.eos_token) or ""
    if not eos and scored != "all":
        return NO_EOS
    prompt = cast(str, preference.prompt)
    answers = (cast(str, preference.chosen), cast(str, preference.rejected))
    chosen, rejected = (prompt + _ended(text, eos, scored) for text in answers)
    return Rendering(prompt, chosen, rejected, special=True, label=preference.label)


def _render_apart(preference: Preference, tokenizer: PreTrainedTokenizerBase) -> Rendering | RowError:
    if not isinstance(preference.prompt, str):
        return RowError("row", "a conversation, and an encoder-decoder model reads a text", TEXT_OF_IT)
    if tokenizer.eos_token_id is None:
        return NO_EOS
    languages = preference.languages or (None, None)
    try:
        refuse_languages(tokenizer, languages)
    except RowError as error:
        return error
    # A decoder's text does not go on from the prompt: one that begins like it says so.
    chosen, rejected = preference.whole or (cast(str, preference.chosen), cast(str, preference.rejected))
    return Rendering(preference.prompt, chosen, rejected, special=True, languages=languages, label=preference.label)


def _ended(text: str, eos: str, scored: str) -> str:
    """An answer with its end token. White space behind one that it has is not the model's, and nothing follows it."""
    if scored != "all" and text.rstrip().endswith(eos):
        return text.rstrip()
    return text if text.endswith(eos) else text + eos


def _render_chat(preference: Preference, tokenizer: Any, learned: Learned, scored: str) -> Rendering:
    settings = preference.chat_template_kwargs or {}
    if reserved := sorted(RESERVED_KWARGS & set(settings)):
        raise RowError("chat_template_kwargs", f"{reserved[0]!r} is not for a row to set", "remove the key")
    how = {**settings, "tools": preference.tools or None}
    _refuse_unnamed(tokenizer, preference.tools)
    manners = learned.of(cast("list[Message]", preference.prompt), preference.tools, settings)
    if manners.unsteady:
        raise UNSTEADY
    parts = [cast("list[Message]", part) for part in (preference.prompt, preference.chosen, preference.rejected)]
    if any(message["role"] == "function" for part in parts for message in part):
        parts = [_with_tool_role(part) for part in parts] if learned.knows_tool_only(preference.tools, settings) else parts
    prompt, *answers = ([_as_templates_read(message, manners) for message in part] for part in parts)
    strict = scored != "all" and not manners.unknown
    notes = [f"pair with {IGNORED.get(name, NOT_READ.format(name))}" for name in manners.ignores]
    refuse_switched_off(answers, scored)
    notes += unread([*prompt, *answers[0], *answers[1]], tokenizer.get_chat_template(tools=preference.tools or None))
    if strict:
        answers, ended = ending_once(answers, (*manners.ends, cast("str | None", tokenizer.eos_token) or ""), scored)
        notes += ended
    notes += marks_in([*prompt, *answers[0], *answers[1]], manners)
    unfinished = prompt[-1]["role"] == "assistant" and not prompt[-1].get("tool_calls")
    ending = {"continue_final_message": True} if unfinished else {"add_generation_prompt": True}
    asked = rendered(tokenizer, prompt, **ending, **how)
    chosen, rejected = cast(
        "list[str]",
        tokenizer.apply_chat_template([spoken(tokenizer, prompt + answer) for answer in answers], tokenize=False, **how),
    )
    if chosen == rejected and preference.label is None:
        reason = "the chat template writes it as it does chosen: it does not print what they differ in"
        raise RowError("rejected", reason, "mend the row, set data.on_bad_row: drop, or set model.chat_template to another")
    writers = [
        Conversation(tokenizer, manners, how, prompt, answer, full, side)
        for side, full, answer in (("chosen", chosen, answers[0]), ("rejected", rejected, answers[1]))
    ]
    head = manners.head if manners.head and asked.startswith(manners.head) else _before_content(asked, prompt[0])
    printed = Printed(prompt, asked, asked[len(head) :], manners, lambda again: rendered(tokenizer, again, **ending, **how))
    notes += _unprinted("prompt", printed, (), strict)
    for writer in writers:
        notes += _unprinted(writer.field, writer.printed(asked), writer.scored_by(scored), strict)
        if not writer.full.startswith(asked):  # what it prints of a question may be gone once that is answered
            notes += _unprinted("prompt", writer.with_prompt(head), (), strict, len(prompt))
    rendering = Rendering(asked, chosen, rejected, False, head, images=preference.images, label=preference.label)
    if strict:
        rendering, more = _marked(rendering, writers, scored, unfinished)
        notes += more
    elif scored != "all":
        learned.unknown = learned.unknown or manners.unknown
        for writer in writers:
            writer.refuse_losses()
    return rendering._replace(notes=tuple(dict.fromkeys(map(one_line, notes))))


def _marked(
    rendering: Rendering, writers: Sequence[Conversation], scored: str, unfinished: bool
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
            fix = error.fix.replace("data.scored: all", "data.scored: last or all")
            raise RowError(error.field, error.reason, fix) from None
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


def _with_tool_role(messages: list[Message]) -> list[Message]:
    """Messages whose results of functions are those of tools."""
    return [{**message, "role": "tool"} if message["role"] == "function" else message for message in messages]


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
    content = str(message.get("content") or "").split(IMAGE)[0].strip()
    start = text.find(content) if content else -1
    return text[: max(start, 0)]


def _unprinted(field: str, there: Printed, scored: Sequence[int], strict: bool, first: int | None = None) -> Iterator[str]:
    """Notes on what messages, or the `first` of them, say that is not in their rendering, but for those that are `scored`,
    which are looked at elsewhere. Raises RowError for a message that does not come in there at all and is not the
    assistant's, where `strict`."""
    for i, message in enumerate(there.messages[:first]):
        role = message["role"]
        if role == "assistant" and i not in scored:
            lost = {part.key for part in said(message) if not there.has(i, part)}
            lost |= {part.key for part in called(message) if not there.has(i, part)}
            yield from (
                f"pair with {key} of an assistant's turn that the chat template drops or rewrites" for key in sorted(lost)
            )
        for part in said(message) if role != "assistant" else ():
            if there.has(i, part):
                continue
            if there.shows(i, part):
                yield f"pair with a message ({role}) that the chat template rewrites"
            elif strict:
                reason = f"the chat template does not print this message ({role})"
                reason += " once an answer follows" if first else ""
                fix = MERGE_IT if role in ("system", "developer") else PRINT_IT
                raise RowError(f"{field}[{i}].{part.key}", reason, fix)
            else:
                yield f"pair with a message ({role}) that the chat template does not print"
