"""Files that are there as a whole or not at all, even after a power cut."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

# How the name of a file that is being written begins; a process that was killed leaves it behind.
DRAFT = ".draft-"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, now or after a crash, sees the old content or the new, never a part.

    Raises OSError, always with `path` as its file name.
    """
    draft = path.with_name(f"{DRAFT}{os.getpid()}-{uuid.uuid4().hex}")
    try:
        with open(draft, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync_folder(path.parent)
    except OSError as error:
        error.filename = str(path)  # a full disk comes without a name, and the draft's would tell nobody anything
        raise
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make what was renamed into a folder stay there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
