"""sha256 of large files, remembered between runs: a start must not read 140 GB again to learn that nothing changed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from dspref import reading
from dspref.config import cache_folder
from dspref.files import write_atomically

# A file that was written so shortly before it was read may change again within one tick of the file system's clock.
SETTLED_SECONDS = 2.0


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, from memory where path, size, times and inode are those of the last reading."""
    memory = cache_folder("digests.json")
    stat = path.stat()
    name = str(path.resolve())
    # The time of change (ctime) moves with every write, also where a tool sets the time of modification back.
    state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    if (entry := _read(memory).get(name)) and entry["state"] == state:
        return entry["sha256"]
    with reading.open_regular(path) as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS:
        _remember(memory, {name: sealed(name, state, found)})
    return found


def sealed(name: str, state: Any, digest: Any) -> dict[str, Any]:
    """An entry of the memory, with a seal that a flipped digit in any of its parts breaks."""
    seal = hashlib.sha256(json.dumps([name, state, digest]).encode()).hexdigest()[:16]
    return {"state": state, "sha256": digest, "seal": seal}


def _read(memory: Path) -> dict[str, dict[str, Any]]:
    """What is remembered, as far as it is sound."""
    try:
        known = reading.read_json(memory, strict=False)
    except (OSError, ValueError):
        return {}
    entries = known.items() if isinstance(known, dict) else ()
    return {name: entry for name, entry in entries if _is_sound(name, entry)}


def _is_sound(name: str, entry: Any) -> bool:
    return isinstance(entry, dict) and entry == sealed(name, entry.get("state"), entry.get("sha256"))


def _remember(memory: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Best effort: another process may write at the same time, and then one of the two hashes again."""
    kept = {name: entry for name, entry in _read(memory).items() if os.path.exists(name)}
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, json.dumps(kept | entries))
    except OSError:
        return
