"""What every step from a raw row to a preference needs: the types, a row and its place, the error of one, JSON in a cell."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

Message = dict[str, Any]
Text = str | list[Message]
Values = Mapping[str, Any]
Columns = Mapping[str, str | None]
# (source, target): as a tokenizer calls them; None: what it has been set to.
Languages = tuple[str | None, str | None]

# Names under which a conversation is stored.
CONVERSATIONS = ("messages", "conversations", "conversation")
FIELDS = ("prompt", "chosen", "rejected")
# Names under which a system message is.
SYSTEM = ("system", "system_prompt", "system_message")
# Columns of other tools for the answer beside the last one in a conversation.
REJECTED = ("rejected_response", "rejected_messages")
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

    def of(self, key: str) -> RowError:
        """The same error, with the keys of the source at `key` of the YAML, such as data.eval, in its words."""
        if key == "data.train":
            return self
        field, reason, fix = (text.replace("data.train.", f"{key}.") for text in (self.field, self.reason, self.fix))
        return RowError(field, reason, fix, droppable=self.droppable)


class Row(NamedTuple):
    """One raw row. `line`: its line, its element in a JSON array, or its row in parquet and data sets, from 1."""

    values: dict[str, Any]
    file: str
    line: int

    @property
    def where(self) -> str:
        return place_of(self.file, self.line)


class BadRow(NamedTuple):
    """A row that could not be read, with the reason."""

    error: RowError
    file: str
    line: int

    @property
    def where(self) -> str:
        return place_of(self.file, self.line)


def place_of(file: str, line: int) -> str:
    """A place, for messages: names of files may hold anything."""
    return f"{one_line(file)}:{line}"


def kind_of(value: Any) -> str:
    """text; chat, a list or a single message; or other."""
    if isinstance(value, str):
        return "text"
    return "chat" if isinstance(value, list) or is_message(value) else "other"


def is_message(value: Any) -> bool:
    """Whether a value is meant as a message."""
    keys = value.keys() if isinstance(value, dict) else set()
    return bool(keys & {"role", "from"}) and bool(keys & {"content", "value", "tool_calls", "function_call"})


def what_is(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def given(columns: Columns | None) -> dict[str, str]:
    """The columns that the user has named: for prompt, chosen and rejected, otherwise than these."""
    named = {field: name for field, name in (columns or {}).items() if name is not None}
    return {field: name for field, name in named.items() if name != field or field not in FIELDS}


def find(values: Values, name: str) -> tuple[bool, Any]:
    """Whether a column is there, and what it holds; `column.key` is a key of an object, `column.0` one item of a list."""
    if name in values:
        return True, values[name]
    column, dot, key = name.partition(".")
    inner = values.get(column)
    if isinstance(inner, list):
        inner = {str(number): item for number, item in enumerate(inner)}
    return find(inner, key) if dot and isinstance(inner, dict) else (False, None)


def squeezed(text: str | None) -> str:
    """Text with every run of white space as one space, and none at its ends."""
    return " ".join((text or "").split())


def one_system(said: Mapping[str, Any]) -> Any:
    """What some places, by name, all say the system message is; None where none says one. Raises RowError where they say
    different things."""
    there = {name: value for name, value in said.items() if value is not None and value != ""}
    if len({squeezed(value) if isinstance(value, str) else repr(value) for value in there.values()}) > 1:
        names = " and ".join(there)
        raise RowError("system", f"{names} say different things", "name the one that is meant: data.train.columns.system")
    return next(iter(there.values()), None)


def close_name(name: str, values: Values, cutoff: float = 0.6) -> str | None:
    by_folded = {str(column).casefold(): str(column) for column in values if column not in FIELDS}
    close = difflib.get_close_matches(name.casefold(), list(by_folded), n=1, cutoff=cutoff)
    return by_folded[close[0]] if close else None


def missing(field: str, values: Values, name: str) -> RowError:
    """The error of a field whose column `name` is not there."""
    if name in values:
        taken = f"the column {name!r} is another field's by data.train.columns"
        return RowError(field, taken, f"set data.train.columns.{field}")
    close, key = close_name(name, values), f"set data.train.columns.{field}"
    other = f"{key} to a column that is there" if name != field else key
    fix = f"did you mean {close!r}? {key}: {_in_yaml(close)}" if close else other
    return RowError(field, f"no column {name!r} among {sorted(map(str, values))}", fix)


def _in_yaml(name: str) -> str:
    """A name as it may stand in a YAML file."""
    plain = re.fullmatch(r"[^\W\d][\w./-]*( [\w./-]+)*", name) and name.lower() not in ("null", "true", "false", "yes", "no")
    return name if plain else json.dumps(name, ensure_ascii=False)


def parse_json(text: str, place: str, fix: str) -> Any:
    """The value of a JSON text inside a row. Raises RowError."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        fault = next(filter(None, map(unsound, strings(value))), None) if "\\u" in text else None
    except (ValueError, RecursionError) as error:
        raise RowError(place, f"broken JSON: {error}", fix) from None
    if fault:
        raise RowError(place, f"its JSON {fault}", "remove the character")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, names of keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def unsound(text: str) -> str | None:
    """Why a text cannot be used, or None. Escapes can smuggle in what the bytes of a file cannot hold."""
    if "\0" in text:
        return "holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds a lone surrogate (\\u{ord(text[error.start]):04x})"
    return None
