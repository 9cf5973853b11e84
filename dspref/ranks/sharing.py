"""How many ranks may hold a pack between them (parallel.sequence)."""

from __future__ import annotations

from dspref.errors import ConfigError


def refuse(sequence: int, ranks: int) -> None:
    """Raises ConfigError where `sequence` ranks cannot hold a pack between them, as there would be some without others."""
    if ranks % sequence:
        there = f"{ranks} rank{'s' if ranks > 1 else ''}"
        raise ConfigError(f"parallel.sequence: {sequence} does not divide the {there}; use 1, or ranks that it divides")
