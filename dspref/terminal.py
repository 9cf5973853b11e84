"""Text for people: what a terminal would obey is shown and not sent, and what is printed to be pasted is quoted.

Text may come from anywhere: a key of a file, a file's name, a model's, an environment variable. This module is below every
layer: errors and logs pass what they say through `shown`.
"""

from __future__ import annotations

import json
import os
import re
import shlex

# Among what is not printable: escapes and other control characters, marks that turn the direction of text, what has no
# width, halves of characters (which cannot be written at all).
LINES = "\n\t"


def shown(text: str) -> str:
    """The text with such characters as their escapes, `\\x1b`; lines stay lines."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in LINES else _escaped(c) for c in text.replace("\r\n", "\n"))


def command(*words: object) -> str:
    """A command line to paste into a shell, on one line: each word arrives as it is, and nothing in it is run."""
    return " ".join(_word(str(word)) for word in words)


def literal(text: str) -> str:
    """The text as a string in Python code, in double quotes and on one line."""
    return "".join(c if c.isprintable() else _escaped(c) for c in json.dumps(text, ensure_ascii=False))


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
