"""How the start of a run grows with its pairs: from the command to the end of step 1, and the most memory of a rank.

    python -m benchmarks.warm_start --against ../a-checkout-of-another-commit --out benchmarks/results/warm_start.json

Two ranks on the CPU, a tiny model, SimPO (no reference to score), pairs of about 50 tokens. Each commit has a token cache
of its own; its first start with a file is cold, the others are warm, and the commits take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import yaml

HERE = Path(__file__).resolve().parents[1]
RANKS = 2


def pairs_file(count: int, folder: Path) -> Path:
    """`count` conversations of words without sense."""
    path, draws = folder / f"pairs-{count}.jsonl", random.Random(0)

    def turn(role: str) -> list[dict[str, str]]:
        return [{"role": role, "content": "".join(draws.choices(ascii_lowercase, k=draws.randint(5, 14)))}]

    if not path.exists():
        with open(path, "w", encoding="utf-8") as file:
            for _ in range(count):
                row = {"prompt": turn("user"), "chosen": turn("assistant"), "rejected": turn("assistant")}
                file.write(json.dumps(row) + "\n")
    return path


def start(commit: Path, name: str, pairs: Path, work: Path) -> dict[str, float]:
    """One run of one step, by the launcher and all."""
    run = work / f"run-{name}-{time.time_ns()}"
    shipped = HERE / "launch/quickstart"
    config = {
        "model": {"name_or_path": f"{shipped}/model", "tokenizer_name_or_path": f"{shipped}/tokenizer", "init": "random"}
        | {"dtype": "float32", "gradient_checkpointing": False},
        "data": {"train": {"path": str(pairs)}, "tokens_per_pack": 2048, "max_length": 64} | {"on_bad_row": "drop"},
        "objective": {"name": "simpo"},
        "train": {"pairs_per_step": 16, "max_steps": 1},
        "deepspeed": {"zero_optimization": {"stage": 1}},
        "output_dir": str(run),
    }
    path = work / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    cache = {"DSPREF_CACHE": str(work / f"cache-{name}"), "PYTHONPATH": str(commit), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    command = [*launcher, str(commit / "launch/train.py"), "--config", str(path)]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    done = subprocess.run(command, env={**os.environ, **cache}, cwd=work, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": (run / "metrics.jsonl").stat().st_mtime - began,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_mib": after.ru_maxrss / 1024,  # of the largest child so far, so small files come first
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, nargs=2, default=[3_000, 300_000])
    parser.add_argument("--against", type=Path, help="checkout of another commit")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("COMMIT", "NAME", "PAIRS"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    work = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if asked.one:
        commit, name, pairs = asked.one
        print(json.dumps(start(Path(commit), name, Path(pairs), work)))
        return
    commits = {"this": HERE, **({"against": asked.against.resolve()} if asked.against else {})}
    found: dict[str, Any] = {name: {count: [] for count in asked.pairs} for name in commits}
    for _ in range(asked.rounds + 1):
        for count in asked.pairs:
            for name, commit in commits.items():
                found[name][count].append(_apart(commit, name, pairs_file(count, work), work))
                print(name, count, json.dumps(found[name][count][-1]), flush=True)
    result = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "ranks": RANKS}
    result |= {"runs": found, "growth": {name: _growth(runs) for name, runs in found.items()}}
    print(json.dumps(result["growth"], indent=1))
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n")


def _apart(commit: Path, name: str, pairs: Path, work: Path) -> dict[str, float]:
    """`start` in a process of its own, whose largest child is a rank of this run."""
    command = [sys.executable, "-m", "benchmarks.warm_start", "--work", str(work), "--one", str(commit), name, str(pairs)]
    done = subprocess.run(command, cwd=HERE, env={**os.environ, "PYTHONPATH": str(HERE)}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _growth(runs: dict[int, list[dict[str, float]]]) -> dict[str, float]:
    """Of the many pairs over the few: warm seconds more, and memory times."""
    few, many = (runs[count] for count in sorted(runs))
    seconds, cpu = ([min(run[name] for run in warm[1:]) for warm in (few, many)] for name in ("seconds", "cpu_seconds"))
    peaks = [max(run["peak_mib"] for run in warm[1:]) for warm in (few, many)]
    more = {"warm_seconds_more": seconds[1] - seconds[0], "warm_cpu_seconds_more": cpu[1] - cpu[0]}
    return {"cold_seconds": many[0]["seconds"], **more, "memory_times": peaks[1] / peaks[0]}


if __name__ == "__main__":
    main()
