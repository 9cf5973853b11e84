"""Which pairs form step k (`order`), and in which packs they run (`pack`). Pure, numpy only.

`order` knows neither lengths nor world size: the pairs of a step are the same on one GPU and on a thousand, and resuming
is an integer. `pack` is called step by step, for one step's pairs, and is free to place them anywhere, because losses are
sums divided by global counts.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import ceil, floor
from typing import NamedTuple

import numpy as np

# Tokens at which causal attention costs as much as the linear layers: cost = n + n^2 / QUADRATIC_TOKENS. About 15 % at
# 8k tokens, as an 8B model spends; only the balance of packs depends on it.
QUADRATIC_TOKENS = 55_000

# Greedy placement is even enough where packs hold more pairs, or where the dearest is this little above the mean.
FEW_PAIRS, EVEN_ENOUGH = 16, 0.015


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
    if together is not None and len(np.unique(together)) == len(together):
        together = None  # nothing has company
    ids, passes, start = [], [], 0
    for n, weight in zip(rows, weights, strict=True):
        source = np.arange(start, start + n)
        parts = [source] * floor(weight) + [_sample(source, round((weight - floor(weight)) * n), draws, together)]
        ids += parts
        passes += [np.full(len(part), number) for number, part in enumerate(parts)]
        start += n
    pairs = np.concatenate(ids) if ids else np.arange(0)
    if shuffle and together is None:
        draws.shuffle(pairs)
    elif shuffle and together is not None:
        # Of what comes twice in an epoch, each time is a group of its own.
        groups = numbered_by_sight(np.concatenate(passes) * (int(together.max()) + 1) + together[pairs])
        place = np.argsort(draws.permutation(int(groups.max(initial=-1)) + 1))
        pairs = pairs[np.argsort(place[groups], kind="stable")]
    return [pairs[i : i + pairs_per_step] for i in range(0, len(pairs), pairs_per_step)]


def _sample(source: np.ndarray, count: int, draws: np.random.Generator, together: np.ndarray | None) -> np.ndarray:
    """`count` pairs of a source, in order; whole groups, but for the last."""
    if together is None or not count:
        return np.sort(draws.choice(source, count, replace=False)) if count else source[:0]
    groups = numbered_by_sight(together[source])
    return np.sort(source[np.argsort(draws.permutation(int(groups.max()) + 1)[groups], kind="stable")[:count]])


class Groups(NamedTuple):
    """Pairs that run together: the number of its group for each pair [n]; and of each group, the tokens that are computed,
    the (query, key) pairs of attention, those tokens that are answers', and those that are scored; and of the pairs of
    attention those within prompts and those of answers with their prompts, int64 each."""

    of_pair: np.ndarray
    tokens: np.ndarray
    attention: np.ndarray
    answers: np.ndarray
    scored: np.ndarray
    within: np.ndarray
    across: np.ndarray

    @property
    def cost(self) -> np.ndarray:
        """What a group costs, in tokens of linear layers."""
        return self.tokens + 2 * self.attention / QUADRATIC_TOKENS


def alone(lengths: np.ndarray, scored: np.ndarray | None = None, apart: bool = False) -> Groups:
    """Each pair by itself, its prompt computed for each answer; `lengths` [n, 3] are the tokens of prompt, chosen, rejected,
    `scored` [n, 2] those of the answers that are scored (None: all). `apart`: an encoder reads prompts, in which every token
    sees all."""
    prompts, answers, sides = lengths[:, 0], lengths[:, 1:].sum(axis=1), (lengths[:, 1:] > 0).sum(axis=1)
    sequences = np.where(lengths[:, 1:] > 0, lengths[:, :1] + lengths[:, 1:], 0)
    attention = (sequences * (sequences + 1) // 2).sum(axis=1)
    attention += sides * prompts * (prompts - 1) // 2 if apart else 0  # the other half of each prompt
    within = sides * prompts**2 if apart else sides * (prompts * (prompts + 1) // 2)
    targets = answers if scored is None else scored.sum(axis=1)
    numbers = np.arange(len(lengths))
    return Groups(numbers, sequences.sum(axis=1), attention, answers, targets, within, answers * prompts)


def group(
    same: np.ndarray,
    lengths: np.ndarray,
    tokens_per_pack: int,
    scored: np.ndarray | None = None,
    apart: bool = False,
    lists: np.ndarray | None = None,
) -> Groups:
    """Pairs of one prompt together, so that it and each of their answers are computed once.

    `same` [n, 3] names the content of each (prompt, prompt + chosen, prompt + rejected), `lengths` [n, 3] are the tokens of
    prompt, chosen, rejected, `scored` [n, 2] those of the answers that are scored (None: all). A group beyond
    `tokens_per_pack` is cut between two pairs, but not between neighbours with the same number in `lists` [n] that have room
    in one. `apart`: an encoder reads prompts, in which every token sees all.
    """
    scored = lengths[:, 1:] if scored is None else scored
    groups = _measured(numbered_by_sight(same[:, 0]), same, lengths, scored, apart)
    large = groups.tokens > tokens_per_pack
    if len(groups.tokens) < len(same) and large.any():
        cut = _cut(groups.of_pair, large, same, lengths, tokens_per_pack, lists)
        return _measured(cut, same, lengths, scored, apart)
    return groups


def numbered_by_sight(labels: np.ndarray) -> np.ndarray:
    """Labels as 0, 1, 2, ... in the order of first sight."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _measured(groups: np.ndarray, same: np.ndarray, lengths: np.ndarray, scored: np.ndarray, apart: bool) -> Groups:
    """A group computes its prompt, and each distinct answer of its pairs behind it."""
    count = int(groups.max(initial=-1)) + 1
    prompts = np.zeros(count, dtype=np.int64)
    prompts[groups] = lengths[:, 0]
    twice, answers, scored = np.tile(groups, 2), lengths[:, 1:].T.reshape(-1), scored.T.reshape(-1)
    if count < len(groups):
        # Distinct (group, answer): one answer may be needed in two parts of a group that was cut.
        named = np.concatenate([same[:, 1], same[:, 2]]) * count + twice
        kept = np.unique(named, return_index=True)[1]
        twice, answers, scored = twice[kept], answers[kept], scored[kept]
    # The first answer runs behind the prompt, the others against its keys: (p + a)^2 / 2 less what is not computed twice.
    own = answers * (answers + 1) // 2
    tokens, attention, targets = (np.bincount(twice, x, count).astype(np.int64) for x in (answers, own, scored))
    within = prompts**2 if apart else prompts * (prompts + 1) // 2
    across = tokens * prompts
    return Groups(groups, prompts + tokens, within + across + attention, tokens, targets, within, across)


