"""A raw row becomes a `Preference`: a prompt, a chosen and a rejected answer.

`normalise` brings the row's fields under their own names first; `FORMATS` is the table of what they may then be. To add
a format, write the function that converts such fields, add one line to the table, and one fixture row to the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dspref.data.image_rows import placed
from dspref.data.messages import behind, is_blank, is_said, is_silent, said_again, says_the_same, stripped
from dspref.data.normalise import Fields, no_pair, normalise
from dspref.data.row_settings import languages_of, template_kwargs_of, tools_of
from dspref.data.row_template import check_template as check_template
from dspref.data.rows import DROP as DROP
from dspref.data.rows import (
    FIELDS,
    Columns,
    Languages,
    Message,
    RowError,
    Text,
    Values,
    given,
    kind_of,
    missing,
    squeezed,
    what_is,
)
from dspref.data.rows import one_line as one_line
from dspref.data.texts import behind_text, shared_start

# Who sets the scene; a prompt is more than that.
SYSTEMS = ("system", "developer")
# Characters of one pair: beyond any model's context, and tokenizing takes about a second for each million.
MAX_CHARACTERS = 2**23
ADD_PROMPT = "add a prompt column, or name it: data.train.columns.prompt"


@dataclass(frozen=True)
class Preference:
    """One pair: three texts, or three message lists. The answers do not repeat the prompt. Of unpaired data, one answer:
    `chosen` and `rejected` are both it, and `label` says which it is."""

    prompt: Text
    chosen: Text
    rejected: Text
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    languages: Languages | None = None
    """Of prompt and answers, for a model that translates."""
    images: tuple[Any, ...] = ()
    """Of the prompt, in order, as the row names them, or as `image_files` found them."""
    label: bool | None = None
    """Of an answer that stands alone: whether it is desirable. None: there are two."""
    repeats: int = field(default=0, compare=False)
    """How many of the two answers repeated the prompt, or its end, in the row."""
    whole: tuple[str, str] | None = field(default=None, compare=False)
    """Of three texts whose answers repeated the prompt, these answers as the row has them."""
    begins: bool | None = field(default=None, compare=False)
    """Of a conversation made of three texts, whether both answers begin with the prompt's in the row; else None."""
    parted: bool = field(default=False, compare=False)
    """And whether white space parts it from what follows."""
    given: Mapping[str, float] = field(default_factory=dict, compare=False)
    """Numbers of the row that are read beside the texts, by `given.NAMES`: they are not what the pair says."""
    unused: tuple[str, ...] = field(default=(), compare=False)
    """What is to be said of columns of the row that are no part of the pair."""


@dataclass(frozen=True)
class Format:
    """A format: does it recognise a row's fields, and the preference in them."""

    recognises: Callable[[Values], bool]
    convert: Callable[[Values], Preference]


def to_preference(
    values: Values,
    columns: Columns | None = None,
    template: Mapping[str, str] | None = None,
    *,
    as_: str | None = None,
    chat_model: bool = False,
    repeated: bool = True,
) -> Preference:
    """Convert one raw row of two answers.

    `columns` maps prompt, chosen, rejected, system, tools, chat_template_kwargs to names in the file; `template` builds
    texts from other columns. `as_`: chat | text, what such texts are; None: chat for a `template` where the tokenizer has
    a chat template (`chat_model`), and for rows with a system message; else text. `repeated`: in a conversation made of
    texts, answers that begin with the prompt's repeat it, and lose it. Raises RowError for a bad row, ConfigError for a bad
    template.
    """
    try:
        fields = normalise(values, columns, template, as_, chat_model, repeated=repeated)
        return pair_of(fields, values, columns)
    except RecursionError:
        raise RowError("row", "nested too deeply", "write a plainer row") from None


def pair_of(fields: Fields, values: Values, columns: Columns | None) -> Preference:
    """The preference in a row's fields; `values` and `columns` are for what is said of fields that do not fit."""
    for layout in FORMATS.values():
        if layout.recognises(fields):
            preference = layout.convert(fields)
            _refuse_without_effect(fields, preference, given(columns))
            preference = _with_system(preference, fields.get("system", ""))
            _check(preference, alone="label" in fields)
            prompt, images = placed(preference.prompt, (preference.chosen, preference.rejected), fields.get("images", ()))
            repeats = preference.repeats + fields.get("repeats", 0)
            more = {
                "prompt": prompt,
                "images": images,
                "tools": tools_of(fields),
                "chat_template_kwargs": template_kwargs_of(fields),
                "languages": languages_of(fields),
                "label": fields.get("label"),
            }
            return replace(
                preference, repeats=repeats, begins=fields.get("begins"), parted=fields.get("parted", False), **more
            )
    raise _why_unrecognised(fields, values, columns)


def with_answer(pair: Preference, answer: Text, field: str) -> Preference:
    """The prompt of a pair, and an answer to it that stands alone, from the column `field`. Raises RowError."""
    alone = replace(pair, chosen=answer, rejected=answer, label=True, repeats=0, whole=None, begins=None, parted=False)
    try:
        _check(alone, alone=True)
    except RowError as error:
        raise RowError(field, error.reason, error.fix) from None
    return alone


