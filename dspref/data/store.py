"""Token ids on disk: addressed by content, memory-mapped, built once and found again.

A store is a folder `cache_dir/<address>`. Its address is a digest of the source files' bytes and of all settings that decide
the tokens, so that finding it again reads no row. Any number of processes may build the same store at once: the first rename
wins and the others use it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dspref.data.building import build
from dspref.data.cache import put_in_place, report_of, scratch_folder
from dspref.data.complaints import in_words
from dspref.data.converting import format_of
from dspref.data.formats import check_template
from dspref.data.given_store import Given
from dspref.data.image_files import NOTHING, Shown, folder_of
from dspref.data.image_store import StoredImages, address_of, pictures_of
from dspref.data.images import Pictures
from dspref.data.rows import one_line, place_of
from dspref.data.sight import Sight, runs_of, sight_of
from dspref.data.sources import Digest, Listing, Source, find, sha256
from dspref.data.splits import LISTED, unusable
from dspref.data.tokenize import tokenizer_digest
from dspref.data.truncate import Limits, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raise this whenever the same rows would give other tokens or another layout on disk.
FORMAT_VERSION = 11
# Of a source, what the digests of its rows stand for, or what does not touch a row.
NOT_DECISIVE = ("key", "path", "split", "max_samples", "weight", "name", "data_dir", "revision")

Log = Callable[[str], None]


class PairStore:
    """The tokenized pairs of some sources, in order: pair i is the i-th kept row of all of them."""

    def __init__(self, folder: Path, files: Sequence[str], verify: bool = False, sight: Sight | None = None) -> None:
        """Open a store; `files` names the files of its sources, in order. `verify`: read all of it and compare digests;
        `sight`: how its images are read. Damage raises any of several exceptions."""
        self.report: dict[str, Any] = report_of(folder, verify)
        self.key: str = self.report["content"]
        """A digest of the pairs themselves: tokens, what is scored, their order."""
        self.address: str = folder.name
        self.apart: bool = bool(self.report.get("apart"))
        """Whether prompts are an encoder's, and answers, with the token that a decoder starts with, lie apart from them."""
        self.source_rows: tuple[int, ...] = tuple(self.report["source_rows"])
        # Plain arrays over the same memory: a slice of a memmap is a memmap, which is slow to make.
        self._tokens, self._places = (np.asarray(_mapped(folder / f"{name}.npy")) for name in ("tokens", "places"))
        self._mask = np.asarray(_mapped(folder / "mask.npy")) if "mask.npy" in self.report["files"] else None
        self._offsets, self.rows, self.same, self.scored = (
            np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("offsets", "rows", "same", "scored")
        )
        self.rows: np.ndarray
        """The row that each pair comes from, counted through all sources."""
        self.same: np.ndarray
        """Numbers [n, 3] for the content of (prompt, prompt + chosen, prompt + rejected), with what is scored of it: equal
        where that is equal."""
        self.scored: np.ndarray
        """Scored tokens of chosen and rejected, int64 [n, 2]."""
        self.lengths: np.ndarray = np.diff(self._offsets).reshape(-1, 3)
        """Tokens of prompt, chosen and rejected, int64 [n, 3]; an answer that is not there has none."""
        self.computed: np.ndarray = np.maximum(self.lengths - np.array([0, 1, 1]), 0) if self.apart else self.lengths
        """Of these, the tokens that a model computes: without the last of an answer, where prompts lie apart."""
        self.uncut: np.ndarray = np.asarray(_mapped(folder / "uncut.npy"))
        """Tokens of prompt, chosen and rejected before truncation, int32 [n, 3]."""
        self.given = Given(folder / "given.npy" if "given.npy" in self.report["files"] else None, len(self.rows))
        self._files = list(files)
        self._sight, self._images = sight, None
        if sight is not None:
            self._images = StoredImages(folder, [folder_of(file) for file in files], self.where)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenizedPair:
        """Pair `index`, as read-only views of the file."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, chosen, rejected, end = (int(offset) for offset in self._offsets[3 * index : 3 * index + 4])
        tokens, mask = self._tokens, self._mask
        pair = TokenizedPair(tokens[start:chosen], tokens[chosen:rejected], tokens[rejected:end])
        if mask is None:
            return pair
        all_scored = self.scored[index] == self.lengths[index, 1:]
        masks = (mask[chosen:rejected], mask[rejected:end])
        first, second = (None if whole else part for part, whole in zip(masks, all_scored))
        return pair._replace(chosen_scored=first, rejected_scored=second)

    def pictures(self, pairs: Sequence[int]) -> Pictures | None:
        """The images of some pairs, decoded now; None where the model reads none. Raises DataError."""
        if self._sight is None:
            return None
        return pictures_of([self.shown(pair) for pair in pairs], self._sight)

    def shown(self, pair: int) -> Shown:
        """The images of a pair's prompt, not yet decoded."""
        return NOTHING if self._images is None else self._images.of(pair)

    def image_digests(self, pairs: Sequence[int]) -> list[bytes]:
        """What says of each pair which images it has; empty for none."""
        if self._images is None or self._sight is None:
            return [b""] * len(pairs)
        return [self._images.digests(pair, self._sight) for pair in pairs]

    def tower_work(self, packs: Iterable[Sequence[int]]) -> list[Mapping[str, float]]:
        """What a tower reads for the pairs of each pack, by names of its own; empty of a model without one."""
        return [self._tower_work(pairs) for pairs in packs] if self._sight is not None else []

    def _tower_work(self, pairs: Sequence[int]) -> Mapping[str, float]:
        sight = self._sight
        assert sight is not None
        first = dict(zip(self.image_digests(pairs), pairs))
        prompts = [self[pair].prompt for digest, pair in first.items() if digest]
        runs = [runs_of(prompt == sight.token) for prompt in prompts] or [sight.of_blank]
        return sight.reading(np.concatenate(runs))

    def changed_image(self, digest: Digest) -> str | None:
        """An image that is not what it was when the store was built."""
        return self._images.changed(digest) if self._images is not None else None

    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        """All ids, int32 [N], and where each prompt, chosen and rejected begins in them, int64 [3n + 1]; read-only."""
        return self._tokens, self._offsets

    def bounds(self, rows: np.ndarray) -> np.ndarray:
        """Where prompt, chosen and rejected of some pairs lie among all ids, int64 [n, 3, 2]."""
        ends = self._offsets[3 * rows[:, None] + np.arange(4)]
        return np.stack([ends[:, :3], ends[:, 1:]], axis=2)

    def flat_mask(self) -> np.ndarray | None:
        """Which of all ids are scored, bool [N], false in prompts; None where all answers are scored whole."""
        return self._mask

    def where(self, index: int) -> str:
        """The file and line of a pair, for messages."""
        file, line = self._places[index].tolist()
        return place_of(self._files[file], line)

    def place(self, index: int) -> tuple[int, int]:
        """(number of its file through all sources, line) of a pair."""
        file, line = self._places[index].tolist()
        return file, line

    def at(self, file: int, line: int) -> np.ndarray:
        """The pairs of the row at a place, in order: int64 [k]."""
        return np.flatnonzero((self._places[:, 1] == line) & (self._places[:, 0] == file))

    @property
    def reads_images(self) -> bool:
        """Whether the model does."""
        return self._sight is not None

    @property
    def reads_clock(self) -> bool:
        """Whether the chat template writes the date or time into what it renders."""
        return bool(self.report["clock"])


