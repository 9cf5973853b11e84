"""All that a row gives has one prompt, token by token: split where all of its answers can be, and cut by the longest one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from dspref.data.rows import RowError
from dspref.data.tokenize import Whole

Item = Whole | RowError


def alike(takes: str, rows: Sequence[int], items: Sequence[Item]) -> list[Item]:
    """The examples of some rows, those of a list with the prompt that all of them have: where the first letters of an answer
    and the end of the prompt are one token, that token is an answer's in all of them. As in a pair. `rows`: of each."""
    sizes: dict[int, int] = {}
    for row, item in zip(rows, items, strict=True):
        if takes == "list" and isinstance(item, Whole):
            sizes[row] = min(sizes.get(row, len(item.pair.prompt)), len(item.pair.prompt))
    return [
        _split_at(item, sizes[row]) if isinstance(item, Whole) and row in sizes else item for row, item in zip(rows, items)
    ]


def longest(takes: str, rows: Sequence[int], items: Sequence[Item]) -> Counter[int]:
    """Tokens of the longest answer of each row, where the prompt of a row is cut alike for all of them."""
    found: Counter[int] = Counter()
    for row, item in zip(rows, items, strict=True):
        if takes != "pairs" and isinstance(item, Whole):
            found[row] = max(found[row], item.longest)
    return found


def _split_at(item: Whole, size: int) -> Whole:
    """The same with its first `size` tokens as the prompt; those behind them begin the answers, and are scored where all of
    an answer is."""
    pair, moved = item.pair, item.pair.prompt[size:]
    if not len(moved):
        return item
    answers, masks = [], []
    for answer, mask in zip(pair[1:3], pair[3:]):
        there = len(answer) > 0
        answers.append(np.concatenate([moved, answer]) if there else answer)
        masks.append(None if mask is None else np.concatenate([np.zeros(len(moved), dtype=bool), mask]))
    images = None if item.images is None else item.images[:size]
    return item._replace(pair=type(pair)(pair.prompt[:size], *answers, *masks), head=min(item.head, size), images=images)
