"""Data in numbers: what a set of tokenized pairs holds, what two of them share, and what packing will save.

All counts are exact, over columns of a store; of its tokens only those of prompts that two sets may share are read. Pairs
and prompts are compared as the model gets them: as tokens, after truncation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dspref.data.loader import Packing, place
from dspref.data.plan import alone
from dspref.data.sameness import content_of
from dspref.data.store import PairStore

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
# Bars of a histogram, at most; their widths are one of these times a power of ten.
BARS, WIDTHS = 12, (1, 2, 5)
COLUMNS = ("prompt", "chosen", "rejected")
# How a trainer without packing would do it: so many pairs a batch (the default of transformers and TRL), every sequence as
# long as the longest of the batch.
PADDED_PAIRS = 8
# How the reasons begin for which pairs of equal answers are left out.
IDENTICAL = "rejected: identical to chosen"


def figures(store: PairStore, ids: np.ndarray) -> dict[str, Any]:
    """The numbers of some pairs of a store, in plain values."""
    lengths, uncut, same, scored = store.lengths[ids], store.uncut[ids], store.same[ids], store.scored[ids]
    longest = lengths[:, 0] + lengths[:, 1:].max(axis=1, initial=0)
    there = scored > 0
    # Of unpaired data, answers that are not there count in nothing.
    answers = {name: lengths[there[:, k], k + 1] for k, name in enumerate(COLUMNS[1:])}
    columns = {"prompt": lengths[:, 0], **answers, "pair": longest}
    return {
        "pairs": len(ids),
        "rows": len(np.unique(store.rows[ids])),
        "answers": {name: len(column) for name, column in answers.items()} | {"single": int((~there).any(axis=1).sum())},
        "tokens": {name: spread(column) for name, column in columns.items()},
        "histogram": histogram({name: columns[name] for name in COLUMNS}),
        "truncated": truncation(lengths, uncut, there),
        "repeated": repetition(same, store.rows[ids]),
        "bias": length_bias(scored[there.all(axis=1)]),
        "scored": {"chosen": int(scored[:, 0].sum()), "rejected": int(scored[:, 1].sum())},
    }


def spread(lengths: np.ndarray) -> dict[str, Any]:
    """Total, mean and percentiles: so many per cent have at most that many tokens."""
    if not len(lengths):
        return {"total": 0, "mean": 0.0, "percentiles": {str(p): 0 for p in PERCENTILES}}
    found = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    named = {str(p): int(value) for p, value in zip(PERCENTILES, found)}
    return {"total": int(lengths.sum()), "mean": float(lengths.mean()), "percentiles": named}


def histogram(columns: dict[str, np.ndarray]) -> dict[str, Any]:
    """Counts of each column in bars of one width: bar k holds lengths from k * width up to and without (k + 1) * width."""
    most = max((int(column.max(initial=0)) for column in columns.values()), default=0)
    width = next(w * 10**power for power in range(20) for w in WIDTHS if most < BARS * w * 10**power)
    bars = most // width + 1
    counts = {name: np.bincount(column // width, minlength=bars).tolist() for name, column in columns.items()}
    return {"width": width, "counts": counts}


def truncation(lengths: np.ndarray, uncut: np.ndarray, there: np.ndarray) -> dict[str, Any]:
    """Of prompts, chosen and rejected answers: how many were cut, the tokens that these lost, and had. And pairs of which
    anything was cut. `there`: which answers there are, bool [n, 2]."""
    lost = uncut - lengths
    of = [len(lost), *there.sum(axis=0).tolist()]
    found: dict[str, Any] = {}
    for k, name in enumerate(COLUMNS):
        cut = lost[:, k] > 0
        counts = {"count": int(cut.sum()), "lost": int(lost[cut, k].sum()), "had": int(uncut[cut, k].sum())}
        found[name] = counts | {"share": share(counts["count"], of[k])}
    pairs = int((lost > 0).any(axis=1).sum())
    return found | {"pair": {"count": pairs, "share": share(pairs, len(lost))}}


def repetition(same: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    """Pairs that an earlier one says too, or that another one says the other way round; prompts that several pairs, and
    several rows, have. `same`: numbers of a store's content; `rows`: the row of each pair."""
    prompts, of_prompt, pairs_of = np.unique(same[:, 0], return_inverse=True, return_counts=True)
    both = np.unique(same[:, 1:], axis=0)
    ways = both[:, 0] * (int(same.max(initial=0)) + 1) + both[:, 1]
    back = both[:, 1] * (int(same.max(initial=0)) + 1) + both[:, 0]
    by_row = np.unique(np.stack([of_prompt, rows], axis=1), axis=0)[:, 0] if len(rows) else of_prompt
    rows_of = np.bincount(by_row, minlength=len(prompts))
    shared = pairs_of > 1
    return {
        "pairs": len(same) - len(both),
        "pairs_share": share(len(same) - len(both), len(same)),
        "contradicted": int(np.isin(ways, back).sum()),
        "prompts": len(prompts),
        "prompts_of_several_pairs": int(shared.sum()),
        "prompts_of_several_pairs_share": share(int(shared.sum()), len(prompts)),
        "pairs_of_these": int(pairs_of[shared].sum()),
        "prompts_of_several_rows": int((rows_of > 1).sum()),
    }


