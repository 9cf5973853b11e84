"""What must be known of a YAML key of the `objective` section."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Key:
    """What must be known of a YAML key beyond its range and default, which are those of the argument."""

    meaning: str
    suits: Callable[[Any], bool] = lambda loss: True
    """Whether it can have an effect on a loss."""
    unsuited: str = ""
    """Why it has none on the others."""
    has_effect: Callable[[Mapping[str, Any]], bool] = lambda section: True
    """Whether the other keys of an `objective` section leave it an effect."""
    muted: str = ""
    """Why they do not."""
