"""Which pairs of which sources somebody means: by the row's number, as the worst of all, or drawn at random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dspref.data.rows import one_line
from dspref.data.sources import Listing
from dspref.data.splits import LISTED
from dspref.data.store import PairStore
from dspref.errors import ConfigError

# What the worst pair is worst in, in tokens. Lengths are those before truncation, so that what was cut most comes first.
WORST: dict[str, Callable[[PairStore], np.ndarray]] = {
    "length": lambda store: store.uncut[:, 0] + store.uncut[:, 1:].max(axis=1),
    "prompt": lambda store: store.uncut[:, 0],
    # Of pairs: an answer that stands alone differs from none.
    "margin": lambda store: np.where(store.scored.all(axis=1), np.abs(store.scored[:, 0] - store.scored[:, 1]), -1),
}


@dataclass(frozen=True)
class SourcePairs:
    """One source of the YAML, and its pairs: those from `first` up to `stop` of a store that may hold others' too."""

    key: str
    listing: Listing
    store: PairStore
    number: int
    """Of the source among those of the store."""
    first: int
    stop: int
    first_file: int
    """The number of its first file among those of the store."""

    @property
    def ids(self) -> np.ndarray:
        return np.arange(self.first, self.stop)


# (source, pair of its store)
Chosen = tuple[SourcePairs, int]


def sources_of(store: PairStore, listings: Sequence[Listing], keys: Sequence[str]) -> list[SourcePairs]:
    """The sources that a store was made of, in order."""
    found, first, file = [], 0, 0
    for number, (key, listing, count) in enumerate(zip(keys, listings, store.source_rows, strict=True)):
        found.append(SourcePairs(key, listing, store, number, first, first + count, file))
        first, file = first + count, file + len(listing.names)
    return found


def named(sources: Sequence[SourcePairs], name: str) -> SourcePairs:
    """The source of some that is called so: by its key in the YAML, or the end of it. Raises ConfigError."""
    for source in sources:
        if name in (source.key, source.key.rpartition(".")[2]):
            return source
    if len(sources) == 1:
        raise ConfigError(f"--source {name}: {sources[0].key} is a single source; leave --source out")
    there = ", ".join(source.key.rpartition(".")[2] for source in sources[:LISTED])
    raise ConfigError(f"--source {name}: no such source; use one of {there}")


def with_pairs(sources: Sequence[SourcePairs]) -> list[SourcePairs]:
    """Those of some sources that have a pair. Raises ConfigError where none has."""
    if not (found := [source for source in sources if source.stop > source.first]):
        raise ConfigError(f"--source {sources[0].key}: none of its rows is left; `dspref inspect` without --source says why")
    return found


def worst(sources: Sequence[SourcePairs], by: str) -> Chosen:
    """The pair that is longest, or whose answers differ most in length; the first of several. Raises ConfigError where no
    row has two answers to compare."""
    values = [(source, WORST[by](source.store)[source.first : source.stop]) for source in sources]
    source, column = max(values, key=lambda item: int(item[1].max()))
    if column.max() < 0:
        raise ConfigError(f"--worst {by}: compares two answers, and here each stands alone; use --worst length")
    return source, source.first + int(column.argmax())


def drawn(sources: Sequence[SourcePairs], count: int, seed: int) -> list[Chosen]:
    """Pairs drawn at random, each at most once, in the order of the data."""
    bounds = np.cumsum([0] + [source.stop - source.first for source in sources])
    size = min(count, int(bounds[-1]))
    places = np.sort(np.random.default_rng(seed).choice(int(bounds[-1]), size, replace=False))
    of = np.searchsorted(bounds, places, side="right") - 1
    return [(sources[k], sources[k].first + int(place - bounds[k])) for k, place in zip(of.tolist(), places.tolist())]


def first_of(sources: Sequence[SourcePairs], count: int) -> list[Chosen]:
    everything = ((source, index) for source in sources for index in range(source.first, source.stop))
    return [chosen for chosen, _ in zip(everything, range(count))]


def places_meant(sources: Sequence[SourcePairs], row: str) -> tuple[SourcePairs, list[int], int]:
    """The source, the number of the file in it, and the line that a text such as `17` or `data/train.jsonl:17` names;
    several numbers where the source reads parts of one file. Raises ConfigError where there is none, or more than one."""
    file, _, number = row.rpartition(":")
    if not (number.isascii() and number.isdigit() and int(number) > 0):
        raise ConfigError(f"--row {row}: must be a row's number, from 1, or FILE:NUMBER as messages have it")
    places = [
        (source, k, name)
        for source in sources
        for k, name in enumerate(source.listing.names)
        if not file or one_line(name) == one_line(file) or file in (Path(name).name, str(Path(name)))
    ]
    if not places:
        there = sorted({one_line(name) for source in sources for name in source.listing.names})
        raise ConfigError(f"--row {row}: no source here reads {file}; there are {', '.join(there[:LISTED])}")
    if len({source.key for source, _, _ in places}) > 1:
        names = ", ".join(dict.fromkeys(source.key.rpartition(".")[2] for source, _, _ in places))
        raise ConfigError(f"--row {row}: in which of several sources? add --source with one of {names}")
    files = list(dict.fromkeys(name for _, _, name in places))
    if len(files) > 1:
        fix = f"give it as FILE:NUMBER, such as {one_line(files[0])}:{number}"
        raise ConfigError(f"--row {row}: in which of {len(files)} files? {fix}")
    return places[0][0], [k for _, k, _ in places], int(number)
