"""Floating-point operations of a run, counted and not measured: 2 per weight and token of every matrix product, 4 per query,
key and attention channel; the backward pass costs the same again for activations, and again for weights that are trained.
Below the lowest weight that is trained there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dspref.model.pieces import ATTENTION, CROSS, PATCHES, PROMPTS, SCORED, SELF, TOKENS, Piece

# What a stack reads beside its own input, and from which depth on: answers see prompts in the first layer's cross-attention.
READS_OF = {"text": {"encoder": 0.5, "tower": -math.inf}}


class Work(NamedTuple):
    """What a model is asked to compute: tokens through its layers, tokens scored by its head, (query, key) pairs; and what
    an encoder or a tower reads, by the names of `dspref.model.pieces`."""

    tokens: int
    scored: int
    attention: int
    more: Mapping[str, float] = {}

    @classmethod
    def of_step(cls, computed: float, scored: float, attention: float, more: Mapping[str, float]) -> Work:
        """Of all tokens and pairs of attention that are computed, those of an encoder among them."""
        apart = round(more.get(PROMPTS, 0))
        pairs = sum(round(more.get(name, 0)) for name in (SELF["encoder"], CROSS))
        return cls(round(computed) - apart, round(scored), round(attention) - pairs, more)

    def count(self, name: str) -> float:
        own = {TOKENS: self.tokens, SCORED: self.scored, ATTENTION: self.attention}
        return own[name] if name in own else self.more.get(name, 0)


class Met(NamedTuple):
    """Weights that one of a count meets in matrix products; of these, the ones whose input gets a gradient, the ones that
    get one themselves, and the ones that gradient checkpointing meets again. A channel of attention counts as two."""

    weights: float = 0.0
    passed: float = 0.0
    trained: float = 0.0
    again: float = 0.0


@dataclass(frozen=True)
class ModelSize:
    """A model, as far as operations go: what each of a count meets."""

    met: Mapping[str, Met]

    @classmethod
    def of_text(cls, body: float, head: float, trained_body: float, trained_head: float, channels: float) -> ModelSize:
        """Of a decoder in which a gradient goes all the way down: weights of layers and head, how many of them are trained,
        and the channels of attention over all layers."""
        return cls({
            TOKENS: Met(body, body, trained_body, body),
            SCORED: Met(head, head, trained_head),
            ATTENTION: Met(2 * channels, 2 * channels, 2 * channels, 2 * channels),
        })  # fmt: skip

    @property
    def body(self) -> float:
        return self._of(TOKENS).weights

    @property
    def head(self) -> float:
        return self._of(SCORED).weights

    @property
    def trained_body(self) -> float:
        return self._of(TOKENS).trained

    @property
    def trained_head(self) -> float:
        return self._of(SCORED).trained

    @property
    def channels(self) -> float:
        return self._of(ATTENTION).weights / 2

    @property
    def matrices(self) -> float:
        """Weights of all matrices, of experts those that a token is sent to."""
        return sum(met.weights for name, met in self.met.items() if not name.endswith(ATTENTION))

    def _of(self, name: str) -> Met:
        return self.met.get(name, Met())

    def forward(self, work: Work) -> float:
        """FLOPs of a forward pass."""
        return sum(2 * met.weights * work.count(name) for name, met in self.met.items())

    def recomputed(self, work: Work) -> float:
        """FLOPs of the forward pass that gradient checkpointing repeats: of layers that a gradient comes to."""
        return sum(2 * met.again * work.count(name) for name, met in self.met.items())

    def backward(self, work: Work) -> float:
        """FLOPs of a backward pass."""
        return sum(2 * (met.passed + met.trained) * work.count(name) for name, met in self.met.items())


def size_of(pieces: Sequence[Piece]) -> ModelSize:
    """A model of these pieces, each behind those before it."""
    first: dict[str, tuple[float, int]] = {}
    for number, piece in enumerate(pieces):
        if piece.trained:
            first[piece.stack] = min(first.get(piece.stack, (math.inf, number)), (piece.depth, number))

    def passes(number: int, piece: Piece) -> bool:
        if piece.below:
            return piece.below in first
        if piece.reads == PATCHES:
            return False  # pixels
        if any(other in first and piece.depth >= depth for other, depth in READS_OF.get(piece.stack, {}).items()):
            return True
        lowest = first.get(piece.stack)
        if lowest is None:
            return False
        # Within a layer something trained is before every matrix, its norm.
        return lowest[0] <= piece.depth if math.isfinite(piece.depth) else lowest < (piece.depth, number)

    met: dict[str, list[float]] = {}
    for number, piece in enumerate(pieces):
        if not piece.reads:
            continue
        passed = piece.weights * passes(number, piece)
        trained = passed if piece.is_attention else piece.weights * piece.trained
        again = max(passed, trained) if math.isfinite(piece.depth) else 0.0
        row = met.setdefault(piece.reads, [0.0, 0.0, 0.0, 0.0])
        for k, value in enumerate((piece.weights, passed, trained, again)):
            row[k] += value
    return ModelSize({name: Met(*row) for name, row in met.items()})


def of_step(
    policy: ModelSize,
    reference: ModelSize | None,
    work: Work,
    *,
    recomputes: bool,
    head_again: bool,
    looks_ahead: bool,
    mlps_again: float = 0.0,
) -> tuple[float, float]:
    """FLOPs of a step: (of the policy's forward and backward, of all that is executed).

    `reference`: of a live one. `recomputes`: gradient checkpointing; `head_again`: the head is met again in the backward
    pass, as probabilities are not kept; `looks_ahead`: a first pass without gradient; `mlps_again`: weights of
    MLPs that are recomputed tile by tile, beside what `recomputes` means.
    """
    useful = executed = policy.forward(work) + policy.backward(work)
    if recomputes:
        executed += policy.recomputed(work)
    if head_again:
        executed += 2 * policy.head * work.scored
    executed += 2 * mlps_again * work.tokens
    if looks_ahead:
        executed += policy.forward(work)
    if reference:
        executed += reference.forward(work)
    return useful, executed
