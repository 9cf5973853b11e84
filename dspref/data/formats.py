"""A raw row becomes a `Preference`: a prompt, a chosen and a rejected answer.

`FORMATS` is the table of layouts that are understood. To add one, write the function that converts a row, add
one line to the table, and one fixture row to the tests.
"""

from __future__ import annotations

import difflib
import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from dspref.errors import ConfigError

Message = dict[str, Any]
Text = str | list[Message]
Values = Mapping[str, Any]
Columns = Mapping[str, str]

FIELDS = ("prompt", "chosen", "rejected")
OPTIONAL_FIELDS = ("tools", "chat_template_kwargs")
TEMPLATE_KEYS = ("system", *FIELDS)
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SYSTEM_ROLES = ("system", "developer")
ADD_PROMPT = "add a prompt column, or set data.columns.prompt"
DROP = "mend the row, or set data.on_bad_row: drop"


def one_line(text: object, limit: int = 300) -> str:
    """Text from data or from another library, safe to print: one line, printable, not endless."""
    flat = " ".join(str(text).split())
    printable = "".join(character if character.isprintable() else "?" for character in flat)
    return printable if len(printable) <= limit else printable[: limit - 3] + "..."


class RowError(ValueError):
    """One row cannot be used: which field, why, and how to mend it.

    `droppable` marks a pair that training leaves out by design, even where bad rows are errors.
    """

    def __init__(self, field: str, reason: str, fix: str = DROP, *, droppable: bool = False) -> None:
        self.field, self.reason, self.fix = one_line(field, 100), one_line(reason), one_line(fix)
        self.droppable = droppable
        super().__init__(f"{self.field}: {self.reason}; fix: {self.fix}")


@dataclass(frozen=True)
class Preference:
    """One pair: three texts, or three message lists. The answers do not repeat the prompt."""

    prompt: Text
    chosen: Text
    rejected: Text
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Format:
    """A layout: does it recognise a row (columns already renamed), and the preference in such a row."""

    recognises: Callable[[Values], bool]
    convert: Callable[[Values], Preference]


def to_preference(
    values: Values,
    columns: Columns | None = None,
    template: Mapping[str, str] | None = None,
) -> Preference:
    """Convert one raw row.

    `columns` maps prompt, chosen, rejected, tools, chat_template_kwargs to names in the file; `template`
    builds the fields from other columns. Raises RowError for a bad row, ConfigError for a bad template.
    """
    columns = columns or {}
    row = {
        **values,
        **_renamed(values, columns, OPTIONAL_FIELDS if template else (*FIELDS, *OPTIONAL_FIELDS)),
    }
    if template:
        row |= _fill(template, values)
    for layout in FORMATS.values():
        if layout.recognises(row):
            preference = layout.convert(row)
            _check(preference)
            return replace(preference, tools=_tools(row), chat_template_kwargs=_template_kwargs(row))
    raise _why_unrecognised(row, values, columns)


def _renamed(values: Values, columns: Columns, fields: Sequence[str]) -> dict[str, Any]:
    """These fields under their own names. Raises RowError when `columns` names a column that is not there."""
    names = {field: columns.get(field, field) for field in fields}
    for field, name in names.items():
        if name in values:
            continue
        # A misspelt prompt column would silently turn the row into one with an implicit prompt.
        if name != field or (field == "prompt" and close_name(name, values, cutoff=0.85) is not None):
            raise _missing(field, values, name)
    return {field: values[name] for field, name in names.items() if name in values}


def close_name(name: str, values: Values, cutoff: float = 0.6) -> str | None:
    by_folded = {column.casefold(): column for column in values if column not in FIELDS}
    close = difflib.get_close_matches(name.casefold(), list(by_folded), n=1, cutoff=cutoff)
    return by_folded[close[0]] if close else None


def _missing(field: str, values: Values, name: str) -> RowError:
    close, key = close_name(name, values), f"set data.columns.{field}"
    fix = f"did you mean {close!r}? {key}: {close}" if close else key
    return RowError(field, f"no column {name!r} among {sorted(values)}", fix)


def _why_unrecognised(row: Values, values: Values, columns: Columns) -> RowError:
    """The error for a row that no format fits: the first thing that is wrong with it."""
    for field in ("chosen", "rejected", "prompt"):
        if field not in row and field != "prompt":
            return _missing(field, values, columns.get(field, field))
        value = row.get(field, "")
        if kind_of(value) == "other":
            reason = "null" if value is None else f"{type(value).__name__}, not text or a message list"
            return RowError(field, reason)
    kinds = ", ".join(f"{field} is {kind_of(row[field])}" for field in FIELDS if field in row)
    return RowError("row", f"mixes text and chat: {kinds}", "make prompt, chosen and rejected the same kind")


