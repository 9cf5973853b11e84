"""Starting a process that measures: alone, with one thread, without network."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.workload import ROOT, Spec

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}


class Failed(Exception):
    """A measurement that is worth nothing; the first line says why."""


def failure(what: str, done: subprocess.CompletedProcess[str]) -> Failed:
    """A process that did not end well, with the end of what it said."""
    said = (done.stderr or done.stdout).strip() or "nothing"
    return Failed(f"{what} ended with exit code {done.returncode}: {said.splitlines()[-1]}\n{said[-3000:]}")


def measure(module: str, spec: Spec, **environment: str) -> dict[str, Any]:
    """Run one variant in a process of its own; the JSON object that it prints last. Raises Failed."""
    path = spec.save(Path(spec.work) / "spec.json")
    command = [sys.executable, "-m", f"benchmarks.variants.{module}", str(path)]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if spec.device == "cpu" else {}  # dspref would use a GPU unasked
    env = os.environ | ENVIRONMENT | hidden | environment
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise failure(module, done)
    return json.loads(lines[-1])


def cpu_seconds(command: Sequence[str]) -> float:
    """CPU seconds of a command and its children. Raises Failed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise failure(" ".join(command), done)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
