"""The watch of one process, without ranks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspref.data.ahead import ahead
from dspref.errors import Interrupted
from dspref.watch.watch import watching


def hear(number: signal.Signals) -> None:
    """Python runs the handler of a signal that this process sends to itself before the next line but one."""
    os.kill(os.getpid(), number)
    for _ in range(10):
        time.sleep(0.001)


@pytest.mark.parametrize("later", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_what_is_put_in_order_after_a_signal_is_not_cut_short_by_the_next(later, tmp_path: Path) -> None:
    """A launcher sends its own after the terminal's, and another rank's wish comes as one."""
    orderly = False
    with pytest.raises(Interrupted, match="stopped by SIGINT before the first step") as stopped, watching(tmp_path):
        try:
            hear(signal.SIGINT)
        finally:
            hear(later)
            orderly = True
    assert orderly and stopped.value.exit_code == 130


def test_a_signal_in_a_finalizer_is_raised_after_it(tmp_path: Path, capsys) -> None:
    """A generator that an error leaves behind waits for its thread; what is raised there Python drops."""

    def slow() -> Iterator[int]:
        yield 1
        time.sleep(1.5)
        yield 2

    made = ahead(slow())
    assert next(made) == 1
    with pytest.raises(Interrupted, match="stopped by SIGTERM before the first step"), watching(tmp_path):
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        before = signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
        try:
            del made  # waits, and is interrupted
            signal.signal(signal.SIGALRM, before)
            for _ in range(400):
                time.sleep(0.01)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    assert not capsys.readouterr().err
