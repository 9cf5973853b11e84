"""The tensor contract: token ids of pairs -> one `PackedBatch`.

T packed tokens, P pairs, C scored tokens, N of them counted once for each answer of each pair, S attention segments, K
gathered keys. A padded batch does not exist: sequences lie one behind the other, and the shift by one ("token t is predicted
at t - 1") happens here, once, as an index.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dspref.data.images import Images, Laid, Pictures
from dspref.data.slices import Part
from dspref.data.truncate import TokenizedPair

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

# Span of a scored token = side x P + pair, so that one index_add gives all sums as [sides, P].
CHOSEN, REJECTED, PROMPT = 0, 1, 2
# Of a filler pack.
FILLER_TOKENS = 4


@dataclass(frozen=True)
class Layout:
    """Segment i attends from queries `cu_seqlens_q[i:i+2]` to keys `kv_index[cu_seqlens_k[i]:cu_seqlens_k[i+1]]`, or to the
    keys in place where `kv_index` is None."""

    cu_seqlens_q: Int[Tensor, "S+1"]
    cu_seqlens_k: Int[Tensor, "S+1"]
    kv_index: Int[Tensor, "K"] | None
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class Prompts:
    """What an encoder reads of a pack, E tokens: each prompt once, for all its answers, which the decoder reads apart."""

    input_ids: Int[Tensor, "E"]
    position_ids: Int[Tensor, "E"]
    own: Layout
    """How prompts attend: each to itself."""
    of_answers: Layout
    """How answers attend to prompts: each to all tokens of its own."""


@dataclass(frozen=True)
class PackedBatch:
    """One pack on its way through the model. Segment i attends from queries `cu_seqlens_q[i:i+2]` to keys
    `kv_index[cu_seqlens_k[i]:cu_seqlens_k[i+1]]` (all keys in place where `kv_index` is None), causal and aligned at the
    bottom right: the last query sees every key.

    An answer that several pairs have is computed and scored once; `scored_index` counts its tokens for each of them (None:
    every scored token counts once, in order). `multiplicity`: how often a token would be computed without any sharing.

    `prompts`: of an encoder-decoder model, whose decoder reads all the rest: answers without their prompts. `images`: of a
    model that reads these too, in prompts; its positions may have several axes. `given`: numbers that the rows have beside
    their texts, float32, by the fields of `PairLogps`; the same names in every pack of a store, and no model sees them.
    `sequences`: as many as any of the packs that run at the same time on all ranks has, or more: so many forwards each makes
    of a model that reads one at a time. `own`: this rank's part, where several hold the pack between them."""

    input_ids: Int[Tensor, "T"]
    position_ids: Int[Tensor, "T"] | Int[Tensor, "A T"]
    cu_seqlens_q: Int[Tensor, "S+1"]
    cu_seqlens_k: Int[Tensor, "S+1"]
    kv_index: Int[Tensor, "K"] | None
    predictor_index: Int[Tensor, "C"]
    targets: Int[Tensor, "C"]
    scored_index: Int[Tensor, "N"] | None
    span_index: Int[Tensor, "N"]
    place_in_span: Int[Tensor, "N"]
    multiplicity: Int[Tensor, "T"]
    pair_ids: Int[Tensor, "P"]
    max_seqlen_q: int
    max_seqlen_k: int
    num_pairs: int
    prompts: Prompts | None = None
    images: Images | None = None
    given: Mapping[str, Float[Tensor, "P"]] | None = None
    sequences: int = 1
    own: Part | None = None

    @property
    def computed(self) -> Part:
        """What this rank computes: its part, or all."""
        whole = self.input_ids, self.position_ids, self.multiplicity, self.predictor_index, self.targets
        return self.own or Part(*whole)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same pack with its tensors on `device`; asynchronous from pinned memory."""
        return self._with_tensors(lambda x: x.to(device, non_blocking=True))

    def pinned(self) -> PackedBatch:
        """The same pack where a GPU can fetch it by itself; as it is where there is none."""
        return self._with_tensors(torch.Tensor.pin_memory) if torch.cuda.is_available() else self

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        return _changed(self, change)


def _changed(part: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A part of a pack with other tensors, its own parts' too."""
    own = {f.name: getattr(part, f.name) for f in fields(part)}
    changed = {name: change(x) for name, x in own.items() if isinstance(x, torch.Tensor)}
    named = {name: {key: change(t) for key, t in x.items()} for name, x in own.items() if isinstance(x, Mapping)}
    return replace(part, **changed, **named, **{name: _changed(x, change) for name, x in own.items() if is_dataclass(x)})


