"""Text for people: what a terminal would obey is shown and not sent, and what is printed to be pasted is quoted.

Text may come from anywhere: a key of a file, a file's name, a model's, an environment variable. This module is below every
layer: errors and logs pass what they say through `shown`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
from typing import Any

# Among what is not printable: escapes and other control characters, marks that turn the direction of text, what has no
# width, halves of characters (which cannot be written at all).
LINES = "\n\t"


def shown(text: str) -> str:
    """The text with such characters as their escapes, `\\x1b`; lines stay lines."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in LINES else _escaped(c) for c in text.replace("\r\n", "\n"))


def columns(plain: int) -> int:
    """Of $COLUMNS, else of the terminal; `plain` where there is neither."""
    return shutil.get_terminal_size((plain, 24)).columns


def first_line(error: BaseException) -> str:
    """The first line of what a library says, with the next where it only leads there; failing that, the error's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = next(iter(lines), type(error).__name__)
    return (f"{first} {lines[1]}" if first.endswith(":") and len(lines) > 1 else first)[:500]


class _Unfailing(io.FileIO):
    """A descriptor for text that people may read and nothing depends on: what cannot be written is dropped."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:  # its reader has gone, or its disk is full
            return len(memoryview(data).cast("B"))


def outlive_streams() -> None:
    """From now on a closed standard output or error, one without a reader, or on a full disk, ends nothing."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream: Any = getattr(sys, name)
        if stream is None:  # closed: nothing else may get its number, as libraries would write into that
            opened = os.open(os.devnull, os.O_WRONLY)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            stream = open(descriptor, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        elif stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue  # somebody else's
        elif isinstance(getattr(stream.buffer, "raw", stream.buffer), _Unfailing):
            continue
        else:
            with contextlib.suppress(OSError):
                stream.flush()
        own: Any = _Unfailing(descriptor, "w", closefd=False)
        if isinstance(stream.buffer, io.BufferedWriter):
            own = io.BufferedWriter(own)
        by_line, at_once = stream.line_buffering, stream.write_through
        # What an encoding has no character for, such as an ASCII terminal's, is written as its escape.
        errors = "backslashreplace" if stream.errors == "strict" else stream.errors
        found = io.TextIOWrapper(own, stream.encoding, errors, line_buffering=by_line, write_through=at_once)
        setattr(sys, name, found)
        setattr(sys, f"__{name}__", found)


def command(*words: object) -> str:
    """A command line to paste into a shell, on one line: each word arrives as it is, and nothing in it is run."""
    return " ".join(_word(str(word)) for word in words)


def literal(text: str) -> str:
    """The text as a string in Python code, in double quotes and on one line."""
    return "".join(c if c.isprintable() else _escaped(c) for c in json.dumps(text, ensure_ascii=False))


def duration(seconds: float) -> str:
    """90 -> '1 min 30 s': the two largest units."""
    parts = []
    rest = max(round(seconds), 0)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count} {unit}")
        elif parts:
            break
    return " ".join(parts[:2]) or "0 s"


def printable(text: str, limit: int = 200) -> str:
    """One line of text without control characters."""
    line = "".join(c if c.isprintable() else " " for c in text).strip()
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _word(text: str) -> str:
    if text.isprintable():
        return shlex.quote(text)
    # $'...' of bash and zsh. A name that is not UTF-8 is given by its bytes.
    raw = os.fsencode(text) if re.search("[\udc80-\udcff]", text) else text.encode(errors="replace")
    return "$'" + "".join(_byte(byte) for byte in raw) + "'"


def _byte(byte: int) -> str:
    character = chr(byte)
    return character if 32 <= byte < 127 and character not in "'\\" else f"\\{byte:03o}"


def _escaped(character: str) -> str:
    if character.isspace() and character not in "\r\v\f\x1c\x1d\x1e\x1f\x85\u2028\u2029":
        return " "  # a wide or narrow one, or one that does not break
    return character.encode("unicode_escape").decode()
