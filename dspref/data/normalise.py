"""The step in front of the formats: whatever layout a row has, its fields under their own names.

Columns are renamed, conversations written as JSON text are read, `messages` and `conversations` become a prompt (and the
chosen answer, where there is only a rejected one beside them), single messages become lists, text answers behind a
conversation become messages. A key of the source that would have no effect on a row is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from json import JSONDecodeError, JSONDecoder
from typing import Any, cast

from dspref.data.given import NAMES
from dspref.data.image_rows import column_of
from dspref.data.messages import answer_of, is_said, messages_of, says_the_same, system_text, unwrapped
from dspref.data.row_template import fill
from dspref.data.rows import (
    CONVERSATIONS,
    FIELDS,
    REJECTED,
    SYSTEM,
    Columns,
    Message,
    RowError,
    Values,
    close_name,
    find,
    given,
    is_message,
    kind_of,
    missing,
    one_system,
    parse_json,
)
from dspref.data.texts import begun_anew, behind_text

Fields = dict[str, Any]

# Columns that are read where they are named, and by no name of their own.
LANGUAGES = ("source_language", "target_language")
OPTIONAL_FIELDS = ("tools", "chat_template_kwargs")
ANSWERS = ("chosen", "rejected")
# Columns that hold a prompt elsewhere: where one is there, what two texts share at their start is not the prompt.
PROMPT_LIKE = ("instruction", "question", "query", "input", "context", "problem", *CONVERSATIONS)
# The start of a conversation in JSON, or in Python's writing.
MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|from|content|value)["']\s*:""")
OBJECTS = re.compile(r"""\s*(\[\s*)?\{\s*["']""")
OF_BOTH = "make the prompt of both by data.train.template"
WRITE_CONVERSATION = "write it with json.dumps, or set data.train.as: text if text is meant"


def normalise(
    values: Values,
    columns: Columns | None = None,
    template: Mapping[str, str] | None = None,
    as_: str | None = None,
    chat_model: bool = False,
    ranked: bool = False,
    repeated: bool = True,
) -> Fields:
    """The fields of a row: prompt, chosen and rejected (not in a `ranked` row, whose answers come later), tools,
    chat_template_kwargs, images, a list, and `system`, a text. `as_` (chat | text, or None) says what texts are;
    `chat_model`, whether the tokenizer has a chat template; `repeated`, whether two answers that begin with the prompt's
    text lose it in a conversation that is made of texts. Raises RowError."""
    named = given(columns)
    fields = (*OPTIONAL_FIELDS, *LANGUAGES, *(() if template else ("system", *(FIELDS[:1] if ranked else FIELDS))))
    row = _renamed(values, named, fields)
    images = column_of(values, named)
    if template:
        _refuse_columns(named)
        row |= fill(template, values)
    else:
        row = _opened(_with_conversations(row) if as_ != "text" else row)
        if as_ != "text":
            row = without_null_prompt(row, named)
        row = _with_history(row, values, named, ranked)
        _refuse_implied(row, values, named)
        _refuse_lost(row, values, named)
    # A source speaks one way: where some rows have a system message, those without one are conversations too.
    speaks = "system" in row or ((template is not None or "images" in images) and chat_model)
    system = system_text(row.pop("system", None))
    row = _spoken(row, as_ or ("chat" if speaks else None), system, ranked, repeated)
    return row | images | ({"system": system} if system else {})


def _refuse_columns(named: Mapping[str, str]) -> None:
    if unread := sorted(set(named) - {*OPTIONAL_FIELDS, *LANGUAGES, "images", *NAMES}):
        raise RowError(f"columns.{unread[0]}", "has no effect beside template, which makes the texts", "drop one of them")


