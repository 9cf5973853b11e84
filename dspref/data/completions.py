"""A row of several scored answers becomes pairs: each that `PAIRINGS` names, in the better answer's favour."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from math import isfinite
from typing import Any

from dspref.data.formats import (
    FIELDS,
    Columns,
    Preference,
    RowError,
    Text,
    Values,
    close_name,
    is_blank,
    kind_of,
    messages_of,
    stripped,
    to_preference,
)

RANKED_FIELDS = ("completions", "scores")

# Which of n answers, best first, make a pair. All pairs: InstructGPT (Ouyang et al. 2022, arXiv:2203.02155, section 3.5).
PAIRINGS: dict[str, Callable[[int], list[tuple[int, int]]]] = {
    "all": lambda n: list(combinations(range(n), 2)),
    "best_against_rest": lambda n: [(0, j) for j in range(1, n)],
    "best_against_worst": lambda n: [(0, n - 1)] if n > 1 else [],
}


def to_preferences(
    values: Values,
    columns: Columns | None = None,
    template: Mapping[str, str] | None = None,
    pairs: str = "all",
) -> list[Preference | RowError]:
    """Convert one raw row, which may hold several scored answers instead of two ranked ones: `pairs` says which of them
    make a pair (all | best_against_rest | best_against_worst). An answer that cannot be used is an error in its place, and
    the others make pairs. Raises as `to_preference` does."""
    names = {field: (columns or {}).get(field, field) for field in (*FIELDS, *RANKED_FIELDS)}
    if template or names["chosen"] in values or not _is_ranked(values, names):
        return [to_preference(values, columns, template)]
    answers, errors = ranked(values, names)
    candidates = [(*answers[i], *answers[j]) for i, j in PAIRINGS[pairs](len(answers))]
    # An answer that was sampled twice may have two scores; it is not better than itself.
    kept = [(best, worst) for high, best, low, worst in candidates if high > low and stripped(best) != stripped(worst)]
    if not kept and not errors:
        raise RowError(names["scores"], "no answer is better than another", droppable=True)
    made = [to_preference({**values, names["chosen"]: a, names["rejected"]: b}, columns) for a, b in kept]
    return [*errors, *made]


def _is_ranked(values: Values, names: Mapping[str, str]) -> bool:
    given = any(names[field] != field for field in RANKED_FIELDS)
    return given or names["completions"] in values


def ranked(values: Values, names: Mapping[str, str]) -> tuple[list[tuple[float, Text]], list[RowError]]:
    """(score, answer) of a row's answers, best first, equal scores in the order of the row, and errors for those that cannot
    be used; what has no score is left out."""
    completions, scores = (_items(values, names[field], field) for field in RANKED_FIELDS)
    if len(completions) != len(scores):
        raise RowError(names["scores"], f"{len(scores)} scores for {len(completions)} completions")
    known, errors = [], []
    for number, (score, completion) in enumerate(zip(scores, completions)):
        if score is None:
            continue
        try:
            place = f"{names['scores']}[{number}]"
            known.append((_score(score, place), _answer(completion, f"{names['completions']}[{number}]")))
        except RowError as error:
            errors.append(error)
    return sorted(known, key=lambda scored: -scored[0]), errors


def _score(value: Any, place: str) -> float:
    try:
        if not isinstance(value, bool) and isfinite(value):
            return float(value)
    except (TypeError, OverflowError):
        pass
    raise RowError(place, f"not a finite number: {value!r}")


def _answer(value: Any, place: str) -> Text:
    """One of several answers: a text, a message list, or a single message."""
    answer = [value] if isinstance(value, dict) else value
    if kind_of(answer) == "other":
        raise RowError(place, f"{type(answer).__name__}, not text or a message list")
    answer = answer if isinstance(answer, str) else messages_of(answer, place)
    if is_blank(answer):
        raise RowError(place, "empty answer")
    return answer


def _items(values: Values, name: str, field: str) -> list[Any]:
    """The items of a column that holds a list; of `column.key`, that key of each item."""
    column, _, key = name.partition(".") if name not in values else (name, "", "")
    if column not in values:
        close = close_name(column, values)
        fix = f"did you mean {close!r}? " if close else ""
        raise RowError(field, f"no column {column!r} among {sorted(values)}", f"{fix}set data.columns.{field}")
    items = values[column]
    if not isinstance(items, list) or not items:
        raise RowError(column, "an empty list" if items == [] else f"{type(items).__name__}, not a list")
    if key and not all(isinstance(item, dict) and key in item for item in items):
        raise RowError(column, f"an item without {key!r}", f"set data.columns.{field}")
    return [item[key] for item in items] if key else items
