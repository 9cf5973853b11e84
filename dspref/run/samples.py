"""samples.jsonl: answers to prompts, a row for each prompt and step. `history` reads it, of whatever version."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dspref.files import append_line, lines_of, read_lines, write_atomically
from dspref.reading import is_count
from dspref.secrets import redact


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add the rows of a step. Raises OSError."""
    append_line(path, "\n".join(redact(json.dumps(row)) for row in rows))


def forget_behind(path: Path, step: int) -> None:
    """Drop the rows of steps behind `step`, which will be made again, and what is no row. Raises OSError."""
    rows = list(lines_of(path))
    kept = [row for row in rows if row is not None and is_count(row.get("step")) and row["step"] <= step]
    if len(kept) < len(rows):
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))


def kept_answers(path: Path, prompts: Sequence[str]) -> list[str] | None:
    """The reference's answers to these prompts, as the first rows of the file have them; None where they do not."""
    found = []
    for row, prompt in zip(read_lines(path), prompts):
        if row.get("prompt") != redact(prompt) or not isinstance(row.get("reference"), str):
            return None
        found.append(row["reference"])
    return found if len(found) == len(prompts) else None
