"""Rows become the files of a store, chunk by chunk: of all that is read, only what is in work is in memory."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dspref.data.ahead import ahead
from dspref.data.apart import start_of
from dspref.data.cache import Column, seal
from dspref.data.complaints import Complaints, in_words
from dspref.data.converting import Converter, Place
from dspref.data.formats import Preference, within_reason
from dspref.data.given_store import GivenColumn
from dspref.data.image_files import Picture, folder_of, look_at
from dspref.data.image_store import ImageWriter
from dspref.data.manners import Learned
from dspref.data.one_prompt import alike, longest
from dspref.data.pieces import Encoder
from dspref.data.rows import BadRow, Row, RowError, one_line
from dspref.data.sameness import content_of, numbered
from dspref.data.sources import Listing, Source
from dspref.data.template import Rendering, render
from dspref.data.tokenize import Ids, Whole, ids_of, split
from dspref.data.truncate import Limits, TokenizedPair, in_force
from dspref.data.whole_rows import left_over, repeated
from dspref.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows that are read, rendered, encoded or written at a time, each of these while the next rows are in the step before.
CHUNK_ROWS = 128
TELL_EVERY_SECONDS = 20.0
PARTS = ("prompt", "chosen", "rejected")
AGAIN = "equal to an answer of its list with a score as high or higher"
REST = "what is left of the row compares no two answers"
REPEATED = "prompt, or end of it, that an answer repeated and lost"
KEPT = "pair of text whose answers both begin with the prompt's, and keep it, as not all rows (or those of one prompt) do so"
AS_TEXT = (
    "pair of plain text, for a tokenizer with a chat template (as: chat makes conversations of them, as: text is silent)"
)

Log = Callable[[str], None]


class Chunk(NamedTuple):
    """Some rows, and of each pair that they give the row in the chunk, its texts, and the numbers beside these."""

    rows: Sequence[Place]
    of: list[int]
    texts: list[Rendering | RowError]
    given: list[Mapping[str, float]]


def build(
    listings: Sequence[Listing],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    scored: str,
    on_bad_row: str,
    folder: Path,
    log: Log,
) -> None:
    """Read, convert and tokenize all rows into a new `folder`. Raises DataError for bad rows unless dropped, and when none
    is left."""
    folder.mkdir()
    told, reader = time.monotonic(), Reader.of(tokenizer, scored)
    images = (sight := reader.encoder.sight) and ImageWriter(folder, sight)
    built = _Build(_Files.create(folder), limits, apart=reader.encoder.start is not None, images=images)
    first_file = 0
    for listing in listings:
        converter = Converter(listing, chat_model=tokenizer.chat_template is not None)
        built.begin_source(listing.source.takes)
        # The tokenizer leaves Python free to read and render the next rows meanwhile, and to write the last ones.
        rendered = ahead(reader.chunks(converter, built.notes))
        for chunk, ids in ahead((chunk, ids_of(chunk.texts, reader.encoder)) for chunk in rendered):
            built.add(chunk, ids, reader.encoder, first_file)
            if time.monotonic() - told > TELL_EVERY_SECONDS:
                told = time.monotonic()
                log(f"data: tokenized {built.read:,} rows, up to {chunk.rows[-1][1].where}")
        built.end_source(converter.decided)
        first_file += len(listing.names)
    if built.bad.count and on_bad_row == "error":
        raise DataError(built.bad.lines())
    if not built.kept:
        raise DataError(_nothing_left([listing.source for listing in listings], built))
    clock = "strftime_now" in str(tokenizer.chat_template)
    unknown = reader.learned.unknown if built.conversations and scored != "all" else None
    seal(folder, built.report() | {"content": built.close(), "clock": clock, "unknown_template": unknown})


@dataclass(frozen=True)
class Reader:
    """What turns rows into texts and tokens, learned from the tokenizer once."""

    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    learned: Learned
    scored: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, scored: str) -> Reader:
        return cls(tokenizer, Encoder(tokenizer), Learned(tokenizer), scored)

    def chunks(self, convert: Converter, notes: Counter[str]) -> Iterator[Chunk]:
        """Chunks of rows of the converter's source, with the texts of all their pairs; a bad row gives its error. Raises
        DataError in the end where `pairs` had no effect on any row."""
        rows, source = convert.listing.rows(), convert.source
        while chunk := list(islice(rows, CHUNK_ROWS)):
            converted = [(k, self.looked(within_reason(item), chunk[k][1])) for k, item in convert(chunk)]
            notes.update(self._notes([item for _, item in converted if isinstance(item, Preference)], source))
            texts = [render(item, self.tokenizer, self.learned, self.scored) for _, item in converted]
            given = [item.given if isinstance(item, Preference) else {} for _, item in converted]
            yield Chunk(chunk, [k for k, _ in converted], texts, given)
        if not convert.pairs_made:
            where = f"give completions and scores by {source.format}"
            where = where if source.format else f"name the columns of the answers and their scores in {source.key}.columns"
            fix = f"drop it, or {where}"
            raise DataError(f"{source.path}: {source.key}.pairs: has no effect: no row holds several answers; fix: {fix}")

    def looked(self, item: Preference | RowError, row: Row | BadRow) -> Preference | RowError:
        """The pair with its images found, or why they cannot be."""
        if isinstance(item, RowError) or not item.images or self.encoder.sight is None:
            return item
        try:
            return replace(item, images=look_at(item.images, folder_of(row.file)))
        except RowError as error:
            return error

    def _notes(self, preferences: Sequence[Preference], source: Source) -> dict[str, int]:
        apart = start_of(self.tokenizer) is not None
        unasked = source.as_ is None and self.tokenizer.chat_template is not None and not apart
        as_text = sum(isinstance(preference.prompt, str) for preference in preferences) if unasked else 0
        told = Counter(note for preference in preferences for note in preference.unused)
        repeated = 0 if apart else sum(preference.repeats for preference in preferences)
        kept = sum(bool(preference.begins) and not preference.repeats for preference in preferences)
        return {REPEATED: repeated, KEPT: kept, AS_TEXT: as_text, **told}


# ------------------------------------------------------------------------------------------------- what is written


@dataclass
class _Files:
    """The columns of a store: tokens and which of them are scored, where sequences begin, and where pairs come from."""

    tokens: Column
    mask: Column
    """True for each scored token; all prompts' are false."""
    offsets: Column
    scored: Column
    uncut: Column
    """Tokens of prompt, chosen and rejected before truncation."""
    rows: Column
    places: Column
    """(file through all sources, line) of each pair."""
    same: Column
    given: GivenColumn

    @classmethod
    def create(cls, folder: Path) -> _Files:
        layout = {
            "tokens": (np.int32, None), "mask": (np.bool_, None), "offsets": (np.int64, None), "scored": (np.int64, 2),
            "uncut": (np.int32, 3), "rows": (np.int64, None), "places": (np.int64, 2), "same": (np.int64, 3),
        }  # fmt: skip
        columns = {name: Column(folder / f"{name}.npy", dtype, width) for name, (dtype, width) in layout.items()}
        return cls(**columns, given=GivenColumn(folder / "given.npy"))


