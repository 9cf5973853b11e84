"""Items that are made ahead: the same, in order, with their errors, and none after the caller has left."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from dspref.data.ahead import ahead


def counted(made: list[int], count: int) -> Iterator[int]:
    for i in range(count):
        made.append(i)
        yield i


def test_the_same_items_in_the_same_order() -> None:
    assert list(ahead(iter(range(50)))) == list(range(50))
    assert list(ahead(iter(()))) == []


def test_the_next_item_is_made_while_one_is_in_use() -> None:
    made: list[int] = []
    done = threading.Event()

    def items() -> Iterator[int]:
        made.append(0)
        yield 0
        made.append(1)
        done.set()
        yield 1

    stream = ahead(items())
    assert next(stream) == 0
    assert done.wait(5) and made == [0, 1]
    assert list(stream) == [1]


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_so_many_wait(depth: int) -> None:
    made: list[int] = []
    stream = ahead(counted(made, 100), depth)
    for i in range(10):
        assert next(stream) == i
        assert len(made) <= i + 1 + depth + 1  # in use, waiting, and one in the maker's hands
    stream.close()
    assert len(made) < 20


def test_an_error_comes_where_its_item_would() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("no second")

    stream = ahead(broken())
    assert next(stream) == 1
    with pytest.raises(ValueError, match="no second"):
        next(stream)


def test_a_caller_that_leaves_takes_the_thread_along() -> None:
    before = threading.active_count()
    stream = ahead(counted([], 10**9))
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before
