"""Token ids on disk: addressed by content, memory-mapped, built once and found again.

A store is a folder `cache_dir/<key>` that appears by one rename, so it is complete or absent. Any number of
processes may build the same store at once: the first rename wins and the others use it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dspref.data.ahead import ahead
from dspref.data.completions import is_ranked, to_preferences
from dspref.data.formats import Preference, RowError, check_template
from dspref.data.sources import BadRow, Row, Source, read
from dspref.data.tokenize import CHUNK_ROWS, Limits, Rendering, TokenizedPair, render, split, tokenizer_digest, truncate
from dspref.errors import DataError, EnvironmentFault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raise this whenever the same rows would give other tokens or another layout on disk.
FORMAT_VERSION = 3
MAX_ERROR_LINES = 20
MAX_REASONS = 20
PROGRESS_ROWS = 20_000
REPEATED = "prompt, or end of it, that an answer repeated and lost"
AS_TEXT = (
    "pair of plain text, for a tokenizer with a chat template (as: chat makes conversations of them, as: text is silent)"
)

Log = Callable[[str], None]


class PairStore:
    """The tokenized pairs of some sources, in order: pair i is the i-th kept row of all of them."""

    def __init__(self, folder: Path, wheres: Sequence[str]) -> None:
        """Open a store; `wheres` names every row of its sources. Damage raises OSError or ValueError."""
        self.key: str = folder.name
        self.report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        self.source_rows: tuple[int, ...] = tuple(self.report["source_rows"])
        tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
        # A plain array over the same memory: a slice of a memmap is a memmap, which is slow to make.
        self._tokens: np.ndarray = np.asarray(tokens)
        self._offsets: np.ndarray = np.load(folder / "offsets.npy", allow_pickle=False)
        self.rows: np.ndarray = np.load(folder / "rows.npy", allow_pickle=False)
        """The row that each pair comes from, counted through all sources."""
        self.same: np.ndarray = np.load(folder / "same.npy", allow_pickle=False)
        """Numbers [n, 3] for the content of (prompt, prompt + chosen, prompt + rejected): equal where that is equal."""
        rows = self.rows
        if not len(self._offsets) == 3 * len(rows) + 1 == 3 * self.report["kept"] + 1 or self.same.shape != (len(rows), 3):
            raise ValueError("the parts do not belong together")
        if self._offsets[-1] != len(self._tokens) or sum(self.source_rows) != len(rows):
            raise ValueError("the parts do not belong together")
        self.lengths: np.ndarray = np.diff(self._offsets).reshape(-1, 3)
        self._wheres = [wheres[int(row)] for row in rows]

    def __len__(self) -> int:
        return len(self._wheres)

    def __getitem__(self, index: int) -> TokenizedPair:
        """Pair `index`, as read-only views of the file."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, chosen, rejected, end = (int(offset) for offset in self._offsets[3 * index : 3 * index + 4])
        prompt, answer = self._tokens[start:chosen], self._tokens[chosen:rejected]
        return TokenizedPair(prompt, answer, self._tokens[rejected:end])

    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        """All ids, int32 [N], and where each prompt, chosen and rejected begins in them, int64 [3n + 1]; read-only."""
        return self._tokens, self._offsets

    def where(self, index: int) -> str:
        """The file and line of a pair, for messages."""
        return self._wheres[index]


def load_pairs(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    *,
    on_bad_row: str,
    cache_dir: Path,
    log: Log,
) -> PairStore:
    """Read the sources, and tokenize them unless the cache has them. `on_bad_row`: error | drop.

    Raises DataError (one line per bad row), ConfigError for a bad template, EnvironmentFault for an unusable
    `cache_dir`.
    """
    for source in sources:
        if source.template:
            check_template(source.template)
    rows = [read(source) for source in sources]
    wheres = [row.where for of_source in rows for row in of_source]
    folder = cache_dir / _key(sources, rows, tokenizer, limits, on_bad_row)
    store = _open(folder, wheres)
    if store is None:
        with _scratch_folder(cache_dir) as scratch:
            built = _build(sources, rows, tokenizer, limits, on_bad_row, log)
            _write(built, scratch / folder.name)
            store = _publish(scratch / folder.name, folder, wheres)
    _log_report(store.report, log)
    return store


def _key(
    sources: Sequence[Source],
    rows: Sequence[Sequence[Row | BadRow]],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    on_bad_row: str,
) -> str:
    """sha256 of all that decides the tokens. File names and lines do not: a moved file is found again."""
    settings = [FORMAT_VERSION, tokenizer_digest(tokenizer), asdict(limits), on_bad_row]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for source, of_source in zip(sources, rows, strict=True):
        columns, template = dict(source.columns or {}), dict(source.template or {})
        how = [columns, template, source.pairs, source.as_, source.max_samples, len(of_source)]
        digest.update(json.dumps(how, sort_keys=True).encode())
        for row in of_source:
            # Keys stay in the row's own order: a template prints tools in the order they are written.
            value = row.values if isinstance(row, Row) else str(row.error)
            digest.update(json.dumps(value, default=repr).encode())
            digest.update(b"\n")
    return digest.hexdigest()[:32]


