"""dspref as its users run it: a YAML file, `train`, and the metrics.jsonl that it leaves. One rank, no launcher."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import Measurement, main, spent
from benchmarks.workload import Spec

REFERENCES = {"live": "engine", "stored": "stored", "none": "none"}


def document(spec: Spec, folder: Path) -> dict[str, Any]:
    """The run as a YAML document. Caches lie in `folder` too: nothing is found that an earlier run computed."""
    return {
        "model": {
            "name_or_path": spec.model,
            "dtype": spec.dtype,
            "gradient_checkpointing": spec.checkpointing,
            "attn_implementation": spec.attention,
        },
        "reference": {"mode": REFERENCES[spec.reference]},
        "data": {
            "train": {"path": spec.data},
            "max_length": spec.max_length,
            "tokens_per_pack": spec.tokens_per_pack,
            "prefix_sharing": spec.prefix_sharing,
            "shuffle": False,
            "scored": "all",  # as peers have it
        },
        "objective": spec.objective,
        "train": {
            "pairs_per_step": spec.pairs_per_step,
            "max_steps": spec.steps,
            "learning_rate": spec.learning_rate,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
        },
        "checkpoint": {"save_every": spec.save_every, "keep_last": 1},
        "deepspeed": f"ds_configs/zero{spec.zero_stage}.json" if spec.zero_stage else {"zero_optimization": {"stage": 0}},
        "output_dir": str(folder / "run"),
    }


def train(spec: Spec, folder: Path, extra: dict[str, float]) -> list[dict[str, float]]:
    """Do the run in this process; its lines of metrics.jsonl, one per step."""
    os.environ["DSPREF_CACHE"] = str(folder / "cache")
    from dspref import config
    from dspref.reference import filling
    from dspref.training import preparation, trainer

    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(document(spec, folder), sort_keys=False), encoding="utf-8")
    with spent(extra, filling, "fill", "reference"), spent(extra, preparation, "load_pairs", "tokens"):
        trainer.train(config.load(path), path)
    extra |= saves(read(folder / "run" / "events.jsonl"))
    return [record for record in read(folder / "run" / "metrics.jsonl") if "loss" in record]


def read(path: Path) -> list[dict[str, Any]]:
    from dspref.files import read_lines

    return list(read_lines(path))


def saves(events: list[dict[str, Any]]) -> dict[str, float]:
    """Of the checkpoints: their size, least wall seconds to the commit, and least seconds that training waited."""
    commits = [event for event in events if event["event"] == "commit"][:-1]  # the last step waits for its own
    return {f"save_{name}": min(commit[name] for commit in commits) for name in ("bytes", "seconds", "waited") if commits}


def run(spec: Spec) -> Measurement:
    extra: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=spec.work) as folder:
        records = train(spec, Path(folder), extra)
    return Measurement(
        extra=extra,
        losses=[record["loss"] for record in records],
        cpu_seconds=[record["perf/cpu_seconds"] for record in records],
        seconds=[record["perf/seconds"] for record in records],
        useful_tokens=[round(record["perf/tokens_per_second"] * record["perf/seconds"]) for record in records],
    )


if __name__ == "__main__":
    main(run)
