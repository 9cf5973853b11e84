"""Rows that two sources both read: the same rows, however their files are written, and places in them that meet.

Files of one digest are the same. Of others the first rows are compared, and the next only as long as these agree: of files
that differ, next to nothing is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple

from dspref.data.converting import format_of, pairs_of
from dspref.data.rowfiles import without_nulls
from dspref.data.rows import RowError
from dspref.data.sources import BadRow, Digest, Listing, Part, Row, Source, Term
from dspref.errors import ConfigError

EVERYTHING = (0, None)


class Reading(NamedTuple):
    """Rows `first` to `stop` (None: its end) of a file or table, read as part of the split that `term` names."""

    part: Part
    term: Term
    first: int
    stop: int | None


class Shared(NamedTuple):
    """A file or table that a listing reads, and as which part of its split; and as which part another one reads it."""

    name: str
    term: Term
    other: Term


def shared(one: Listing, others: Sequence[Listing], digest: Digest) -> Shared | None:
    """The first file or table some of whose rows a listing and one of the others read, wherever they lie and by whatever
    name; None where there is none."""
    known = {part: found for listing in (one, *others) for part, found in _digests(listing, digest)}
    _find_copies(one, others, known)
    theirs = [reading for other in others for reading in readings(other, {known[id(part)] for part in _parts(one)}, known)]
    for own in readings(one, {known[id(reading.part)] for reading in theirs}, known):
        for other in theirs:
            if known[id(own.part)] == known[id(other.part)] and _meet(own, other):
                return Shared(own.part.name, own.term, other.term)
    same = next((other for other in others if _is_split_anew(one, other)), None)
    return same and Shared(one.source.path, one.selections[0].term, same.selections[0].term)


def _parts(listing: Listing) -> Iterator[Part]:
    yield from (part for selection in listing.selections for part in selection.parts)


def _digests(listing: Listing, digest: Digest) -> Iterator[tuple[int, str]]:
    """The digest of each part, by the part's identity."""
    yield from ((id(part), found) for part, found in zip(_parts(listing), listing.digests(digest), strict=True))


def _find_copies(one: Listing, others: Sequence[Listing], known: dict[int, str]) -> None:
    """Give parts of two listings one digest in `known` where they hold the same rows in one order, written in two ways."""
    parts = [(part, listing.source) for listing in others for part in _parts(listing)]
    if all(known[id(own)] == known[id(part)] for own in _parts(one) for part, _ in parts):
        return
    first = {id(part): next(_rows(part, source), None) for part, source in parts}
    for own in _parts(one):
        begins = next(_rows(own, one.source), None)
        for part, source in parts:
            if known[id(own)] == known[id(part)] or begins != first[id(part)]:
                continue
            if _same_rows(_rows(own, one.source), _rows(part, source)):
                former = known[id(part)]
                known |= {key: known[id(own)] for key, found in known.items() if found == former}


def _is_split_anew(one: Listing, other: Listing) -> bool:
    """Whether two listings that are read whole hold the same rows in one order, in files that end at other places."""
    both = [list(_parts(listing)) for listing in (one, other)]
    whole = all(
        listing.source.max_samples is None and not any(selection.term.is_slice for selection in listing.selections)
        for listing in (one, other)
    )
    if not whole or len(both[0]) == len(both[1]) == 1:
        return False
    return _same_rows(*(_all_rows(listing, parts) for listing, parts in zip((one, other), both)))


def _all_rows(listing: Listing, parts: Iterable[Part]) -> Iterator[Any]:
    return chain.from_iterable(_rows(part, listing.source) for part in parts)


def _same_rows(one: Iterable[Any], other: Iterable[Any]) -> bool:
    return all(left == right for left, right in zip_longest(one, other))


def _rows(part: Part, source: Source) -> Iterator[Any]:
    """What each row of a part says: its pairs, or where it has none, its values."""
    for row in part.rows():
        yield row.error.reason if isinstance(row, BadRow) else _said(row, source)


def _said(row: Row, source: Source) -> Any:
    try:
        made = pairs_of(row.values, source, format_of(source), as_=source.as_)
    except (RowError, ConfigError):  # a template that is wrong is told where it is used
        made = []
    if made and not any(isinstance(item, RowError) for item in made):
        return made
    return {name: without_nulls(value) for name, value in row.values.items() if value is not None}


def readings(listing: Listing, wanted: set[str], known: dict[int, str]) -> Iterator[Reading]:
    """What a listing reads of parts whose digests are wanted. Rows are counted where only some of a part's are read."""
    if not any(known[id(part)] in wanted for part in _parts(listing)):
        return
    left = listing.source.max_samples
    for parts, term, _ in listing.selections:
        if left is None and term[1:] == (None, None):
            yield from (Reading(part, term, *EVERYTHING) for part in parts)
            continue
        counts = [part.count if part.count is not None else sum(1 for _ in part.rows()) for part in parts]
        first, stop = term.bounds(sum(counts))
        stop = min(sum(counts) if stop is None else stop, sum(counts), *([] if left is None else [first + left]))
        left = None if left is None else left - max(0, stop - first)
        before = 0
        for part, count in zip(parts, counts):
            yield Reading(part, term, max(first - before, 0), max(min(stop - before, count), 0))
            before += count


def _meet(one: Reading, other: Reading) -> bool:
    stops = [reading.stop for reading in (one, other) if reading.stop is not None]
    first = max(one.first, other.first)
    return all(first < stop for stop in stops)
