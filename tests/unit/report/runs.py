"""Run folders made up for reports: long ones, damaged ones, with what a run writes. `python runs.py FOLDER [STEPS] [RUNS]`
makes some to look at."""

from __future__ import annotations

import json
import math
import random
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

BEGIN = datetime(2026, 5, 1, 12, tzinfo=UTC)


def when(seconds: float) -> str:
    return (BEGIN + timedelta(seconds=seconds)).isoformat(timespec="seconds")


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def record(step: int, steps: int, rate: float, chance: random.Random) -> dict[str, Any]:
    """A logged step of a run in which likelihood is displaced, as a run writes it."""
    done, noise = step / steps, chance.gauss(0, 1)
    margin, drop = 4 * (1 - math.exp(-4 * done)), 60 * done
    seconds = 0.5 + 0.05 * abs(noise) + (4 if chance.random() < 0.001 else 0)
    sides = {
        "rewards/chosen": 0.02 * noise - drop / 40, "rewards/rejected": 0.02 * noise - drop / 40 - margin,
        "logps/chosen": -180 - drop + noise, "logps/rejected": -190 - drop - 10 * margin + noise,
        "kl/chosen": -drop / 4, "kl/rejected": -drop / 4 - 10 * margin,
        "logits/chosen": -1.2 + 0.05 * noise, "logits/rejected": -1.3 + 0.05 * noise,
        "lengths/chosen": 240 + 9 * noise, "lengths/rejected": 210 + 9 * noise,
    }  # fmt: skip
    parts = {"data": 0.01, "forward": 0.3, "reference": 0.0, "backward": 0.6, "update": 0.09}
    speed = {
        "tokens_per_second": 48_000 / seconds, "response_tokens_per_second": 22_000 / seconds, "seconds": seconds,
        "pairs_per_second": 64 / seconds, "computed_tokens_per_second": 41_000 / seconds, "tflops_per_rank": 210 / seconds,
        "pack_fill": 0.97, "packs": 4, "cpu_seconds": 0.4, "memory_gib": 61 + min(done, 0.3), "mfu": 0.2 / seconds,
        "hfu": 0.26 / seconds,
        **{f"{phase}_seconds": share * seconds for phase, share in parts.items()},
    }  # fmt: skip
    loss = math.log(2) * math.exp(-2 * done) + 0.03 * noise
    return {
        "step": step, "epoch": round(3 * done, 6), "loss": loss,
        "grad_norm": math.exp(0.3 * noise) + 40 * (chance.random() < 3e-4),
        "learning_rate": rate * min(step / (0.1 * steps), 0.5 + 0.5 * math.cos(math.pi * done)), "loss/sigmoid": loss,
        "rewards/accuracies": min(1.0, max(0.0, 0.5 + 0.4 * (1 - math.exp(-5 * done)) + 0.05 * noise)),
        "rewards/margins": margin + 0.1 * noise, "nll_loss": 1.4 + 0.3 * done, **sides,
        **{f"perf/{name}": value for name, value in speed.items()},
    }  # fmt: skip


def write(folder: Path, steps: int = 200, seed: int = 0, rate: float = 5e-7, every: int = 1, **changes: Any) -> Path:
    """A finished run that was resumed once, half-way, and skipped a step; `changes`: of run.json."""
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    run = {"run_id": f"{seed:012x}", "state": "finished", "host": "node-1", "pid": 7, "world_size": 8, "started": when(0)}
    (folder / "run.json").write_text(json.dumps(run | {"steps": steps} | changes))
    records = [record(step, steps, rate, chance) for step in range(every, steps + 1, every)]
    for k in (1, 2, 3, 4):
        step = k * steps // 4
        of_set = {"loss": 0.8 - 0.2 * k + 0.03 * k * k, "rewards/accuracies": 0.55 + 0.05 * k, "rewards/margins": 0.4 * k}
        records.append({"step": step} | {f"eval_{name}": value for name, value in of_set.items()})
    (folder / "metrics.jsonl").write_text(lines(records))
    events = [
        {"time": when(0), "event": "start", "world_size": 8}, {"time": when(50), "event": "commit", "step": steps // 2},
        {"time": when(60), "event": "start", "world_size": 4}, {"time": when(61), "event": "resume", "step": steps // 2},
        {"time": when(80), "event": "skip", "step": steps * 3 // 4, "rows": ["pairs.jsonl:3"], "where": {}},
        {"time": when(99), "event": "finish", "step": steps},
    ]  # fmt: skip
    (folder / "events.jsonl").write_text(lines(events))
    config = f"model:\n  name_or_path: a/model\nobjective:\n  name: dpo\n  beta: 0.1\ntrain:\n  learning_rate: {rate}\n"
    (folder / "config.resolved.yaml").write_text(f"{config}  seed: {seed}\noutput_dir: {folder}\n")
    (folder / "env.json").write_text(json.dumps({"dspref": "0.1.0", "packages": {"torch": "2.13.0"}, "gpus": []}))
    samples = [
        {"step": step, "prompt": "Why is the sky blue?", "policy": f"Short waves scatter {step} times more.",
         "reference": "Because of the sea.", "chosen": "Air scatters short waves more."}
        for step in (steps // 2, steps)
    ]  # fmt: skip
    (folder / "samples.jsonl").write_text(lines(samples))
    (folder / "logs").mkdir(exist_ok=True)
    log = f"{when(0)} model      a/model\ndata       1302 pairs, mean tokens 10 prompt + 6 | 6\n"
    log += "data: left out 3 of 1305 rows: empty\n"
    (folder / "logs/rank-0.log").write_text(
        f"{log}{when(70)} warning: step 9 skipped, the loss is not finite (1 in a row)\n"
    )
    return folder


if __name__ == "__main__":
    for number in range(int(sys.argv[3]) if len(sys.argv) > 3 else 3):
        write(
            Path(sys.argv[1]) / f"run-{number}",
            int(sys.argv[2]) if len(sys.argv) > 2 else 10_000,
            number,
            5e-7 * 100**number,
        )
