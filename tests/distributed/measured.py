"""Two steps of a run, and the most memory that they needed: `python tests/distributed/measured.py X.yaml OUT.json`, with
overrides behind them, once for each rank.

Resident memory over what the imports took. MALLOC_MMAP_THRESHOLD_ in the environment has malloc map each large tensor apart
and give it back at once, so that what is resident is what is in use. The kernel keeps the peak (VmHWM), which is set back
when the first step begins: what loading needs is another matter. From the second step on the optimizer has its states, so
two are enough.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from dspref import config as configuration
from dspref.training import trainer

MIB = 2**20


def resident(name: str) -> int:
    """Bytes, of a line of this process's status: VmRSS, or VmHWM for the peak."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found[1]) * 1024 if found else 0


class Marks:
    """What was resident over the baseline, at places of a step, in bytes."""

    def __init__(self) -> None:
        self.baseline = resident("VmRSS")
        self.places: list[tuple[str, int, int]] = []
        self.largest = self.scored = self.keys = 0

    def add(self, place: str) -> None:
        self.places.append((place, resident("VmRSS") - self.baseline, resident("VmHWM") - self.baseline))

    def leave(self, out: str) -> None:
        """Write what was seen, once all ranks are here."""
        peaks = [peak for _, _, peak in self.places[1:]]
        found = {
            "peak": max(peaks),
            "after": self.places[-1][1],
            "tokens": self.largest,
            "scored": self.scored,
            "keys": self.keys,
            "places": [(place, now // MIB, peak // MIB) for place, now, peak in self.places],
        }
        if os.environ["RANK"] == "0":
            Path(out).write_text(json.dumps(found), encoding="utf-8")
        torch.distributed.barrier()
        os._exit(0)


def main(path: str, out: str, *overrides: str) -> None:
    marks, step, forward, backward = Marks(), trainer.optimizer_step, trainer.Engine.forward, trainer.Engine.backward

    def seen_step(*args: Any) -> Any:
        if not marks.places:
            marks.add("before the first step")
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        found = step(*args)
        marks.add("step")
        if args[1].number == 2:
            marks.leave(out)
        return found

    def seen_forward(self: Any, batch: Any, **asked: Any) -> Any:
        if len(batch.input_ids) > marks.largest:
            marks.largest, marks.scored, marks.keys = len(batch.input_ids), len(batch.targets), int(batch.cu_seqlens_k[-1])
        found = forward(self, batch, **asked)
        marks.add("forward")
        return found

    def seen_backward(self: Any, share: Any) -> None:
        backward(self, share)
        marks.add("backward")

    trainer.optimizer_step = seen_step
    trainer.Engine.forward, trainer.Engine.backward = seen_forward, seen_backward
    trainer.train(configuration.load(path, overrides), Path(path))


if __name__ == "__main__":
    main(*sys.argv[1:])
