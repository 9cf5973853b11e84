"""What a source names: files, folders, globs and hub sets become lists of files and tables, and these become raw rows.

A selector (path, split, slice, name, data_dir) that finds nothing is an error that lists what there is.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from dspref.data import splits
from dspref.data.parts import RELATIVE, Digest, Part, file_part, hub_part, saved_parts
from dspref.data.rowfiles import reason_of
from dspref.data.rows import BadRow, Row
from dspref.data.splits import DEFAULT_SPLIT, SUFFIXES, Term, unusable
from dspref.errors import DataError

__all__ = ["BadRow", "Digest", "Listing", "Part", "Row", "Source", "Term", "find", "read", "sha256"]

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """One entry of data.train or data.eval: what to read and how its columns are named.

    `split`: None is the split `train`, or what a single file or the files of a glob are. `name`: a data set of several in
    one place; `data_dir`: a folder in it; `revision`: of a hub set.
    """

    path: str
    split: str | None = None
    max_samples: int | None = None
    weight: float = 1.0
    columns: Mapping[str, str] | None = None
    template: Mapping[str, str] | None = None
    pairs: str = "all"
    pair_weights: str | None = None
    """score_gap: pairs weigh as much as the scores of their answers are apart, whose columns are named then."""
    as_: str | None = None
    """What texts are: chat | text; None: what `to_preference` takes them for."""
    key: str = "data.train"
    """Where it stands in the YAML, for messages."""
    name: str | None = None
    data_dir: str | None = None
    revision: str | None = None
    format: str | None = None
    """`module:function` of the user's, which says what a row is."""

    @property
    def takes(self) -> str:
        """What a row becomes: `pairs` (or answers that stand alone), a `list` of answers, or a pair with its `gold` one."""
        if self.pairs == "list":
            return "list"
        return "gold" if "reference" in {**(self.columns or {}), **(self.template or {})} else "pairs"


class Selection(NamedTuple):
    """The rows of some parts, one behind the other, within the bounds of a term."""

    parts: tuple[Part, ...]
    term: Term
    left_out: tuple[str, ...] = ()
    """Names of files beside these that are in no split."""


@dataclass(frozen=True)
class Listing:
    """What a source names, before anything is read."""

    source: Source
    selections: tuple[Selection, ...]

    @property
    def names(self) -> list[str]:
        """Of the files, as they are numbered by `rows`."""
        return [part.name for selection in self.selections for part in selection.parts]

    @property
    def left_out(self) -> list[str]:
        """Names of files that lie beside those that are read, and are in no split."""
        read = {Path(name).name for name in self.names}
        return sorted({name for selection in self.selections for name in selection.left_out if name not in read})

    def digests(self, digest: Digest) -> list[str]:
        return [part.digest(digest) for selection in self.selections for part in selection.parts]

    def content(self, digest: Digest) -> list[Any]:
        """All that decides which rows are read, in plain values."""
        parts = [[*selection.term[1:], *(part.digest(digest) for part in selection.parts)] for selection in self.selections]
        return [self.source.max_samples, parts]

    def columns(self, wanted: set[str]) -> set[str]:
        """Which of some columns there are in any row of the files, read or not. Raises DataError."""
        found: set[str] = set()
        for part in (part for selection in self.selections for part in selection.parts):
            for row in islice(part.rows(), 1 if part.same_columns else None):
                found |= wanted & row.values.keys() if isinstance(row, Row) else set()
                if found == wanted:
                    return found
        return found

    def rows(self) -> Iterator[tuple[int, Row | BadRow]]:
        """Each row with the number of its file. Raises DataError where there is none, or a file cannot be used."""
        found = islice(chain.from_iterable(self._selected()), self.source.max_samples)
        first = next(found, None)
        if first is None:
            raise unusable(self.source.path, "no rows", "write at least one row")
        return chain([first], found)

    def _selected(self) -> Iterator[Iterator[tuple[int, Row | BadRow]]]:
        start = 0
        for parts, term, _ in self.selections:
            yield _within(start, parts, term, self.source.path)
            start += len(parts)


