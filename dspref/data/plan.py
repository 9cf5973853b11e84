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
    together: np.ndarray | None = None,
) -> list[np.ndarray]:
    """The pair ids of every step of one epoch.

    Ids count through the sources in order. A source of weight 2.5 appears twice whole, and half of its rows, sampled by
    (seed, epoch), once more. With `shuffle=False` pairs keep the order of the files. `together` [pairs]: shuffled pairs with
    the same number stay side by side, in the order of the files; None: each is shuffled alone.
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
    if shuffle and together is None:
        draws.shuffle(pairs)
    elif shuffle and together is not None:
        # Of a source that comes twice, each pass has groups of its own.
        passes = np.repeat(np.arange(len(ids)), [len(part) for part in ids])
        groups = _numbered(passes * (int(together.max(initial=0)) + 1) + together[pairs])
        place = np.argsort(draws.permutation(int(groups.max(initial=-1)) + 1))
        pairs = pairs[np.argsort(place[groups], kind="stable")]
    return [pairs[i : i + pairs_per_step] for i in range(0, len(pairs), pairs_per_step)]


def group(same: np.ndarray, lengths: np.ndarray, tokens_per_pack: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of one prompt run together, so that it and each of their answers are computed once: (number of its group for
    each pair [n], computed tokens of each group).

    `same` [n, 3] names the content of each (prompt, prompt + chosen, prompt + rejected), `lengths` [n, 3] are the tokens of
    prompt, chosen, rejected. A group beyond `tokens_per_pack` is cut between two pairs.
    """
    groups = _numbered(same[:, 0])
    if len(groups) == 0 or groups[-1] + 1 == len(groups) == groups.max() + 1:
        return groups, lengths.sum(axis=1)  # no prompt comes twice
    tokens = _group_tokens(groups, same, lengths)
    if (tokens > tokens_per_pack).any():
        groups = _cut(groups, tokens > tokens_per_pack, same, lengths, tokens_per_pack)
        tokens = _group_tokens(groups, same, lengths)
    return groups, tokens


def _numbered(labels: np.ndarray) -> np.ndarray:
    """Labels as 0, 1, 2, ... in the order of first sight."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _group_tokens(groups: np.ndarray, same: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A prompt, and each distinct answer of the group's pairs."""
    count = int(groups.max()) + 1
    prompts = np.zeros(count, dtype=np.int64)
    prompts[groups] = lengths[:, 0]
    # Distinct (group, answer): one answer may be needed in two parts of a group that was cut.
    answers = np.concatenate([same[:, 1], same[:, 2]]) * count + np.tile(groups, 2)
    kept = np.unique(answers, return_index=True)[1]
    sizes = np.concatenate([lengths[:, 1], lengths[:, 2]])[kept]
    return prompts + np.bincount(np.tile(groups, 2)[kept], sizes, count).astype(np.int64)


def _cut(groups: np.ndarray, large: np.ndarray, same: np.ndarray, lengths: np.ndarray, budget: int) -> np.ndarray:
    """Number the pairs of large groups anew: a new group wherever the next pair would exceed the budget."""
    groups, fresh = groups.copy(), int(groups.max()) + 1
    for whole in np.flatnonzero(large):
        tokens, seen = 0, set()
        for i in np.flatnonzero(groups == whole):
            answers = dict(zip(same[i, 1:].tolist(), lengths[i, 1:].tolist()))
            needed = sum(length for answer, length in answers.items() if answer not in seen)
            if seen and tokens + needed > budget:
                tokens, seen, fresh = 0, set(), fresh + 1
            tokens += needed if seen else int(lengths[i].sum())
            seen |= answers.keys()
            groups[i] = fresh
        fresh += 1
    return _numbered(groups)


def pack(lengths: np.ndarray, tokens_per_pack: int, world_size: int) -> list[list[np.ndarray]]:
    """Packs of one step, as `[rank][micro_step]` arrays of positions into `lengths`.

    `lengths` holds the computed tokens of each pair, or of each group of pairs. Every rank gets the same number of packs (an
    empty array is a filler). No pack exceeds `tokens_per_pack`, except one that holds a single longer pair. The packs are
    few and balanced by cost: longest pair first, each into the cheapest pack that still has room.
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
