"""Which files of a folder, or of a glob, are a split's. What finds nothing is refused with a list of what there is; it never
means more data.

The layouts are those that `datasets` writes and the hub has: `train-00000-of-00002.parquet`, `data/train.jsonl`,
`train/0000.parquet`, `config/train/0000.parquet`, and what a README's `configs:` says. A file that follows none of these, in
a folder where none does, is of the split `train`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dspref import reading
from dspref.data.formats import one_line
from dspref.errors import DataError

DEFAULT_SPLIT = "train"
# The words that `datasets` takes for the name of a split, and which of its three splits they mean there.
SYNONYMS = {
    "train": ("training",),
    "validation": ("valid", "val", "dev"),
    "test": ("testing", "eval", "evaluation"),
}
KEYWORDS = frozenset([*SYNONYMS, *(word for words in SYNONYMS.values() for word in words)])
LINE_FORMATS = (".jsonl", ".json", ".ndjson", ".csv")
SUFFIXES = (*LINE_FORMATS, *(suffix + ".gz" for suffix in LINE_FORMATS), ".parquet")
# What a name has behind that of its split: -00000-of-00002, -00000-of-00002-<hash>, _3, .part-07
SHARD = re.compile(r"(([-_. ]*(part|shard|chunk)[-_. ]*|[-_. ]+)\d+([-_. ]of[-_. ]\d+)?(-[0-9a-f]{16})?)$")
SHARD_OF = re.compile(r"-\d+-of-\d+(-[0-9a-f]{16})?$")
VERSION = re.compile(r"[-_. ]v\d+([._]\d+)*$", re.I)
# What a name says behind a split that does not make another split of it: my_train_set.
SET = re.compile(r"([-_. ]*(data)?set|[-_. ](data|split|file)s?)$", re.I)
TERM = re.compile(r"(?P<name>[^\[\]\s]+?)(\[(?P<start>-?[\d_]+%?)?:(?P<stop>-?[\d_]+%?)?\])?")
PERCENT = re.compile(r"-?[\d_]+%")
# What lies beside data and is none, as `datasets` has it.
NOT_DATA = frozenset(["config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"])
MAX_README_BYTES = 2**20
LISTED = 20
# Number and count of a shard.
NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})(?=\D|$)")


def unusable(where: object, reason: str, fix: str) -> DataError:
    return DataError(f"{one_line(where)}: {one_line(reason)}; fix: {one_line(fix, 1000)}")


# ------------------------------------------------------------------------------------------------ the notation


class Term(NamedTuple):
    """One part of `train[10%:]+test`: a split, and of its rows those from `start` to `stop` (None: the end)."""

    name: str
    start: str | None = None
    stop: str | None = None

    @property
    def is_slice(self) -> bool:
        return self[1:] != (None, None)

    @property
    def rest(self) -> str | None:
        """The other rows of the split, in the notation; None where they are no slice of it."""
        if not self.is_slice or None not in self[1:]:
            return None
        return f"{self.name}[{self.stop}:]" if self.start is None else f"{self.name}[:{self.start}]"

    @property
    def needs_count(self) -> bool:
        """Whether the rows must be counted first: a share of them, or places counted from their end."""
        return any(bound is not None and ("%" in bound or bound.startswith("-")) for bound in self[1:])

    def bounds(self, count: int | None) -> tuple[int, int | None]:
        """First row and the row behind the last; `count`: all rows, where that is needed. Shares are rounded to the closest
        row, as `datasets` has it."""
        start, stop = (None if bound is None else self._place(bound, count) for bound in self[1:])
        return start or 0, stop

    @staticmethod
    def _place(bound: str, count: int | None) -> int:
        number = int(bound.rstrip("%"))
        if "%" in bound:
            number = round(number * (count or 0) / 100)
        return number if number >= 0 and not bound.startswith("-") else max(0, (count or 0) + number)


def parse(split: str, where: str) -> list[Term]:
    """`train`, `train[:100]`, `train[10%:]`, `train+test`, as `datasets` writes it. Raises DataError for anything else."""
    terms = []
    for text in re.split(r"\s*\+\s*", split.strip()):
        match = TERM.fullmatch(text)
        bounds = [match["start"], match["stop"]] if match else []
        given = [bound for bound in bounds if bound]
        if match is None or (mixed := len({"%" in bound for bound in given}) > 1):
            reason = "mixes rows and percent" if match and mixed else "not a split"
            raise unusable(where, f"split {split!r}: {reason}", "write train, train[:1000], train[10%:] or train+test")
        if any(PERCENT.fullmatch(bound) and abs(int(bound[:-1])) > 100 for bound in given):
            raise unusable(where, f"split {split!r}: more than 100 %", "write a share such as train[:90%]")
        terms.append(Term(match["name"], *bounds))
    return terms


# -------------------------------------------------------------------------------------------- names of files


class Named(NamedTuple):
    """A file of a folder: the split that its name or its folders say (two where they disagree), and the folders before."""

    path: Path
    splits: tuple[str, ...]
    config: str


def split_in(name: str) -> str | None:
    """The split in the name of a file or folder, without its ending: `train_prefs` in `uf-train_prefs-00000-of-00001`.

    It begins at a word that `datasets` knows and goes on to the end, so that `train` is not `train_prefs`.
    """
    bare = _without_shard(name)
    words = (word for word in re.finditer(r"[^\W_]+", bare) if word.group().casefold() in KEYWORDS)
    found = next(words, None)
    return bare[found.start() :] if found else None


def _without_shard(name: str) -> str:
    while (shorter := SHARD.sub("", name)) != name:
        name = shorter
    return name


def name_of(path: Path, root: Path) -> Named:
    """What the name of a file below `root` says."""
    ending = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")
    stem = path.name[: len(path.name) - len(ending)]
    folders = list(path.relative_to(root).parts[:-1])
    by_name = split_in(stem)
    at = next((k for k in reversed(range(len(folders))) if split_in(folders[k])), None)
    by_folder = split_in(folders[at]) if at is not None else None
    if by_name is None and by_folder is None:
        if path.parent.name == "data" and SHARD_OF.search(stem) and SHARD_OF.sub("", stem):
            by_name = SHARD_OF.sub("", stem)  # any name is a split in that layout of the hub
        elif re.fullmatch(r"\d{4}", stem) and path.name.endswith(".parquet") and folders:
            at, by_folder = len(folders) - 1, folders[-1]  # as it is in the hub's own parquet copies
    before = folders[:at] if at is not None else folders
    found = tuple(dict.fromkeys(split for split in (by_folder, by_name) if split))
    return Named(path, found, "/".join(folder for folder in before if folder != "data"))


def choose(
    files: Sequence[Named], split: str, where: str, only: bool = False, asked_for: bool = False, declared: bool = False
) -> list[Path]:
    """The files of a split, whichever of the words for it they have, unless their splits are `declared`. `only`: the split
    was not written, so that where all are of one, that is meant, and none may be left out whose name says none.
    `asked_for`: the files themselves were, by a pattern, so that all that have the split are meant, in whatever folder and
    with whatever shards.

    Raises DataError where there are none, where names disagree, where several configs have this split, and where shards of
    it are missing.
    """
    there = list(dict.fromkeys(name for file in files for name in file.splits))
    if not there:
        if split == DEFAULT_SPLIT:
            return [file.path for file in files]
        listed = ", ".join(file.path.name for file in files[:LISTED])
        raise unusable(where, f"no split {split!r}: no file's name says a split ({listed})", "name the file in path")
    wanted = there if only and len(there) == 1 else _meant(split, there, declared)
    if not wanted:
        raise unusable(where, f"no split {split!r}", f"set split to one of {', '.join(sorted(there)[:LISTED])}")
    found = [file for file in files if any(_same(name, one) for name in file.splits for one in wanted)]
    if unclear := next((file for file in found if len(set(map(_plain, file.splits))) > 1), None):
        folder, name = unclear.splits
        reason = f"its folder says split {folder}, its name says {name}"
        raise unusable(unclear.path, reason, "give the path of the folder or of the files that you mean")
    if asked_for:
        if only and (unsaid := next((file for file in files if not file.splits), None)):
            reason = f"{unsaid.path.name} says no split, and others say {wanted[0]}"
            raise unusable(where, reason, f"write split: {wanted[0]} for those alone, or a list of sources")
        return [file.path for file in found]
    configs = sorted({file.config for file in found})
    if len(configs) > 1:
        raise several(where, [config or "." for config in configs])
    _refuse_missing_shards([file.path for file in found])
    return [file.path for file in found]


def _refuse_missing_shards(paths: Sequence[Path]) -> None:
    """Raise DataError where `-00000-of-00002` is there, and `-00001-of-00002` is not."""
    there: dict[tuple[Path, str, int], set[int]] = {}
    for path in paths:
        if match := NUMBERED.search(path.name):
            there.setdefault((path.parent, path.name[: match.start()], int(match[2])), set()).add(int(match[1]))
    for (folder, stem, count), numbers in there.items():
        if missing := sorted(set(range(count)) - numbers):
            reason = f"{len(missing)} of {count} shards of {stem} are missing, the first is {missing[0]:05}"
            raise unusable(folder, reason, "fetch them, or name the files that you mean by a pattern")


def left_out(files: Sequence[Named], chosen: Sequence[Path], split: str) -> list[str]:
    """The names of files that are in no split, or begin theirs with the word for this one, and were not chosen."""
    taken, word = set(chosen), SYNONYMS.get(split.casefold(), ())
    begins = re.compile("|".join(map(re.escape, (split, *word))), re.I)
    return [file.path.name for file in files if file.path not in taken and all(map(begins.match, file.splits))]


def _meant(split: str, there: Sequence[str], declared: bool) -> Sequence[str]:
    """Those of some splits that are meant: for train, validation and test all that `datasets` has for them, one word as well
    as another."""
    if split in SYNONYMS and not declared and (same := [name for name in there if _plain(name) == split]):
        return same
    found = matching(split, there)
    return [found] if found else []


def _plain(name: str) -> str:
    """The split that the name of one means: train for training, train_set or TRAIN."""
    word = SET.sub("", name).casefold()
    return next((split for split, words in SYNONYMS.items() if word in words), word)


def matching(split: str, there: Sequence[str]) -> str | None:
    """The one of some splits that is meant: by its name, or where `datasets` would take another word for it, by that."""
    if named := [name for name in there if _same(name, split)]:
        return named[0]
    # `pairs_train_v2.jsonl` is the split train, as long as there is no other version of it.
    versions = [name for name in there if _same(VERSION.sub("", name), split)]
    meant = (split, *SYNONYMS.get(split, ()))
    other = versions or [name for name in there if VERSION.sub("", name).casefold() in meant]
    return other[0] if len({name.casefold() for name in other}) == 1 else None


def _same(one: str, other: str) -> bool:
    return one.casefold() == other.casefold()


def several(where: object, configs: Sequence[str]) -> DataError:
    listed = ", ".join(map(str, configs[:LISTED]))
    return unusable(where, f"holds several data sets ({listed})", "choose one by name, or give its folder as path")


# --------------------------------------------------------------------------------------------- files of a folder


@dataclass(frozen=True)
class Found:
    """What lies below a folder: data files, and folders that `save_to_disk` wrote."""

    files: tuple[Path, ...]
    saved: tuple[Path, ...]


def is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or that of a DatasetDict wrote this folder. A `dataset_info.json` is none of its signs:
    other tools have one."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def look(root: Path) -> Found:
    """All data below a folder, sorted; hidden names are none. Raises DataError for what has a data file's name and is none,
    and OSError for a folder that cannot be read."""
    files, saved, seen = [], [], set()
    for folder, folders, names in os.walk(root, onerror=_raise, followlinks=True):
        here = Path(folder)
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()  # a link that leads back up
            continue
        seen.add(real)
        if here != root and (here / "state.json").exists():
            saved.append(here)
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not _hidden(name))
        for name in names:
            if name.lower().endswith(SUFFIXES) and name not in NOT_DATA and not _hidden(name):
                files.append(here / name)
    for path in files:
        refuse_irregular(path)
    return Found(tuple(sorted(files)), tuple(sorted(saved)))


def _raise(error: OSError) -> None:
    raise error


def _hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def refuse_irregular(path: Path) -> None:
    """Raise DataError for a device, a pipe, a socket, or a link to nothing: reading them would not end, or never begin."""
    if path.is_file():
        return
    kinds = {
        "a folder": path.is_dir, "a pipe": path.is_fifo, "a socket": path.is_socket, "a device": path.is_char_device,
        "a disk": path.is_block_device, "a link to nothing": path.is_symlink,
    }  # fmt: skip
    kind = next((words for words, holds in kinds.items() if holds()), "not there")
    raise unusable(path, f"{kind}, not a file", "write the rows to a file, and name that")


# --------------------------------------------------------------------------------------- what a README says of it


def declared(root: Path) -> dict[str, Mapping[str, Any]]:
    """The data sets that the front matter of a folder's README.md names (`configs:`), by name. Empty where it names none."""
    import yaml

    try:
        text = reading.read_text(root / "README.md", MAX_README_BYTES)
    except (OSError, UnicodeDecodeError):
        return {}
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.S)
    try:
        front = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    configs = front.get("configs") if isinstance(front, dict) else None
    named = (
        [one for one in configs or [] if isinstance(one, dict) and one.get("data_files")]
        if isinstance(configs, list)
        else []
    )
    return {str(one.get("config_name", "default")): one for one in named}


def declared_files(root: Path, config: Mapping[str, Any]) -> list[Named]:
    """The files of one data set of a README, each with its split."""
    base = root / str(config.get("data_dir") or "")
    return [
        Named(path, (split,), "")
        for split, pattern in _patterns(config["data_files"])
        for path in sorted(base.glob(pattern.removeprefix("./")))
        if path.is_file() and path.name.lower().endswith(SUFFIXES)
    ]


def _patterns(data_files: Any) -> Iterator[tuple[str, str]]:
    """(split, glob) of each entry, in the notations that `datasets` reads."""
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": paths} for split, paths in data_files.items()]
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        split, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else (None, entry)
        for path in paths if isinstance(paths, list) else [paths]:
            if isinstance(path, str) and path and not path.startswith("/") and "://" not in path and ".." not in path:
                yield str(split or DEFAULT_SPLIT), path
