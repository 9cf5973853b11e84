"""How many tokens an MLP runs over at a time (`model.tiled_mlp`): for `tiles`, and estimates of memory. Loads no torch."""

from __future__ import annotations

# Matrix products of fewer tokens leave a GPU waiting.
LEAST = 1024


def tokens_of(asked: bool | int, hidden: int) -> int:
    """Tokens of a tile; 0: all. Of themselves as many as a vector has numbers (Arctic long sequence training,
    arXiv:2506.13996), so that a tile is as wide as it is long."""
    return 0 if asked is False else max(hidden, LEAST) if asked is True else int(asked)