def _why_unrecognised(fields: Fields, values: Values, columns: Columns | None) -> RowError:
    """The error for a row that no format fits: the first thing that is wrong with it."""
    named = given(columns)
    no_answers = all(fields.get(name) is None and name not in named for name in ("chosen", "rejected"))
    if no_answers and (what := no_pair(values)):
        fix = (
            "use a set of pairs, or name the columns: data.train.columns.chosen and rejected, or with objective.name: kto "
            "columns.completion and label"
        )
        return RowError("row", f"{what}; chosen and rejected are missing: a pair needs two answers", fix)
    for name in ("chosen", "rejected", "prompt"):
        if name not in fields and name != "prompt":
            return missing(name, values, named.get(name, name))
        value = fields.get(name, "")
        if kind_of(value) == "other":
            return RowError(name, "null" if value is None else f"{what_is(value)}, not text or a message list")
    kinds = ", ".join(f"{name} is {kind_of(fields[name])}" for name in FIELDS if name in fields)
    return RowError("row", f"mixes text and chat: {kinds}", "make prompt, chosen and rejected the same kind")


def _refuse_without_effect(fields: Fields, preference: Preference, named: Mapping[str, str]) -> None:
    """Refuse a column that the user has named and a text has no place for, and a text prompt beside whole conversations
    that do not say it."""
    prompt = fields.get("prompt")
    if isinstance(preference.prompt, str):
        if lost := sorted(named.keys() & {"tools", "chat_template_kwargs"}):
            raise RowError(f"columns.{lost[0]}", "has no effect: the row is text", "drop it, or set data.train.as: chat")
    elif isinstance(prompt, str) and not is_said(prompt, preference.prompt):
        reason = "has no effect: the answers are whole conversations, and it does not stand in them"
        if "prompt" in named:
            raise RowError("columns.prompt", reason, "drop data.train.columns.prompt, or mend the row")
        raise RowError("prompt", reason)


def _with_system(preference: Preference, system: str) -> Preference:
    """The preference with the system message of a column of its own in front."""
    prompt = preference.prompt
    if not system:
        return preference
    if isinstance(prompt, str):  # two texts without a prompt column
        raise RowError("system", "a system message needs a prompt column", ADD_PROMPT)
    if prompt[0]["role"] != "system":
        return replace(preference, prompt=[{"role": "system", "content": system}, *prompt])
    if squeezed(prompt[0].get("content")) != squeezed(system):
        raise RowError("system", "the conversation has another system message", "keep one of them")
    return preference


# ---------------------------------------------------------------------------------------------------- formats


def _shaped(prompt: str | None, answers: str) -> Callable[[Values], bool]:
    """Recognise fields whose prompt (None: no such column) and both answers have these kinds."""
    expected = (prompt, answers, answers)
    return lambda row: tuple(kind_of(row[name]) if name in row else None for name in FIELDS) == expected


def text(row: Values) -> Preference:
    """Three strings; two answers that repeat the prompt lose it."""
    prompt, chosen, rejected = (row[name] for name in FIELDS)
    # One answer alone may begin with the words of its prompt.
    if "label" not in row and (parts := behind_text(prompt, chosen, rejected)) is not None:
        return Preference(*parts, repeats=2, whole=(chosen, rejected))
    return Preference(prompt, chosen, rejected)


def implicit_text(row: Values) -> Preference:
    """Two strings: what they share at the start, in whole words, is the prompt."""
    chosen, rejected = row["chosen"], row["rejected"]
    if "label" in row:
        raise RowError("prompt", "no such column, and one text alone does not say where its answer begins", ADD_PROMPT)
    _refuse_empty(chosen, rejected)
    shared = shared_start(chosen, rejected)
    if not shared:
        raise RowError("prompt", "no such column, and the answers share no text at their start", ADD_PROMPT)
    return Preference(chosen[:shared], chosen[shared:], rejected[shared:])


def chat(row: Values) -> Preference:
    """Three message lists; answers that repeat the prompt, or its end, lose that."""
    prompt, *answers = (row[name] for name in FIELDS)
    opening = [answer[0] for answer in answers]
    if (
        prompt[0]["role"] != "system" == opening[0]["role"]
        and says_the_same(*opening)
        and all(says_the_same(answer[min(1, len(answer) - 1)], prompt[0]) for answer in answers)
    ):
        prompt = [opening[0], *prompt]  # the answers are whole conversations, the prompt lacks the system message
    chosen, rejected = (behind(prompt, answer) for answer in answers)
    if all(message["role"] in SYSTEMS for message in prompt):
        shared = _shared(chosen, rejected)  # a column of the system message alone, and whole conversations
        prompt, chosen, rejected = [*prompt, *chosen[:shared]], chosen[shared:], rejected[shared:]
    size = said_again(prompt, chosen, rejected)
    chosen, rejected = chosen[size:], rejected[size:]
    moved = len(prompt) - len(row["prompt"])
    shorter = [len(chosen) < len(answers[0]) - moved, len(rejected) < len(answers[1]) - moved]
    return Preference(prompt, chosen, rejected, repeats=sum(shorter))


