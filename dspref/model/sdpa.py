"""torch's scaled_dot_product_attention over a pack: for CPUs, GPUs that have no other kernel, and scores with a bias.

On a CPU each segment is a call, which is linear in the length of the pack. On a GPU a call for a short segment costs more
than its work: there, segments of like length are rows of one call, padded behind their tokens. Long ones that need a mask,
or scores that torch's function does not know, are computed some queries at a time. T queries, K keys, H heads, G key-value
heads, D head size; S rows of at most Q queries and K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

# Scores that a call may compute beyond those asked for, as a factor; and the number that it may compute in any case, per
# head, as so many cost a GPU less than the launches of another call.
PADDING, SMALL = 1.5, 2**22
# The most scores for which a mask, or where they are held themselves the scores of all heads, are made at once.
AT_ONCE = 2**23


@dataclass(frozen=True)
class Options:
    """What a layer asks of a kernel beyond plain attention; `window` counts the query's own position. `position_bias`: added
    to the score of a key at distance -L to L behind its query, by head. `sinks`: of each head, the score of a key without a
    value."""

    scale: float
    dropout: float
    window: int | None
    softcap: float | None
    position_bias: Float[Tensor, "H 2L+1"] | None = None
    sinks: Float[Tensor, "H"] | None = None


@dataclass(frozen=True)
class Rows:
    """Segments that one call computes: how many queries and keys each has."""

    queries: Sequence[int]
    keys: Sequence[int]
    device: torch.device

    @cached_property
    def places(self) -> tuple[Int[Tensor, "T"], Int[Tensor, "K"]]:
        """Of queries and of keys, among padded ones."""
        queries, keys = (self._here(_places(counts)) for counts in (self.queries, self.keys))
        return queries, keys

    @cached_property
    def counts(self) -> tuple[Int[Tensor, "S 1 1"], Int[Tensor, "S 1 1"]]:
        """Of queries and of keys."""
        queries, keys = (self._here(np.array(counts)[:, None, None]) for counts in (self.queries, self.keys))
        return queries, keys

    def plain(self, causal: bool) -> bool:
        """No query would see padding: none is there, or it lies behind all that a query sees."""
        return self.queries == self.keys if causal else len(set(self.keys)) == 1

    def seen(self, causal: bool, window: int | None) -> Bool[Tensor, "S Q K"]:
        """Which keys a query sees. One that is padding sees what the last one does: the softmax of nothing is NaN."""
        queries, keys = self.counts
        key = torch.arange(max(self.keys), device=self.device)[None, None]
        if not causal:
            return (key < keys).expand(-1, max(self.queries), -1)
        query = torch.arange(max(self.queries), device=self.device)[None, :, None].minimum(queries - 1)
        return _within(query + keys - queries - key, window)

    def _here(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)


@dataclass(frozen=True)
class Calls:
    """What computes a pack; where the order of its tokens is another than the pack's, their indices in it."""

    rows: Sequence[Rows]
    queries: Int[Tensor, "T"] | None = None
    keys: Int[Tensor, "K"] | None = None

    @cached_property
    def back(self) -> Int[Tensor, "T"] | None:
        return None if self.queries is None else torch.argsort(self.queries)


def calls_of(queries: Sequence[int], keys: Sequence[int], device: torch.device, side_by_side: bool) -> Calls:
    """Of segments with so many queries and keys: as few as PADDING and SMALL allow, or one for each."""
    groups = _alike(queries, keys) if side_by_side else [[i] for i in range(len(queries))]
    rows = [Rows([queries[i] for i in group], [keys[i] for i in group], device) for group in groups]
    order = list(chain.from_iterable(groups))
    if order == sorted(order):
        return Calls(rows)
    return Calls(rows, *(torch.from_numpy(_tokens(order, counts)).to(device) for counts in (queries, keys)))


def sdpa(
    q: Float[Tensor, "T H D"],
    k: Float[Tensor, "K G D"],
    v: Float[Tensor, "K G D"],
    calls: Calls,
    causal: bool,
    options: Options,
    at_once: int = AT_ONCE,
) -> Float[Tensor, "T H D"]:
    """Attention of every segment to its own keys; `causal`: aligned at the bottom right. `at_once`: see AT_ONCE."""
    if not q.is_cpu:
        # On CUDA only the kernel that holds all scores takes a mask together with fewer key-value heads.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    q = _ordered(q, calls.queries)
    k, v = (_ordered(x, calls.keys) for x in (k, v))
    queries, keys = [sum(rows.queries) for rows in calls.rows], [sum(rows.keys) for rows in calls.rows]
    # split, not slices: the backward of a slice fills and adds a gradient as long as the pack.
    parts = zip(calls.rows, q.split(queries), k.split(keys), v.split(keys))
    return _ordered(torch.cat([_call(*part, causal, options, at_once) for part in parts]), calls.back)


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Bool[Tensor, "Q K"]:
    """True where a query may see a key: causal, aligned at the bottom right, at most `window` keys back."""
    query, key = torch.arange(keys - queries, keys, device=device)[:, None], torch.arange(keys, device=device)[None]
    return _within(query - key, window)


