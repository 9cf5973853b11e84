"""What one of several ranks computes of a pack that they hold between them: all but attention, for its share of the tokens.

Every rank knows the whole pack: how its sequences lie, what is scored, and in which spans that counts. T tokens of a pack,
of which a rank has m = T / ranks, rounded up; C scored ones, of which it predicts c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Tokens that are computed together, as in `PackedBatch`, and which of the pack's scored tokens are predicted at these
    (None: all, in order)."""

    input_ids: Int[Tensor, "m"]
    position_ids: Int[Tensor, "m"] | Int[Tensor, "A m"]
    multiplicity: Int[Tensor, "m"]
    predictor_index: Int[Tensor, "c"]
    targets: Int[Tensor, "c"]
    scored: Int[Tensor, "c"] | None = None

    def cut(self, number: int, parts: int) -> Part:
        """Of a whole pack, the tokens that the rank `number` of `parts` has: a run of them, and behind the last of the pack
        tokens that count in nothing, as all ranks have as many. A target may be a token of the next rank."""
        count = len(self.input_ids)
        size = -(-count // parts)
        start = number * size

        def run(tokens: Tensor) -> Tensor:
            return torch.nn.functional.pad(tokens, (0, size * parts - count))[..., start : start + size]

        own = (self.predictor_index >= start) & (self.predictor_index < start + size)
        return Part(
            run(self.input_ids),
            run(self.position_ids),
            run(self.multiplicity),
            self.predictor_index[own] - start,
            self.targets[own],
            own.nonzero()[:, 0],
        )
