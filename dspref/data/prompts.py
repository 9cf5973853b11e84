"""A file of prompts without answers -> the tokens that a model is asked with, as training would render them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dspref import reading
from dspref.data.apart import asked, start_of
from dspref.data.complaints import Complaints
from dspref.data.formats import to_preference
from dspref.data.image_files import NOTHING, Shown, folder_of, look_at
from dspref.data.image_rows import COLUMNS, VIDEOS
from dspref.data.manners import Learned
from dspref.data.normalise import LANGUAGES
from dspref.data.pieces import Encoder
from dspref.data.rowfiles import rows_of
from dspref.data.rows import DROP, BadRow, Row, RowError, close_name, kind_of
from dspref.data.splits import SUFFIXES, unusable
from dspref.data.template import Rendering, render
from dspref.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEND = "mend the row"
SPEAK = "in a .jsonl file, give each row source_language and target_language, by the codes of the tokenizer"
# What stands in for the answers that such a row has not: a prompt is rendered as the first part of a pair.
ANSWERS = ("a", "b")
# Columns beside `prompt` that are read as in pairs.
KEPT = ("system", "tools", "chat_template_kwargs", *LANGUAGES, *COLUMNS, *VIDEOS)


class OwnPrompt(NamedTuple):
    """`ids`: what the model reads; `chosen`: an answer that stands beside the prompt; `where`: its file and line; `begins`:
    what the decoder of an encoder-decoder model reads before its answer."""

    ids: list[int]
    chosen: str | None
    where: str
    begins: list[int] | None = None
    shown: Shown = NOTHING
    """Its images."""


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[OwnPrompt]:
    """The prompts of a file: rows with `prompt`, a text or messages (`system`, `tools` and `chat_template_kwargs` as in
    pairs, languages for a model that translates, images for one that reads them), or else a prompt in each line. A text is
    what a user says, where the tokenizer has a chat template.

    Raises DataError, a line for each reason why some are none.
    """
    learned, encoder = Learned(tokenizer), Encoder(tokenizer)
    found, complaints = [], Complaints()
    for row in _rows(path):
        try:
            if isinstance(row, BadRow):
                raise row.error
            pair = _as_pair(row.values, tokenizer)
            spoken = {name: name for name in LANGUAGES if name in pair}
            preference, folder = to_preference(pair, spoken), folder_of(row.file)
            if encoder.sight is not None:
                preference = replace(preference, images=look_at(preference.images, folder))
            rendering = render(preference, tokenizer, learned)
            if isinstance(rendering, RowError):
                raise rendering
            begins = None
            if encoder.start is not None:
                ids, begins = asked(rendering, tokenizer, encoder.start)
            else:
                ids = _ids(rendering, encoder)
            shown = Shown(rendering.images, str(folder), row.where)
            found.append(OwnPrompt(ids, _said(row.values), row.where, begins, shown))
        except RowError as error:
            fix = SPEAK if error.field in LANGUAGES else MEND if error.fix == DROP else error.fix
            complaints.note(row, RowError(error.field, error.reason, fix))
    if complaints.count:
        raise DataError(complaints.lines())
    if not found:
        raise unusable(path, "the file holds no prompt", "write at least one")
    return found


def _rows(path: Path) -> Iterator[Row | BadRow]:
    if path.name.lower().endswith(SUFFIXES):
        yield from rows_of(path)
        return
    try:
        text = reading.read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise unusable(path, reading.words(error), "give a text file, or rows in a .jsonl file") from None
    if text.lstrip("\ufeff \t\r\n").startswith('{"'):
        raise unusable(path, "its lines are rows of JSON", "name it .jsonl")
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        if line.strip():
            yield Row({"prompt": line.strip()}, str(path), number)


def _as_pair(values: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A row with answers, as rows of pairs have them."""
    prompt = values.get("prompt")
    empty = prompt == [] or (isinstance(prompt, str) and not prompt.strip())
    if kind_of(prompt) == "other" or empty:
        near = close_name("prompt", values) if "prompt" not in values else None
        kind = "is empty" if empty else "is null" if prompt is None else "is no text, and no list of messages"
        reason = kind if "prompt" in values else "is missing"
        raise RowError("prompt", reason, f"rename {near} to prompt" if near else "write a text, or a list of messages")
    kept = {key: values[key] for key in KEPT if values.get(key) is not None}
    if isinstance(prompt, str) and (tokenizer.chat_template is None or start_of(tokenizer) is not None):
        return {**kept, "prompt": prompt, **dict(zip(("chosen", "rejected"), ANSWERS))}
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in ANSWERS)
    return {**kept, "prompt": turns, "chosen": chosen, "rejected": rejected}


def _ids(rendering: Rendering, encoder: Encoder) -> list[int]:
    ids = encoder([rendering.prompt], rendering.special)[0]
    if not len(ids):
        raise RowError("prompt", "no token precedes the answer", "write a prompt, or use a tokenizer with BOS")
    return (ids if encoder.sight is None else encoder.sight.expanded(ids, rendering.images)[0]).tolist()


def _said(values: Mapping[str, Any]) -> str | None:
    """The text of `chosen`: a text, a message, or the last of several."""
    answer = values.get("chosen")
    if isinstance(answer, list) and answer:
        answer = answer[-1]
    if isinstance(answer, dict):
        answer = answer.get("content")
    if answer is not None and not isinstance(answer, str):
        raise RowError("chosen", "is no text, and no message with a content", "write a text, or leave it out")
    return answer
