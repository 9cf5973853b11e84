"""The row that a pair of a store was made of, read again; and the pair as it was before it was cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dspref.data.building import Reader
from dspref.data.converting import Converter
from dspref.data.formats import Preference, within_reason
from dspref.data.one_prompt import alike, longest
from dspref.data.rows import BadRow, Row, RowError
from dspref.data.sources import Listing
from dspref.data.template import render
from dspref.data.tokenize import Whole, ids_of, split
from dspref.data.truncate import Limits, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# (number of a file in its source, line)
Place = tuple[int, int]


class Origin(NamedTuple):
    """A raw row, the pair of texts or messages in it, and the same as tokens before truncation; and the longest answer of
    the row, where all that it gives belongs together."""

    values: dict[str, Any]
    preference: Preference
    whole: Whole
    beside: int = 0


def rows_at(listing: Listing, places: Iterable[Place]) -> dict[Place, Row | BadRow]:
    """The rows at some places of a source, as far as there are such. Each file is read once, up to the last of them."""
    parts = [part for selection in listing.selections for part in selection.parts]
    found: dict[Place, Row | BadRow] = {}
    wanted: dict[int, set[int]] = {}
    for file, line in places:
        wanted.setdefault(file, set()).add(line)
    for file, lines in wanted.items():
        last = max(lines)
        for row in parts[file].rows():
            if row.line in lines:
                found[file, row.line] = row
            if row.line >= last:
                break
    return found


class Again:
    """Makes pairs of single rows of a source, as they were made for the store. `decided`: what its report says of that."""

    def __init__(
        self, listing: Listing, tokenizer: PreTrainedTokenizerBase, scored: str, decided: Mapping[str, Any]
    ) -> None:
        self.reader = Reader.of(tokenizer, scored)
        self.convert = Converter(listing, tokenizer.chat_template is not None, decided)

    def __call__(self, row: Row | BadRow) -> list[Origin | RowError]:
        """The pairs of a row, or why there are none."""
        reader = self.reader
        made = [reader.looked(within_reason(item), row) for _, item in self.convert([(0, row)])]
        texts = [render(item, reader.tokenizer, reader.learned, reader.scored) for item in made]
        takes, of_row = self.convert.source.takes, [0] * len(texts)
        wholes = alike(takes, of_row, split(texts, ids_of(texts, reader.encoder), reader.encoder))
        beside = longest(takes, of_row, wholes)[0]
        return [
            Origin(row.values, item, whole, beside)
            if isinstance(row, Row) and isinstance(item, Preference) and isinstance(whole, Whole)
            else whole
            for item, whole in zip(made, wholes, strict=True)
            if isinstance(whole, RowError) or isinstance(item, Preference)
        ]  # pyright: ignore[reportReturnType]


def origin_of(pair: TokenizedPair, made: Iterable[Origin | RowError], limits: Limits) -> Origin | None:
    """The one of a row's pairs that became this one; None where none does, as under a template that writes the time."""
    for origin in made:
        if isinstance(origin, RowError):
            continue
        try:
            cut = origin.whole.cut(limits, origin.beside)
        except RowError:
            continue
        if all(np.array_equal(one, other) for one, other in zip(pair[:3], cut[:3])):
            return origin
    return None


def why_left_out(made: Iterable[Origin | RowError], limits: Limits) -> list[RowError]:
    """The reasons why pairs of a row are not in the store."""
    reasons: list[RowError] = []
    for item in made:
        try:
            if isinstance(item, RowError):
                raise item
            item.whole.cut(limits, item.beside)
        except RowError as error:
            reasons.append(error)
    return reasons
