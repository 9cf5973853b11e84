"""Submit a run to SLURM; the same as `dspref submit`:

python launch/submit.py X.yaml [section.key=value ...] --nodes 4 --time 24:00:00
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # as in train.py

from dspref.cli import app

if __name__ == "__main__":
    app(["submit", *sys.argv[1:]], prog_name="dspref")
