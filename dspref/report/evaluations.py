"""An evaluation of held-out pairs, for people: metrics, and accuracy by subset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dspref.terminal import printable

# Metrics that come first, in this order; the others follow as the run writes them.
FIRST = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")


def in_text(found: Mapping[str, Any]) -> str:
    """Lines for the terminal of what `training.held_out` has found."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    for name in ("model", "objective", "reference"):
        yield f"{name:<10} {printable(str(found[name]), 400)}"
    for name, one in found["sets"].items():
        yield ""
        yield f"{name}: {one['pairs']:,} {one.get('unit', 'pairs')}"
        metrics = one["metrics"]
        yield from _table({key: metrics[key] for key in sorted(metrics, key=_rank)})
        if subsets := one.get("subsets"):
            yield ""
            yield f"accuracy by subset ({len(subsets)})"
            accuracies = {f"{key} ({of['pairs']:,})": of["accuracy"] for key, of in subsets.items()}
            yield from _table(accuracies | {"mean over subsets": one["mean_over_subsets"]})
            if without := one.get("pairs_without_subset"):
                yield f"  {without:,} pairs without a subset are not in these"


def _table(values: Mapping[str, float]) -> Iterator[str]:
    names = {key: printable(key, 60) for key in values}
    width = max(map(len, names.values()), default=0)
    yield from (f"  {names[key]:<{width}}  {value:>10.4g}" for key, value in values.items())


def _rank(key: str) -> int:
    return FIRST.index(key) if key in FIRST else len(FIRST)