def implicit_chat(row: Values) -> Preference:
    """Two message lists: the messages that they share at the start are the prompt. Of one: those up to the last user's."""
    chosen, rejected = row["chosen"], row["rejected"]
    _refuse_empty(chosen, rejected, alone="label" in row)
    shared = behind_last_user(chosen) if "label" in row else _shared(chosen, rejected)
    if not shared:
        raise RowError("prompt", "no such column, and the answers share no first message", ADD_PROMPT)
    return Preference(chosen[:shared], chosen[shared:], rejected[shared:])


def chat_with_text_prompt(row: Values) -> Preference:
    """UltraFeedback: a string, and message lists that are the whole conversation or the answer alone."""
    chosen, rejected = row["chosen"], row["rejected"]
    _refuse_empty(chosen, rejected, alone="label" in row)
    if "assistant" not in (chosen[0]["role"], rejected[0]["role"]) and _shared(chosen, rejected):
        return implicit_chat(row)
    if not row["prompt"].strip():
        raise RowError("prompt", "empty")
    return chat({**row, "prompt": [{"role": "user", "content": row["prompt"]}]})


FORMATS: dict[str, Format] = {
    "text": Format(_shaped("text", "text"), text),
    "implicit_text": Format(_shaped(None, "text"), implicit_text),
    "chat": Format(_shaped("chat", "chat"), chat),
    "implicit_chat": Format(_shaped(None, "chat"), implicit_chat),
    "chat_with_text_prompt": Format(_shaped("text", "chat"), chat_with_text_prompt),
}


def behind_last_user(messages: list[Message]) -> int:
    """How many messages stand before the answer of a whole conversation: all up to its last user's."""
    return max((i + 1 for i, message in enumerate(messages) if message["role"] == "user"), default=0)


def _shared(left: list[Message], right: list[Message]) -> int:
    """How many leading messages say the same, leaving both sides at least one."""
    limit = min(len(left), len(right)) - 1
    return next((i for i in range(limit) if not says_the_same(left[i], right[i])), max(limit, 0))


# -------------------------------------------------------------------------------------------- checks of a pair


def _check(preference: Preference, alone: bool) -> None:
    """Refuse a pair that could not teach anything, or whose answers do not follow the prompt."""
    _refuse_empty(preference.chosen, preference.rejected, alone)
    if not isinstance(preference.prompt, str):
        for name in ("chosen", "rejected"):
            _check_conversation(preference.prompt, getattr(preference, name), name)


def _check_conversation(prompt: list[Message], answer: list[Message], name: str) -> None:
    """Whether a user's turn stands twice, and the assistant says something. Roles are for the template to judge."""
    first = next((i for i, message in enumerate(answer) if message["role"] == "assistant"), None)
    if first is None:
        raise RowError(name, "no assistant message in the answer")
    if first and all(message["role"] in SYSTEMS for message in prompt):
        reason = "nothing but a system message, and the answers begin with other messages, which are no part of an answer"
        raise RowError("prompt", reason, "write what both answers follow into the prompt")
    if len(answer) > 1:
        for i, message in enumerate(answer):
            if message["role"] == "assistant" and is_silent(message):
                raise RowError(f"{name}[{i}]", "empty answer: the model would learn to end its turn at once")
    if prompt[-1]["role"] != "user":
        return
    twice = next((i for i, message in enumerate(answer[:first]) if says_the_same(message, prompt[-1])), None)
    if twice is not None:
        raise RowError(f"{name}[{twice}]", "repeats the user message that the prompt ends with", "keep it in one of them")
    if answer[0]["role"] == "user":
        reason = "a user message right behind the prompt's, which ends with one"
        raise RowError(f"{name}[0]", reason, "begin the answer with the assistant's message")


def _refuse_empty(chosen: Text, rejected: Text, alone: bool = False) -> None:
    """Refuse blank answers, and equal ones but where one stands `alone`."""
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if is_blank(answer):
            raise RowError(name, "empty answer (nothing but white space)" if answer else "empty answer")
    if alone:
        return
    if chosen == rejected:
        raise RowError("rejected", "identical to chosen")
    if stripped(chosen) == stripped(rejected):
        raise RowError("rejected", "identical to chosen but for white space at the ends")


def within_reason(preference: Preference | RowError) -> Preference | RowError:
    """The pair, or an error where it is too much text for any model."""
    if isinstance(preference, RowError):
        return preference
    for name in FIELDS:
        if (size := _characters(getattr(preference, name))) > MAX_CHARACTERS:
            return RowError(name, f"{size:,} characters, more than the {MAX_CHARACTERS:,} that are read", "cut the text")
    return preference


def _characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(message.get("content") or "") for message in text)
