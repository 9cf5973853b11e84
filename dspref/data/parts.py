"""What a source is read from: files, and tables of the `datasets` library. Each knows its rows and its content's digest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspref import hub
from dspref.data import splits
from dspref.data.rowfiles import kind_of_file, numbered, reason_of, rows_of
from dspref.data.rows import BadRow, Row
from dspref.data.splits import DEFAULT_SPLIT, unusable

RELATIVE = "check the path; it is relative to the working directory"
ROWS_AT_ONCE = 256

Digest = Callable[[Path], str]
"""The content of a file, as a hex digest."""


@dataclass(frozen=True)
class Part:
    """A file or a table: its name for messages, its rows anew with each call, and a digest of its content."""

    name: str
    rows: Callable[[], Iterator[Row | BadRow]]
    digest: Callable[[Digest], str]
    count: int | None = None
    """Rows, where that is known without reading."""
    same_columns: bool = False
    """Whether each row has the columns of all."""


def file_part(path: Path) -> Part:
    def content(digest: Digest) -> str:
        try:
            return f"{kind_of_file(path)} {digest(path)}"
        except OSError as error:
            raise unusable(path, reason_of(error), "check the file and its permissions") from None

    return Part(str(path), lambda: rows_of(path), content, same_columns=kind_of_file(path) in ("csv", "parquet"))


def saved_parts(folder: Path, split: str, only: bool) -> tuple[Part, ...]:
    """The table of a split in a folder that `save_to_disk` wrote. `only`: where that is one table, it is the one."""
    from datasets import Dataset, load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # datasets has many types for one thing: a damaged folder
        raise unusable(folder, f"a damaged saved data set: {error}", "save it again") from None
    if isinstance(loaded, Dataset):
        there = re.split(r"[\[+(]", str(loaded.split))[0] if loaded.split is not None else DEFAULT_SPLIT
        tables, wanted, inside = {there: loaded}, there if only else split, folder
    else:
        tables = {str(name): table for name, table in loaded.items()}
        wanted = splits.matching(split, list(tables)) or ""
        inside = folder / wanted
    if wanted not in tables:
        raise unusable(folder, f"no split {split!r}", f"set split to one of {', '.join(sorted(tables))}")
    files = sorted(path for path in inside.rglob("*") if path.is_file())

    def content(digest: Digest) -> str:
        return "saved " + hashlib.sha256("\n".join(map(digest, files)).encode()).hexdigest()

    return (table_part(tables[wanted], str(folder), content),)


def hub_part(path: str, split: str, options: Mapping[str, str | None]) -> Part:
    """The table of a split of a hub set; `options`: name, data_dir and revision. Raises DataError."""
    from datasets import config, load_dataset
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if path in _PACKAGED_DATASETS_MODULES:
        reason = f"{path!r} is a kind of file, not a data set, and no file or folder here has this name"
        raise unusable(path, reason, "give the path of the files")
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    if silent := hub.silence():
        config.HF_HUB_OFFLINE = True  # a set in the cache is had at once
    try:
        loaded: Any = load_dataset(path, split=split, **given)
    except Exception as error:  # network, permission, missing set: each has its own type
        reason = f"not on disk, and not loadable from the hub: {silent or error}"
        remedy = "check the network, or give a path" if silent else f"{RELATIVE}; or check the hub name, name and split"
        raise unusable(path, reason, remedy) from None
    return table_part(loaded, path, lambda digest: f"hub {loaded._fingerprint}")


def table_part(table: Any, name: str, content: Callable[[Digest], str]) -> Part:
    def rows() -> Iterator[dict[str, Any]]:
        for batch in table.with_format(None).iter(batch_size=ROWS_AT_ONCE):  # decoded by the batch
            columns = list(batch)
            yield from (dict(zip(columns, values)) for values in zip(*batch.values()))

    return Part(name, lambda: numbered(rows(), name), content, len(table), same_columns=True)
