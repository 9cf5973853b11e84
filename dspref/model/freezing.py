"""Parameters that stay as they are, by patterns of their names (`model.freeze`). Loads no torch."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from dspref.errors import ConfigError

KEY = "model.freeze"
# Of names that are offered, so many.
MOST_PARTS = 25


def chosen(names: Collection[str], patterns: Iterable[str]) -> set[str]:
    """The names that any pattern is found in: parts of a name between its dots, such as `vision_tower` or `layers.0`, where
    `*` stands for any text, `?` for a character and `[0-7]` for one of several."""
    return {name for name in names for pattern in patterns if fnmatchcase(f".{name}.", f"*.{pattern}.*")}


def frozen(names: Collection[str], patterns: Collection[str]) -> set[str]:
    """As `chosen`. Raises ConfigError for a pattern that is found nowhere, and where nothing is left to be trained."""
    for pattern in patterns:
        if not chosen(names, [pattern]):
            raise ConfigError(f"{KEY}: no parameter of the model has {pattern!r} in its name{_instead(pattern, names)}")
    found = chosen(names, patterns)
    if found and found == set(names):
        raise ConfigError(f"{KEY}: leaves nothing to be trained; name fewer parameters")
    return found


def _instead(pattern: str, names: Collection[str]) -> str:
    """What may have been meant, or what there is."""
    parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdecimal())
    close = difflib.get_close_matches(pattern.rpartition(".")[2], parts, n=1)
    more = ", ..." * (len(parts) > MOST_PARTS)
    return f"; did you mean {close[0]}?" if close else f"; it has {', '.join(list(parts)[:MOST_PARTS])}{more}"
