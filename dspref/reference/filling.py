"""Filling a reference store: of the pairs that a run needs, those that it lacks are scored once, by all ranks together, and
all are read back as tables."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dspref import distributed
from dspref.data.ahead import ahead
from dspref.data.batch import PackedBatch
from dspref.data.loader import Packing, StepPacks, place
from dspref.data.mismatched import Pairs
from dspref.errors import EnvironmentFault
from dspref.model.logps import pair_logps
from dspref.reference.store import ReferenceStore, blocks_of, sequence_keys

# What was scored is committed after so many seconds at the latest (and a pack), sooner at the beginning. A job that is
# ended loses no more.
COMMIT_SECONDS, FIRST_COMMIT_SECONDS = 30.0, 4.0
# Columns of a table of reference log-probs: what every objective needs of a pair.
COLUMNS = ("chosen", "rejected", "chosen_common", "rejected_common")

# Told (pairs scored, pairs to score, seconds left or None), on every rank.
View = Callable[[int, int, float | None], None]


class Need(NamedTuple):
    """Pairs of a data set that a run needs the reference's log-probs of; n pairs."""

    rows: np.ndarray
    """int64 [n], each once, in the order in which they are needed: it decides which are scored together."""
    now: np.ndarray
    """bool [n]: those that are still needed. A run that goes on needs no pair of the steps that are done."""


class Wanted(NamedTuple):
    """A `Need`, with the keys of its sequences: uint8 [n, 2, KEY_BYTES]."""

    rows: np.ndarray
    now: np.ndarray
    keys: np.ndarray


class Todo(NamedTuple):
    """A block of which some pairs are to be scored; n pairs."""

    name: str
    rows: np.ndarray
    """int64 [n], ascending."""
    places: np.ndarray
    """int64 [n]: where their keys are. This and what follows is a `Block`, by ascending row."""
    own: np.ndarray
    unknown: np.ndarray
    asked: np.ndarray


def opened(root: Path, identity: Mapping[str, Any]) -> ReferenceStore:
    """The store below `root`. Raises EnvironmentFault where it cannot be read."""
    try:
        return ReferenceStore(root, identity)
    except OSError as error:
        raise EnvironmentFault(f"{root}: cannot read the reference store ({error.strerror}); set reference.store") from None


def whole(pairs: Pairs) -> Need:
    return Need(np.arange(len(pairs)), np.ones(len(pairs), dtype=bool))


def wanted_of(
    store: ReferenceStore | None, sets: Mapping[str, Pairs], needs: Mapping[str, Need] | None = None
) -> dict[str, Wanted]:
    """What is wanted of each data set, by default all of it; on rank 0, which has the store, and {} on the others."""
    found = {}
    for name, pairs in sets.items() if store is not None else ():
        need = (needs or {}).get(name) or whole(pairs)
        found[name] = Wanted(*need, sequence_keys(pairs, need.rows))
    return found


def fill(
    store: ReferenceStore | None,
    wanted: Mapping[str, Wanted],
    sets: Mapping[str, Pairs],
    scorer: Callable[[], AbstractContextManager[Any]],
    packing: Packing,
    device: torch.device,
    share: tuple[int, int] = (0, 1),
    view: View = lambda done, total, left: None,
) -> int:
    """Score what the store lacks of what is wanted, and commit it as it is done; the number of pairs.

    `scorer` opens a context that gives the reference's forward; it is not opened where nothing is missing. `share` = (k, n):
    only every n-th block, from the k-th. Packs depend on what is wanted and on `packing` alone, neither on the clock nor on
    what a job that was ended has left: the values are those of one that was not.
    """
    # Rank 0 decides for all: a file system may show a new file to one node before another.
    todo = [Todo(*block) for block in distributed.broadcast_object(_todo(store, wanted, share))]
    if not todo:
        return 0
    distributed.on_main(partial(_refuse_unwritable, store))
    tally = _Tally(todo, sets, view)
    with scorer() as forward:
        tally.begin()
        for block in todo:
            pairs, pending = sets[block.name], []
            for rows, sums in score(forward, pairs, planned(block, pairs, packing), packing, device):
                pending.append((rows, sums))
                tally.count(block, rows)
                if tally.is_due():
                    distributed.on_main(partial(_commit, store, wanted, block, pending, pairs))
                    pending = []
                    tally.committed()
            if pending:
                distributed.on_main(partial(_commit, store, wanted, block, pending, pairs))
                tally.committed()
    return tally.total