def computed_tokens(lengths: np.ndarray, prefix_sharing: bool, encoder_decoder: bool = False) -> np.ndarray:
    """Tokens that the model computes for each pair; `lengths` [n, 3] are those of (prompt, chosen, rejected)."""
    answers = (lengths[:, 1:] > 0).sum(axis=1)
    prompts = 1 if prefix_sharing else answers
    return prompts * lengths[:, 0] + lengths[:, 1] + lengths[:, 2] - (answers if encoder_decoder else 0)


def collate(
    pairs: Sequence[TokenizedPair],
    pair_ids: Sequence[int],
    *,
    prefix_sharing: bool,
    score_prompt: bool = False,
    encoder_decoder: bool = False,
    pictures: Pictures | None = None,
    given: Mapping[str, np.ndarray] | None = None,
    sequences: int = 1,
) -> PackedBatch:
    """Lay pairs out in one row. With `prefix_sharing`, pairs of one prompt are `[prompt | answer | answer | ...]`: the
    prompt and each distinct answer are computed once; without, a pair is `[prompt | chosen][prompt | rejected]`. Log-probs
    are the same either way. No pairs give a filler pack.

    `score_prompt`: the prompt's tokens 2..n are scored too, for every pair. `encoder_decoder`: prompts lie apart, and
    answers, which begin with the decoder's start token, lose their last one, which is a target alone. `pictures`: the images
    of the pairs, of a model that reads some. `given`: numbers of each pair, float32 [P] by name. `sequences`: a pack's."""
    if pictures and score_prompt:
        raise ValueError("image tokens are no text that a model could be asked for: prompts with images are not scored")
    groups = groups_of(pairs, prefix_sharing, score_prompt, pictures.digests if pictures else None)
    parts = _answers if encoder_decoder else _segments
    segments = [segment for group in groups for segment in parts(group)] or [_filler()]
    starts = np.cumsum([0] + [len(s.tokens) for s in segments])
    keys, predictors = [], []
    for start, segment in zip(starts, segments):
        own = np.arange(start, start + len(segment.tokens))
        # A segment with a shared prompt reads its keys right where the group starts, `prompt_offset` tokens before it.
        prompt = np.arange(segment.prompt) + (start - segment.prompt_offset)
        keys.append(np.concatenate([prompt, own]) if segment.prompt else own)
        # Token t is predicted at t - 1: the place before each scored token.
        predictors.append(np.concatenate([prompt[-1:], own])[segment.scored + (len(prompt) > 0) - 1])
    cu_k = np.cumsum([0] + [len(k) for k in keys])
    spans, runs = _runs(segments)
    laid = [Laid(group.pair, group.prompt, [answer.tokens for answer in group.answers]) for group in groups]
    several_axes = pictures.position_ids(laid) if pictures else None
    return PackedBatch(
        input_ids=_int64([s.tokens for s in segments]),
        position_ids=_positions(segments) if several_axes is None else several_axes,
        cu_seqlens_q=torch.tensor(starts, dtype=torch.int32),
        cu_seqlens_k=torch.tensor(cu_k, dtype=torch.int32),
        kv_index=_int64(keys) if any(s.prompt for s in segments) else None,
        predictor_index=_int64(predictors),
        targets=_int64([s.targets for s in segments]),
        scored_index=_int64(runs) if sum(map(len, runs)) > sum(len(s.scored) for s in segments) else None,
        span_index=_int64([np.full(len(run), span) for span, run in zip(spans, runs)]),
        place_in_span=_int64([np.arange(len(run)) for run in runs]),
        multiplicity=_int64([np.repeat(s.uses, s.lengths) for s in segments]),
        pair_ids=torch.tensor(list(pair_ids), dtype=torch.int64),
        max_seqlen_q=int(np.diff(starts).max()),
        max_seqlen_k=int(np.diff(cu_k).max()),
        num_pairs=len(pairs),
        prompts=_prompts(groups, starts) if encoder_decoder else None,
        images=pictures.images(laid) if pictures else None,
        given={name: torch.from_numpy(numbers) for name, numbers in given.items()} if given else None,
        sequences=sequences,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pairs -> groups -> segments


@dataclass
class Answer:
    """Tokens behind a prompt, the places of those that are scored, and the spans, one for each pair, that these count in."""

    tokens: np.ndarray
    scored: np.ndarray
    spans: list[int]


@dataclass
class Group:
    """A prompt, which pair has it first, and answers to it; and the spans of the prompt where it is scored."""

    pair: int
    prompt: np.ndarray
    prompt_spans: list[int]
    answers: list[Answer]


def groups_of(
    pairs: Sequence[TokenizedPair],
    prefix_sharing: bool,
    score_prompt: bool = False,
    digests: Sequence[bytes] | None = None,
) -> list[Group]:
    """What a pack holds, in order: prompts, each with the answers that run behind it. `digests`: of what else there is to
    the prompt of each pair; prompts are the same only where these are."""
    return _shared_groups(pairs, score_prompt, digests) if prefix_sharing else _separate_groups(pairs, score_prompt)


def _sides(pair: TokenizedPair) -> list[tuple[int, Answer]]:
    """(side, answer) of those that a pair has, without spans yet."""
    of = zip((CHOSEN, REJECTED), (pair.chosen, pair.rejected), (pair.chosen_scored, pair.rejected_scored))
    return [
        (side, Answer(ids, np.arange(len(ids)) if mask is None else np.flatnonzero(mask), []))
        for side, ids, mask in of
        if len(ids)
    ]


def _separate_groups(pairs: Sequence[TokenizedPair], score_prompt: bool) -> list[Group]:
    groups, count = [], len(pairs)
    for k, pair in enumerate(pairs):
        for side, answer in _sides(pair):
            answer.spans.append(side * count + k)
            prompt_spans = [PROMPT * count + k] if score_prompt and side == CHOSEN else []
            groups.append(Group(k, pair.prompt, prompt_spans, [answer]))
    return groups


def _shared_groups(pairs: Sequence[TokenizedPair], score_prompt: bool, digests: Sequence[bytes] | None) -> list[Group]:
    """Groups of equal prompts, with their distinct answers, each in the order of first sight."""
    groups: dict[tuple[bytes, bytes], Group] = {}
    answers: dict[tuple[bytes, ...], Answer] = {}
    for k, pair in enumerate(pairs):
        key = (pair.prompt.tobytes(), digests[k] if digests else b"")
        group = groups.setdefault(key, Group(k, pair.prompt, [], []))
        if score_prompt:
            group.prompt_spans.append(PROMPT * len(pairs) + k)
        for side, answer in _sides(pair):
            known = answers.setdefault((*key, answer.tokens.tobytes(), answer.scored.tobytes()), answer)
            if known is answer:
                group.answers.append(answer)
            known.spans.append(side * len(pairs) + k)
    return list(groups.values())


@dataclass(frozen=True)
class _Segment:
    """Tokens with their own attention, in parts of `lengths` that would be computed `uses` times without sharing. Those at
    the places `scored` are scored, the `targets`, in runs of (number of tokens, spans). `prompt` tokens that start
    `prompt_offset` before it are keys too, and precede it in position."""

    tokens: np.ndarray
    lengths: tuple[int, ...]
    uses: tuple[int, ...]
    scored: np.ndarray
    targets: np.ndarray
    runs: tuple[tuple[int, list[int]], ...] = ()
    prompt: int = 0
    prompt_offset: int = 0


def _segments(group: Group) -> list[_Segment]:
    """The prompt with its first answer, then each other answer."""
    first, *others = group.answers
    size, offset = len(group.prompt), len(group.prompt) + len(first.tokens)
    uses = sum(len(answer.spans) for answer in group.answers)
    of_prompt = np.arange(1, size) if group.prompt_spans else np.arange(0)
    prompt_run = ((size - 1, group.prompt_spans),) if group.prompt_spans else ()
    tokens, scored = np.concatenate([group.prompt, first.tokens]), np.concatenate([of_prompt, size + first.scored])
    runs = (*prompt_run, (len(first.scored), first.spans))
    segments = [_Segment(tokens, (size, len(first.tokens)), (uses, len(first.spans)), scored, tokens[scored], runs)]
    for answer in others:
        count, run = len(answer.tokens), (len(answer.scored), answer.spans)
        targets, uses = answer.tokens[answer.scored], (len(answer.spans),)
        segments.append(_Segment(answer.tokens, (count,), uses, answer.scored, targets, (run,), size, offset))
        offset += count
    return segments


def _answers(group: Group) -> list[_Segment]:
    """Each answer by itself, up to its last token, from which nothing is predicted."""
    assert all(0 not in answer.scored for answer in group.answers), "a decoder's first token is given, and predicted by none"
    return [
        _Segment(
            answer.tokens[:-1], (len(answer.tokens) - 1,), (len(answer.spans),), answer.scored, answer.tokens[answer.scored],
            ((len(answer.scored), answer.spans),),
        )
        for answer in group.answers
    ]  # fmt: skip


def _prompts(groups: Sequence[Group], answers: np.ndarray) -> Prompts:
    """The prompts of a pack, for answers that begin at `answers`."""
    prompts = [group.prompt for group in groups] or [_filler().tokens]
    each = np.repeat(np.arange(len(prompts)), [len(group.answers) for group in groups] or [1])  # the prompt of each answer
    starts, lengths = np.cumsum([0] + [len(prompt) for prompt in prompts]), np.array([len(prompt) for prompt in prompts])
    cu_k = np.cumsum([0, *lengths[each]])
    own, cu_answers = torch.tensor(starts, dtype=torch.int32), torch.tensor(answers, dtype=torch.int32)
    longest = int(lengths.max())
    return Prompts(
        _int64(prompts),
        _int64([np.arange(len(prompt)) for prompt in prompts]),
        Layout(own, own, None, longest, longest),
        Layout(
            cu_answers, torch.tensor(cu_k, dtype=torch.int32), _int64([np.arange(*starts[k : k + 2]) for k in each]),
            int(np.diff(answers).max()), int(lengths[each].max()),
        ),
    )  # fmt: skip


def _filler() -> _Segment:
    """Tokens that score nothing: a real forward and a zero gradient, for a rank that has run out of pairs."""
    return _Segment(np.zeros(FILLER_TOKENS, dtype=np.int64), (FILLER_TOKENS,), (0,), np.arange(0), np.arange(0))


def _positions(segments: Sequence[_Segment]) -> Tensor:
    return _int64([np.arange(s.prompt, s.prompt + len(s.tokens)) for s in segments])


def _runs(segments: Sequence[_Segment]) -> tuple[list[int], list[np.ndarray]]:
    """(span, the scored tokens counted in it) of every answer of every pair, and of every prompt that is scored."""
    spans, runs, start = [0], [np.arange(0)], 0
    for length, of_run in (run for segment in segments for run in segment.runs):
        spans += of_run
        runs += [np.arange(start, start + length)] * len(of_run)
        start += length
    return spans, runs


def _int64(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))