def _within(distance: Tensor, window: int | None) -> Tensor:
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _call(rows: Rows, q: Tensor, k: Tensor, v: Tensor, causal: bool, options: Options, at_once: int) -> Tensor:
    """What is longer than `at_once` allows is computed in blocks of queries."""
    held = options.softcap or options.sinks is not None
    masked = held or options.window is not None or not rows.plain(causal)
    if not causal or not masked or len(rows.keys) > 1 or options.position_bias is not None:
        return _whole(rows, q, k, v, causal, options)
    most = max(at_once // (rows.keys[0] * (q.shape[1] if held else 1)), 1)
    return _whole(rows, q, k, v, causal, options) if len(q) <= most else _in_blocks(q, k, v, options, most)


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, options: Options, most: int) -> Float[Tensor, "T H D"]:
    """One causal segment, `most` queries at a time, each block with the keys that it sees, and again in its backward pass:
    neither a mask nor scores of the whole segment are ever there."""
    found, stop = [], len(k) - len(q)
    for block in q.split(most):
        stop += len(block)
        start = 0 if options.window is None else max(stop - len(block) + 1 - options.window, 0)
        rows = Rows([len(block)], [stop - start], q.device)
        found.append(
            checkpoint(
                _whole,
                rows,
                block,
                k[start:stop],
                v[start:stop],
                True,
                options,
                use_reentrant=False,
                preserve_rng_state=options.dropout > 0,
            )
        )
    return torch.cat(found)  # type: ignore[arg-type]


def _whole(rows: Rows, q: Tensor, k: Tensor, v: Tensor, causal: bool, options: Options) -> Tensor:
    mask, place = _mask(rows, causal, options, q), rows.places if len(rows.keys) > 1 else (None, None)
    q, k, v = _padded(q, rows.queries, place[0]), _padded(k, rows.keys, place[1]), _padded(v, rows.keys, place[1])
    if options.softcap or options.sinks is not None:
        mask = rows.seen(causal, options.window)[:, None] if mask is None else mask
        return _ordered(_by_scores(q, k, v, mask, options).transpose(1, 2).flatten(0, 1), place[0])
    output = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, dropout_p=options.dropout, scale=options.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return _ordered(output.transpose(1, 2).flatten(0, 1), place[0])


def _by_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: Options) -> Float[Tensor, "S H Q D"]:
    """With all scores of a block in memory, in fp32 or better, for what torch's function does not know: softcaps (Gemma 2,
    arXiv:2408.00118, eq. in 2: c tanh(score / c)) and sinks (gpt-oss: a column of the softmax that adds nothing)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if options.sinks is not None:
        sinks = options.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    shares = scores.softmax(dim=-1)[..., : k.shape[-2]].to(q.dtype)
    return torch.nn.functional.dropout(shares, options.dropout) @ v


def _mask(rows: Rows, causal: bool, options: Options, like: Tensor) -> Tensor | None:
    """What a query may see, as True [S, 1, Q, K], or where there is a bias, as what is added to its scores [S, H, Q, K]."""
    hidden = options.window is not None or not rows.plain(causal)
    if options.position_bias is None:
        return rows.seen(causal, options.window)[:, None] if hidden else None
    queries, keys = (torch.arange(max(counts), device=like.device) for counts in (rows.queries, rows.keys))
    distance = keys[None] - queries[:, None] + options.position_bias.shape[1] // 2
    bias = options.position_bias[:, distance].to(like.dtype)[None]
    if not (hidden or causal):
        return bias
    return torch.where(rows.seen(causal, options.window)[:, None], bias, float("-inf"))


def _padded(x: Tensor, counts: Sequence[int], places: Tensor | None) -> Tensor:
    """[T, H, D] -> [S, H, Q, D]"""
    if len(set(counts)) > 1:
        assert places is not None
        x = x.new_zeros(len(counts) * max(counts), *x.shape[1:]).index_copy(0, places, x)
    return x.unflatten(0, (len(counts), -1)).transpose(1, 2)


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(0, order)


def _alike(queries: Sequence[int], keys: Sequence[int]) -> list[list[int]]:
    """Segments in groups, the longest first; those of a group in the order of the pack."""
    groups: list[list[int]] = []
    widest = asked = 0  # queries of the last group's longest, and scores that its segments ask for
    for i in sorted(range(len(queries)), key=lambda i: (-keys[i], -queries[i])):
        if groups:
            widest, asked, padded = max(widest, queries[i]), asked + queries[i] * keys[i], keys[groups[-1][0]]
            if (len(groups[-1]) + 1) * widest * padded <= max(PADDING * asked, SMALL):
                groups[-1].append(i)
                continue
        groups.append([i])
        widest, asked = queries[i], queries[i] * keys[i]
    return [sorted(group) for group in groups]


def _places(counts: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.arange(n) + row * max(counts) for row, n in enumerate(counts)])


def _tokens(order: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """Indices of the tokens of segments, in that order."""
    ends = np.cumsum(counts)
    return np.concatenate([np.arange(ends[i] - counts[i], ends[i]) for i in order])
