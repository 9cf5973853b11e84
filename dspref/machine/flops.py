"""Floating-point operations of a run, counted and not measured: 2 per weight and token of every matrix product, 4 per query,
key and attention channel; the backward pass costs the same again for activations, and again for weights that are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Work(NamedTuple):
    """What a model is asked to compute: tokens through its layers, tokens scored by its head, and (query, key) pairs."""

    tokens: int
    scored: int
    attention: int


@dataclass(frozen=True)
class ModelSize:
    """Weights that one token meets in matrix products: of the layers, of the head; how many of them are trained; and the
    channels of attention over all layers."""

    body: float
    head: float
    trained_body: float
    trained_head: float
    channels: float

    def forward(self, work: Work) -> float:
        """FLOPs of a forward pass."""
        return 2 * (self.body * work.tokens + self.head * work.scored) + 4 * self.channels * work.attention

    def recomputed(self, work: Work) -> float:
        """FLOPs of the forward pass that gradient checkpointing repeats: all but the head."""
        return self.forward(work._replace(scored=0))

    def backward(self, work: Work) -> float:
        """FLOPs of a backward pass."""
        weights = 2 * (self.trained_body * work.tokens + self.trained_head * work.scored)
        return self.forward(work) + weights + 4 * self.channels * work.attention


def of_step(
    policy: ModelSize,
    reference: ModelSize | None,
    work: Work,
    *,
    recomputes: bool,
    head_again: bool,
    looks_ahead: bool,
) -> tuple[float, float]:
    """FLOPs of a step: (of the policy's forward and backward, of all that is executed).

    `reference`: of a live one. `recomputes`: gradient checkpointing; `head_again`: the head is met again in the backward
    pass, as probabilities are not kept; `looks_ahead`: a first pass without gradient.
    """
    useful = executed = policy.forward(work) + policy.backward(work)
    if recomputes:
        executed += policy.recomputed(work)
    if head_again:
        executed += 2 * policy.head * work.scored
    if looks_ahead:
        executed += policy.forward(work)
    if reference:
        executed += reference.forward(work)
    return useful, executed
