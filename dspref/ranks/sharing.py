"""How many ranks may hold a pack between them (parallel.sequence)."""

from __future__ import annotations

from dspref.errors import ConfigError


def refuse(sequence: int, ranks: int) -> None:
    """Raises ConfigError where `sequence` ranks cannot hold a pack between them, as there would be some without others."""
    if ranks % sequence:
        there = f"{ranks} rank{'s' if ranks > 1 else ''}"
        raise ConfigError(f"parallel.sequence: {sequence} does not divide the {there}; use 1, or ranks that it divides")


def over_machines(sequence: int, of_machine: int) -> str | None:
    """What there is to know of groups where a machine has so many ranks, in a line; None where each group is on one."""
    if of_machine % sequence == 0:
        return None
    has = f"a machine has {of_machine} rank{'s' if of_machine > 1 else ''}"
    return (
        f"parallel.sequence: {has}, so that groups of {sequence} reach over machines, "
        "between which every layer's attention is exchanged"
    )
