"""One variant of a race in this process: dspref, TRL or FlexAttention's prefix sharing, on the same spec.

Each leaves a line in RUN/metrics.jsonl per finished step, so that a run that was ended early still says how far it got.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.clock import Stopwatch
from benchmarks.measure import Measurement, peak_bytes
from benchmarks.workload import Spec
from dspref.files import read_lines


def metrics_file(spec: Spec, variant: str) -> Path:
    return Path(spec.work) / variant / "run" / "metrics.jsonl"


def finished_steps(path: Path) -> list[dict[str, Any]]:
    """The lines of finished steps."""
    return [record for record in read_lines(path) if "loss" in record]


def dspref(spec: Spec, folder: Path) -> dict[str, Any]:
    from benchmarks.variants import dspref_run

    extra: dict[str, float] = {}

    def run() -> None:
        from dspref.training import closing

        closing.finish = closing.show_summary = lambda *_, **__: None  # the export, which is on nobody's clock
        dspref_run.train(spec, folder, extra)

    ended = until_memory_ends(run)
    records = finished_steps(folder / "run" / "metrics.jsonl")
    seconds = [record["perf/seconds"] for record in records]
    return {
        "ended": ended,
        "losses": [record["loss"] for record in records],
        "logps": [record["logps/chosen"] for record in records],
        "seconds": seconds,
        "useful_tokens": [round(record["perf/tokens_per_second"] * s) for record, s in zip(records, seconds)],
        "own_figures": {name: records[-1][name] for name in ("perf/mfu", "perf/hfu") if name in (records or [{}])[-1]},
        "extra": extra,
    }


def trl(spec: Spec, folder: Path, masters: bool) -> dict[str, Any]:
    """`masters`: fp32 weights, under autocast where the spec says 16 bits, as `trl dpo` has it. Without, weights, gradients
    and optimizer states are in the spec's dtype."""
    from transformers import AutoModelForCausalLM, TrainerCallback

    from benchmarks.measure import spent
    from benchmarks.variants import trl_run

    watch, log = Stopwatch(spec.device), folder / "run" / "metrics.jsonl"
    found = Measurement()
    log.parent.mkdir(parents=True)

    class Timer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            watch.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.stop()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "loss" in logs:
                with log.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps({name: float(logs[name]) for name in ("loss", "logps/chosen")}) + "\n")

    trl_run.load = lambda spec: AutoModelForCausalLM.from_pretrained(spec.model, dtype="float32" if masters else spec.dtype)
    with spent(found.extra, trl_run.DPOTrainer, "_precompute_ref_logps", "reference"):
        trainer = trl_run.build(spec, str(folder / "trainer"))
    trainer.add_callback(Timer())
    ended = until_memory_ends(trainer.train)
    tokens, size, records = trl_run.useful_tokens(trainer.train_dataset), spec.pairs_per_step, finished_steps(log)
    return {
        "ended": ended,
        "losses": [record["loss"] for record in records],
        "logps": [record["logps/chosen"] for record in records],
        "seconds": watch.read()[: len(records)],
        "useful_tokens": [sum(tokens[i : i + size]) for i in range(0, len(tokens), size)][: len(records)],
        "extra": found.extra,
    }


def flex(spec: Spec, folder: Path) -> dict[str, Any]:
    from benchmarks.gpu import flex as prefix_sharing

    found, chosen = prefix_sharing.run(spec)
    return {
        "ended": "steps",
        "losses": found.losses,
        "logps": chosen,
        "seconds": found.seconds,
        "useful_tokens": found.useful_tokens,
    }


def until_memory_ends(job: Any) -> str:
    """Why a job ended: `steps`, as there were no more, or `memory`."""
    try:
        job()
    except RuntimeError as error:  # cuBLAS has an error of its own for it
        if isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error):
            return "memory"
        raise
    return "steps"


VARIANTS = {
    "dspref": dspref,
    "trl": partial(trl, masters=True),
    "trl_16": partial(trl, masters=False),
    "flex": flex,
}


def train(variant: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Train on a spec from nothing; what every variant says alike."""
    own = Spec(**spec)
    folder = Path(own.work) / variant
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = VARIANTS[variant](own, folder) | {"peak_bytes": peak_bytes(own.device)}
    shutil.rmtree(folder, ignore_errors=True)
    return result
