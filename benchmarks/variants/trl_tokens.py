"""TRL: the making of a DPOTrainer's data set out of all pairs of a file, without training on it."""

from __future__ import annotations

import tempfile

from trl import DPOTrainer

from benchmarks.measure import Measurement, main, spent
from benchmarks.variants import trl_run
from benchmarks.workload import Spec


def run(spec: Spec) -> Measurement:
    found = Measurement()
    with (
        tempfile.TemporaryDirectory(dir=spec.work) as folder,
        spent(found.extra, DPOTrainer, "_prepare_dataset", "tokens"),
    ):
        trainer = trl_run.build(spec, folder)
    found.useful_tokens = [sum(trl_run.useful_tokens(trainer.train_dataset))]
    return found


if __name__ == "__main__":
    main(run)
