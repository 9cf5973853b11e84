"""Rows whose examples stay together: lists of answers, and pairs with their gold answer. Pure, numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from dspref.data.given import SCORES
from dspref.data.plan import Groups, numbered_by_sight
from dspref.data.truncate import TokenizedPair


def starts(rows: np.ndarray) -> np.ndarray:
    """bool [n]: the first example of each row; `rows` [n] never falls."""
    return np.concatenate([np.ones(min(len(rows), 1), dtype=bool), rows[1:] != rows[:-1]])


def rows_of_sources(rows: np.ndarray, source_examples: Sequence[int]) -> list[int]:
    """Of each source, how many rows its examples are of."""
    ends = np.cumsum([0, *source_examples])
    return [int(starts(rows[a:b]).sum()) for a, b in pairwise(ends)]


def examples_of(rows: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The examples of some rows, which are numbered as they come: all of each, in order."""
    first = np.append(np.flatnonzero(starts(rows)), len(rows))
    counts = np.diff(first)[chosen]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(first[chosen], counts) + within


def numbered(rows: np.ndarray, examples: np.ndarray) -> np.ndarray:
    """A number for each of some examples, int64 [P]: equal for those of one row. Where a row is there twice, as a source of
    weight 2 has it, its second time is another one."""
    in_order = np.argsort(examples, kind="stable")
    first = starts(examples[in_order])
    times = np.arange(len(examples)) - np.flatnonzero(first)[np.cumsum(first) - 1] if len(examples) else examples
    again = np.empty(len(examples), dtype=np.int64)
    again[in_order] = times
    return again * (int(rows.max(initial=-1)) + 1) + rows[examples]


def joined(groups: Groups, numbers: np.ndarray, tokens_per_pack: int) -> Groups:
    """Groups of examples, those with the same numbers [P] together, unless there is no room for them in one pack."""
    # Of those that hang together by any example.
    together = _connected(groups.of_pair, numbers)
    tokens = np.bincount(together, groups.tokens)
    if (tokens > tokens_per_pack).any():
        large = tokens[together] > tokens_per_pack
        together = numbered_by_sight(np.where(large, len(groups.tokens) + np.arange(len(large)), together))
    sums = (np.bincount(together, column).astype(np.int64) for column in groups[1:])
    return Groups(together[groups.of_pair], *sums)


def _connected(group: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The number of a part for each group, int64 [g]: groups with an example of the same number are of one part."""
    labels = np.arange(int(group.max(initial=-1)) + 1)
    number = numbered_by_sight(numbers)
    while True:
        least = np.full(int(number.max(initial=-1)) + 1, len(labels))
        np.minimum.at(least, number, labels[group])
        found = labels.copy()
        np.minimum.at(found, group, least[number])
        if (found == labels).all():
            return numbered_by_sight(labels)
        labels = found


def left_over(
    takes: str,
    rows: Sequence[int],
    given: Sequence[Mapping[str, float]],
    kept: Sequence[TokenizedPair | None],
) -> set[int]:
    """The rows of which what is left (None: left out) is nothing to train on: of a list, answers of one score; of a pair and
    its gold answer, one of them alone. `given`: the numbers of each example."""
    if takes == "pairs":
        return set()
    kinds: dict[int, set[float | None]] = {}
    for row, numbers, pair in zip(rows, given, kept, strict=True):
        if pair is not None:
            kinds.setdefault(row, set()).update(map(numbers.get, SCORES) if takes == "list" else [len(pair.rejected) > 0])
    return {row for row, seen in kinds.items() if len(seen) < 2}
