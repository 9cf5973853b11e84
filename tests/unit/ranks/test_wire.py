"""What ranks send each other arrives as it was, and as data."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from dspref.ranks import wire


class Named(NamedTuple):
    a: int
    b: str


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -1, 2**80, 1.5, float("inf"), "", "a\x00\ud800ä", b"\x00\xff", [], [[1], (2,)], (), (1, (2, [3])),
        {}, {"a": {1: (2,)}}, {(1, "x"): None}, {"tuple": [1]}, {"dict": 1, "set": 2}, {1, 2}, Path("/a/b"), Path("a"),
        [(Path("x"), {"step": 3, "files": {"a": [1, "b"]}}), None],
    ],
)  # fmt: skip
def test_values_arrive_as_they_were(value):
    arrived = wire.from_bytes(wire.to_bytes(value))
    assert arrived == value and type(arrived) is type(value)


def test_numbers_and_arrays():
    for array in (np.arange(6).reshape(2, 3), np.zeros((0, 2), np.float32), np.array([True]), np.array(3, dtype=">i4")):
        arrived = wire.from_bytes(wire.to_bytes([("a", array)]))[0][1]
        assert arrived.dtype == array.dtype and arrived.shape == array.shape and (arrived == array).all()
        arrived[...] = 0  # it is writable
    assert wire.from_bytes(wire.to_bytes((np.int64(3), np.float32(0.5), np.bool_(True)))) == (3, 0.5, True)
    assert wire.from_bytes(wire.to_bytes(Named(1, "x"))) == (1, "x")


@pytest.mark.parametrize("value", [object(), len, np.array([object()]), np.array(["text"]), 1j, [OrderedDict, 1]])
def test_other_things_are_not_sent(value):
    with pytest.raises(TypeError, match="ranks cannot send each other"):
        wire.to_bytes(value)


@pytest.mark.parametrize(
    "text",
    [
        pickle.dumps(print), b'{"array": ["O", [1], "AAAAAAAAAAA="]}', b'{"no kind": 1}', b"{}", b'{"tuple": 1}', b"[", b"",
        b'{"array": ["<i8", [99], ""]}',
    ],
)  # fmt: skip
def test_what_no_rank_sends_is_refused(text):
    with pytest.raises((ValueError, KeyError, TypeError)):
        wire.from_bytes(text)
