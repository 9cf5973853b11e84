"""Whether a rendering holds what the messages of a conversation say.

What stands nowhere in a rendering was dropped or rewritten. What does may have been dropped all the same, where another
message or the template itself has those words: then the template is asked again, with another word in their place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from dspref.data.image_rows import IMAGE
from dspref.data.manners import Manners
from dspref.data.messages import REASONING
from dspref.data.rows import Message

WORD = "otherword"


class Part(NamedTuple):
    """A text of a message, and the keys that lead to it."""

    text: str
    path: tuple[Any, ...]

    @property
    def key(self) -> str:
        return self.path[0]


def said(message: Message) -> Iterator[Part]:
    """What a message says: its content, in parts where images stand between these, and its reasoning."""
    for key in ("content", *REASONING):
        if isinstance(text := message.get(key), str):
            parts = text.split(IMAGE)
            yield from (Part(part, (key, k) if len(parts) > 1 else (key,)) for k, part in enumerate(parts))


def called(message: Message) -> Iterator[Part]:
    """The names of the functions that it calls."""
    yield from (Part(call["name"], (*path, "name")) for path, call in _calls(message) if isinstance(call.get("name"), str))


def passed(message: Message) -> Iterator[Part]:
    """The names of the arguments of its calls, where these are objects; the paths are those of the values."""
    for path, call in _calls(message):
        arguments = call.get("arguments")
        yield from (Part(key, (*path, "arguments", key)) for key in (arguments if isinstance(arguments, dict) else ()))


def _calls(message: Message) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    calls = message.get("tool_calls")
    for k, call in enumerate(calls if isinstance(calls, list) else ()):
        if isinstance(call, dict):
            inner = isinstance(call.get("function"), dict)
            yield ("tool_calls", k, *(["function"] if inner else [])), call["function"] if inner else call


@dataclass
class Printed:
    """Messages in the rendering `text`, of which `own` is theirs. `again` renders them anew, with some replaced."""

    messages: Sequence[Message]
    text: str
    own: str
    manners: Manners
    again: Callable[[list[Message]], str]

    def has(self, i: int, part: Part, opening: str = "") -> bool:
        """Whether a part of message `i` is there. What `opening` ends with, such as `<think>`, need not be there again."""
        if not part.text.strip() or self._in_line:
            return True
        if self._goes_on(part.text, opening):
            return True
        forms = [part.text.strip(), *_in_json(part.text.strip())]
        if not any(form in self.own for form in forms) and not _stands_in(part.text, self.own, opening):
            return False
        # Every place where the messages have those words is there, and none of the template's is among them.
        needed = self._everything.count(forms[0])
        certain = forms[0] not in self.manners.frame and any(self.own.count(form) >= needed for form in forms)
        if certain or part.key == "tool_calls":
            return certain or self.shows(i, part)
        if (other := self._with_other(i, part)) is None:
            return True
        return WORD in other and any(_squeezed(other.replace(WORD, form)) == _squeezed(self.text) for form in forms)

    def _goes_on(self, text: str, opening: str) -> bool:
        """Whether what is written begins with a text but for the token that `opening` ends with. Other words in its place
        would not show it: a template that reads thoughts opens and ends them for a text without any, too."""
        opened = self.manners.tokens.match(text.lstrip())
        if opened is None or not opening.rstrip().endswith(opened.group()):
            return False
        rest = _squeezed(text.lstrip()[opened.end() :])
        return rest != "" and _squeezed(self.own).startswith(rest)

    def shows(self, i: int, part: Part) -> bool:
        """Whether the rendering is another one where that part of message `i` is."""
        return self._with_other(i, part) != self.text

    def _with_other(self, i: int, part: Part) -> str | None:
        """The rendering with another word in place of a part; None where there is none."""
        try:
            return self.again([*self.messages[:i], _with_word(self.messages[i], part.path), *self.messages[i + 1 :]])
        except Exception:  # a template is a program: it may raise anything
            return None

    @cached_property
    def _in_line(self) -> bool:
        """Whether the messages stand one behind another, each up to the next as the template writes it, and say no more than
        their content: the most frequent case, and soon seen."""
        place, before = 0, None
        for message in self.messages:
            content = message.get("content")
            joint = "" if before is None else self.manners.joints.get((before, message["role"]))
            if not isinstance(content, str) or joint is None or not self.own.startswith(joint, place):
                return False
            content = content if self.own.startswith(content, place + len(joint)) else content.strip()
            place += len(joint)
            if not self.own.startswith(content, place) or any(message.get(key) for key in (*REASONING, "tool_calls")):
                return False
            place, before = place + len(content), message["role"]
        return True

    @cached_property
    def _everything(self) -> str:
        parts = [part.text for message in self.messages for parts in (said, called) for part in parts(message)]
        calls = [call.get("arguments") for message in self.messages for _, call in _calls(message)]
        return "\0".join([*parts, *(call if isinstance(call, str) else json.dumps(call, default=str) for call in calls)])


def _with_word(value: Any, path: Sequence[Any]) -> Any:
    """A copy of a value with another word at the end of a path."""
    if not path:
        return WORD
    key, *rest = path
    if isinstance(value, str):
        parts = value.split(IMAGE)
        return IMAGE.join([*parts[:key], WORD, *parts[key + 1 :]])
    if isinstance(value, list):
        return [_with_word(item, rest) if i == key else item for i, item in enumerate(value)]
    return {**value, key: _with_word(value[key], rest)}


def _in_json(text: str) -> tuple[str, str]:
    """A text as JSON holds it, as templates print what tools say."""
    return json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _stands_in(text: str, written: str, opening: str) -> bool:
    """Whether a text is there, white space aside."""
    wanted, there, before = map(_squeezed, (text, written, opening[-200:]))
    if wanted in there:
        return True
    opened = next((n for n in range(min(len(wanted), len(before)), 0, -1) if before.endswith(wanted[:n])), 0)
    return opened > 0 and there.startswith(wanted[opened:])
