"""Several whole runs under one launcher: `deepspeed --num_gpus 2 tests/distributed/launched.py runs.json`.

runs.json is a list of [config file, [overrides]]. Starting a launcher takes ten times as long as a run of one step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dspref import config as configuration
from dspref import distributed
from dspref.training import trainer

if __name__ == "__main__":
    for path, overrides in json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8")):
        trainer.train(configuration.load(path, overrides), Path(path))
    distributed.finish()