def length_bias(scored: np.ndarray) -> dict[str, Any]:
    """How chosen answers compare to rejected ones in scored tokens, in rows that have both: pairs, and the difference
    chosen - rejected."""
    more = scored[:, 0] - scored[:, 1]
    longer, equal = int((more > 0).sum()), int((more == 0).sum())
    return {
        "chosen_longer": longer,
        "chosen_longer_share": share(longer, len(more)),
        "equal": equal,
        "equal_share": share(equal, len(more)),
        "mean_difference": float(more.mean()) if len(more) else 0.0,
        "median_difference": float(np.median(more)) if len(more) else 0.0,
    }


def share(count: int, of: int) -> float:
    return count / of if of else 0.0


# -------------------------------------------------------------------------------------------------- two sets of pairs


def _content(store: PairStore, index: int) -> Iterator[bytes]:
    return content_of(store[index], store.image_digests([index])[0])


def overlap(held_out: PairStore, training: PairStore) -> dict[str, int]:
    """Prompts and pairs of a held-out set that the training set has too, and the pairs of these prompts."""
    ours = {
        next(_content(held_out, index)): int(held_out.same[index, 0])
        for index in np.unique(held_out.same[:, 0], return_index=True)[1].tolist()
    }
    firsts = np.unique(training.same[:, 0], return_index=True)[1]
    # Only prompts that may be equal are read.
    firsts = firsts[np.isin(training.lengths[firsts, 0], held_out.lengths[:, 0])]
    met: dict[int, int] = {}
    for index in firsts.tolist():
        if (number := ours.get(next(_content(training, index)))) is not None:
            met[int(training.same[index, 0])] = number
    concerned = np.flatnonzero(np.isin(held_out.same[:, 0], list(met.values())))
    said = {index: b"".join(_content(held_out, index)) for index in concerned.tolist()}
    known = set(said.values())
    theirs = np.flatnonzero(np.isin(training.same[:, 0], list(met)))
    equal = {content for index in theirs.tolist() if (content := b"".join(_content(training, index))) in known}
    pairs = sum(content in equal for content in said.values())
    return {"prompts": len(met), "pairs_of_these": len(concerned), "pairs": pairs}


# --------------------------------------------------------------------------------------------------------- packing


def savings(steps: Sequence[np.ndarray], store: PairStore, packing: Packing) -> dict[str, Any]:
    """Tokens that the pairs of some steps cost: padded, without padding, and as they are packed, over all steps; and the
    packs of all ranks, with the room in them that is used."""
    padded = separate = computed = packs = 0
    for ids in steps:
        lengths = store.lengths[ids]
        padded += padded_tokens(lengths)
        separate += int(alone(lengths).tokens.sum())
        placed = place(store, ids, packing)
        computed += placed.tokens
        packs += sum(map(len, placed.ids))
    return {
        "steps": len(steps),
        "pairs": sum(map(len, steps)),
        "tokens_per_pack": packing.tokens_per_pack,
        "ranks": packing.world_size,
        "prefix_sharing": packing.prefix_sharing,
        "padded_pairs": PADDED_PAIRS,
        "padded": padded,
        "unpadded": separate,
        "packed": computed,
        "saved": 1 - share(computed, padded) if padded else 0.0,
        "packs": packs,
        "fill": share(computed, packs * packing.tokens_per_pack),
    }


def padded_tokens(lengths: np.ndarray) -> int:
    """Tokens in batches of `PADDED_PAIRS` pairs, in order, all answers of each as long as the longest of the batch."""
    if not len(lengths):
        return 0
    longest = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    starts = np.arange(0, len(lengths), PADDED_PAIRS)
    answers = np.add.reduceat((lengths[:, 1:] > 0).sum(axis=1), starts)
    return int((answers * np.maximum.reduceat(longest, starts)).sum())


def where_packed(steps: Sequence[np.ndarray], store: PairStore, packing: Packing, index: int) -> dict[str, Any] | None:
    """The pack in which a pair runs first: step (from 1), rank, micro-step, the pairs beside it, how full the pack is. None
    where none of the steps holds the pair."""
    for number, ids in enumerate(steps, start=1):
        if index not in ids:
            continue
        placed = place(store, ids, packing)
        for rank, packs in enumerate(placed.ids):
            for micro_step, members in enumerate(packs):
                if index in members:
                    return {
                        "step": number, "steps": len(steps), "rank": rank, "micro_step": micro_step + 1,
                        "micro_steps": len(packs), "pairs": members.tolist(),
                    }  # fmt: skip
    return None