class _Tally:
    """How far the scoring is, and when the next commit is due. The same on all ranks, but for their clocks."""

    def __init__(self, todo: list[Todo], sets: Mapping[str, Pairs], view: View) -> None:
        self.total = sum(int(block.asked.sum()) for block in todo)
        self._tokens = sum(int(sets[block.name].lengths[block.rows[block.asked]].sum()) for block in todo)
        self._sets, self._view = sets, view
        self._done = self._done_tokens = 0
        view(0, self.total, None)

    def begin(self) -> None:
        self._begun = self._committed = time.monotonic()

    def count(self, block: Todo, rows: np.ndarray) -> None:
        counted = rows[block.asked[np.searchsorted(block.rows, rows)]]
        self._done += len(counted)
        self._done_tokens += int(self._sets[block.name].lengths[counted].sum())
        rate = (time.monotonic() - self._begun) / max(self._done_tokens, 1)
        self._view(self._done, self.total, rate * (self._tokens - self._done_tokens) if self._done_tokens else None)

    def is_due(self) -> bool:
        """Whether any rank's clock says so. A collective of eight bytes."""
        now = time.monotonic()
        patience = min(max((now - self._begun) / 2, FIRST_COMMIT_SECONDS), COMMIT_SECONDS)
        return bool(distributed.largest(int(now - self._committed > patience)))

    def committed(self) -> None:
        self._committed = time.monotonic()


def _todo(store: ReferenceStore | None, wanted: Mapping[str, Wanted], share: tuple[int, int]) -> list[Todo]:
    """This job's blocks that have something to score."""
    if store is None:
        return []
    every = list(wanted.values())
    of_sets = blocks_of([want.keys for want in every], lambda keys: store.look_up(keys)[1], [want.now for want in every])
    found = []
    for name, block in [(name, block) for name, of_set in zip(wanted, of_sets) for block in of_set][share[0] :: share[1]]:
        if block.asked.any():
            rows = wanted[name].rows[block.pairs]
            order = np.argsort(rows)
            found.append(Todo(name, rows[order], *(column[order] for column in block)))
    return found


def planned(block: Todo, store: Pairs, packing: Packing) -> StepPacks:
    """The packs of a block that are to be run: those of the whole block that hold a pair which is asked for. Where they hold
    pairs that are known too (from other jobs, or other data), the pairs that are asked for are packed anew."""
    placed = place(store, block.rows, packing)
    at = [np.searchsorted(block.rows, rows) for rows in together(placed)]
    kept = [k for k, pairs in enumerate(at) if block.asked[pairs].any()]
    if not all(block.unknown[at[k]].all() for k in kept):
        return place(store, block.rows[block.asked], packing)
    return replace(placed, ids=[[of_rank[k] for k in kept] for of_rank in placed.ids])


def together(placed: StepPacks) -> list[np.ndarray]:
    """The pairs that run at one time on all ranks, ascending, of each micro-step."""
    return [np.sort(np.concatenate(of_ranks)) for of_ranks in zip(*placed.ids)]


def _refuse_unwritable(store: Any) -> None:
    """Raise EnvironmentFault before hours of scoring, not after."""
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(store.folder, os.W_OK) else "permission denied"
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        raise EnvironmentFault(f"{store.folder}: cannot write the reference store ({reason}); set reference.store")


