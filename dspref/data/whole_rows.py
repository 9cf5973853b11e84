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


def joined(single: Groups, numbers: np.ndarray, tokens_per_pack: int) -> Groups:
    """Groups of one example each: those with the same number [P] as one group, unless there is no room for it in a pack."""
    together = numbered_by_sight(numbers)
    large = (np.bincount(together, single.tokens) > tokens_per_pack)[together]
    together = numbered_by_sight(np.where(large, len(large) + np.arange(len(large)), together))
    return Groups(together, *(np.bincount(together, column).astype(np.int64) for column in single[1:]))


def repeated(rows: Sequence[int], kept: Sequence[TokenizedPair | None]) -> list[int]:
    """Which examples are an answer that their row has before already, token by token."""
    seen: set[tuple[int, bytes]] = set()
    found = []
    for n, (row, pair) in enumerate(zip(rows, kept, strict=True)):
        if pair is None or (len(pair.chosen) and len(pair.rejected)):
            continue
        content = (row, (pair.chosen if len(pair.chosen) else pair.rejected).tobytes())
        found += [n] if content in seen else []
        seen.add(content)
    return found


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
