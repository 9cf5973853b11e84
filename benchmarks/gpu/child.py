"""A process that measures: `python -m benchmarks.gpu.child WHAT ARGUMENTS.json`; the last line of stdout is the result.

And its other end: `ask` starts one, alone, without network, for at most so many seconds.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.processes import ENVIRONMENT, Failed, failure
from benchmarks.workload import ROOT
from dspref.launcher import ALLOCATOR  # for all variants alike


class TimedOut(Failed):
    """A measurement that had no more time."""


def ask(what: str, arguments: dict[str, Any], *, work: Path, device: str, limit: float) -> dict[str, Any]:
    """What a child found; all that it said so far, where its time ends. Raises Failed."""
    if limit < 1:
        raise TimedOut("no time left for it")
    path = work / "arguments.json"
    path.write_text(json.dumps(arguments) + "\n", encoding="utf-8")
    # With bytecode, which some containers forbid, an import of torch, transformers and DeepSpeed takes 6 s in place of 15 s.
    env = os.environ | ENVIRONMENT | ALLOCATOR | {"PYTHONDONTWRITEBYTECODE": ""}
    if device == "cpu":
        env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    else:  # one GPU: with several, transformers' Trainer would use them all
        env |= {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0], "OMP_NUM_THREADS": "8"}
    command = [sys.executable, "-m", "benchmarks.gpu.child", what, str(path)]
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as ended:
        said = ended.stdout or b""
        if found := last_result(said.decode(errors="ignore") if isinstance(said, bytes) else said):
            return found
        raise TimedOut(f"{what} took longer than the {limit:.0f} s that it had") from None
    found = last_result(done.stdout)
    if done.returncode or found is None:
        raise failure(what, done)
    return found


def last_result(stdout: str) -> dict[str, Any] | None:
    """The last whole line of JSON."""
    lines = [line for line in stdout.splitlines(keepends=True) if line.startswith("{") and line.endswith("}\n")]
    return json.loads(lines[-1]) if lines else None


def prepare(work: str, tiny: bool, device: str, dtype: str, races: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The machine; and of each race its model, its pairs, and what a step computes. `races`: shape, lengths, count, live."""
    from benchmarks.gpu.clock import reason
    from benchmarks.measure import versions

    found: dict[str, Any] = {"hardware": hardware(device), "versions": versions(), "races": {}}
    for name, race in races.items():
        try:
            found["races"][name] = prepare_race(Path(work), tiny, device, dtype, name, **race)
        except Exception as error:  # one race that cannot be made must not take the others with it
            found["races"][name] = {"reason": reason(error)}
    return found


def prepare_race(
    work: Path, tiny: bool, device: str, dtype: str, name: str, shape: str, lengths: list[list[int]], count: int, live: bool
) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.gpu import models
    from dspref.model.packed import PackedCausalLM
    from dspref.report.performance import Work, peak_flops, size_of

    folder = models.model_folder(work, shape, tiny, device, dtype)
    config = models.config_of(shape, tiny)
    pairs = models.write_pairs(folder / f"{name.replace(' ', '-')}.jsonl", config.vocab_size, lengths, count)
    with torch.device("meta"):
        size = size_of(PackedCausalLM(AutoModelForCausalLM.from_config(config), "sdpa"))
    seen, flops, tokens = models.with_template(lengths), {}, {}
    for layout in (models.separate, models.shared, models.padded):
        work_of_step = Work(*layout(seen))
        total = size.forward(work_of_step) * (1 + live) + size.backward(work_of_step)
        flops[layout.__name__], tokens[layout.__name__] = total, work_of_step.tokens
    peak = peak_flops(torch.device(device), dtype)
    return {"model": str(folder), "data": str(pairs), "flops": flops, "tokens": tokens, "peak_flops": peak}


def hardware(device: str) -> dict[str, Any]:
    import torch

    if device == "cpu":
        return {"device": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    memory = torch.cuda.get_device_properties(0).total_memory
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(driver, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()
    except OSError:
        said = []
    about = {"device": torch.cuda.get_device_name(0), "driver": said[0] if said else "unknown", "cuda": torch.version.cuda}
    return about | {"memory_gib": memory / 2**30, "cores": os.cpu_count()}


def main() -> None:
    import torch

    from benchmarks.gpu import parts, train

    jobs: dict[str, Callable[..., dict[str, Any]]] = {
        "prepare": prepare,
        "train": train.train,
        "micro_steps": parts.micro_steps,
        "attention_kernels": parts.attention_kernels,
        "heads": parts.heads,
    }
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    arguments = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    print("\n" + json.dumps(jobs[sys.argv[1]](**arguments)), flush=True)


if __name__ == "__main__":
    main()
