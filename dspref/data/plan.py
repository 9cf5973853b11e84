"""Which pairs form step k (`order`), and in which packs they run (`pack`). Pure, numpy only.

`order` knows neither lengths nor world size: the pairs of a step are the same on one GPU and on a thousand, and resuming
is an integer. `pack` is called step by step, for one step's pairs, and is free to place them anywhere, because losses are
sums divided by global counts.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import ceil, floor

import numpy as np

# Tokens at which causal attention costs as much as the linear layers: cost = n + n^2 / QUADRATIC_TOKENS. About 15 % at
# 8k tokens, as an 8B model spends; only the balance of packs depends on it.
QUADRATIC_TOKENS = 55_000


def rows_per_epoch(rows: Sequence[int], weights: Sequence[float]) -> int:
    """Pairs in one epoch of a mixture: each source counts `weight` passes over its rows, a fraction rounded."""
    return sum(floor(w) * n + round((w - floor(w)) * n) for n, w in zip(rows, weights, strict=True))


def steps_per_epoch(rows: Sequence[int], weights: Sequence[float], pairs_per_step: int) -> int:
    """ceil(pairs / pairs_per_step): the last step of an epoch is short, nothing is dropped or repeated."""
    return ceil(rows_per_epoch(rows, weights) / pairs_per_step)


def order(
    rows: Sequence[int],
    weights: Sequence[float],
    seed: int,
    epoch: int,
    pairs_per_step: int,
    shuffle: bool = True,
) -> list[np.ndarray]:
    """The pair ids of every step of one epoch.

    Ids count through the sources in order. A source of weight 2.5 appears twice whole, and half of its rows, sampled by
    (seed, epoch), once more. With `shuffle=False` pairs keep the order of the files.
    """
    draws = np.random.default_rng([seed, epoch])
    ids, start = [], 0
    for n, weight in zip(rows, weights, strict=True):
        source = np.arange(start, start + n)
        ids += [source] * floor(weight)
        extra = round((weight - floor(weight)) * n)
        ids.append(np.sort(draws.choice(source, extra, replace=False)) if extra else source[:0])
        start += n
    pairs = np.concatenate(ids) if ids else np.arange(0)
    if shuffle:
        draws.shuffle(pairs)
    return [pairs[i : i + pairs_per_step] for i in range(0, len(pairs), pairs_per_step)]


def pack(lengths: np.ndarray, tokens_per_pack: int, world_size: int) -> list[list[np.ndarray]]:
    """Packs of one step, as `[rank][micro_step]` arrays of positions into `lengths`.

    `lengths` holds the computed tokens of each pair. Every rank gets the same number of packs (an empty array is a filler).
    No pack exceeds `tokens_per_pack`, except one that holds a single longer pair. The packs are few and balanced by cost:
    longest pair first, each into the cheapest pack that still has room.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    longest_first = np.argsort(-lengths, kind="stable")
    # A pair beyond the budget fills one pack, not several.
    demand = int(np.minimum(lengths, tokens_per_pack).sum())
    micro_steps = max(1, ceil(demand / (tokens_per_pack * world_size)))
    while (packs := _place(lengths, longest_first, tokens_per_pack, micro_steps * world_size)) is None:
        micro_steps += 1
    # Ranks wait for each other in every micro-step: put packs of like cost side by side, dearest first.
    cost = lengths + lengths**2 / QUADRATIC_TOKENS
    packs.sort(key=lambda members: -cost[members].sum())
    return [[np.array(packs[m * world_size + r], dtype=np.int64) for m in range(micro_steps)] for r in range(world_size)]


def _place(lengths: np.ndarray, longest_first: np.ndarray, budget: int, bins: int) -> list[list[int]] | None:
    """Greedy balanced placement into `bins` packs, or None where a pair finds no room."""
    packs: list[list[int]] = [[] for _ in range(bins)]
    fill = [0] * bins
    cheapest = [(0.0, k) for k in range(bins)]
    for i in longest_first.tolist():
        length = int(lengths[i])
        # The cheapest pack is nearly always the emptiest, so this looks at one or two packs.
        passed: list[tuple[float, int]] = []
        while cheapest and packs[cheapest[0][1]] and fill[cheapest[0][1]] + length > budget:
            passed.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        cost, k = cheapest[0]
        packs[k].append(i)
        fill[k] += length
        heapq.heapreplace(cheapest, (cost + length + length**2 / QUADRATIC_TOKENS, k))
        for entry in passed:
            heapq.heappush(cheapest, entry)
    return packs