def load_pairs(
    sources: Sequence[Source | Listing],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    *,
    on_bad_row: str,
    cache_dir: Path,
    log: Log,
    scored: str = "assistant",
    digest: Digest = sha256,
    verify: bool = True,
    summarise: bool = True,
) -> PairStore:
    """Read and tokenize the sources, unless the cache has them. `on_bad_row`: error | drop; `scored`: which tokens of a
    conversation are scored, last | assistant | all. `verify`: compare what the cache
    has with its digests, byte by byte; once for each start of a run on a machine is enough. `summarise`: say what was left
    out and cut, which is in the store's report too.

    Raises DataError (one line per reason), ConfigError for a bad template, EnvironmentFault for an unusable `cache_dir`.
    """
    listings = [source if isinstance(source, Listing) else find(source) for source in sources]
    for listing in listings:
        if listing.source.template:
            check_template(listing.source.template, listing.source.key)
        if listing.left_out and summarise:
            what = f"left out, as their names say no split or more than it: {_listed(listing.left_out)}"
            log(f"data: {one_line(listing.source.path)}: {what} (name files in path to read them)")
    files = [name for listing in listings for name in listing.names]
    how = [FORMAT_VERSION, tokenizer_digest(tokenizer), asdict(limits), on_bad_row, scored]
    contents = [listing.content(digest) for listing in listings]
    folder = cache_dir / _address(listings, contents, how)
    sight = sight_of(tokenizer)
    store = _open(folder, files, verify, log) if sight is None else _with_images(folder, files, verify, log, digest, sight)
    if store is None:
        with scratch_folder(cache_dir) as scratch:
            build(listings, tokenizer, limits, scored, on_bad_row, scratch / folder.name, log)
            for listing, content in zip(listings, contents):
                if listing.content(digest) != content:
                    reason, fix = "this source changed while it was read", "start again when its files are complete"
                    raise unusable(listing.names[0], reason, fix)
            built = scratch / folder.name
            if sight is not None:
                folder = folder.with_name(f"{folder.name}-{address_of(built)}")
            put_in_place(built, folder)
            store = PairStore(folder, files, sight=sight)
    if summarise:
        _log_report(store.report, "pairs" if (store.scored > 0).all() else "examples", log)
    return store


