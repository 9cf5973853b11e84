"""wandb and tensorboard, beside metrics.jsonl. What they do, they do in a thread: none of them stops or slows a step."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Thread
from typing import Any

from dspref import distributed
from dspref.config import LogSection
from dspref.secrets import redact_words

Send = Callable[[Mapping[str, Any] | None], None]
Opened = tuple[str | None, Send]

# Of a record that has answers to prompts, their rows.
SAMPLES = "samples"
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
        distributed.log(f"{self._name}: switched off ({reason}); metrics.jsonl goes on")


def _wandb(folder: Path, log: LogSection, settings: Mapping[str, Any], run_id: str | None) -> Opened:
    import wandb

    # It keeps the command line word for word, and would add the working tree's code, changes and origin.
    sys.argv[:] = redact_words(sys.argv)
    quiet = wandb.Settings(silent=True, console="off", init_timeout=30, save_code=False, disable_code=True, disable_git=True)
    run = wandb.init(
        project=log.project, name=log.run_name or folder.name, dir=str(folder), id=run_id,
        resume="allow" if run_id else None, config=dict(settings), settings=quiet,
    )  # fmt: skip

    def send(record: Mapping[str, Any] | None) -> None:
        if record is None:
            return run.finish()
        shown = dict(record)
        if rows := shown.pop(SAMPLES, None):
            shown[SAMPLES] = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        run.log(shown, step=record["step"])

    return run.id, send


def _tensorboard(folder: Path, log: LogSection, settings: Mapping[str, Any], run_id: str | None) -> Opened:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(record: Mapping[str, Any] | None) -> None:
        if record is None:
            return writer.close()
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "step":
                writer.add_scalar(name, value, record["step"])
        for number, row in enumerate(record.get(SAMPLES, ())):
            writer.add_text(f"{SAMPLES}/{number}", in_markdown(row), record["step"])
        writer.flush()

    return None, send


def in_markdown(row: Mapping[str, Any]) -> str:
    """A row of texts, each as it stands: what is in a code block is neither laid out nor followed."""
    parts = []
    for name, text in row.items():
        if isinstance(text, str):
            fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
            parts.append(f"**{name}**\n\n{fence}\n{text}\n{fence}")
    return "\n\n".join(parts)


# Each opens a tracker: its own name for the run, and what sends a record to it; None as a record closes it.
TRACKERS = {"wandb": _wandb, "tensorboard": _tensorboard}
