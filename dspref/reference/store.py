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
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dspref import reading
from dspref.errors import NumericFault
from dspref.files import DRAFT, write_atomically

if TYPE_CHECKING:
    from dspref.data.mismatched import Pairs

# Raise this whenever the same sequences would get other keys, or the columns of a shard another meaning.
FORMAT_VERSION = 1
KEY_BYTES = 16
# Sums of log-probs: over an answer's scored tokens; over its first m, m = those of the pair's shorter answer (LD-DPO).
VALUES = ("sum", "common_sum")
BLOCK_PAIRS = 1000
# Keys are made of so many pairs at a time, so that little memory is taken.
ROWS_AT_ONCE = 20_000
STALE_SECONDS = 24 * 3600
SUFFIX = ".safetensors"


def sequence_keys(store: Pairs, rows: np.ndarray | None = None) -> np.ndarray:
    """The keys of (prompt + chosen) and (prompt + rejected) of each pair of `rows` (default: all), uint8 [n, 2, KEY_BYTES].

    A key is the sha256, cut short, of all that decides the values of a sequence: prompt ids and answer ids (int32, little
    endian), between them a digest of the prompt's images where it has some, which of the answer's tokens are scored where
    that is not all, then the fixed-size tail (prompt length, answer length, m), which makes the whole unambiguous.
    Read-only.
    """
    rows = np.arange(len(store)) if rows is None else rows
    parts = [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]
    return np.frombuffer(b"".join(_keys(store, part) for part in parts), dtype=np.uint8).reshape(-1, 2, KEY_BYTES)


def _keys(store: Pairs, rows: np.ndarray) -> bytes:
    tokens, bounds = store.flat()[0], store.bounds(rows)
    lengths = bounds[..., 1] - bounds[..., 0]
    prompt, chosen, rejected = lengths.T
    mask = store.flat_mask()
    shorter = (lengths[:, 1:] if mask is None else store.scored[rows]).min(axis=1)
    tails = _bytes_of(np.stack([prompt, chosen, shorter, prompt, rejected, shorter], axis=1))
    ids = _bytes_of(tokens)
    digests, images = [], store.image_digests(rows.tolist())
    for pair, (asked, first, second) in enumerate((4 * bounds).tolist()):
        one = hashlib.sha256(ids[slice(*asked)])
        one.update(images[pair])
        other = one.copy()
        for key, (begin, stop), tail in ((one, first, 24 * pair), (other, second, 24 * pair + 12)):
            key.update(ids[begin:stop])
            if mask is not None and not (part := mask[begin // 4 : stop // 4]).all():
                key.update(np.packbits(part).data)
            key.update(tails[tail : tail + 12])
        digests += (one.digest()[:KEY_BYTES], other.digest()[:KEY_BYTES])
    return b"".join(digests)


class Block(NamedTuple):
    """Pairs whose packs are planned together; n pairs."""

    pairs: np.ndarray
    """int64 [n]: positions in the keys of their data set."""
    own: np.ndarray
    """bool [n, 2]: the sequences that are this pair's business."""
    unknown: np.ndarray
    """bool [n]: pairs with a sequence of their own that is not known."""
    asked: np.ndarray
    """bool [n]: pairs with a sequence of their own that is not known and that some pair needs."""


def blocks_of(
    keys: Sequence[np.ndarray], known: Callable[[np.ndarray], np.ndarray], needed: Sequence[np.ndarray] | None = None
) -> list[list[Block]]:
    """The blocks of each data set, in order, with what of them is left to score.

    keys: uint8 [n, 2, KEY_BYTES] of each data set; known: keys [..., KEY_BYTES] -> bool [...]; needed: bool [n] of each data
    set, the pairs whose sequences must be known (default: all).
    Every sequence is the business of the pair in which it first occurs, in any data set; pairs with such sequences are cut
    into blocks before the look at what is known. So the number of a block is the same for all jobs that share the work, and
    a job that was killed, or that lost shards, forms the same blocks again.
    """
    if not keys:
        return []
    every = np.concatenate([_packed(of_set) for of_set in keys])
    _, first, number = np.unique(every, return_index=True, return_inverse=True)
    new, wanted = np.zeros(len(every), dtype=bool), np.zeros(len(first), dtype=bool)
    new[first] = True
    wanted[number[np.repeat(np.concatenate(needed), 2)] if needed is not None else number] = True
    ends = np.cumsum([2 * len(of_set) for of_set in keys])[:-1]
    found = []
    for of_set, *masks in zip(keys, np.split(new, ends), np.split(wanted[number], ends)):
        own, asked = (mask.reshape(-1, 2) for mask in masks)
        pairs = np.flatnonzero(own.any(axis=1))
        unknown = own[pairs] & ~known(of_set[pairs])
        columns: tuple[Any, ...] = pairs, own[pairs], unknown.any(axis=1), (unknown & asked[pairs]).any(axis=1)
        starts = range(0, len(pairs), BLOCK_PAIRS)
        found.append([Block(*(column[start : start + BLOCK_PAIRS] for column in columns)) for start in starts])
    return found


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
            data = reading.read_bytes(path, 2**40)
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