def _renamed(values: Values, named: Mapping[str, str], fields: tuple[str, ...]) -> Fields:
    """These fields under their own names. Raises RowError when a column that was named is not there."""
    taken = set(named.values())
    row: Fields = {}
    for field in fields:
        name = named.get(field, field)
        if field not in named and (name in taken or field in LANGUAGES):
            continue  # the column is another field's
        there, value = find(values, name) if field in named else (name in values, values.get(name))
        if there:
            row[field] = value
        # A misspelt prompt column would silently turn the row into one with an implicit prompt.
        elif field in named or (field == "prompt" and close_name(name, values, cutoff=0.85) is not None):
            raise missing(field, values, name)
    if "system" in fields and "system" not in named:
        row |= _system_column(values, taken)
    return row


def _system_column(values: Values, taken: set[str]) -> Fields:
    """The system message of a row, whichever column of that meaning has it."""
    there = {name: values[name] for name in SYSTEM if name in values and name not in taken}
    return {"system": one_system(there)} if there else {}


def without_null_prompt(row: Fields, named: Mapping[str, str]) -> Fields:
    """The row without a prompt that is null beside whole conversations: Arrow gives a row the columns of others."""
    null = "prompt" not in named and row.get("prompt", "") in (None, [])
    if not null or not all(_is_whole(row.get(field)) for field in ANSWERS):
        return row
    return {field: value for field, value in row.items() if field != "prompt"}


def _is_whole(answer: Any) -> bool:
    """Whether an answer is a conversation with its prompt."""
    opening = answer[0] if isinstance(answer, list) and answer else None
    try:
        return is_message(opening) and messages_of([opening], "answer")[0]["role"] != "assistant"
    except RowError:
        return False


# ------------------------------------------------------------------------------------- conversations as JSON text


def _with_conversations(row: Fields) -> Fields:
    """The row with conversations that are JSON text, as a cell of a CSV file has them, as what they are."""
    read = {field: conversation_in(row[field], field) if field in row else None for field in FIELDS}
    kinds = {field: kind_of(unwrapped(read[field])) for field in FIELDS if field in row}
    if kinds.get("prompt") != "chat" and len({kinds[field] for field in ANSWERS if field in row}) > 1:
        read |= {field: row.get(field) for field in ANSWERS}  # one answer happens to look like it
    return row | {field: read[field] for field in FIELDS if field in row}


def conversation_in(value: Any, field: str) -> Any:
    """The conversation that a text is JSON of, or the object that holds it; anything else as it is."""
    if not isinstance(value, str) or not OBJECTS.match(value):
        return value
    try:
        found, end = JSONDecoder().raw_decode(value, len(value) - len(value.lstrip()))
    except (JSONDecodeError, ValueError, RecursionError):
        if not MESSAGES.match(value):
            return value
        raise RowError(field, "looks like a conversation, and is broken JSON", WRITE_CONVERSATION) from None
    whole = unwrapped(found)
    messages = [whole] if isinstance(whole, dict) else whole
    if value[end:].strip() or not all(map(is_message, messages)):
        return value  # a text that begins with an example, or other JSON
    return parse_json(value, field, WRITE_CONVERSATION)


def _opened(row: Fields) -> Fields:
    """The row with conversations that lie in objects taken out of these, and what lies beside them there."""
    for field in FIELDS:
        if field in row:
            row = _beside(row[field], field, row) | {field: unwrapped(row[field])}
    return row


def _beside(holder: Any, field: str, row: Fields) -> Fields:
    """The row with the tools and settings that an object around a conversation holds, as OpenAI writes them."""
    if not isinstance(holder, dict) or unwrapped(holder) is holder:
        return row
    own = {name: holder[name] for name in OPTIONAL_FIELDS if holder.get(name)}
    if other := next((name for name in own if row.get(name) and row[name] != own[name]), None):
        raise RowError(f"{field}.{other}", f"the row has other {other}", "keep one of them")
    return row | own


# ------------------------------------------------------------------------------------------ conversations as columns


