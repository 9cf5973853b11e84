"""Work done ahead: a thread makes the next items while the caller uses earlier ones."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Full, Queue
from threading import Event, Thread, current_thread
from typing import Any, TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.1
_END = object()


def ahead(items: Iterator[T], depth: int = 1) -> Iterator[T]:
    """The same items in the same order, up to `depth` of them waiting and one in the making; an error in their making is
    raised where its item would have come."""
    waiting: Queue[Any] = Queue(depth)
    left = Event()

    def hand_over(item: Any) -> None:
        while not left.is_set():
            try:
                return waiting.put(item, timeout=POLL_SECONDS)
            except Full:
                continue

    def make() -> None:
        try:
            for item in items:
                hand_over((item, None))
                if left.is_set():
                    return
            hand_over((_END, None))
        except BaseException as error:
            hand_over((_END, error))

    maker = Thread(target=make, name="ahead", daemon=True)
    maker.start()
    try:
        while (made := waiting.get())[0] is not _END:
            yield made[0]
        if made[1] is not None:
            raise made[1]
    finally:  # reached too when the caller goes away in the middle
        left.set()
        if current_thread() is not maker:  # whose garbage collection may be what ends a forgotten generator
            maker.join()
