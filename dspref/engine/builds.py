"""What DeepSpeed takes from the environment: the accelerator, and where operators are compiled, with the locks that killed
builds leave there. Loads neither torch nor deepspeed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from dspref.errors import EnvironmentFault

# What $DS_ACCELERATOR may be; dspref is tested on the first two.
ACCELERATORS = ("cpu", "cuda", "xpu", "xpu.external", "npu", "mps", "hpu", "mlu", "sdaa", "supa", "klxpu")
# A lock of that age is nobody's; every later start would wait for it for ever, silently.
STALE_SECONDS = 900


def accelerator(env: Mapping[str, str], cuda: bool) -> str:
    """$DS_ACCELERATOR, or what is there. Raises EnvironmentFault for what DeepSpeed does not know."""
    asked = env.get("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    if asked not in ACCELERATORS:
        raise EnvironmentFault(f"DS_ACCELERATOR: {asked!r} is no accelerator; unset it, or set cpu or cuda")
    return asked


def folder(env: Mapping[str, str], own: bool) -> Path:
    """$TORCH_EXTENSIONS_DIR, or its default: dspref has a folder of its `own` for what it builds itself."""
    default = "dspref/torch_extensions" if own else "torch_extensions"
    return Path(env.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / default)


def locks(folder: Path) -> Iterator[tuple[Path, float]]:
    """Each lock in the folder, with its age in seconds."""
    for lock in sorted(folder.glob("**/lock")) if folder.exists() else []:
        yield lock, time.time() - lock.stat().st_mtime