def _commit(
    store: Any,
    wanted: Mapping[str, Wanted],
    block: Todo,
    scored: list[tuple[np.ndarray, torch.Tensor]],
    pairs: Pairs,
) -> None:
    """Store the sequences that are the business of some pairs of a block (rank 0)."""
    rows = np.concatenate([rows for rows, _ in scored])
    values = np.concatenate([sums.numpy() for _, sums in scored]).reshape(-1, 2, 2).transpose(0, 2, 1)
    at = np.searchsorted(block.rows, rows)
    own, keys = block.own[at], wanted[block.name].keys[block.places[at]]
    try:
        # values: [sum or common, side] -> [side, sum or common]
        store.append(keys[own], values[own], pairs.lengths[rows, 1:][own])
    except OSError as error:
        raise EnvironmentFault(
            f"{error.filename2 or error.filename or store.folder}: cannot write the reference store ({error.strerror}); "
            "free the space, move away what is in the way, or set reference.store"
        ) from None


def score(
    forward: Any, store: Pairs, placed: StepPacks, packing: Packing, device: torch.device
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Run packs: after each micro-step its pairs, on all ranks, ascending, and their log-prob sums, fp32 [n, columns] on the
    CPU of every rank."""
    micro_steps = zip(together(placed), placed.packs(store, packing))
    for rows, at, batch in ahead((rows, _places(batch, rows), batch.pinned()) for rows, batch in micro_steps):
        sums = torch.zeros(len(rows), len(COLUMNS), device=device)
        batch = batch.to(device)
        logps = pair_logps(forward(batch)[0], batch)
        sums[at.to(device, non_blocking=True)] = torch.stack([getattr(logps, name) for name in COLUMNS], dim=1)
        yield rows, distributed.sum_of_groups(sums).cpu()  # each pair was scored by one group, and is zero in the others


def _places(batch: PackedBatch, rows: np.ndarray) -> torch.Tensor:
    """Where a pack's pairs are in `rows`, where a GPU can fetch it by itself."""
    places = torch.from_numpy(np.searchsorted(rows, batch.pair_ids.numpy()))
    return places.pin_memory() if torch.cuda.is_available() else places


def score_rows(forward: Any, store: Pairs, rows: np.ndarray, packing: Packing, device: torch.device) -> torch.Tensor:
    """Log-prob sums of some pairs (ascending `rows`) of a data set: fp32 [n, columns] on the CPU of every rank."""
    found = torch.full((len(rows), len(COLUMNS)), torch.nan)
    if len(rows):
        for scored, sums in score(forward, store, place(store, rows, packing), packing, device):
            found[np.searchsorted(rows, scored)] = sums
    return found


def tables(
    store: ReferenceStore | None, wanted: Mapping[str, Wanted], sets: Mapping[str, Pairs], device: torch.device
) -> dict[str, torch.Tensor]:
    """What a filled store holds of what is wanted: fp32 [pairs of the data set, columns] on every rank, read by rank 0; NaN
    for all other pairs."""
    found = {}
    for name, pairs in sets.items():
        table = torch.zeros(len(pairs), len(COLUMNS))
        if store is not None:
            table[:] = torch.nan
            want = wanted[name]
            values = store.look_up(want.keys)[0].transpose(0, 2, 1)  # [n, sum or common, side]
            table[want.rows] = torch.from_numpy(np.ascontiguousarray(values.reshape(-1, len(COLUMNS))))
        found[name] = distributed.all_sum(table.to(device))
    return found


def report(store: ReferenceStore | None, wanted: Mapping[str, Wanted], scored: int) -> None:
    """Say what was scored, and where it is kept."""
    if store is not None:
        total = sum(int(want.now.sum()) for want in wanted.values())
        others = f" ({total - scored} known before, or equal to another)" if scored < total else ""
        distributed.remark(f"reference: scored {scored} of {total} pairs, kept in {store.folder}{others}")