def _within(start: int, parts: Sequence[Part], term: Term, where: str) -> Iterator[tuple[int, Row | BadRow]]:
    """The rows of a selection, with numbers of files from `start`."""

    def numbered_rows() -> Iterator[tuple[int, Row | BadRow]]:
        return ((start + k, row) for k, part in enumerate(parts) for row in part.rows())

    count = sum(part.count or sum(1 for _ in part.rows()) for part in parts) if term.needs_count else None
    first, stop = term.bounds(count)
    empty = True
    for item in islice(numbered_rows(), first, max(first, stop) if stop is not None else None):
        empty = False
        yield item
    if empty and term[1:] != (None, None):
        text = f"{term.name}[{term.start or ''}:{term.stop or ''}]"
        raise unusable(where, f"split {text!r} selects no row", "choose rows that are there")


def read(source: Source) -> list[Row | BadRow]:
    """All rows that a source names, in file order. Raises DataError when it or one of its files cannot be used at all."""
    return [row for _, row in find(source).rows()]


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------- what a path names


def find(source: Source) -> Listing:
    """The files and tables that a source names; nothing of their rows is read. Raises DataError."""
    terms = splits.parse(DEFAULT_SPLIT if source.split is None else source.split, source.path)
    try:
        return Listing(source, tuple(_found(source, terms)))
    except DataError as error:
        raise DataError(_with_keys(str(error), source.key)) from None
    except (OSError, ValueError) as error:
        raise unusable(source.path, reason_of(error), "check the path and its permissions") from None


def _with_keys(message: str, key: str) -> str:
    """A message whose fix names a key of the source by its place in the YAML, where it might be another's."""
    if key == "data.train":
        return message
    what, fix = message.rsplit("; fix: ", 1) if "; fix: " in message else (message, "")
    for words, name in (("set split to ", "split"), ("write split: ", "split"), ("choose one by name", "name")):
        fix = fix.replace(words, words.replace(name, f"{key}.{name}"))
    return f"{what}; fix: {fix}" if fix else what


def _found(source: Source, terms: Sequence[Term]) -> Iterator[Selection]:
    path = Path(source.path).expanduser()
    local = path.exists() or path.is_symlink()
    matches = [] if local else sorted(glob.glob(str(path), recursive=True))
    on_hub = not local and not matches and _is_hub_name(source.path, path)
    _refuse_void_keys(source, "hub" if on_hub else "folder" if path.is_dir() else "files")
    for term in terms:
        if path.is_dir():
            yield _of_folder(path, source, term)
        elif local:
            yield _of_file(path, source, term)
        elif matches:
            yield _of_glob(path, [Path(match) for match in matches], source, term)
        elif on_hub:
            options = {key: getattr(source, key) for key in ("name", "data_dir", "revision")}
            yield Selection((hub_part(source.path, term.name, options),), term)
        else:
            raise _missing(source, path)


def _refuse_void_keys(source: Source, kind: str) -> None:
    """Raise DataError for a key that has no effect on what the path names."""
    of_hub = {"hub": (), "folder": ("revision",), "files": ("name", "data_dir", "revision")}[kind]
    if given := next((key for key in of_hub if getattr(source, key) is not None), None):
        what = "a folder" if kind == "folder" else "a file"
        raise unusable(source.path, f"{given} has no effect on {what} of this machine", f"drop {source.key}.{given}")


def _is_hub_name(name: str, path: Path) -> bool:
    local = "/" in name and path.parent.is_dir()
    return bool(HUB_NAME.fullmatch(name)) and not name.endswith(SUFFIXES) and not local


def _missing(source: Source, path: Path) -> DataError:
    if glob.has_magic(source.path):
        return unusable(source.path, "the pattern matches no file", RELATIVE)
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    fix = f"did you mean {path.parent / close[0]}?" if close else RELATIVE
    return unusable(source.path, "no such file or folder", fix)


def _of_file(path: Path, source: Source, term: Term) -> Selection:
    """A single file is the split `train`, or the one that its name says."""
    splits.refuse_irregular(path)
    own = splits.name_of(path, path.parent).splits
    if term.name not in (DEFAULT_SPLIT, *own):
        reason = f"no split {term.name!r} in a single file"
        fix = f"set {source.key}.split: {DEFAULT_SPLIT}, or drop it; a slice is {DEFAULT_SPLIT}[:100]"
        raise unusable(source.path, reason, fix)
    return Selection((file_part(path),), term)


