"""Train from one YAML file, under any launcher:

deepspeed launch/train.py --config X.yaml [section.key=value ...]
torchrun --nproc-per-node 2 launch/train.py --config X.yaml
srun python launch/train.py --config X.yaml
python launch/train.py --config X.yaml
"""

from __future__ import annotations

import sys

from dspref.launcher import main

if __name__ == "__main__":
    sys.exit(main())
