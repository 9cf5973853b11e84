"""The rows of one source become preferences.

A source speaks one way: where some rows have a column that decides what the others are, those have it too, empty. So it is
in Arrow's tables and in CSV, whose rows all have the same columns; in JSON a row may lack one. And where its answers
repeat their prompts, all do: one that says "Hi! ..." to "Hi" among others repeats nothing. A source may name a format of the
user's own: what that gives for a row stands in the row's place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from dspref.data.completions import LIST, is_ranked, to_preferences
from dspref.data.formats import Preference
from dspref.data.given import NAMES
from dspref.data.gold import REFERENCE
from dspref.data.normalise import OPTIONAL_FIELDS
from dspref.data.own_format import Given, OwnFormat, as_given, own_format
from dspref.data.row_template import columns_of
from dspref.data.rows import SYSTEM, RowError, Values, given
from dspref.data.sources import BadRow, Listing, Row, Source

# (file of its source, row)
Place = tuple[int, Row | BadRow]
Made = list[tuple[int, Preference | RowError]]


class Converter:
    """Makes preferences of the rows of a listing, a few at a time. Its files are read through once more where it depends on
    other rows what a row is: only then, and once."""

    def __init__(self, listing: Listing, chat_model: bool, decided: Mapping[str, Any] | None = None) -> None:
        """`decided`: what a converter of the same listing found, to take single rows as it did."""
        self.listing, self.source = listing, listing.source
        self.own = format_of(self.source)
        self.pairs_made = self.source.pairs in ("all", LIST)
        """Whether `pairs` has had an effect on a row, where it is set."""
        self.how = {"as_": self.source.as_, "chat_model": chat_model, "key": self.source.key}
        self.how["pair_weights"] = self.source.pair_weights
        self.lacking: dict[str, None] | None = None
        """Columns that a row has, with null, where it lacks them; None while it has not been looked for them."""
        self.repeated: bool | None = None
        """Whether the answers of conversations that are made of texts repeat their prompts; None before the first."""
        if decided is not None:
            self.lacking = None if decided["lacking"] is None else dict.fromkeys(decided["lacking"])
            self.repeated = decided["repeated"]

    @property
    def decided(self) -> dict[str, Any]:
        """What hangs on other rows, as found so far."""
        return {"lacking": None if self.lacking is None else sorted(self.lacking), "repeated": self.repeated}

    def __call__(self, rows: Sequence[Place]) -> Made:
        """(row, preference or why there is none) of each pair of some rows."""
        made = self._all(rows)
        if self.lacking is None and any(self._hangs_on_others(rows[k][1], item) for k, item in made):
            self.lacking = dict.fromkeys(sorted(self._columns(self._decisive())))
            made = self._all(rows) if self.lacking else made
        spoken = [item for _, item in made if isinstance(item, Preference) and item.begins is not None]
        if self.repeated is None and spoken:
            # One prompt alone shows little: both may begin with a word of it by chance, but not as a text apart.
            prompts = {str(item.prompt[-1]) for item in spoken}
            self.repeated = all(item.begins and (item.parted or len(prompts) > 1) for item in spoken)
            made = made if self.repeated else self._all(rows)
        return made

    def _decisive(self) -> set[str]:
        named = given(self.source.columns)
        own = {named[field] for field in ("system", *OPTIONAL_FIELDS, *NAMES) if field in named}
        if self.source.template:
            return own | columns_of(self.source.template)
        return own | ({*SYSTEM} - set(named.values()))

    def _hangs_on_others(self, row: Row | BadRow, item: Preference | RowError) -> bool:
        """Whether a row might be something else with a column that it lacks: a text might be a conversation, and what is
        missing might be null."""
        if isinstance(row, BadRow) or isinstance(item, RowError):
            by_function = self.own is not None and isinstance(item, RowError) and item.field == self.own.name
            return isinstance(row, Row) and not by_function
        return isinstance(item.prompt, str) and not self.source.template and self.source.as_ is None

    def _columns(self, wanted: set[str]) -> set[str]:
        """Which of some columns there are in any row of the source, as its format gives it."""
        if self.own is None:
            return self.listing.columns(wanted)
        rows = (row for _, row in self.listing.rows() if isinstance(row, Row))
        items = (item for row in rows for item in _given(row.values, self.own))
        return {name for item in items if isinstance(item, Given) for name in wanted & item.values.keys()}

    def _all(self, rows: Sequence[Place]) -> Made:
        return [(k, item) for k, (_, row) in enumerate(rows) for item in self._one(row)]

    def _one(self, row: Row | BadRow) -> Sequence[Preference | RowError]:
        if isinstance(row, BadRow):
            return [row.error]
        how: dict[str, Any] = {**self.how, "repeated": self.repeated is not False}
        if not self.pairs_made:
            items = (item for item in _given(row.values, self.own) if isinstance(item, Given))
            self.pairs_made = any(is_ranked(item.values, self.source.columns) for item in items)
        return pairs_of(row.values, self.source, self.own, self.lacking or {}, **how)


def format_of(source: Source) -> OwnFormat | None:
    """The format of the user's own that a source names. Raises ConfigError."""
    return own_format(source.format, source.key) if source.format else None


def pairs_of(
    values: Values, source: Source, own: OwnFormat | None, lacking: Mapping[str, None] = MappingProxyType({}), **how: Any
) -> list[Preference | RowError]:
    """Each pair of a raw row, or why there is none. `own`: the source's `format_of`; `lacking`: columns that the row has, as
    null, where it lacks them. Takes what `to_preferences` does."""
    made: list[Preference | RowError] = []
    items = _given(values, own)
    if own is not None and source.takes != "pairs" and len(items) > 1:
        fix = "give one dict for each row, with all of its answers (completions and scores)"
        return [RowError(own.name, f"gave {len(items)} rows for one, and all that a row gives is one list or one pair", fix)]
    for item in items:
        made += [item] if isinstance(item, RowError) else _pairs_of(item, source, own, lacking, how)
    return made


def _given(values: Values, own: OwnFormat | None) -> list[Given | RowError]:
    """The row itself, or what the user's format gives for it."""
    try:
        return [Given(values)] if own is None else own(values)
    except RowError as error:
        return [error]


def _pairs_of(
    item: Given, source: Source, own: OwnFormat | None, lacking: Mapping[str, None], how: Mapping[str, Any]
) -> list[Preference | RowError]:
    how = {**how, "repeated": False} if item.literal else how
    columns = source.columns
    if own is not None:
        read = (*NAMES, REFERENCE)
        columns = item.columns | {name: column for name, column in (source.columns or {}).items() if name in read}
    values = {**lacking, **item.values} if lacking else item.values
    made: list[Preference | RowError]
    try:
        made = to_preferences(values, columns, source.template, source.pairs, **how)
    except RowError as error:
        made = [error]
    if item.literal:
        made = [one if isinstance(one, RowError) else as_given(one, item) for one in made]
    return made if own is None else [own.of(one) if isinstance(one, RowError) else one for one in made]
