"""The tensor contract: token ids of pairs -> one `PackedBatch`.

T packed tokens, P pairs, C scored tokens, S attention segments, K gathered keys. A padded batch does not exist: sequences
lie one behind the other, and the shift by one ("token t is predicted at t - 1") happens here, once, as an index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from dspref.data.tokenize import TokenizedPair

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

# Span of a scored token = side x P + pair, so that one index_add gives all sums as [sides, P].
CHOSEN, REJECTED, PROMPT = 0, 1, 2


@dataclass(frozen=True)
class PackedBatch:
    """One pack on its way through the model. Segment i attends from queries `cu_seqlens_q[i:i+2]` to keys
    `kv_index[cu_seqlens_k[i]:cu_seqlens_k[i+1]]` (all keys in place where `kv_index` is None), causal and aligned at the
    bottom right: the last query sees every key."""

    input_ids: Int[Tensor, "T"]
    position_ids: Int[Tensor, "T"]
    cu_seqlens_q: Int[Tensor, "S+1"]
    cu_seqlens_k: Int[Tensor, "S+1"]
    kv_index: Int[Tensor, "K"] | None
    predictor_index: Int[Tensor, "C"]
    targets: Int[Tensor, "C"]
    span_index: Int[Tensor, "C"]
    place_in_span: Int[Tensor, "C"]
    pair_ids: Int[Tensor, "P"]
    max_seqlen_q: int
    max_seqlen_k: int
    num_pairs: int

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same pack with its tensors on `device`; asynchronous from pinned memory."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in moved.items() if isinstance(v, torch.Tensor)})


def computed_tokens(lengths: np.ndarray, prefix_sharing: bool) -> np.ndarray:
    """Tokens that the model computes for each pair; `lengths` [n, 3] are those of (prompt, chosen, rejected)."""
    prompts = 1 if prefix_sharing else 2
    return prompts * lengths[:, 0] + lengths[:, 1] + lengths[:, 2]


def collate(
    pairs: Sequence[TokenizedPair], pair_ids: Sequence[int], *, prefix_sharing: bool, score_prompt: bool = False
) -> PackedBatch:
    """Lay pairs out in one row. With `prefix_sharing` a pair is `[prompt | chosen | rejected]` and the prompt is computed
    once; without, `[prompt | chosen][prompt | rejected]`. Log-probs are the same either way. No pairs give a filler pack.

    `score_prompt`: the prompt's tokens 2..n are scored too, once per pair, in the chosen sequence."""
    lay_out = _shared_segments if prefix_sharing else _separate_segments
    segments = [s for k, pair in enumerate(pairs) for s in lay_out(pair, k, len(pairs), score_prompt)] or [_filler()]
    starts = np.cumsum([0] + [len(s.tokens) for s in segments])
    keys, predictors = [], []
    for start, segment in zip(starts, segments):
        own = np.arange(start, start + len(segment.tokens))
        # A segment with a shared prompt reads its keys right where the pair starts, `prompt_offset` tokens before it.
        prompt = np.arange(segment.prompt) + (start - segment.prompt_offset)
        keys.append(np.concatenate([prompt, own]) if segment.prompt else own)
        scored = segment.num_scored
        # Token t is predicted at t - 1: the run of scored tokens, one earlier.
        predictors.append(np.concatenate([prompt[-1:], own])[-scored - 1 : -1] if scored else own[:0])
    cu_k = np.cumsum([0] + [len(k) for k in keys])
    runs = [run for segment in segments for run in segment.runs] or [(0, 0)]
    return PackedBatch(
        input_ids=_int64([s.tokens for s in segments]),
        position_ids=_int64([np.arange(s.prompt, s.prompt + len(s.tokens)) for s in segments]),
        cu_seqlens_q=torch.tensor(starts, dtype=torch.int32),
        cu_seqlens_k=torch.tensor(cu_k, dtype=torch.int32),
        kv_index=_int64(keys) if any(s.prompt for s in segments) else None,
        predictor_index=_int64(predictors),
        targets=_int64([s.tokens[len(s.tokens) - s.num_scored :] for s in segments]),
        span_index=_int64([np.full(length, span) for span, length in runs]),
        place_in_span=_int64([np.arange(length) for _, length in runs]),
        pair_ids=torch.tensor(list(pair_ids), dtype=torch.int64),
        max_seqlen_q=int(np.diff(starts).max()),
        max_seqlen_k=int(np.diff(cu_k).max()),
        num_pairs=len(pairs),
    )


@dataclass(frozen=True)
class _Segment:
    """A run of tokens with its own attention. Its last tokens are scored, in `runs` of (span, number of tokens); `prompt`
    tokens that start `prompt_offset` before it are keys too, and precede it in position."""

    tokens: np.ndarray
    runs: tuple[tuple[int, int], ...] = ()
    prompt: int = 0
    prompt_offset: int = 0

    @property
    def num_scored(self) -> int:
        return sum(length for _, length in self.runs)


def _chosen_segment(pair: TokenizedPair, k: int, num_pairs: int, score_prompt: bool) -> _Segment:
    prompt_run = ((PROMPT * num_pairs + k, len(pair.prompt) - 1),) if score_prompt else ()
    tokens = np.concatenate([pair.prompt, pair.chosen])
    return _Segment(tokens, (*prompt_run, (CHOSEN * num_pairs + k, len(pair.chosen))))


def _separate_segments(pair: TokenizedPair, k: int, num_pairs: int, score_prompt: bool) -> list[_Segment]:
    rejected = np.concatenate([pair.prompt, pair.rejected])
    return [
        _chosen_segment(pair, k, num_pairs, score_prompt),
        _Segment(rejected, ((REJECTED * num_pairs + k, len(pair.rejected)),)),
    ]


def _shared_segments(pair: TokenizedPair, k: int, num_pairs: int, score_prompt: bool) -> list[_Segment]:
    first = _chosen_segment(pair, k, num_pairs, score_prompt)
    runs = ((REJECTED * num_pairs + k, len(pair.rejected)),)
    return [first, _Segment(pair.rejected, runs, len(pair.prompt), len(first.tokens))]


def _filler() -> _Segment:
    """Four tokens that score nothing: a real forward and a zero gradient, for a rank that has run out of pairs."""
    return _Segment(np.zeros(4, dtype=np.int64))


def _int64(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))
