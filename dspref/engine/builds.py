"""Where DeepSpeed's operators are compiled, and the locks that killed builds leave there. No torch, no deepspeed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

# A lock of that age is nobody's; every later start would wait for it for ever, silently.
STALE_SECONDS = 900


def folder(env: Mapping[str, str], own: bool) -> Path:
    """$TORCH_EXTENSIONS_DIR, or its default: dspref has a folder of its `own` for what it builds itself."""
    default = "dspref/torch_extensions" if own else "torch_extensions"
    return Path(env.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / default)


def locks(folder: Path) -> Iterator[tuple[Path, float]]:
    """Each lock in the folder, with its age in seconds."""
    for lock in sorted(folder.glob("**/lock")) if folder.exists() else []:
        yield lock, time.time() - lock.stat().st_mtime