# ------------------------------------------------------------------------------------------------------ build


@dataclass
class _Build:
    """What has been tokenized so far."""

    tokens: list[np.ndarray] = field(default_factory=list)
    lengths: list[tuple[int, int, int]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    same: list[list[int]] = field(default_factory=list)
    numbers: dict[bytes, int] = field(default_factory=dict)
    source_rows: list[int] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    """What a user should know of the rows that were read, counted."""
    too_long: list[int] = field(default_factory=list)
    seen: int = 0
    read: int = 0

    def add(self, row: int, where: str, item: TokenizedPair | RowError, limits: Limits) -> None:
        """Truncate and keep the next pair, or note why it is left out."""
        self.seen += 1
        if isinstance(item, RowError):
            return self._leave_out(where, item)
        try:
            pair = truncate(item, limits)
        except RowError as error:
            self.too_long.append(len(item.prompt) + max(len(item.chosen), len(item.rejected)))
            return self._leave_out(where, error)
        for name, before, after in zip(TokenizedPair._fields, item, pair, strict=True):
            self.truncated[name] += len(after) < len(before)
        self.tokens.append(np.concatenate(pair))
        self.lengths.append((len(pair.prompt), len(pair.chosen), len(pair.rejected)))
        self.rows.append(row)
        sequences = (pair.prompt,), (pair.prompt, pair.chosen), (pair.prompt, pair.rejected)
        self.same.append([self._number(*parts) for parts in sequences])

    def _number(self, *parts: np.ndarray) -> int:
        """The same number for the same content."""
        digest = hashlib.blake2b(len(parts[0]).to_bytes(4, "little"), digest_size=16)
        for part in parts:
            digest.update(part.tobytes())
        return self.numbers.setdefault(digest.digest(), len(self.numbers))

    def _leave_out(self, where: str, error: RowError) -> None:
        self.dropped[f"{error.field}: {error.reason}"] += 1
        if not error.droppable:
            self.bad.append(BadRow(where, error))

    def report(self) -> dict[str, Any]:
        common = dict(self.dropped.most_common(MAX_REASONS))
        if other := self.dropped.total() - sum(common.values()):
            common["other reasons"] = other
        truncated = {name: self.truncated[name] for name in TokenizedPair._fields}
        counts = {"rows": self.read, "pairs": self.seen, "kept": len(self.rows), "source_rows": self.source_rows}
        return {**counts, "dropped": common, "truncated": truncated, "notes": dict(+self.notes)}


def _build(
    sources: Sequence[Source],
    rows: Sequence[Sequence[Row | BadRow]],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    on_bad_row: str,
    log: Log,
) -> _Build:
    """Convert and tokenize all rows. Raises DataError for bad rows unless dropped, and when none is left."""
    built, total, done = _Build(), sum(map(len, rows)), 0
    for source, of_source in zip(sources, rows, strict=True):
        before = len(built.rows)
        # The tokenizer leaves Python free to render the next rows meanwhile.
        for chunk, rendered in ahead(_rendered(of_source, source, tokenizer, built.notes)):
            pairs = split([item for _, item in rendered], tokenizer)
            for (row, _), pair in zip(rendered, pairs, strict=True):
                built.add(done + row, chunk[row].where, pair, limits)
            done += len(chunk)
            built.read = done
            if done // PROGRESS_ROWS > (done - len(chunk)) // PROGRESS_ROWS:
                log(f"data: tokenized {done} of {total} rows")
        built.source_rows.append(len(built.rows) - before)
    if built.bad and on_bad_row == "error":
        raise DataError(_bad_row_lines(built.bad))
    if not built.rows:
        raise DataError(_nothing_left(sources, built))
    return built


def _rendered(
    rows: Sequence[Row | BadRow], source: Source, tokenizer: PreTrainedTokenizerBase, notes: Counter[str]
) -> Iterator[tuple[Sequence[Row | BadRow], list[tuple[int, Rendering | RowError]]]]:
    """Chunks of rows, each with (number of the row in it, texts) of all its pairs; a bad row gives its error. Raises
    DataError in the end where `pairs` had no effect on any row."""
    pairs_made = source.pairs == "all"
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS]
        pairs_made = pairs_made or any(isinstance(row, Row) and is_ranked(row.values, source.columns) for row in chunk)
        converted = [(k, item) for k, row in enumerate(chunk) for item in _convert(row, source, tokenizer)]
        notes.update(_notes([item for _, item in converted if isinstance(item, Preference)], source, tokenizer))
        yield chunk, [(k, render(item, tokenizer)) for k, item in converted]
    if not pairs_made:
        fix = f"drop it, or name the columns of the answers and their scores in {source.key}.columns"
        raise DataError(f"{source.path}: {source.key}.pairs: has no effect: no row holds several answers; fix: {fix}")