def _cut(
    groups: np.ndarray,
    large: np.ndarray,
    same: np.ndarray,
    lengths: np.ndarray,
    budget: int,
    lists: np.ndarray | None,
) -> np.ndarray:
    """Number the pairs of large groups anew: a new group wherever the next pair, or list, would exceed the budget."""
    groups, fresh = groups.copy(), int(groups.max()) + 1
    for whole in np.flatnonzero(large):
        members = np.flatnonzero(groups == whole)
        prompt, tokens, seen = int(lengths[members[0], 0]), 0, set()
        for pairs in _parts(members, prompt, same, lengths, budget, lists):
            answers = _answers_of(pairs, same, lengths)
            needed = sum(length for answer, length in answers.items() if answer not in seen)
            if seen and tokens + needed > budget:
                tokens, seen, fresh = 0, set(), fresh + 1
            tokens += needed if seen else prompt + sum(answers.values())
            seen |= answers.keys()
            groups[pairs] = fresh
        fresh += 1
    return numbered_by_sight(groups)


def _parts(
    members: np.ndarray, prompt: int, same: np.ndarray, lengths: np.ndarray, budget: int, lists: np.ndarray | None
) -> list[np.ndarray]:
    """Pairs of one prompt, those of a list together while there is room for it."""
    if lists is None:
        return list(members[:, None])
    runs = np.split(members, np.flatnonzero(np.diff(lists[members])) + 1)
    fits = [prompt + sum(_answers_of(run, same, lengths).values()) <= budget for run in runs]
    return [part for run, fit in zip(runs, fits) for part in ([run] if fit else run[:, None])]


