"""Numbers as people write them: `16k`, `1.5M`, `2^20`, `1_000`, and `1e5` for a count.

YAML reads all but the last as text, and text they stay where a key takes text (a run may be called 16k). Where it takes a
number they are one: `k` and `M` are 1024 and 1024^2 of tokens, as in "16k of context", and 1000 and 1000^2 of all else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

PATTERN = r"[-+]?[0-9][0-9_]*(\.[0-9]+)?[kKmM]|[0-9]{1,9}(\^|\*\*)[0-9]{1,3}|[-+]?[0-9]+(_[0-9]+)+(\.[0-9]+)?"
# Keys that count tokens.
IN_TOKENS = re.compile(r"tokens|_length\Z")
LARGEST = 2**64
# Nothing that is counted has more.
DIGITS = 300


class Shorthand(str):
    """Text that is a number where one is wanted; YAML makes it of what is not in quotes."""


class Exponent(float):
    """A number written as `1e5`: a whole one where one is wanted."""


def meant(text: str, key: str) -> int | float | None:
    """The number that a text stands for as a value of `key`; None where it is none, or beyond what is counted."""
    if len(text) > DIGITS or not re.fullmatch(PATTERN, text):
        return None
    unit = (1024 if IN_TOKENS.search(key) else 1000) ** {"k": 1, "m": 2}.get(text[-1].lower(), 0)
    base, power, exponent = text.replace("**", "^").partition("^")
    if power:
        value = Fraction(int(base) ** int(exponent)) if int(base) < 2 or int(exponent) <= 64 else Fraction(LARGEST + 1)
    else:
        value = Fraction(base.rstrip("kKmM").replace("_", "")) * unit
    if abs(value) > LARGEST:
        return None
    return int(value) if value.denominator == 1 else float(value)


def as_wanted(key: str, value: Any, annotation: Any) -> Any:
    """A value of a section's key with numbers where the key's type wants them, and plain texts elsewhere. What belongs to a
    section below is left to that."""
    if isinstance(value, Shorthand | Exponent):
        return _scalar(key, value, {*_leaves(annotation)})
    if isinstance(value, dict | list) and not any(_is_section(kind) for kind in _all(annotation)):
        inner = {
            leaf for kind in _all(annotation) if get_origin(kind) in (list, dict) for leaf in _leaves(get_args(kind)[-1])
        }
        return _below(key, value, inner)
    return value


def _below(key: str, value: Any, kinds: set[Any]) -> Any:
    if isinstance(value, dict):
        return {str(name): _below(str(name) if Any in kinds else key, inner, kinds) for name, inner in value.items()}
    if isinstance(value, list):
        return [_below(key, inner, kinds) for inner in value]
    return _scalar(key, value, kinds) if isinstance(value, Shorthand | Exponent) else value


def _scalar(key: str, value: Shorthand | Exponent, kinds: set[Any]) -> Any:
    if isinstance(value, Exponent):
        return int(value) if int in kinds and not kinds & {float, Any} and value < LARGEST else float(value)
    number = meant(value, key) if kinds & {int, float, Any} and str not in kinds else None
    return str(value) if number is None else number


def _leaves(annotation: Any) -> Iterator[Any]:
    """The types of a value that is neither list nor mapping."""
    origin = get_origin(annotation)
    if origin in (list, dict):
        return
    if origin is None:
        yield annotation
    elif hasattr(annotation, "__metadata__"):
        yield from _leaves(annotation.__origin__)
    else:  # a union; of a Literal the values
        for part in get_args(annotation):
            yield from _leaves(part) if _is_union(annotation) else [type(part)]


def _all(annotation: Any) -> Iterator[Any]:
    """Every type that an annotation is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _all(part)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) is Union or type(annotation).__name__ == "UnionType"


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
