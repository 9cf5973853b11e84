"""Rows that two sources both read: the same content, by its digest, and places in it that meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dspref.data.sources import Digest, Listing, Part, Term

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
    theirs = [reading for other in others for reading in readings(other, {known[id(part)] for part in _parts(one)}, known)]
    for own in readings(one, {known[id(reading.part)] for reading in theirs}, known):
        for other in theirs:
            if known[id(own.part)] == known[id(other.part)] and _meet(own, other):
                return Shared(own.part.name, own.term, other.term)
    return None


def _parts(listing: Listing) -> Iterator[Part]:
    yield from (part for selection in listing.selections for part in selection.parts)


def _digests(listing: Listing, digest: Digest) -> Iterator[tuple[int, str]]:
    """The digest of each part, by the part's identity."""
    yield from ((id(part), found) for part, found in zip(_parts(listing), listing.digests(digest), strict=True))


def readings(listing: Listing, wanted: set[str], known: dict[int, str]) -> Iterator[Reading]:
    """What a listing reads of parts whose digests are wanted. Rows are counted where only some of a part's are read."""
    if not any(known[id(part)] in wanted for part in _parts(listing)):
        return
    left = listing.source.max_samples
    for parts, term in listing.selections:
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