def _with_history(row: Fields, values: Values, named: Mapping[str, str], ranked: bool) -> Fields:
    """The row with a prompt from `messages` or the like, where it has none of its own; and where only the rejected answer
    is given beside them, with the last message as the chosen one."""
    name = next((name for name in CONVERSATIONS if values.get(name) is not None and name not in named.values()), None)
    asked, chosen = row.get("prompt"), row.get("chosen")
    if name is None or (asked is None and "prompt" in named):
        return row
    holder = conversation_in(values[name], name)
    history = unwrapped(holder)
    if kind_of(history) != "chat":
        return row
    other = next((column for column in REJECTED if values.get(column) is not None and column not in named.values()), None)
    rejected = row.get("rejected")
    if rejected is None and other:
        rejected = unwrapped(conversation_in(values[other], other))
    both = chosen is not None and rejected is not None
    complete = ranked or both
    if complete and asked is not None:
        return row | ({"rejected": rejected} if both else {})
    if not complete and (rejected is None or chosen is not None or "chosen" in named):
        return row
    if both and isinstance(history, list) and not all(map(is_message, history)) and all(map(_is_whole, (chosen, rejected))):
        return row  # a column of another kind, beside whole conversations
    messages, row = messages_of(history, name), _beside(holder, name, row)
    if complete:
        return row | ({"prompt": messages} if ranked else _before_answers(messages, chosen, rejected))
    if other is None and messages[-1]["role"] != "assistant":
        return row  # the chosen answer is missing
    made = _beside_the_last(messages, rejected, name, other or "rejected")
    if asked and "prompt" in made and not is_said(asked, made["prompt"]):
        raise RowError("prompt", f"says other things than {name}", f"drop it, or write it into {name}")
    return {field: value for field, value in row.items() if field != "prompt" or asked} | made


def _before_answers(messages: list[dict[str, Any]], chosen: Any, rejected: Any) -> Fields:
    """A conversation before two answers. It may be a chosen conversation that stands in the row twice."""
    answer = answer_of(chosen, "chosen", messages)
    ended = messages[-1]["role"] == "assistant"
    if ended and isinstance(chosen, list | dict) and says_the_same(cast(Message, answer[0]), messages[0]):
        return {"rejected": rejected}  # the answers are whole conversations
    if ended and len(messages) > 1 and says_the_same(cast(Message, answer[0]), messages[-1]):
        messages = messages[:-1]
    return {"prompt": messages, "rejected": rejected}


def _refuse_implied(row: Fields, values: Values, named: Mapping[str, str]) -> None:
    """Two texts without a prompt, beside a column that is called like one: it would be lost without a word."""
    if "prompt" in row or not all(kind_of(row.get(field)) == "text" for field in ANSWERS):
        return
    name = next((name for name in PROMPT_LIKE if values.get(name) and name not in named.values()), None)
    if name:
        both = name == "instruction" and values.get("input")
        fix = OF_BOTH if both else f"set data.train.columns.prompt: {name}"
        raise RowError("prompt", f"no such column, and {name!r} may be meant", fix)


def _refuse_lost(row: Fields, values: Values, named: Mapping[str, str]) -> None:
    """Columns that belong to a text prompt in the layout of Alpaca, and would not be in it."""
    if kind_of(row.get("prompt")) != "text":
        return
    if named.get("prompt") == "instruction" and "input" not in named.values() and values.get("input"):
        raise RowError("input", "belongs to the instruction, and would not be in the prompt", OF_BOTH)
    if isinstance(values.get("history"), list) and values["history"] and "history" not in named.values():
        raise RowError("history", "earlier turns, which would not be in the prompt", "write the conversation as messages")


