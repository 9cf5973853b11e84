"""`launch/train.py` with a fault in it, for launchers: FAULT is hook:victim:step:how, as in hooks.py."""

import os
import sys

import hooks

from dspref.launcher import main

if __name__ == "__main__":
    name, victim, step, how = os.environ["FAULT"].split(":")
    getattr(hooks, name)(int(os.environ["RANK"]), int(victim), int(step), how)
    sys.exit(main())
