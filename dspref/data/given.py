"""Numbers that a row gives beside its pair: a weight, a target margin, the score of each answer.

They are read where the user, or something that the run does with them, names their columns; no token depends on them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from dspref.data.cache import Column
from dspref.data.rows import RowError, Values, find, missing

SCORES = ("score_chosen", "score_rejected")
NAMES = ("weight", "margin", *SCORES)
"""The columns of `given.npy`, in order."""
# What stands for the number of a pair without one; scores are never read of such a pair.
ABSENT = {"weight": 1.0, "margin": 0.0}
# A number as text. What is more than that, such as `4/5` or `N/A`, is for the user to read.
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.A)
LARGEST = float(np.finfo(np.float32).max)
OF_RANKS = "a rank says which answer is the better one, and not by how much: name columns of scores"


def number_of(value: Any, place: str) -> float:
    """A finite number; one that is written as text, too. Raises RowError."""
    value = float(value) if isinstance(value, str) and NUMBER.fullmatch(value.strip()) else value
    try:
        if not isinstance(value, bool) and isfinite(value):
            return float(value)
    except (TypeError, OverflowError):
        pass
    raise RowError(place, f"not a finite number: {value!r}")


def given_in(values: Values, named: Mapping[str, str]) -> dict[str, float]:
    """The numbers that a row has in the columns named for them. Scores of both answers are needed where either is named; a
    weight or a margin may be null. Raises RowError."""
    return {name: value for name in NAMES if name in named and (value := _number_in(values, name, named[name])) is not None}


def _number_in(values: Values, name: str, column: str) -> float | None:
    there, value = find(values, column)
    needed = name in SCORES
    if not there:
        error = missing(name, values, column)
        raise RowError(name, f"scores of both answers are read, and there is {error.reason}", error.fix) if needed else error
    if value is None or (isinstance(value, str) and not value.strip()):
        if needed:
            raise RowError(column, "null, and the scores of both answers are read")
        return None
    number = within_reach(number_of(value, column), column)
    if name == "weight" and number < 0:
        raise RowError(column, f"a weight below 0: {number:g}")
    return number


def within_reach(number: float, place: str) -> float:
    """A number, if it is one in 32 bits too."""
    if abs(number) > LARGEST:
        raise RowError(place, f"too large: {number:g}")
    return number


def of_scores(chosen: float, rejected: float) -> dict[str, float]:
    """The scores of a pair that is made of scored answers."""
    return {name: within_reach(score, "scores") for name, score in zip(SCORES, (chosen, rejected))}


def with_gap(found: Mapping[str, float]) -> dict[str, float]:
    """The numbers of a pair that weighs as much as its scores are apart. Raises RowError where that is below 0."""
    chosen, rejected = (found[name] for name in SCORES)
    if rejected > chosen:
        raise RowError(SCORES[1], f"{rejected:g} is above score_chosen, {chosen:g}: the pair would weigh less than nothing")
    return {**found, "weight": within_reach(chosen - rejected, SCORES[0])}


class GivenColumn(Column):
    """`given.npy`, float32 [n, 4]: NaN where a row has no such number."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, np.float32, len(NAMES))
        self.is_empty = True

    def append(self, values: Sequence[Mapping[str, float]]) -> None:
        self.is_empty &= not any(values)
        super().append([[numbers.get(name, np.nan) for name in NAMES] for numbers in values])

    @property
    def content_columns(self) -> list[Column]:
        """Itself, where it is part of what a run trains on."""
        return [] if self.is_empty else [self]

    def close(self) -> None:
        """As of any column; a file without a number goes, so that stores of such rows are what they were."""
        super().close()
        if self.is_empty:
            self.path.unlink()


class Given:
    """What the rows of a store give: a number for every pair, by name, of those that some row has."""

    def __init__(self, path: Path | None, count: int) -> None:
        table = np.load(path, allow_pickle=False) if path else np.empty((count, 0), dtype=np.float32)
        if len(table) != count:
            raise ValueError("given.npy is of other pairs")
        there = {name: column for name, column in zip(NAMES, table.T) if not np.isnan(column).all()}
        self.columns: dict[str, np.ndarray] = {
            name: np.nan_to_num(column, nan=ABSENT.get(name, np.nan)) for name, column in there.items()
        }
        """float32 [n] each."""

    def of(self, pairs: Sequence[int]) -> dict[str, np.ndarray]:
        """float32 [P] each, of some pairs."""
        return {name: column[list(pairs)] for name, column in self.columns.items()}
