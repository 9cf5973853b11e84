"""Train from one YAML file, under any launcher:

deepspeed launch/train.py --config X.yaml [section.key=value ...]
torchrun --nproc-per-node 2 launch/train.py --config X.yaml
srun python launch/train.py --config X.yaml
python launch/train.py --config X.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last: where dspref is not installed, it lies beside this folder

from dspref.launcher import main

if __name__ == "__main__":
    sys.exit(main())
