"""The report of `dspref doctor`: fit to be pasted into an issue, so without secrets."""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import dspref
from dspref import secrets
from dspref.errors import ExitCode
from dspref.machine import machine, preflight
from dspref.machine.context import FAIL, OK, WARN, CheckContext

# Environment variables that decide how a run goes.
MATTER = (
    "CUDA_", "NCCL_", "GLOO_", "TORCH", "DS_", "DEEPSPEED_", "DSPREF_", "HF_", "HUGGING_FACE_", "TRANSFORMERS_", "WANDB_",
    "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "SLURM_JOB", "SLURM_NTASKS", "SLURM_NNODES", "OMP_NUM_THREADS", "TMPDIR",
    "XDG_CACHE_HOME", "PYTORCH_", "TRITON_", "CXX", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "no_proxy",
)  # fmt: skip


def examine(context: CheckContext, run: str = "") -> dict[str, Any]:
    """What is known of this machine, and with a config of what its run lacks. `run`: how the user named it."""
    found = machine.gpus()
    verdicts = preflight.examine(replace(context, ranks=max(len(found.names), 1), on_gpu=bool(found.names)))
    levels = [verdict.level for verdict in verdicts.values()]
    return {
        "dspref": dspref.__version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "run": run,
        "packages": machine.installed(),
        "gpus": found.names,
        "checks": {name: verdict._asdict() for name, verdict in verdicts.items()},
        "environment": environment(os.environ),
        "verdict": next(level for level in (FAIL, WARN, OK) if level in levels),
    }


def exit_code(report: Mapping[str, Any]) -> ExitCode:
    """2 where only what the config names is at fault, 4 where the machine is."""
    failed = {name for name, check in report["checks"].items() if check["level"] == FAIL}
    return ExitCode.DONE if not failed else ExitCode.CONFIG if failed == {"inputs"} else ExitCode.ENVIRONMENT


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter; of a secret, only that it is set."""
    known = {name: value for name, value in sorted(env.items()) if name.startswith(MATTER)}
    return {name: secrets.HIDDEN if secrets.is_telling(name) else value for name, value in known.items()}


def as_json(report: Mapping[str, Any]) -> str:
    return secrets.redact(json.dumps(report, indent=2) + "\n")


def as_text(report: Mapping[str, Any]) -> str:
    """For people: one aligned line per check, then versions and environment."""
    checks, packages = report["checks"], report["packages"]
    width = max(map(len, checks))
    count = {level: sum(check["level"] == level for check in checks.values()) for level in (FAIL, WARN)}
    lines = [
        f"dspref {report['dspref']} doctor{' of ' + report['run'] if report['run'] else ''}, {report['time']}",
        f"{report['host']}, {report['platform']}, python {report['python']}, {report['cpus']} CPUs",
        ", ".join(f"{name} {version}" for name, version in packages.items()),
        "",
        *(f"{check['level']:<4}  {name:<{width}}  {check['text']}" for name, check in checks.items()),
        "",
        *(f"{name}={value}" for name, value in report["environment"].items()),
        "",
        f"{report['verdict']}: {count[FAIL]} failed, {count[WARN]} warnings",
    ]
    return secrets.redact("\n".join(lines) + "\n")
