"""Log-prob sums of sequences under one reference model, on disk, addressed by content.

A store is a folder of shards that are only ever added, each by one rename and named by the sha256 of its bytes: any number
of jobs may read and write it at once, without locks, and a job that is killed leaves whole shards behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dspref.errors import NumericFault
from dspref.files import DRAFT, write_atomically

if TYPE_CHECKING:
    from dspref.data.store import PairStore

# Raise this whenever the same sequences would get other keys, or the columns of a shard another meaning.
FORMAT_VERSION = 1
KEY_BYTES = 16
# Sums of log-probs: over an answer's tokens; over its first m tokens, m = the shorter answer of the pair (LD-DPO).
VALUES = ("sum", "common_sum")
BLOCK_PAIRS = 1000
ROWS_AT_ONCE = 20_000
STALE_SECONDS = 24 * 3600
SUFFIX = ".safetensors"


def sequence_keys(store: PairStore, rows: np.ndarray | None = None) -> np.ndarray:
    """The keys of (prompt + chosen) and (prompt + rejected) of each pair of `rows` (default: all), uint8 [n, 2, KEY_BYTES].

    A key is the sha256, cut short, of all that decides the values of a sequence: prompt ids and answer ids (int32, little
    endian), which of the answer's tokens are scored where that is not all, then the fixed-size tail (prompt length, answer
    length, m), which makes the whole unambiguous. Read-only.
    """
    rows = np.arange(len(store)) if rows is None else rows
    parts = [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]
    return np.frombuffer(b"".join(_keys(store, part) for part in parts), dtype=np.uint8).reshape(-1, 2, KEY_BYTES)


def _keys(store: PairStore, rows: np.ndarray) -> bytes:
    tokens, offsets = store.flat()
    bounds = offsets[3 * rows[:, None] + np.arange(4)]
    prompt, chosen, rejected = np.diff(bounds).T
    mask = store.flat_mask()
    shorter = (np.diff(bounds)[:, 1:] if mask is None else store.scored[rows]).min(axis=1)
    tails = _bytes_of(np.stack([prompt, chosen, shorter, prompt, rejected, shorter], axis=1))
    ids = _bytes_of(tokens)
    digests = []
    for pair, (start, first, second, end) in enumerate((4 * bounds).tolist()):
        one = hashlib.sha256(ids[start:first])
        other = one.copy()
        for key, begin, stop, tail in ((one, first, second, 24 * pair), (other, second, end, 24 * pair + 12)):
            key.update(ids[begin:stop])
            if mask is not None and not (part := mask[begin // 4 : stop // 4]).all():
                key.update(np.packbits(part).data)
            key.update(tails[tail : tail + 12])
        digests += (one.digest()[:KEY_BYTES], other.digest()[:KEY_BYTES])
    return b"".join(digests)


def blocks_to_score(keys: Sequence[np.ndarray], known: Callable[[np.ndarray], np.ndarray]) -> list[list[np.ndarray]]:
    """What is left to score: for each data set, in order, its blocks as int64 arrays of rows, each to become one shard.

    keys: uint8 [n, 2, KEY_BYTES] of each data set; known: keys [..., KEY_BYTES] -> bool [...].
    Every sequence is the business of the pair in which it first occurs, in any data set; pairs with such new sequences are
    cut into blocks before the look at what is known, and of a block the pairs are left of which a new one is not known.
    A block of which all is known is empty, so that the number of a block is always the same, for all jobs that share the
    work. Appended in order, both sides of every pair, a block alone stores what is new in it, and all of it at once: a job
    that was killed, or that lost shards, forms the same blocks again, hence the same shards.
    """
    if not keys:
        return []
    every = np.concatenate([_packed(of_set) for of_set in keys])
    new = np.zeros(len(every), dtype=bool)
    new[np.unique(every, return_index=True)[1]] = True
    ends = np.cumsum([len(of_set) for of_set in keys])
    left = []
    for of_set, new_in_set in zip(keys, np.split(new.reshape(-1, 2), ends[:-1])):
        rows = np.flatnonzero(new_in_set.any(axis=1))
        missing = new_in_set[rows] & ~known(of_set[rows])
        starts = range(0, len(rows), BLOCK_PAIRS)
        left.append([rows[i : i + BLOCK_PAIRS][missing[i : i + BLOCK_PAIRS].any(axis=1)] for i in starts])
    return left


def identity_of(described: Mapping[str, Any]) -> str:
    """Name of the store for what decides the values (weights, type, adapter, ...), as far as JSON can say it."""
    text = json.dumps([FORMAT_VERSION, dict(described)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class ReferenceStore:
    """The shards below `root/<identity>/`. What other jobs add after the opening is seen at the next opening."""

    folder: Path
    damaged: list[str]
    """File names of the shards that were found damaged, or could not be read, at the opening."""

    def __init__(self, root: Path, described: Mapping[str, Any]) -> None:
        """Read and verify every shard, and set damaged ones aside as `damaged-<name>`; create nothing.

        Of the values that several shards hold for a sequence, those of the shard whose name sorts first are taken.
        """
        self.folder = root / identity_of(described)
        self.damaged = []
        self._described = dict(described)
        names = self._list()
        _remove_stale(self.folder / name for name in names if name.startswith(DRAFT))
        shards = [self._read(name) for name in names if name.endswith(SUFFIX) and not name.startswith("damaged-")]
        shards = [shard for shard in shards if shard is not None]
        nothing = {"keys": np.empty((0, KEY_BYTES), np.uint8), "values": np.empty((0, len(VALUES)), np.float32)}
        keys = np.concatenate([_packed(shard["keys"]) for shard in (nothing, *shards)])
        self._keys, first = np.unique(keys, return_index=True)  # sorted, as bytes
        self._values = np.concatenate([shard["values"] for shard in (nothing, *shards)])[first]

    def __len__(self) -> int:
        """Number of distinct sequences."""
        return len(self._keys)

    def look_up(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(values fp32 [..., 2], found bool [...]) of keys uint8 [..., KEY_BYTES]; the values of unknown keys are NaN."""
        wanted = _packed(keys)
        at = np.searchsorted(self._keys, wanted)
        found = at < len(self)
        found[found] = self._keys[at[found]] == wanted[found]
        values = np.full((len(wanted), len(VALUES)), np.nan, dtype=np.float32)
        values[found] = self._values[at[found]]
        return values.reshape(*keys.shape[:-1], len(VALUES)), found.reshape(keys.shape[:-1])

    def append(self, keys: np.ndarray, values: np.ndarray, tokens: np.ndarray) -> Path | None:
        """Commit one shard, or nothing (None) where every key is known: keys uint8 [n, KEY_BYTES], values fp32 [n, 2],
        answer lengths `tokens` int32 [n].

        A key that is known already is left out, and of equal keys the first is kept: so a sequence lies in one shard alone,
        its values never change under a running job, and the bytes of a block's shard do not depend on when it is scored.
        Raises NumericFault for values that are not finite, and OSError, always with a file name.
        """
        values = np.asarray(values, dtype=np.float32)
        shapes, n = (keys.shape, values.shape, tokens.shape), len(keys)
        if shapes != ((n, KEY_BYTES), (n, len(VALUES)), (n,)):
            raise ValueError(f"keys, values and tokens do not belong together: {shapes}")
        if bad := int((~np.isfinite(values).all(axis=1)).sum()):
            reason = f"log-probs of {bad} of {n} sequences are not finite"
            raise NumericFault(f"reference: {reason}; check the reference's weights, or use another reference.dtype=")
        chosen = np.unique(_packed(keys), return_index=True)[1]
        chosen = chosen[~self.look_up(keys[chosen])[1]]
        if not len(chosen):
            return None
        keys, values = keys[chosen], values[chosen]
        path = self._commit(save({"keys": keys, "values": values, "tokens": np.asarray(tokens, dtype=np.int32)[chosen]}))
        at = np.searchsorted(self._keys, _packed(keys))
        self._keys = np.insert(self._keys, at, _packed(keys))
        self._values = np.insert(self._values, at, values, axis=0)
        return path

    def _list(self) -> list[str]:
        try:
            return sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return []

    def _read(self, name: str) -> dict[str, np.ndarray] | None:
        """The columns of a shard; None, and the shard set aside, when it is not what its name says."""
        path = self.folder / name
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # another job has set it aside at this moment
            return None
        except OSError:  # it may be whole, only not for us: leave it where it is
            self.damaged.append(name)
            return None
        if name == _name_of(data) and (shard := _parse(data)) is not None:
            return shard
        self.damaged.append(name)
        with suppress(OSError):
            path.rename(path.with_name(f"damaged-{name}"))
        return None

    def _commit(self, data: bytes) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        about = self.folder / "identity.json"  # for people: nothing reads it
        if not about.exists():
            text = json.dumps({"format_version": FORMAT_VERSION, "described": self._described}, indent=1, sort_keys=True)
            write_atomically(about, text)
        path = self.folder / _name_of(data)
        write_atomically(path, data)
        return path