def _beside_the_last(messages: list[dict[str, Any]], rejected: Any, name: str, other: str) -> Fields:
    """ms-swift: the conversation with its chosen answer, and beside it the rejected one: a text or message in the place of
    the last message, messages in the place of all that follows the last user's, or the other conversation whole."""
    if other == "rejected_messages":
        return {"chosen": messages, "rejected": messages_of(rejected, other)}
    if messages[-1]["role"] != "assistant":
        reason = "not an assistant's, and is to be the chosen answer"
        raise RowError(f"{name}[{len(messages) - 1}]", reason, f"end {name} on the chosen answer")
    start = len(messages) - 1
    if isinstance(rejected, list):
        start = max((i + 1 for i, message in enumerate(messages) if message["role"] == "user"), default=start)
    if not start:
        raise RowError(name, "no message before the answer", "begin it with the prompt")
    return {"prompt": messages[:start], "chosen": messages[start:], "rejected": answer_of(rejected, other, messages)}


# ------------------------------------------------------------------------------------------------- text or chat


def _spoken(row: Fields, as_: str | None, system: str, ranked: bool, repeated: bool) -> Fields:
    """The row with all of a conversation in messages, and texts made one where that is asked for."""
    kinds = {kind_of(row[field]) for field in FIELDS if field in row}
    if as_ == "text" and "chat" in kinds:
        raise RowError("as", "the row is a conversation, and as: text has no effect on it", "drop data.train.as")
    if as_ == "text" and system:
        fix = "set data.train.as: chat, or write it into the text by data.train.template"
        raise RowError("system", "a text has no place for a system message", fix)
    texts = kinds == {"text"} if not ranked else kind_of(row.get("prompt")) == "text"
    if texts and as_ == "chat":
        if "prompt" not in row:
            raise RowError("prompt", "no such column, and a conversation needs one", "name it: data.train.columns.prompt")
        if not row["prompt"].strip():
            raise RowError("prompt", "empty")
        if row.keys() >= set(ANSWERS):
            row = row | _begun(row["prompt"], row["chosen"], row["rejected"], repeated)
        row = row | {"prompt": [{"role": "user", "content": row["prompt"]}]}
    if kind_of(row.get("prompt")) == "chat":
        row = row | {"prompt": messages_of(row["prompt"], "prompt")}
    lists = "chat" in {kind_of(row.get(field)) for field in FIELDS}
    return row | {field: answer_of(row[field], field, row.get("prompt")) for field in ANSWERS if field in row and lists}


def _begun(prompt: str, chosen: str, rejected: str, repeated: bool) -> Fields:
    """Whether two answers `begin` with the text of the prompt, and where that is `repeated`, the texts without it."""
    parts = behind_text(prompt, chosen, rejected)
    parted = parts is not None and (parts[0][-1:].isspace() or all(text[:1].isspace() for text in parts[1:]))
    if parts is None or not repeated:
        return {"begins": parts is not None, "parted": parted}
    chosen, rejected = map(begun_anew, parts[1:])
    return {"prompt": parts[0], "chosen": chosen, "rejected": rejected, "repeats": 2, "begins": True, "parted": parted}


# --------------------------------------------------------------------------------------------- rows that are no pair


def no_pair(values: Values) -> str | None:
    """What a row without chosen and rejected is, where it is something else that is well known."""
    keys = {name for name, value in values.items() if value is not None}
    history = next((name for name in CONVERSATIONS if name in keys), None)
    if keys & {"label", "kto_tag"} and keys & {"completion", "response", "output", *CONVERSATIONS}:
        return "a KTO row (one answer and a label)"
    if keys & {"instruction", "input"} and keys & {"output", "response"}:
        return "an Alpaca row (an instruction and one answer)"
    if history and isinstance(values[history], list):
        sharegpt = any(isinstance(message, dict) and "from" in message for message in values[history])
        return f"a {'ShareGPT row' if sharegpt else 'chat row'} ({history}: one conversation, one answer)"
    if keys & {"prompt", "question", "query"} and keys & {"completion", "response", "answer", "output"}:
        return "a row for supervised training (a prompt and one answer)"
    return None
