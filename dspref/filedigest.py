"""sha256 of large files, remembered between runs: a start must not read 140 GB again to learn that nothing changed."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from dspref.config import cache_folder
from dspref.files import write_atomically

# A file that was written so shortly before it was read may change again within one tick of the file system's clock.
SETTLED_SECONDS = 2.0


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, from memory where path, size, times and inode are those of the last reading."""
    memory = cache_folder("digests.json")
    stat = path.stat()
    # The time of change (ctime) moves with every write, also where a tool sets the time of modification back.
    state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    known = _read(memory)
    if (entry := known.get(str(path.resolve()))) and entry[:-1] == state:
        return entry[-1]
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS:
        _remember(memory, {str(path.resolve()): [*state, found]})
    return found


def _read(memory: Path) -> dict[str, list]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = known.items() if isinstance(known, dict) else ()
    return {path: entry for path, entry in entries if isinstance(entry, list) and len(entry) == 5}


def _remember(memory: Path, entries: dict[str, list]) -> None:
    """Best effort: another process may write at the same time, and then one of the two hashes again."""
    kept = {path: entry for path, entry in _read(memory).items() if Path(path).exists()}
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, json.dumps(kept | entries))
    except OSError:
        return