def kind_of(value: Any) -> str:
    return "text" if isinstance(value, str) else "chat" if isinstance(value, list) else "other"


# ---------------------------------------------------------------------------------------------------- formats


def _shaped(prompt: str | None, answers: str) -> Callable[[Values], bool]:
    """Recognise rows whose prompt (None: no such column) and both answers have these kinds."""
    expected = (prompt, answers, answers)
    return lambda row: tuple(kind_of(row[field]) if field in row else None for field in FIELDS) == expected


def text(row: Values) -> Preference:
    """Three strings."""
    return Preference(row["prompt"], row["chosen"], row["rejected"])


def implicit_text(row: Values) -> Preference:
    """Two strings: what they share at the start, less one space at its end, is the prompt."""
    chosen, rejected = row["chosen"], row["rejected"]
    _refuse_empty(chosen, rejected)
    shared = _shared(chosen, rejected)
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    if not shared:
        raise RowError("prompt", "no such column, and the answers share no text at their start", ADD_PROMPT)
    return Preference(chosen[:shared], chosen[shared:], rejected[shared:])


def chat(row: Values) -> Preference:
    """Three message lists; answers that repeat the whole prompt lose it."""
    prompt, chosen, rejected = (messages_of(row[field], field) for field in FIELDS)
    size = len(prompt)
    if chosen[:size] == prompt == rejected[:size]:
        chosen, rejected = chosen[size:], rejected[size:]
    return Preference(prompt, chosen, rejected)


def implicit_chat(row: Values) -> Preference:
    """Two message lists: the messages that they share at the start are the prompt."""
    chosen, rejected = (messages_of(row[field], field) for field in ("chosen", "rejected"))
    _refuse_empty(chosen, rejected)
    shared = _shared(chosen, rejected)
    if not shared:
        raise RowError("prompt", "no such column, and the answers share no first message", ADD_PROMPT)
    return Preference(chosen[:shared], chosen[shared:], rejected[shared:])


def chat_with_text_prompt(row: Values) -> Preference:
    """UltraFeedback: a string, and message lists that are the whole conversation or the answer alone."""
    chosen, rejected = (messages_of(row[field], field) for field in ("chosen", "rejected"))
    _refuse_empty(chosen, rejected)
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        return implicit_chat(row)
    if not row["prompt"].strip():
        raise RowError("prompt", "empty")
    return Preference([{"role": "user", "content": row["prompt"]}], chosen, rejected)


FORMATS: dict[str, Format] = {
    "text": Format(_shaped("text", "text"), text),
    "implicit_text": Format(_shaped(None, "text"), implicit_text),
    "chat": Format(_shaped("chat", "chat"), chat),
    "implicit_chat": Format(_shaped(None, "chat"), implicit_chat),
    "chat_with_text_prompt": Format(_shaped("text", "chat"), chat_with_text_prompt),
}


def _shared(left: str | list[Message], right: str | list[Message]) -> int:
    """How many leading items are equal, leaving both sides at least one."""
    limit = min(len(left), len(right)) - 1
    return next((i for i in range(limit) if left[i] != right[i]), max(limit, 0))


# -------------------------------------------------------------------------------------------- checks of a row