@dataclass
class _Build:
    """What has been tokenized so far."""

    files: _Files
    limits: Limits
    source_rows: list[int] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    """Of each source, what was read, what of it was left out and why, and how its rows were taken."""
    left_out: Complaints = field(default_factory=Complaints)
    """Of the source that is being read; `dropped` has those of all."""
    before: tuple[int, int, int] = (0, 0, 0)
    bad: Complaints = field(default_factory=Complaints)
    dropped: Complaints = field(default_factory=Complaints)
    notes: Counter[str] = field(default_factory=Counter)
    """What a user should know of rows that are used, counted."""
    cut: dict[str, list[int]] = field(default_factory=lambda: {name: [0, 0, 0] for name in PARTS})
    """Of prompts and answers that were cut: how many, the tokens that they lost, and those that they had."""
    conversations: int = 0
    too_long: list[int] = field(default_factory=list)
    digests: bytearray = field(default_factory=bytearray)
    read: int = 0
    seen: int = 0
    kept: int = 0
    tokens: int = 0
    masked: bool = False
    largest_id: int = 0
    longest: int = 0
    """Tokens that a model has to have positions for."""
    apart: bool = False
    """Whether prompts are read apart from their answers."""
    images: ImageWriter | None = None
    """Of a model that reads images."""
    takes: str = "pairs"
    """What a row of the source that is being read becomes."""

    def begin_source(self, takes: str) -> None:
        self.before, self.left_out, self.takes = (self.read, self.seen, self.kept), Complaints(), takes

    def end_source(self, decided: dict[str, Any]) -> None:
        rows, pairs, kept = (now - then for now, then in zip((self.read, self.seen, self.kept), self.before))
        self.source_rows.append(kept)
        counts = {"rows": rows, "pairs": pairs, "kept": kept, "dropped": self.left_out.counts()}
        self.sources.append(counts | {"decided": decided})

    def add(self, chunk: Chunk, ids: Ids, encoder: Encoder, first_file: int) -> None:
        """Split and truncate the pairs of a chunk, and keep them or note why they are left out."""
        kept, uncut, rows, places, pictures, given = [], [], [], [], [], []
        items = alike(self.takes, chunk.of, split(chunk.texts, ids, encoder))
        beside = longest(self.takes, chunk.of, items)
        pairs = [self._cut(item, chunk.rows[k][1], beside[k]) for k, item in zip(chunk.of, items)]
        self.seen += len(items)
        again = repeated(chunk.of, pairs) if self.takes == "list" else []
        for n in again:
            pairs[n] = self._leave_out(chunk.rows[chunk.of[n]][1], RowError("completions", AGAIN, droppable=True))
        alone = left_over(self.takes, chunk.of, chunk.given, pairs)
        for k, texts, numbers, item, pair in zip(chunk.of, chunk.texts, chunk.given, items, pairs, strict=True):
            file, row = chunk.rows[k]
            if pair is not None and k in alone:
                self._leave_out(row, RowError("row", REST, droppable=True))
            elif pair is not None and isinstance(texts, Rendering):
                kept.append(pair)
                uncut += [item.lengths] if isinstance(item, Whole) else []
                rows.append(self.read + k)
                places.append((first_file + file, row.line))
                pictures.append(texts.images)
                given.append(numbers)
                self.notes.update(texts.notes)
                self.conversations += not texts.special
        self.read += len(chunk.rows)
        if kept:
            self.files.uncut.append(uncut)
            self.files.given.append(given)
            self._write(kept, rows, places, pictures)

    def _cut(self, item: Whole | RowError, row: Row | BadRow, beside: int) -> TokenizedPair | None:
        if isinstance(item, RowError):
            return self._leave_out(row, item)
        try:
            pair = item.cut(self.limits, beside)
        except RowError as error:
            self.too_long.append(len(item.pair.prompt) + max(len(item.pair.chosen), len(item.pair.rejected)))
            return self._leave_out(row, error)
        for name, had, kept in zip(PARTS, item.lengths, map(len, pair[:3])):
            if kept < had:
                self.cut[name] = [x + y for x, y in zip(self.cut[name], (1, had - kept, had))]
        return pair

    def _leave_out(self, row: Row | BadRow, error: RowError) -> None:
        self.dropped.note(row, error)
        self.left_out.note(row, error)
        if not error.droppable:
            self.bad.note(row, error)

    def _write(
        self,
        pairs: Sequence[TokenizedPair],
        rows: Sequence[int],
        places: Sequence[tuple[int, int]],
        pictures: Sequence[tuple[Picture, ...]],
    ) -> None:
        files, lengths = self.files, np.array([[len(part) for part in pair[:3]] for pair in pairs], dtype=np.int64)
        tokens = np.concatenate([part for pair in pairs for part in pair[:3]])
        masks = [mask for pair in pairs for mask in _masks(pair)]
        files.tokens.append(tokens)
        files.mask.append(np.concatenate(masks))
        files.offsets.append(self.tokens + np.concatenate([[0], np.cumsum(lengths)])[:-1])
        counts = np.array([np.count_nonzero(mask) for mask in masks]).reshape(-1, 3)
        files.scored.append(counts[:, 1:])
        files.rows.append(rows)
        files.places.append(places)
        seen = self.images.digests(pictures) if self.images else [b""] * len(pairs)
        for pair, digest in zip(pairs, seen):
            self.digests += b"".join(content_of(pair, digest))
        if self.images:
            self.images.add(pictures, [file for file, _ in places])
        self.kept += len(pairs)
        self.tokens += len(tokens)
        self.masked |= any(mask is not None and not mask.all() for pair in pairs for mask in pair[3:])
        self.largest_id = max(self.largest_id, int(tokens.max()))
        answers = lengths[:, 1:].max(axis=1)
        # A decoder does not read an answer's last token.
        sizes = np.maximum(lengths[:, 0], answers - 1) if self.apart else lengths[:, 0] + answers
        self.longest = max(self.longest, int(sizes.max()))

    def close(self) -> str:
        """Complete the files; a digest of the pairs themselves: all that decides what a run trains on."""
        self.files.offsets.append([self.tokens])
        self.files.same.append(numbered(np.frombuffer(self.digests, dtype="<u8").reshape(-1, 2)))
        for column in vars(self.files).values():
            column.close()
        decisive = [self.files.tokens, self.files.offsets, self.files.rows, *([self.files.mask] if self.masked else [])]
        decisive += self.files.given.content_columns
        if not self.masked:
            self.files.mask.path.unlink()
        content = hashlib.sha256(repr(self.source_rows).encode())
        for column in decisive:
            content.update(column.content.digest())
        if self.images:
            self.images.close()
            content.update(self.images.content.digest())
        return content.hexdigest()[:32]

    def report(self) -> dict[str, Any]:
        counts = {"rows": self.read, "pairs": self.seen, "kept": self.kept, "source_rows": self.source_rows}
        counts["sources"] = self.sources
        measures = {"largest_id": self.largest_id, "longest": self.longest, "max_length": self.limits.max_length}
        said = {"dropped": self.dropped.counts(), "notes": dict(+self.notes)}
        how = {"truncated": self.cut, "limits": in_force(self.limits), **({"apart": True} if self.apart else {})}
        if self.images:
            how["images"] = len(self.images.table)
        return {**counts, **measures, **said, **how}


def _masks(pair: TokenizedPair) -> Iterator[np.ndarray]:
    yield np.zeros(len(pair.prompt), dtype=bool)
    for answer, mask in zip(pair[1:3], (*pair[3:], None, None)):
        yield np.ones(len(answer), dtype=bool) if mask is None else mask


def _nothing_left(sources: Sequence[Source], built: _Build) -> str:
    message = f"{', '.join(one_line(source.path) for source in sources)}: none of {built.seen} rows is left "
    message += f"({in_words(built.dropped.counts())})"
    if built.too_long:
        least, middle, most = np.percentile(built.too_long, [0, 50, 100]).astype(int)
        message += f"; tokens of prompt + longer answer: {least} (min), {middle} (median), {most} (max)"
    return f"{message}; fix: {built.dropped.fix()}"