def _of_glob(pattern: Path, matches: Sequence[Path], source: Source, term: Term) -> Selection:
    root = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
    files = [path for path in matches if not path.is_dir()]
    if not files:
        raise unusable(source.path, "the pattern matches folders only", "let it match files, or name one folder")
    for path in files:
        splits.refuse_irregular(path)
    named = [splits.name_of(path, root) for path in files]
    chosen = splits.choose(named, term.name, source.path, source.split is None, asked_for=True)
    return _of_files(named, chosen, term)


def _of_files(named: Sequence[splits.Named], chosen: Sequence[Path], term: Term) -> Selection:
    """The files that were chosen of some for a split."""
    return Selection(tuple(map(file_part, chosen)), term, tuple(splits.left_out(named, chosen, term.name)))


def _of_folder(folder: Path, source: Source, term: Term) -> Selection:
    root = _inner(folder, source.data_dir, "data_dir") if source.data_dir is not None else folder
    if splits.is_saved(root):
        _refuse_name_of_saved(source)
        return Selection(saved_parts(root, term.name, only=source.split is None), term)
    if source.data_dir is None and (configs := splits.declared(root)):
        return Selection(tuple(map(file_part, _of_readme(root, configs, source, term))), term)
    if source.name is not None:
        root = _named_folder(root, source)
        if splits.is_saved(root):
            return Selection(saved_parts(root, term.name, only=source.split is None), term)
    found = splits.look(root)
    if not found.files and not found.saved:
        raise unusable(root, "the folder holds no data file", "put a .jsonl, .csv or .parquet file there")
    if found.saved:
        return Selection(_of_saved_folders(root, found, source, term), term)
    named = [splits.name_of(path, root) for path in found.files]
    return _of_files(named, splits.choose(named, term.name, str(root)), term)


def _inner(folder: Path, inner: str, key: str) -> Path:
    path = folder / inner
    if not path.is_dir():
        there = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        listed = f"use one of {', '.join(there[: splits.LISTED])}" if there else "drop the key"
        raise unusable(folder, f"{key}: no folder {inner!r}", listed)
    return path


def _named_folder(root: Path, source: Source) -> Path:
    """The folder of one data set of several."""
    inner = source.name or ""
    if not (root / inner).is_dir() and (root / "data" / inner).is_dir():
        return root / "data" / inner
    return _inner(root, inner, "name")


def _refuse_name_of_saved(source: Source) -> None:
    if source.name is not None:
        raise unusable(source.path, "name has no effect on a saved data set", f"drop {source.key}.name")


def _of_readme(root: Path, configs: Mapping[str, Mapping[str, Any]], source: Source, term: Term) -> list[Path]:
    # As `datasets` has it: the only one, or the one that is called or marked so.
    default = [one for one, said in configs.items() if len(configs) == 1 or one == "default" or said.get("default") is True]
    if source.name is None and len(default) != 1:
        raise splits.several(root, list(configs))
    name = source.name if source.name is not None else default[0]
    if name not in configs:
        raise unusable(root, f"name: no data set {name!r}", f"use one of {', '.join(configs)}")
    files = splits.declared_files(root, configs[name])
    if not files:
        raise unusable(root, f"the files that its README.md names for {name!r} are not there", "fetch them")
    for file in files:
        splits.refuse_irregular(file.path)
    return splits.choose(files, term.name, str(root), declared=True)


def _of_saved_folders(root: Path, found: splits.Found, source: Source, term: Term) -> tuple[Part, ...]:
    """Folders that `save_to_disk` wrote: one for each split, or one alone."""
    if found.files:
        reason = f"holds data files ({found.files[0].name}) beside saved data sets ({found.saved[0].name})"
        raise unusable(root, reason, "name the one that you mean")
    named = [splits.name_of(folder / "table", root) for folder in found.saved]
    if any(name.splits for name in named):
        chosen = splits.choose(named, term.name, str(root))
        return tuple(part for path in chosen for part in saved_parts(path.parent, term.name, only=True))
    if len(found.saved) > 1:
        raise splits.several(root, [str(folder.relative_to(root)) for folder in found.saved])
    return saved_parts(next(iter(found.saved)), term.name, only=source.split is None)