def messages_of(value: list[Any], field: str) -> list[Message]:
    """The messages of one field, without keys that are null, which Arrow adds. Raises RowError."""
    if not value:
        raise RowError(field, "empty message list")
    return [_message(item, f"{field}[{index}]") for index, item in enumerate(value)]


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, dict):
        raise RowError(place, f"{type(item).__name__}, not a message", 'write {"role": ..., "content": ...}')
    message = {key: value for key, value in item.items() if value is not None or key == "content"}
    role = message.get("role")
    if role is None:
        raise RowError(f"{place}.role", "missing", f"set one of {', '.join(ROLES)}")
    if role not in ROLES:
        raise RowError(f"{place}.role", f"unknown role {role!r}", f"use one of {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        reason = "null without tool_calls" if "content" in message else "missing"
        raise RowError(f"{place}.content", reason, "write the text of the message")
    if content is not None and not isinstance(content, str):
        raise RowError(f"{place}.content", f"{type(content).__name__}, not text", "write the message's text")
    return message


def _check(preference: Preference) -> None:
    """Refuse a pair that could not teach anything, or whose messages are out of order."""
    _refuse_empty(preference.chosen, preference.rejected)
    if not isinstance(preference.prompt, str):
        for field in ("chosen", "rejected"):
            _check_conversation(preference.prompt, getattr(preference, field), field)


def _check_conversation(prompt: list[Message], answer: list[Message], field: str) -> None:
    systems = [i for i, message in enumerate(prompt + answer) if message["role"] in SYSTEM_ROLES]
    place = field if systems and systems[-1] >= len(prompt) else "prompt"
    if len(systems) > 1:
        raise RowError(place, "two system messages", "keep one, as first message")
    if systems and systems[0] > 0:
        raise RowError(place, "system message is not first", "move it to the front")
    if not any(message["role"] == "assistant" for message in answer):
        raise RowError(field, "no assistant message in the answer")


def _refuse_empty(chosen: Text, rejected: Text) -> None:
    for field, answer in (("chosen", chosen), ("rejected", rejected)):
        if is_blank(answer):
            raise RowError(field, "empty answer (nothing but white space)" if answer else "empty answer")
    if chosen == rejected:
        raise RowError("rejected", "identical to chosen")
    if stripped(chosen) == stripped(rejected):
        raise RowError("rejected", "identical to chosen but for white space at the ends")


def is_blank(answer: Text) -> bool:
    if isinstance(answer, str):
        return not answer.strip()
    return not any((message.get("content") or "").strip() or message.get("tool_calls") for message in answer)


def stripped(answer: Text) -> Text:
    if isinstance(answer, str):
        return answer.strip()
    return [message | {"content": (message.get("content") or "").strip()} for message in answer]


def _tools(row: Values) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise RowError("tools", f"broken JSON: {error}", "write a JSON list of tools") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError("tools", "not a list of objects", "write a JSON list of tools")
    return tools or None


def _template_kwargs(row: Values) -> dict[str, Any] | None:
    kwargs = row.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise RowError("chat_template_kwargs", "not an object", "write a JSON object")
    return kwargs or None


# -------------------------------------------------------------------------------------------------- templates


def check_template(template: Mapping[str, str]) -> None:
    """Raise ConfigError for unknown or missing keys, and for anything but plain {column} fields."""
    unknown = sorted(set(template) - set(TEMPLATE_KEYS))
    missing = [key for key in ("chosen", "rejected") if key not in template]
    if unknown:
        raise ConfigError(f"data.template.{unknown[0]}: unknown key; fix: use {', '.join(TEMPLATE_KEYS)}")
    if "system" in template and "prompt" not in template:
        missing.append("prompt")
    if missing:
        raise ConfigError(f"data.template.{missing[0]}: missing; fix: give it a text with {{column}} fields")
    for key, text_ in template.items():
        _parse_template(key, text_)


@lru_cache(maxsize=64)
def _parse_template(key: str, text_: str) -> tuple[tuple[str, str | None], ...]:
    """(literal, column or None) pieces. Not str.format, which would reach attributes of the values."""
    where, fix = f"data.template.{key}", "use {column}, and {{ or }} for a brace"
    try:
        pieces = list(string.Formatter().parse(text_))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}; fix: {fix}") from None
    for _, name, spec, conversion in pieces:
        if name is not None and (not name or name.isdigit() or set(name) & set(".[]") or spec or conversion):
            raise ConfigError(f"{where}: {one_line(name)!r} is not a plain column field; fix: {fix}")
    return tuple((literal, name) for literal, name, _, _ in pieces)


def _fill(template: Mapping[str, str], values: Values) -> dict[str, Any]:
    """The fields of a templated row: text, or chat when the template has a system message."""
    check_template(template)
    filled = {key: "".join(map(str, _pieces(key, text_, values))) for key, text_ in template.items()}
    if "system" not in filled:
        return filled
    system = {"role": "system", "content": filled["system"]}
    answers = {field: [{"role": "assistant", "content": filled[field]}] for field in ("chosen", "rejected")}
    return {"prompt": [system, {"role": "user", "content": filled["prompt"]}], **answers}


def _pieces(key: str, text_: str, values: Values) -> list[str | int | float]:
    pieces: list[str | int | float] = []
    for literal, name in _parse_template(key, text_):
        pieces.append(literal)
        if name is None:
            continue
        if name not in values:
            raise RowError(key, f"its template's column {name!r} is missing", f"use one of {sorted(values)}")
        value = values[name]
        if not isinstance(value, str | int | float):
            reason = "null" if value is None else f"{type(value).__name__}, not text"
            raise RowError(name, f"{reason}; the template of {key} needs it")
        pieces.append(value)
    return pieces
