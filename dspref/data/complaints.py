"""Why rows cannot be used: each reason once, counted, with the first places where it was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from dspref.data.rows import DROP, BadRow, Row, RowError

MAX_ERROR_LINES = 20
MAX_PLACES = 3
MAX_REASONS = 20
# So many different reasons are told apart; more come from texts that the reasons quote.
MAX_KNOWN_REASONS = 1000
OTHER = "other reasons"


class Complaint(NamedTuple):
    """One reason, and the first places where it was found."""

    error: RowError
    places: list[str]


class Complaints:
    """Reasons why rows cannot be used, counted, with the first places of each. Of two sources one reason may have two fixes,
    each with the keys of its own."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], Complaint] = {}
        self.times: Counter[tuple[str, str]] = Counter()

    @property
    def count(self) -> int:
        return self.times.total()

    def note(self, row: Row | BadRow, error: RowError) -> None:
        reason = (f"{error.field}: {error.reason}", error.fix)
        if reason not in self.found and len(self.found) >= MAX_KNOWN_REASONS:
            reason = (OTHER, "")
        complaint = self.found.setdefault(reason, Complaint(error, []))
        self.times[reason] += 1
        if len(complaint.places) < MAX_PLACES:
            complaint.places.append(row.where)

    def counts(self) -> dict[str, int]:
        times: Counter[str] = Counter()
        for (reason, _), count in self.times.items():
            times[reason] += count
        common = dict(times.most_common(MAX_REASONS))
        if other := times.total() - sum(common.values()):
            common[OTHER] = common.get(OTHER, 0) + other
        return common

    def lines(self) -> str:
        """One line for each reason: where it was found first, what it is, where else, and how to mend it."""
        lines = []
        for reason, (error, (first, *others)) in list(self.found.items())[:MAX_ERROR_LINES]:
            more = self.times[reason] - 1 - len(others)
            also = ", ".join(others) + (f" and {more} more" if more else "")
            lines.append(f"{first}: {error.field}: {error.reason}{f' (also {also})' if also else ''}; fix: {error.fix}")
        if rest := self.count - sum(self.times[reason] for reason in list(self.found)[:MAX_ERROR_LINES]):
            lines.append(f"... {rest} more bad rows")
        return "\n".join(lines)

    def fix(self) -> str:
        """How to mend the most common reason, where rows are dropped already."""
        fix = self.found[self.times.most_common(1)[0][0]].error.fix
        return "mend the rows" if fix == DROP else fix


def in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in counts.items())