def _notes(preferences: Sequence[Preference], source: Source, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    unasked = source.as_ is None and tokenizer.chat_template is not None
    as_text = sum(isinstance(preference.prompt, str) for preference in preferences) if unasked else 0
    return {REPEATED: sum(preference.repeats for preference in preferences), AS_TEXT: as_text}


def _convert(row: Row | BadRow, source: Source, tokenizer: PreTrainedTokenizerBase) -> Sequence[Preference | RowError]:
    if isinstance(row, BadRow):
        return [row.error]
    how = {"as_": source.as_, "chat_model": tokenizer.chat_template is not None, "key": source.key}
    try:
        return to_preferences(row.values, source.columns, source.template, source.pairs, **how)
    except RowError as error:
        return [error]


def _bad_row_lines(bad: Sequence[BadRow]) -> str:
    lines = [f"{row.where}: {row.error}" for row in bad[:MAX_ERROR_LINES]]
    if len(bad) > MAX_ERROR_LINES:
        lines.append(f"... {len(bad) - MAX_ERROR_LINES} more bad rows")
    return "\n".join(lines)


def _nothing_left(sources: Sequence[Source], built: _Build) -> str:
    reasons = _counts(built.report()["dropped"])
    message = f"{', '.join(source.path for source in sources)}: none of {built.seen} rows is left ({reasons})"
    if built.too_long:
        least, middle, most = np.percentile(built.too_long, [0, 50, 100]).astype(int)
        message += f"; tokens of prompt + longer answer: {least} (min), {middle} (median), {most} (max)"
    return f"{message}; fix: mend the rows, or raise data.max_length"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in counts.items())


def _log_report(report: Mapping[str, Any], log: Log) -> None:
    if report["dropped"]:
        left_out, unit = report["pairs"] - report["kept"], "rows" if report["pairs"] == report["rows"] else "pairs"
        log(f"data: left out {left_out} of {report['pairs']} {unit}: {_counts(report['dropped'])}")
    if report["notes"]:
        log(f"data: {_counts(report['notes'])}")
    if any(report["truncated"].values()):
        truncated = {name: count for name, count in report["truncated"].items() if count}
        log(f"data: truncated, of {report['kept']} pairs: {_counts(truncated)}")


# ---------------------------------------------------------------------------------------------------- on disk


def _open(folder: Path, wheres: Sequence[str]) -> PairStore | None:
    """The store in `folder`, or None when it is absent, incomplete or damaged."""
    try:
        return PairStore(folder, wheres)
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError):
        return None


@contextmanager
def _scratch_folder(cache_dir: Path) -> Iterator[Path]:
    """A folder to build in, removed at the end. Raises EnvironmentFault when that is not possible."""
    scratch = cache_dir / f".building-{uuid.uuid4().hex}"
    try:
        scratch.mkdir(parents=True)
        yield scratch
    except OSError as error:
        reason = f"cannot write the token cache: {error.strerror or error}"
        raise EnvironmentFault(f"{cache_dir}: {reason}; fix: make it writable, or use another cache folder") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(finished: Path, folder: Path, wheres: Sequence[str]) -> PairStore:
    """Rename the finished store into place, or use the one that another process has put there meanwhile."""
    for attempt in range(3):
        with suppress(OSError):
            finished.rename(folder)
        if (store := _open(folder, wheres)) is not None:
            return store
        with suppress(OSError):  # what stands there is damaged; another process may be moving it at this moment
            folder.rename(finished.parent / f"damaged-{attempt}")
    raise OSError(f"cannot rename a folder to {folder.name}")


def _write(built: _Build, folder: Path) -> None:
    folder.mkdir()
    ends = np.cumsum(np.asarray(built.lengths, dtype=np.int64).reshape(-1))
    np.save(folder / "offsets.npy", np.concatenate([np.zeros(1, dtype=np.int64), ends]))
    np.save(folder / "rows.npy", np.asarray(built.rows, dtype=np.int64))
    np.save(folder / "same.npy", np.asarray(built.same, dtype=np.int64))
    tokens = np.lib.format.open_memmap(folder / "tokens.npy", mode="w+", dtype=np.int32, shape=(int(ends[-1]),))
    _fill(tokens, built.tokens)
    tokens.flush()
    (folder / "report.json").write_text(json.dumps(built.report(), indent=1), encoding="utf-8")


def _fill(target: np.ndarray, parts: Iterable[np.ndarray]) -> None:
    position = 0
    for part in parts:
        target[position : position + len(part)] = part
        position += len(part)
