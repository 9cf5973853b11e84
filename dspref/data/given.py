"""Numbers that a row gives beside its pair: a weight, a target margin, the score of each answer.

They are read where the user, or something that the run does with them, names their columns; no token depends on them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any

from dspref.data.rows import RowError, Values, find, missing

SCORES = ("score_chosen", "score_rejected")
NAMES = ("weight", "margin", *SCORES)
"""The columns of `given.npy`, in order."""
# A number as text. What is more than that, such as `4/5` or `N/A`, is for the user to read.
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.A)
# In 32 bits.
LARGEST = 3.4028234663852886e38
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
