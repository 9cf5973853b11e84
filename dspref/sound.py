"""A config as far as it is right, so that checks can look at one that is wrong elsewhere."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

from dspref.sections import Section

KeyPath = tuple[str | int, ...]


class Unsound(Exception):
    """A check asked for a key that is wrong: what it would say might only follow from that."""


class Sound:
    """A section of which some keys are wrong: its other keys, and `Unsound` for these, so that a check ends there."""

    def __init__(self, section: Section, unsound: Collection[KeyPath], path: KeyPath = ()) -> None:
        self._section, self._unsound, self._path = section, unsound, path

    @property
    def __class__(self) -> Any:  # for isinstance
        return type(self._section)

    def __getattr__(self, name: str) -> Any:
        kind = type(self._section)
        if name in kind.model_fields:
            return sound(getattr(self._section, name), self._unsound, (*self._path, name))
        if isinstance(asked := getattr(kind, name, None), property):
            return cast(Any, asked.fget)(self)
        if name == "model_fields_set" or not hasattr(self._section, name):
            return getattr(self._section, name)
        raise Unsound  # what would give all keys at once


def sound(value: Any, unsound: Collection[KeyPath], path: KeyPath = ()) -> Any:
    """A value of a config without what is wrong below `path`."""
    below = [wrong for wrong in unsound if wrong[: len(path)] == path]
    if not below:
        return value
    if path not in below and isinstance(value, Section):
        return Sound(value, below, path)
    if path not in below and isinstance(value, list):
        return [sound(item, below, (*path, number)) for number, item in enumerate(value)]
    raise Unsound