def _address(listings: Sequence[Listing], contents: Sequence[Any], how: Sequence[Any]) -> str:
    """sha256 of all that decides the tokens. File names do not: a moved file is found again."""
    settings: list[Any] = [*how]
    for listing, content in zip(listings, contents):
        keys = {name: value for name, value in vars(listing.source).items() if name not in NOT_DECISIVE and value}
        if own := format_of(listing.source):
            keys["format"] = own.identity
        settings.append([keys, content])
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def _with_images(
    folder: Path, files: Sequence[str], verify: bool, log: Log, digest: Digest, sight: Sight
) -> PairStore | None:
    """Of the stores of these rows, each with other images, the one whose images are here; None where there is none."""
    for one in sorted(folder.parent.glob(f"{folder.name}-*")):
        store = _open(one, files, verify, log, sight)
        if store is not None and store.changed_image(digest) is None:
            return store
    return None


def _open(folder: Path, files: Sequence[str], verify: bool, log: Log, sight: Sight | None = None) -> PairStore | None:
    """The store in `folder`, or None when it is absent or damaged, and then it is said."""
    if not folder.exists():
        return None
    try:
        return PairStore(folder, files, verify, sight)
    except Exception as error:  # numpy's reader of headers is a parser, and raises what parsers raise
        log(f"data: the token cache {folder} is damaged ({error}); tokenizing again")
        return None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return one_line(", ".join(names[:LISTED]), 1000) + more


def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _log_report(report: Mapping[str, Any], unit: str, log: Log) -> None:
    if warning := unknown_template(report):
        log(f"warning: data: {warning}")
    if report["dropped"]:
        left_out, what = report["pairs"] - report["kept"], "rows" if report["pairs"] == report["rows"] else unit
        log(f"data: left out {left_out} of {report['pairs']} {what}: {in_words(report['dropped'])}")
    if report["notes"]:
        log(f"data: {in_words(report['notes'])}")
    if lost := [truncation_in_words(name, *figures) for name, figures in report["truncated"].items() if figures[0]]:
        log(f"data: beyond {report['limits']}, of {report['kept']} {unit}: {'; '.join(lost)}")


def unknown_template(report: Mapping[str, Any]) -> str | None:
    """What is to be said of a chat template that could not be probed."""
    if not report["unknown_template"]:
        return None
    return (
        "where the model's own words begin and end under this chat template cannot be told "
        f"({report['unknown_template']}); everything behind the prompt is scored (data.scored: all)"
    )


def truncation_in_words(name: str, count: int, lost: int, had: int) -> str:
    """Such as `12 prompts lost 30 % of their tokens (90 of 300 each)`."""
    what = "prompts" if name == "prompt" else f"{name} answers"
    return f"{count} {what} lost {lost / had:.0%} of their tokens ({lost / count:.0f} of {had / count:.0f} each)"
