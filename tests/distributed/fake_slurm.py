"""A cluster of one machine: `sbatch`, `srun`, `scontrol` and `squeue` that do what job scripts rely on.

`Cluster(folder)` puts the four commands into `folder/bin`. `sbatch` only queues; `Cluster.run(job)` is the controller: it
runs the job script, and again while that was requeued. What goes wrong is told per start of the job:

    {"signal_at": 3}              USR1 to rank 0 once metrics.jsonl has step 3
    {"lose_node": 1, "at": 5}     SIGKILL to the ranks of that node and to the job; SLURM requeues it by itself
    {"act": [75, 4]}              no ranks at all: srun commits a checkpoint of step 4 and answers 75
    {"says": "srun: ..."}         what srun prints of its ranks
    {"state": "CANCELLED"}        what squeue says
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

COMMANDS = ("sbatch", "srun", "scontrol", "squeue")
KILL_WAIT = 10.0  # seconds from SIGTERM to SIGKILL


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        for command in COMMANDS:
            script = folder / "bin" / command
            script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" {command} "{folder}" "$@"\n')
            script.chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}"}

    def run(self, job: str, faults: list[dict[str, Any]], task: int | None = None, limit: int = 8) -> tuple[int, int]:
        """Run a queued job, or one task of an array, to its end: (exit code, times it was started)."""
        queued = json.loads((self.folder / f"job-{job}.json").read_text())
        options, number = queued["options"], int(job) + (task or 0)
        environment = self.environment | {
            "SLURM_JOB_ID": str(number), "SLURM_JOB_NODELIST": "node[0-9]", "SLURM_JOB_NUM_NODES": options["nodes"],
            "SLURM_NTASKS_PER_NODE": options["ntasks-per-node"],
        }  # fmt: skip
        if task is not None:
            environment |= {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": str(task)}
        log = options["output"].replace("%j", job).replace("%A", job).replace("%a", str(task))
        requeued = self.folder / f"requeued-{job if task is None else f'{job}_{task}'}"
        for start in range(limit):
            fault = faults[start] if start < len(faults) else {}
            (self.folder / "fault.json").write_text(json.dumps(fault))
            with open(log, "a") as output:
                environment |= {"SLURM_RESTART_COUNT": str(start)} if start else {}
                command = ["bash", queued["script"]]
                code = subprocess.run(
                    command, env=environment, cwd="/", stdout=output, stderr=output, timeout=240
                ).returncode
            if not requeued.exists():
                return code, start + 1
            requeued.unlink()
        raise AssertionError(f"the job was requeued {limit} times")

    def steps(self) -> list[list[str]]:
        """The command of every srun so far."""
        path = self.folder / "srun.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def sbatch(folder: Path, arguments: list[str]) -> int:
    script = Path(arguments[-1])
    found = re.findall(r'^#SBATCH --([\w-]+)=("[^"]*"|\S+)$', script.read_text(), flags=re.M)
    options = {name: value.strip('"') for name, value in found}
    number = str(int(os.environ.get("FAKE_SLURM_JOB", "1000")))
    (folder / f"job-{number}.json").write_text(json.dumps({"script": str(script), "options": options}))
    print(number)
    return 0


def scontrol(folder: Path, arguments: list[str]) -> int:
    match arguments:
        case ["show", "hostnames", _]:
            print("127.0.0.1\n127.0.0.2")
        case ["requeue", job]:
            (folder / f"requeued-{job}").touch()
    return 0


def squeue(folder: Path, arguments: list[str]) -> int:
    fault = folder / "fault.json"
    print(json.loads(fault.read_text()).get("state", "RUNNING") if fault.exists() else "")
    return 0


def srun(folder: Path, arguments: list[str]) -> int:
    options = dict(word[2:].split("=", 1) for word in arguments if word.startswith("--") and "=" in word)
    command = arguments[next(i for i, word in enumerate(arguments) if not word.startswith("--")) :]
    with open(folder / "srun.jsonl", "a") as file:
        file.write(json.dumps(command) + "\n")
    if "--config" not in command:
        return 0  # the libraries are warm
    fault = json.loads((folder / "fault.json").read_text())
    run = Path(command[-1]).parents[1]
    print(fault.get("says", ""), end="", file=sys.stderr)
    if "act" in fault:
        return act(run, *fault["act"])
    nodes, per_node = int(os.environ["SLURM_JOB_NUM_NODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    ranks = []
    for rank in range(nodes * per_node):
        shape = {"STEP_NUM_TASKS": nodes * per_node, "STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})"}
        named = {"PROCID": rank, "LOCALID": rank % per_node, "NODEID": rank // per_node, **shape}
        ranks.append(subprocess.Popen(command, env=os.environ | {f"SLURM_{key}": str(n) for key, n in named.items()}))
    return watch(folder, ranks, per_node, run, fault, kill_on_bad_exit="kill-on-bad-exit" in options)


def act(run: Path, code: int, commit: int | None = None, event: str | None = None, said: int = 75, cause: str = "") -> int:
    """What ranks would have left behind."""
    if commit is not None:
        (run / "checkpoints" / f"step-{commit:06d}").mkdir(parents=True)
        (run / "checkpoints" / f"step-{commit:06d}" / "manifest.json").write_text("{}")
    if event:
        with open(run / "events.jsonl", "a") as file:
            about = {
                "event": event,
                "step": commit,
                "cause": cause or "stopped by SIGUSR1 after step",
                "exit_code": said,
                "pairs": 8,
            }
            file.write(json.dumps({"time": datetime.now(UTC).isoformat(), **about}) + "\n")
    return code


def watch(folder: Path, ranks: list, per_node: int, run: Path, fault: dict[str, Any], kill_on_bad_exit: bool) -> int:
    """The end of a step: signals as SLURM sends them; the highest exit code, 128 + signal for a rank that one ended."""
    deadline = None
    while any(rank.poll() is None for rank in ranks):
        time.sleep(0.01)
        if fault and step(run) >= fault.get("signal_at", fault.get("at", 0)):
            if "lose_node" in fault:
                lose_node(folder, ranks, per_node, fault["lose_node"])
            ranks[fault.get("rank", 0)].send_signal(signal.SIGUSR1)
            fault = {}
        if deadline is None and kill_on_bad_exit and any(rank.poll() for rank in ranks):
            deadline = time.monotonic() + KILL_WAIT
            end(ranks, signal.SIGTERM)
        if deadline and time.monotonic() > deadline:
            end(ranks, signal.SIGKILL)
    return max(128 - rank.returncode if rank.returncode < 0 else rank.returncode for rank in ranks)


def step(run: Path) -> int:
    """The last step of metrics.jsonl."""
    path = run / "metrics.jsonl"
    found = re.findall(r'^\{"step": (\d+)', path.read_text(), flags=re.M) if path.exists() else []
    return int(found[-1]) if found else -1


def lose_node(folder: Path, ranks: list, per_node: int, node: int) -> None:
    """A node dies with its ranks; SLURM then ends the rest of the job, its shell too, and requeues it."""
    end(ranks[node * per_node : (node + 1) * per_node], signal.SIGKILL)
    time.sleep(0.5)
    end(ranks, signal.SIGKILL)
    (folder / f"requeued-{os.environ['SLURM_JOB_ID']}").touch()
    os.kill(os.getppid(), signal.SIGKILL)
    for rank in ranks:
        rank.wait()
    os._exit(0)


def end(ranks: list, number: signal.Signals) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


if __name__ == "__main__":
    name, cluster, *rest = sys.argv[1:]
    sys.exit(globals()[name](Path(cluster), rest))
