"""On the PYTHONPATH of a job: makes room for what a test does to it. While the file $PACE_GATE is there, every step of a
process but the first takes as many seconds more as it says. Python imports this file by its name when it starts. An audit
event tells of every import, so no line of dspref knows of it."""

import itertools
import os
import sys
import time


def seconds():
    try:
        with open(os.environ["PACE_GATE"]) as file:
            return float(file.read() or 0)
    except FileNotFoundError:
        return 0.0


def hook(event, arguments):
    engine = sys.modules.get("dspref.engine.engine") if event == "import" else None
    plain = getattr(getattr(engine, "Engine", None), "step", None)
    if plain is None or hasattr(plain, "paced"):
        return

    numbers = itertools.count(1)

    def step(self):
        norm, number = plain(self), next(numbers)
        began = time.monotonic()
        while number > 1 and time.monotonic() < began + seconds():
            time.sleep(0.02)
        return norm

    step.paced = True
    engine.Engine.step = step


if "PACE_GATE" in os.environ:
    sys.addaudithook(hook)
