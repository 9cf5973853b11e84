"""The rows of one source become preferences.

A source speaks one way: where some rows have a column that decides what the others are, those have it too, empty. So it is
in Arrow's tables and in CSV, whose rows all have the same columns; in JSON a row may lack one. And where its answers
repeat their prompts, all do: one that says "Hi! ..." to "Hi" among others repeats nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dspref.data.completions import to_preferences
from dspref.data.formats import Preference
from dspref.data.given import NAMES
from dspref.data.normalise import OPTIONAL_FIELDS
from dspref.data.row_template import columns_of
from dspref.data.rows import SYSTEM, RowError, given
from dspref.data.sources import BadRow, Listing, Row

# (file of its source, row)
Place = tuple[int, Row | BadRow]
Made = list[tuple[int, Preference | RowError]]


class Converter:
    """Makes preferences of the rows of a listing, a few at a time. Its files are read through once more where it depends on
    other rows what a row is: only then, and once."""

    def __init__(self, listing: Listing, chat_model: bool, decided: Mapping[str, Any] | None = None) -> None:
        """`decided`: what a converter of the same listing found, to take single rows as it did."""
        self.listing, self.source = listing, listing.source
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
            self.lacking = dict.fromkeys(sorted(self.listing.columns(self._decisive())))
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
            return isinstance(row, Row)
        return isinstance(item.prompt, str) and not self.source.template and self.source.as_ is None

    def _all(self, rows: Sequence[Place]) -> Made:
        return [(k, item) for k, (_, row) in enumerate(rows) for item in self._one(row)]

    def _one(self, row: Row | BadRow) -> Sequence[Preference | RowError]:
        if isinstance(row, BadRow):
            return [row.error]
        values: dict[str, Any] = {**self.lacking, **row.values} if self.lacking else row.values
        how: dict[str, Any] = {**self.how, "repeated": self.repeated is not False}
        try:
            return to_preferences(values, self.source.columns, self.source.template, self.source.pairs, **how)
        except RowError as error:
            return [error]
