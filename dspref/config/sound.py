"""A config as far as it is right, so that checks can look at one that is wrong elsewhere."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NoReturn, cast

from dspref.config.sections import Section

KeyPath = tuple[str | int, ...]


class Unsound(AttributeError):
    """A key that is wrong was asked for: what a check would say might only follow from that."""


def sound(value: Any, unsound: Collection[KeyPath], path: KeyPath = ()) -> Any:
    """A value of a config without what is wrong below `path`: to read that is an AttributeError. Raises Unsound where
    nothing of it is right."""
    below = [wrong for wrong in unsound if wrong[: len(path)] == path]
    if not below:
        return value
    if path in below or not isinstance(value, Section | list):
        raise Unsound(path)
    if isinstance(value, list):
        return [sound(item, below, (*path, number)) for number, item in enumerate(value)]
    part = value.model_copy()
    values = cast("dict[str, Any]", vars(part))
    for name in type(value).model_fields:
        try:
            values[name] = sound(getattr(value, name), below, (*path, name))
        except Unsound:
            del values[name]
    values["model_dump"] = _refuse  # which would leave the wrong keys out without a word
    return part


def _refuse(**_: Any) -> NoReturn:
    raise Unsound
