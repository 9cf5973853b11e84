"""Values that ranks send each other, as JSON: what arrives is data, whoever sent it.

Kept as they are: None, bool, int, float, str, bytes, list, dict, tuple (of a named tuple only the values), set, paths,
arrays of numbers. Anything else is a TypeError where it is sent.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# The one key of an object that stands for something else than a dict with string keys.
KINDS: dict[str, Callable[[Any], Any]] = {
    "tuple": lambda items: tuple(map(_unwrapped, items)),
    "set": lambda items: set(map(_unwrapped, items)),
    "dict": lambda items: {_unwrapped(key): _unwrapped(value) for key, value in items},
    "path": Path,
    "bytes": lambda text: base64.b64decode(text, validate=True),
    "array": lambda parts: np.frombuffer(base64.b64decode(parts[2]), dtype=_number(parts[0])).reshape(parts[1]).copy(),
}


def to_bytes(value: Any) -> bytes:
    return json.dumps(_wrapped(value)).encode()


def from_bytes(text: bytes) -> Any:
    return _unwrapped(json.loads(text))


def _wrapped(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_wrapped(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[_wrapped(key), _wrapped(item)] for key, item in value.items()]}
    if isinstance(value, (tuple, set, frozenset)):
        return {"tuple" if isinstance(value, tuple) else "set": [_wrapped(item) for item in value]}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"array": [value.dtype.str, value.shape, base64.b64encode(value.tobytes()).decode()]}
    raise TypeError(f"ranks cannot send each other a {type(value).__name__}")


def _unwrapped(value: Any) -> Any:
    if isinstance(value, list):
        return [_unwrapped(item) for item in value]
    if isinstance(value, dict):
        ((kind, inner),) = value.items()
        return KINDS[kind](inner)
    return value


def _number(name: str) -> np.dtype:
    kind = np.dtype(str(name))
    if kind.kind not in "biuf":
        raise ValueError(f"{name!r}: no numbers")
    return kind
