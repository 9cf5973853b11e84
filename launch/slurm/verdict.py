"""The last word of a job: what became of its ranks. Called by the job script alone."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # as in train.py

from dspref.slurm.verdict import main

if __name__ == "__main__":
    sys.exit(main())
