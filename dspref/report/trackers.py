"""Trackers, beside metrics.jsonl. What they do, they do in a thread: none of them stops or slows a step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Thread
from typing import Any

from dspref import distributed
from dspref.config import LogSection
from dspref.report.tracking import TRACKERS

# Records that may wait for a slow network; then the oldest is left out.
WAITING = 10_000
# How long the end of a run waits for them.
CLOSING_SECONDS = 30


class TrackerThread:
    """Carries records to one tracker, one by one, from a thread of its own."""

    def __init__(self, name: str, folder: Path, log: LogSection, settings: Mapping[str, Any], run_id: str | None) -> None:
        self._name, self._left_out = name, 0
        self.run_id: str | None = None
        self._waiting: Queue[Mapping[str, Any] | None] = Queue(WAITING)
        try:
            self.run_id, self._send = TRACKERS[name](folder, log, settings, run_id)
        except Exception as error:  # trackers raise anything: network, disk, their own bugs
            self._send = None
            self._give_up(error)
        self._thread = Thread(target=self._carry, name=name, daemon=True)
        self._thread.start()

    def send(self, record: Mapping[str, Any] | None) -> None:
        """Never waits."""
        while True:
            try:
                return self._waiting.put_nowait(record)
            except Full:
                self._left_out += 1
                try:
                    self._waiting.get_nowait()
                except Empty:
                    continue

    def close(self) -> None:
        """Wait a little for what is under way."""
        self.send(None)
        self._thread.join(CLOSING_SECONDS)
        self._left_out += self._waiting.qsize() if self._thread.is_alive() else 0
        if self._left_out and self._send:
            distributed.log(f"{self._name}: too slow, {self._left_out} lines were not sent; metrics.jsonl has them")

    def _carry(self) -> None:
        while True:
            record = self._waiting.get()
            if self._send:
                try:
                    self._send(record)
                except Exception as error:
                    self._send = None
                    self._give_up(error)
            if record is None:
                return

    def _give_up(self, error: Exception) -> None:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, ModuleNotFoundError):
            reason = f"{error.name} is not installed; pip install {error.name}"
        distributed.log(f"{self._name}: switched off ({reason}); metrics.jsonl goes on")
