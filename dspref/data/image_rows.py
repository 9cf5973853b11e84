"""Where the images of a row stand in its conversation, whichever way the row says so.

An image in a message's content is one character there, which is no text of anybody's (a noncharacter of Unicode), so that
messages stay texts that can be compared, cut and looked for. Where a part of the content names its image itself, that stands
behind the character until the pair is made.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dspref.data.rows import FIELDS, Message, RowError, Text, Values, missing, what_is

IMAGE, NAMED, END = "\ufdd0", "\ufdd1", "\ufdd2"
MARKS = re.compile(f"{IMAGE}(?:{NAMED}([^{END}]*){END})?")
# Columns that hold images, by the names of most sets, and such that hold what is not read.
COLUMNS = ("images", "image")
VIDEOS = ("videos", "video")
PARTS = ("image", "image_url", "input_image")
# What other tools write into a text where an image belongs (LLaMA-Factory, ms-swift, LLaVA).
PLACE = "<image>"
NAMES = ("image", "path", "url", "image_url", "bytes")
AS_CHAT = "set data.train.as: chat, or write the prompt as messages; without a chat template, set model.chat_template"
MATCH = "give as many images as the prompt has places for one"
NO_IMAGES = RowError("images", "the model reads text alone", "use a vision-language model, or drop the images")


def mark_of(part: Mapping[str, Any], place: str) -> str:
    """An image part of a message's content as text."""
    source = next((part[name] for name in NAMES if part.get(name) is not None), None)
    if isinstance(source, dict):
        source = next((source[name] for name in ("bytes", "url", "path") if source.get(name) is not None), None)
    if isinstance(source, bytes):
        source = "data:;base64," + base64.b64encode(source).decode()
    if source is None:
        return IMAGE
    if not isinstance(source, str) or not source or END in source:
        raise RowError(place, f"{what_is(source)}, and no path of an image", 'write {"type": "image"} and a column images')
    return f"{IMAGE}{NAMED}{source}{END}"


def column_of(values: Values, named: Mapping[str, str]) -> dict[str, Any]:
    """`images` of a row that has a column of them, as a list. Raises RowError for videos."""
    for name in VIDEOS:
        if isinstance(values.get(name), list | str | bytes | dict) and values[name] and name not in named.values():
            raise RowError(name, "videos are not read", "drop the column, or the row")
    if "images" in named and named["images"] not in values:
        raise missing("images", values, named["images"])
    names = [named["images"]] if "images" in named else [name for name in COLUMNS if name not in named.values()]
    there = [name for name in names if values.get(name) is not None]
    if len(there) > 1:
        there = [name for name in there if values[name] not in ([], "")]
    if len(there) > 1:
        raise RowError("images", f"the columns {' and '.join(there)} both hold some", "name one: data.train.columns.images")
    found = values[there[0]] if there else []
    found = found if isinstance(found, list | tuple) else [found] if found != "" else []  # how CSV says null
    return {"images": list(found)} if there else {}


def placed(prompt: Text, answers: Sequence[Text], column: Sequence[Any]) -> tuple[Text, tuple[Any, ...]]:
    """A prompt in which every image is one character, and its images in order, as the row names them. `column`: those that
    stand beside the conversation: they belong to image parts without a name; or to places `<image>` in the texts; or else,
    as in TRL, to the beginning of the first user's message. Raises RowError."""
    for field, answer in zip(FIELDS[1:], answers):
        if any(IMAGE in text for text in _texts(answer)):
            raise RowError(field, "an image in an answer; images belong to prompts", "leave the row out")
    marks = [found for text in _texts(prompt) for found in MARKS.finditer(text)]
    if not marks and not column:
        return prompt, ()
    if isinstance(prompt, str):
        raise RowError("images", "a text has no place for an image", AS_CHAT)
    if not marks:
        prompt = _with_places(prompt, len(column))
        marks = [found for text in _texts(prompt) for found in MARKS.finditer(text)]
    free = sum(found[1] is None for found in marks)
    if free != len(column):
        raise RowError("images", f"{len(column)} images, and {free} places for one in the prompt", MATCH)
    rest = iter(column)
    images = tuple(next(rest) if found[1] is None else found[1] for found in marks)
    return [_with_content(message, MARKS.sub(IMAGE, _text(message))) for message in prompt], images


def _with_places(prompt: Sequence[Message], count: int) -> list[Message]:
    written = sum(text.count(PLACE) for text in _texts(prompt))
    if written:
        return [_with_content(message, _text(message).replace(PLACE, IMAGE)) for message in prompt]
    first = next((i for i, message in enumerate(prompt) if message["role"] == "user"), None)
    if first is None:
        raise RowError("images", "no message of the user's that they could belong to", 'write {"type": "image"} in one')
    return [
        _with_content(message, IMAGE * count + _text(message)) if i == first else message for i, message in enumerate(prompt)
    ]


def _texts(part: Any) -> list[str]:
    return [part] if isinstance(part, str) else [_text(message) for message in part]


def _text(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _with_content(message: Message, content: str) -> Message:
    return {**message, "content": content} if content != message.get("content") and content else message


def as_parts(messages: Sequence[Message]) -> list[Message]:
    """Messages as templates of vision-language models read them: their contents in parts."""
    return [
        {**message, "content": _parts(message["content"])} if isinstance(message.get("content"), str) else message
        for message in messages
    ]


def as_rows_have(messages: Sequence[Message]) -> list[Message]:
    """Messages as a row has them: contents with images in parts, which name these."""
    return [
        {**message, "content": _parts(message["content"])} if IMAGE in _text(message) else message for message in messages
    ]


def without_images(text: str) -> str:
    """A text of somebody's, in which no image can stand."""
    return re.sub(f"[{IMAGE}{NAMED}{END}]", "", text)


def _parts(content: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    done = 0
    for mark in MARKS.finditer(content):
        found += _text_part(content[done : mark.start()])
        found.append({"type": "image"} | ({"image": mark[1]} if mark[1] else {}))
        done = mark.end()
    return found + _text_part(content[done:]) or [{"type": "text", "text": ""}]


def _text_part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}] if text else []
