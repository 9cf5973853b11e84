"""What is read by name: regular files up to a size, without waiting, and JSON up to a depth.

A name may lead to a pipe that nobody writes, to a device that never ends, or to a file of 100 GB. All are refused as they
are opened, by an OSError whose `strerror` says what lies there.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

# Bytes. A page that a person writes, and what libraries write beside weights: an index of shards, a vocabulary.
PAGE, TABLE = 10_000_000, 500_000_000
# Levels of JSON that a settings file may have.
DEPTH = 64
KINDS = {
    stat.S_IFDIR: "is a folder",
    stat.S_IFIFO: "is a pipe",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
}


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file for reading. Raises OSError where there is none, and for what is no regular file."""
    try:
        # A pipe would block the opening until somebody writes, and a terminal would become this process's own.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except ValueError:
        raise OSError(errno.EINVAL, "holds a null character", str(path)) from None
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.EINVAL, "is a socket, not a file", str(path)) from None
        raise
    try:
        refuse_kind(os.fstat(descriptor), path)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | Path, limit: int = PAGE) -> bytes:
    """A file's content. Raises OSError where there is none, where it is no regular file, or has more than `limit` bytes."""
    with open_regular(path) as file:
        state = os.fstat(file.fileno())
        refuse_kind(state, path, limit)
        # It may grow, and files of /proc tell no size.
        content = file.read(min(limit, max(PAGE, 2 * state.st_size)) + 1)
    if len(content) > limit:
        _too_large(path, limit)
    return content


def read_text(path: str | Path, limit: int = PAGE) -> str:
    """As `read_bytes`, of UTF-8. Raises UnicodeDecodeError too."""
    return read_bytes(path, limit).decode("utf-8")


def read_json(path: str | Path, limit: int = PAGE, strict: bool = True) -> Any:
    """As `read_bytes`, of JSON. Raises ValueError too, mostly a JSONDecodeError."""
    return parse_json(read_text(path, limit), strict)


def parse_json(text: str, strict: bool = True) -> Any:
    """JSON up to `DEPTH` levels. `strict`: as its standard has it, without NaN, and no two equal keys in one object; other
    programs write such. Raises ValueError."""
    rules: dict[str, Any] = {"parse_constant": _refuse_constant, "object_pairs_hook": _without_equal_keys} if strict else {}
    try:
        value = json.loads(text, **rules)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level, depth = [value], 0
    while level := [item for node in level if isinstance(node, dict | list) for item in _items(node)]:
        if (depth := depth + 1) > DEPTH:
            raise ValueError("nested too deeply")
    return value


def refuse_kind(state: os.stat_result, path: str | Path, limit: int | None = None) -> None:
    """Raise OSError for what is no regular file, or has more than `limit` bytes."""
    if not stat.S_ISREG(state.st_mode):
        kind = KINDS.get(stat.S_IFMT(state.st_mode), "is of an unknown kind")
        raise OSError(errno.EISDIR if stat.S_ISDIR(state.st_mode) else errno.EINVAL, f"{kind}, not a file", str(path))
    if limit is not None and state.st_size > limit:
        _too_large(path, limit)


def words(error: OSError | ValueError) -> str:
    """What went wrong with a reading, in a few words on one line."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text (byte {error.start})"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}"
    said = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(said.split())


def _too_large(path: str | Path, limit: int) -> NoReturn:
    raise OSError(errno.EFBIG, f"is larger than {limit} bytes", str(path))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"not valid JSON: {name} is no number")


def _without_equal_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"not valid JSON: {next(key for key in keys if keys.count(key) > 1)!r}: duplicate key")
    return found


def _items(node: dict | list) -> Any:
    return node.values() if isinstance(node, dict) else node


# ---------------------------------------------------------------------------------------------------------------------
# What a value of a small file may be


def is_number(value: Any) -> TypeGuard[int | float]:
    """A float, NaN among them, or an integer that can be made one."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**300)


def is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**18


def is_word(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value) and value.isprintable()


def are_words(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(inner, str) for inner in value.values())
