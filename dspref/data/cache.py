"""A cache of folders, each complete or absent: built beside its place, flushed, and renamed into it.

What a folder holds is known by its `report.json`: size and digest of every other file, and a digest of the report itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from dspref import reading
from dspref.errors import EnvironmentFault
from dspref.files import sync_folder
from dspref.processes import Process, place

REPORT = "report.json"
BUILDING, HOLDER = ".building-", "holder.json"
# A folder in the making whose maker is on a machine that cannot be looked at is forgotten after so long.
STALE_SECONDS = 24 * 3600


# ---------------------------------------------------------------------------------------------------- one folder


class Column:
    """An array file that grows: rows are appended, and its header is written anew at the end."""

    def __init__(self, path: Path, dtype: Any, width: int | None = None) -> None:
        self.path, self.dtype, self.width, self.rows = path, np.dtype(dtype), width, 0
        self.content = hashlib.blake2b(digest_size=32)
        """Of the values, without the header."""
        self._file = open(path, "xb")
        self._write_header()

    def append(self, values: Any) -> None:
        block = np.ascontiguousarray(values, dtype=self.dtype).reshape(-1, *([self.width] if self.width else []))
        self.rows += len(block)
        self.content.update(block.data)
        self._file.write(block.data)

    def close(self) -> None:
        """Complete the file, and bring it to disk."""
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _write_header(self) -> None:
        # numpy leaves room for the first number of the shape to grow, so the header keeps its size.
        shape = (self.rows, self.width) if self.width else (self.rows,)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)


def seal(folder: Path, said: Mapping[str, Any]) -> None:
    """Write the report of a folder whose other files are complete: `said`, and what the files are."""
    files = {path.name: [path.stat().st_size, digest(path)] for path in sorted(folder.iterdir())}
    with open(folder / REPORT, "x", encoding="utf-8") as file:
        json.dump(_signed({**said, "files": files}), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def report_of(folder: Path, verify: bool) -> dict[str, Any]:
    """What the report says. Raises ValueError where it, or a file by its size, is not what was written; `verify`: by its
    content. Raises OSError and KeyError too."""
    report = reading.read_json(folder / REPORT, reading.TABLE)
    if not isinstance(report, dict) or _signed(report)["sha256"] != report["sha256"]:
        raise ValueError("the report is not what was written")
    for name, (size, expected) in report["files"].items():
        path = folder / name
        if path.stat().st_size != size or (verify and digest(path) != expected):
            raise ValueError(f"{name} is not what was written")
    return report


def digest(path: Path) -> str:
    with reading.open_regular(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _signed(report: Mapping[str, Any]) -> dict[str, Any]:
    said = {key: value for key, value in report.items() if key != "sha256"}
    return said | {"sha256": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}


# ------------------------------------------------------------------------------------------------ making and placing


@contextmanager
def scratch_folder(cache_dir: Path) -> Iterator[Path]:
    """A folder to build in, removed at the end. Raises EnvironmentFault when that is not possible."""
    scratch = cache_dir / f"{BUILDING}{uuid.uuid4().hex}"
    try:
        scratch.mkdir(parents=True)
        own = Process.find(os.getpid())
        (scratch / HOLDER).write_text(json.dumps({"place": place(), "process": own}), encoding="utf-8")
        _sweep(cache_dir)
        yield scratch
    except OSError as error:
        reason = f"cannot write the token cache: {error.strerror or error}"
        fix = "free the space or make it writable, or name another folder in the variable DSPREF_CACHE"
        raise EnvironmentFault(f"{cache_dir}: {reason}; fix: {fix}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def put_in_place(finished: Path, folder: Path) -> None:
    """Rename a finished folder to its place, unless another process has put one there; what is damaged there goes first."""
    for attempt in range(3):
        with suppress(OSError):
            finished.rename(folder)
            sync_folder(folder.parent)
            return
        with suppress(OSError, ValueError, KeyError, TypeError):
            report_of(folder, verify=True)
            return
        with suppress(OSError):  # another process may be moving it at this moment
            folder.rename(finished.parent / f"damaged-{attempt}")
    raise OSError(f"cannot rename a folder to {folder.name}")


def _sweep(cache_dir: Path) -> None:
    """Remove what builders have left that were killed; that of a living one stays."""
    for left in cache_dir.glob(f"{BUILDING}*"):
        with suppress(OSError):
            if _is_left(left):
                shutil.rmtree(left, ignore_errors=True)


def _is_left(scratch: Path) -> bool:
    try:
        holder = reading.read_json(scratch / HOLDER)
        if holder["place"] == place() and holder["process"]:
            return not Process(*holder["process"]).is_alive
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not yet written, or not by us
    newest = max([scratch.stat().st_mtime, *(entry.stat().st_mtime for entry in os.scandir(scratch))])
    return time.time() - newest > STALE_SECONDS
