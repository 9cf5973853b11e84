"""The watch of one process, without ranks."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

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
