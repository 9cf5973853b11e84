"""What tests do with the jobs of `dspref submit` on a real SLURM: submit, interrupt, wait, and look what became of them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from real_slurm import Cluster, wait_for

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 24, 5
# Two nodes of one rank each.
SHAPE = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1")
OVER = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE")


class Submitted(NamedTuple):
    run: Path
    job: str
    log: Path
    gate: Path
    """While it is there, each step takes longer."""


def submit(
    cluster: Cluster, run_file: Path, name: str, options: Sequence[str] = ("--time=10",), pace: float = 1.0
) -> Submitted:
    """A job, by the command that users type, whose steps take `pace` seconds more as long as its gate is there."""
    run, gate = run_file.parent / name, run_file.parent / f"{name}.slow"
    if pace:
        gate.write_text(str(pace))
    more = {"PYTHONPATH": f"{ROOT}/tests/cluster/pace:{ROOT}", "PACE_GATE": str(gate)}
    words = ("submit", str(run_file), f"output_dir={run}", *SHAPE, "--env=DEEPSPEED_TIMEOUT=2", *options)
    dspref(cluster, more, *words)
    job = json.loads((run / "submit/job.json").read_text())["job"]
    return Submitted(run, job, run / f"logs/slurm-{job}.out", gate)


def dspref(cluster: Cluster, more: dict[str, str], *words: str) -> str:
    """What the command says, where the controller is."""
    command = cluster.inside(sys.executable, "-m", "dspref.cli", *words)
    done = subprocess.run(command, env=cluster.environment | more, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown(cluster: Cluster, run: Path) -> str:
    """What `dspref status` says of a run, on one line."""
    return " ".join(dspref(cluster, {"PYTHONPATH": str(ROOT)}, "status", str(run)).split())


def ranks_of(submitted: Submitted) -> list[int]:
    """The processes of its ranks that have been started, however far they are; in the order of the ranks."""
    config, found = f"{submitted.run}/submit/config.yaml".encode(), {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = ((place / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:  # it has just ended
            continue
        rank = [variable for variable in variables if variable.startswith(b"SLURM_PROCID=")]
        if config in words and b"python" in words[0] and rank:
            found[rank[0]] = int(place.name)
    return [found[rank] for rank in sorted(found)]


def at_step(submitted: Submitted, step: int, seconds: float = 240) -> None:
    """Wait until a job has made so many steps."""
    wait_for(lambda: [step] == steps(submitted.run)[step - 1 : step], seconds, f"step {step} of {submitted.run}")


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [record["step"] for record in records(path)] if path.exists() else []


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in records(run / "events.jsonl") if event["event"] == kind]


def records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may be growing."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def restarted(cluster: Cluster, submitted: Submitted, seconds: float = 240) -> None:
    """Wait until a job is queued again, and spare it the two minutes that SLURM would have it wait; at full speed."""
    queued_again(cluster, submitted, seconds)
    # In the second in which a job ended its new credentials would count as revoked, hence SLURM's own two minutes.
    cluster.ask("scontrol", "update", f"jobid={submitted.job}", "StartTime=now+2")
    submitted.gate.unlink(missing_ok=True)


def queued_again(cluster: Cluster, submitted: Submitted, seconds: float = 240) -> None:
    """Wait until a job that has run is in the queue."""

    def is_queued() -> bool:
        about = cluster.job(submitted.job)
        assert about["JobState"] not in OVER, f"{about['JobState']} {about['ExitCode']}: {submitted.log.read_text()}"
        return about["JobState"] == "PENDING" and about["Restarts"] != "0"

    wait_for(is_queued, seconds, f"the requeue of job {submitted.job}")


def ended(cluster: Cluster, job: str, seconds: float = 240) -> tuple[str, str, int]:
    """(state, exit code:signal, restarts) of a job at its end."""
    wait_for(lambda: cluster.job(job)["JobState"] in OVER, seconds, f"the end of job {job}")
    about = cluster.job(job)
    return about["JobState"], about["ExitCode"], int(about["Restarts"])


def check(cluster: Cluster, submitted: Submitted, whole: str, restarts: int) -> None:
    """The job ends well, each step was logged once, and the weights are those of the run that nothing interrupted."""
    assert ended(cluster, submitted.job) == ("COMPLETED", "0:0", restarts), submitted.log.read_text()
    assert steps(submitted.run) == list(range(1, STEPS + 1))
    assert json.loads((submitted.run / "run.json").read_text())["world_size"] == 2
    assert weights(submitted.run) == whole


def weights(run: Path) -> str:
    return hashlib.sha256((run / "final/model.safetensors").read_bytes()).hexdigest()


def assert_no_step_lost(job: Submitted) -> None:
    """What was interrupted went on where it was."""
    (stop,), (resume,) = events(job.run, "stop"), events(job.run, "resume")
    assert 1 <= stop["step"] == resume["step"] < STEPS