def _answers_of(pairs: np.ndarray, same: np.ndarray, lengths: np.ndarray) -> dict[int, int]:
    """The tokens of each distinct answer of some pairs."""
    return dict(zip(same[pairs, 1:].ravel().tolist(), lengths[pairs, 1:].ravel().tolist()))


def pack(
    lengths: np.ndarray, tokens_per_pack: int, world_size: int, cost: np.ndarray | None = None
) -> list[list[np.ndarray]]:
    """Packs of one step, as `[rank][micro_step]` arrays of positions into `lengths`.

    `lengths` holds the computed tokens of each pair, or of each group of pairs. Every rank gets the same number of packs (an
    empty array is a filler). No pack exceeds `tokens_per_pack`, except one that holds a single longer pair. The packs are
    few and balanced by `cost` (default: that of one sequence of such length): longest pair first, each into the cheapest
    pack that still has room.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    cost = lengths + lengths**2 / QUADRATIC_TOKENS if cost is None else cost
    longest_first = np.argsort(-lengths, kind="stable")
    # A pair beyond the budget fills one pack, not several.
    demand = int(np.minimum(lengths, tokens_per_pack).sum())
    micro_steps = max(1, ceil(demand / (tokens_per_pack * world_size)))
    while (packs := _place(lengths, cost, longest_first, tokens_per_pack, micro_steps * world_size)) is None:
        micro_steps += 1
    # Ranks wait for each other in every micro-step: put packs of like cost side by side, dearest first.
    packs.sort(key=lambda members: -cost[members].sum())
    return [[np.array(packs[m * world_size + r], dtype=np.int64) for m in range(micro_steps)] for r in range(world_size)]


def _place(
    lengths: np.ndarray, cost: np.ndarray, longest_first: np.ndarray, budget: int, bins: int
) -> list[list[int]] | None:
    """Greedy balanced placement into `bins` packs, or None where a pair finds no room."""
    sizes, costs = lengths.tolist(), cost.tolist()
    packs: list[list[int]] = [[] for _ in range(bins)]
    fill = [0] * bins
    cheapest = [(0.0, k) for k in range(bins)]
    for i in longest_first.tolist():
        length = sizes[i]
        # The cheapest pack is nearly always the emptiest, so this looks at one or two packs.
        passed: list[tuple[float, int]] = []
        while cheapest and packs[cheapest[0][1]] and fill[cheapest[0][1]] + length > budget:
            passed.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        load, k = cheapest[0]
        packs[k].append(i)
        fill[k] += length
        heapq.heapreplace(cheapest, (load + costs[i], k))
        for entry in passed:
            heapq.heappush(cheapest, entry)
    _exchange(packs, fill, sizes, costs, budget)
    return packs


def _exchange(packs: list[list[int]], fill: list[int], sizes: list[int], costs: list[float], budget: int) -> None:
    """Even out what greedy placement leaves where a pack holds few pairs: the dearest pack and the cheapest swap the two
    pairs that bring them closest together, as long as that helps."""
    loads = [sum(costs[i] for i in members) for members in packs]
    even = (1 + EVEN_ENOUGH) * sum(loads) / len(packs)
    for _ in range(len(packs)):
        high, low = loads.index(max(loads)), loads.index(min(loads))
        apart = loads[high] - loads[low]
        if loads[high] <= even or len(packs[high]) > FEW_PAIRS:
            return
        swaps = [
            (abs(apart - 2 * (costs[i] - costs[j])), i, j)
            for i in packs[high]
            for j in packs[low]
            if fill[low] + sizes[i] - sizes[j] <= budget and fill[high] - sizes[i] + sizes[j] <= budget
        ]
        closest, i, j = min(swaps, default=(apart, -1, -1))
        if closest >= apart:
            return
        for own, comes, goes in ((high, j, i), (low, i, j)):
            packs[own][packs[own].index(goes)] = comes
            fill[own] += sizes[comes] - sizes[goes]
            loads[own] += costs[comes] - costs[goes]