def _packed(keys: np.ndarray) -> np.ndarray:
    """Keys uint8 [..., KEY_BYTES] as one item each, flat [n]; these sort and compare as bytes."""
    return np.ascontiguousarray(keys, dtype=np.uint8).reshape(-1, KEY_BYTES).view(f"V{KEY_BYTES}")[:, 0]


def _bytes_of(ids: np.ndarray) -> memoryview:
    return np.ascontiguousarray(ids, dtype="<i4").reshape(-1).view(np.uint8).data


def _name_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() + SUFFIX


def _parse(data: bytes) -> dict[str, np.ndarray] | None:
    """The columns of a shard, or None where they are not those of this format."""
    try:
        shard = load(data)
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None
    n = len(shard["keys"]) if "keys" in shard and shard["keys"].ndim else 0
    layout = {"keys": ("uint8", (n, KEY_BYTES)), "values": ("float32", (n, len(VALUES))), "tokens": ("int32", (n,))}
    return shard if {name: (str(column.dtype), column.shape) for name, column in shard.items()} == layout else None


def _remove_stale(drafts: Iterable[Path]) -> None:
    """Remove what killed jobs have left; a young draft may be another job's that is writing it."""
    for draft in drafts:
        with suppress(OSError):
            if time.time() - draft.stat().st_mtime > STALE_SECONDS:
                draft.unlink()
