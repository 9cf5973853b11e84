"""What rows give of their pairs beside the texts, as the losses see it: weights, target margins, the gap of two scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def weighed(weight: Float[Tensor, "P"] | None, scale: Float[Tensor, "P"] | float = 1.0) -> Float[Tensor, "P"] | float:
    """`scale` times the weights of the pairs. The mean over pairs is not made one over weights: a pair of weight 2 counts as
    two, and what it adds does not depend on the pairs beside it."""
    return scale if weight is None else scale * weight


def score_gap(chosen: Float[Tensor, "P"] | None, rejected: Float[Tensor, "P"] | None) -> Float[Tensor, "P"] | None:
    """By how much the chosen answer's score is above the rejected one's; None where nothing reads scores."""
    return None if chosen is None or rejected is None else chosen - rejected


def logged(weight: Float[Tensor, "P"] | None, margin: Float[Tensor, "P"] | None) -> dict[str, Float[Tensor, "P"]]:
    """Metrics of what was given."""
    found = {"pair_weight": weight, "target_margin": margin}
    return {name: values.detach() for name, values in found.items() if values is not None}
