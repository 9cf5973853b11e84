"""Which held-out metrics are better when lower, and by which a run is judged."""

from __future__ import annotations

import re

LOWER = re.compile(r"(^|_)((nll_|aux_)?loss|loss/[\w.:-]+)\Z")
HIGHER = re.compile(r"(^|_)(rewards/(chosen|accuracies|margins)|mean_token_accuracy)\Z")


def lower_is_better(metric: str) -> bool | None:
    """By the name of the metric, behind any prefix of a held-out set; None where that does not tell."""
    return True if LOWER.search(metric) else False if HIGHER.search(metric) else None
