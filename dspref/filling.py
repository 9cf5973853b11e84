"""Filling a reference store: every pair that it lacks is scored once, by all ranks together, and read back as tables."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dspref import distributed
from dspref.data.loader import Layout, place
from dspref.data.store import PairStore
from dspref.errors import EnvironmentFault
from dspref.logps import pair_logps
from dspref.reference_store import ReferenceStore, blocks_to_score, sequence_keys

# A long pass before step 1 says how far it is.
TELL_EVERY_SECONDS = 20
# Columns of a table of reference log-probs: what every objective needs of a pair.
COLUMNS = ("chosen", "rejected", "chosen_common", "rejected_common")

Keys = Mapping[str, np.ndarray]


def opened(root: Path, identity: Mapping[str, Any]) -> ReferenceStore:
    """The store below `root`. Raises EnvironmentFault where it cannot be read."""
    try:
        return ReferenceStore(root, identity)
    except OSError as error:
        raise EnvironmentFault(f"{root}: cannot read the reference store ({error.strerror}); set reference.store") from None


def keys_of(store: ReferenceStore | None, sets: Mapping[str, PairStore]) -> Keys:
    """Keys of the sequences of each data set, on rank 0, which has the store."""
    return {name: sequence_keys(pairs) for name, pairs in sets.items()} if store is not None else {}


def fill(
    store: ReferenceStore | None,
    keys: Keys,
    sets: Mapping[str, PairStore],
    scorer: Callable[[], AbstractContextManager[Any]],
    layout: Layout,
    device: torch.device,
    share: tuple[int, int] = (0, 1),
) -> int:
    """Score what the store lacks of some data sets, block by block, each committed as it is done; the number of pairs.

    `scorer` opens a context that gives the reference's forward; it is not opened where nothing is missing. `share` = (k, n):
    only every n-th block, from the k-th.
    """
    # Rank 0 decides for all: a file system may show a new file to one node before another.
    blocks = distributed.broadcast_object(_blocks(store, keys))
    todo = [(name, rows) for name, rows in blocks[share[0] :: share[1]] if len(rows)]
    if not todo:
        return 0
    distributed.on_main(partial(_refuse_unwritable, store))
    total, done, told = sum(len(rows) for _, rows in todo), 0, time.monotonic()
    with scorer() as forward:
        for name, rows in todo:
            table = score(forward, sets[name], rows, layout, device)
            distributed.on_main(partial(_commit, store, keys, name, rows, table, sets[name].lengths[rows]))
            done += len(rows)
            if time.monotonic() - told > TELL_EVERY_SECONDS:
                told = time.monotonic()
                distributed.log(f"reference: scored {done} of {total} pairs", stamp=True)
    return total


def _blocks(store: ReferenceStore | None, keys: Keys) -> list[tuple[str, np.ndarray]]:
    if store is None:
        return []
    blocks = blocks_to_score(list(keys.values()), lambda wanted: store.look_up(wanted)[1])
    return [(name, rows) for name, of_set in zip(keys, blocks) for rows in of_set]


def _refuse_unwritable(store: Any) -> None:
    """Raise EnvironmentFault before hours of scoring, not after."""
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(store.folder, os.W_OK) else "permission denied"
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        raise EnvironmentFault(f"{store.folder}: cannot write the reference store ({reason}); set reference.store")


def _commit(store: Any, keys: Keys, name: str, rows: np.ndarray, table: torch.Tensor, lengths: np.ndarray) -> None:
    values = table.numpy().reshape(-1, 2, 2).transpose(0, 2, 1)  # [sum or common, side] -> [side, sum or common]
    wanted = keys[name][rows]
    try:
        store.append(wanted.reshape(-1, wanted.shape[-1]), values.reshape(-1, 2), lengths[:, 1:].reshape(-1))
    except OSError as error:
        raise EnvironmentFault(
            f"{store.folder}: cannot write the reference store ({error.strerror}); free the space, or set reference.store"
        ) from None


def score(forward: Any, store: PairStore, rows: np.ndarray, layout: Layout, device: torch.device) -> torch.Tensor:
    """Log-prob sums of some pairs (ascending `rows`) of a data set: fp32 [n, columns] on the CPU of every rank."""
    sums = torch.zeros(len(rows), len(COLUMNS), device=device)
    places = torch.from_numpy(rows).to(device)
    for batch in place(store, rows, layout).packs(store, layout):
        batch = batch.to(device)
        logps = pair_logps(forward(batch)[0], batch)
        at = torch.searchsorted(places, batch.pair_ids)
        sums[at] = torch.stack([getattr(logps, name) for name in COLUMNS], dim=1)
    return distributed.all_sum(sums).cpu()  # each pair was scored by one rank, and is zero on the others


def tables(
    store: ReferenceStore | None, keys: Keys, sets: Mapping[str, PairStore], device: torch.device
) -> dict[str, torch.Tensor]:
    """What a filled store holds of whole data sets: fp32 [n, columns] on every rank, read by rank 0."""
    found = {}
    for name, pairs in sets.items():
        table = torch.zeros(len(pairs), len(COLUMNS))
        if store is not None:
            values = store.look_up(keys[name])[0].transpose(0, 2, 1)  # [n, sum or common, side]
            table = torch.from_numpy(np.ascontiguousarray(values.reshape(-1, len(COLUMNS))))
        found[name] = distributed.all_sum(table.to(device))
    return found


def report(store: ReferenceStore | None, sets: Mapping[str, PairStore], scored: int) -> None:
    """Say what was scored, and where it is kept."""
    if store is not None:
        total = sum(len(pairs) for pairs in sets.values())
        distributed.log(f"reference: scored {scored} of {total} pairs, kept in {store.folder}")
