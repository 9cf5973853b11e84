"""Files that are there as a whole or not at all, even after a power cut; and small files of JSON, whatever befell them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dspref import reading

# How the name of a file that is being written begins; a process that was killed leaves it behind.
DRAFT = ".draft-"
# What a file has, by its path: its size and its sha256.
Hashes = dict[str, tuple[int, str]]
# More than any file of a run has that is read as one JSON value, or any line of one that has a value per line.
LARGEST = 64 * 2**20


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, now or after a crash, sees the old content or the new, never a part.

    Raises OSError, always with `path` as its file name.
    """
    with drafted(path) as draft, open(draft, "xb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the name `path` as a whole, after the block; not at all where that raises.

    Raises OSError, always with `path` as its file name.
    """
    draft = path.with_name(f"{DRAFT}{os.getpid()}-{uuid.uuid4().hex}")
    try:
        yield draft
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync_folder(path.parent)
    except OSError as error:
        error.filename = str(path)  # a full disk comes without a name, and the draft's would tell nobody anything
        raise
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove whatever bears this name, a folder with all in it, a file or a link; nothing where nothing does. What cannot be
    removed stays: who needs the name will say so."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make what was renamed into a folder stay there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flushed(path: Path) -> tuple[int, str]:
    """Size and sha256 of a file that is on disk by then. Raises OSError that names it."""
    try:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        error.filename = str(path)  # a flush comes without a name
        raise


def flushed_tree(folder: Path) -> Hashes:
    """Size and sha256 of every file below a folder by its path in it, all on disk by then, the folders too."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): flushed(path) for path in files}
    for inner in {folder, *(path.parent for path in files)}:
        sync_folder(inner)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# JSON that may be damaged


def read_json(path: Path) -> Any:
    """The value in a file. Raises OSError where it cannot be read, and ValueError where it holds none."""
    return reading.read_json(path, LARGEST, strict=False)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none that can be read."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file. Whatever else stands in its lines is passed over."""
    return (value for value in lines_of(path) if value is not None)


def lines_of(path: Path) -> Iterator[dict[str, Any] | None]:
    """The lines of a JSONL file that are not empty, each the object that it holds, or None."""
    try:
        with reading.open_regular(path) as file:
            while line := file.readline(LARGEST):
                if line.strip():
                    yield _object(line)
    except OSError:
        return


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, of which the last line may have been cut short."""
    with open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
        cut = end > 0 and file.read(1) != b"\n"
        file.write(b"\n" * cut + line.encode() + b"\n")


def whole_lines(path: Path, end: int) -> tuple[int, dict[str, Any] | None]:
    """(length, last object) of the longest beginning of a JSONL file, up to `end`, that ends with a whole object."""
    length, last, start = 0, None, 0
    with suppress(FileNotFoundError), reading.open_regular(path) as file:
        while start < end and (line := file.readline(min(LARGEST, end - start))):
            start += len(line)
            value = _object(line) if line.endswith(b"\n") else None
            length, last = (start, value) if value is not None else (length, last)
    return length, last


def end_of(path: Path, size: int) -> str | None:
    """The last `size` bytes of a text, or all of it; None where it cannot be read."""
    try:
        return _tail(path, size).decode(errors="replace")
    except OSError:
        return None


def _tail(path: Path, size: int) -> bytes:
    with reading.open_regular(path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        return file.read()


def end_line(path: Path) -> None:
    """Give a last line that is whole the end that it lacks: editors leave it out."""
    tail = b""
    with suppress(FileNotFoundError):
        tail = _tail(path, LARGEST)
    line = tail[tail.rfind(b"\n") + 1 :]
    if line and _object(line) is not None:
        with open(path, "ab") as file:
            file.write(b"\n")


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # half-written, or damaged
        return None
    return value if isinstance(value, dict) else None
