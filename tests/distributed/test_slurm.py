"""A job under SLURM that is cut into slices, with real ranks on a fake cluster, ends like one that was never cut."""

from __future__ import annotations

import hashlib
import json
import random
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_slurm import Cluster
from tiny import preference_rows, save_tokenizer, tiny_config

from dspref import slurm
from dspref.run import status

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 24
# Two nodes of one rank each.
JOB = slurm.Job(nodes=2, gpus_per_node=1, cpus_per_task=1, time="10", env=("DS_ACCELERATOR=cpu", "DEEPSPEED_TIMEOUT=2"))


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    tiny_config("qwen2", save_tokenizer(folder / "tokenizer")).save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(18, seed=5)))
    model = {"name_or_path": f"{folder}/model", "tokenizer_name_or_path": f"{folder}/tokenizer", "init": "random"}
    values = {
        "model": {**model, "dtype": "float32"},
        "data": {"train": {"path": f"{folder}/pairs.jsonl"}, "tokens_per_pack": 300},
        "train": {"pairs_per_step": 4, "max_steps": STEPS, "learning_rate": 3e-3},
        "deepspeed": {"zero_optimization": {"stage": 2}},
        "checkpoint": {"save_every": 5},
        "output_dir": "unset",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def whole(run_file: Path) -> str:
    """The weights of a run that nothing interrupts."""
    run, starts = trained(run_file, "whole")
    assert starts == 1
    return weights(run)


def trained(run_file: Path, name: str, *faults: dict[str, Any]) -> tuple[Path, int]:
    """(run folder, times the job was started) of a run that ended well."""
    run, cluster, job = run_file.parent / name, Cluster(run_file.parent / "cluster"), free_number()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", cluster.environment["PATH"])
        patch.setenv("FAKE_SLURM_JOB", job)
        slurm.submit(run_file, [f"output_dir={run}"], JOB)
    code, starts = cluster.run(job, list(faults))
    log = (run / f"logs/slurm-{job}.out").read_text()
    assert code == 0, log
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    about = status.read(run)
    assert (about["state"], about["step"], about["restarts"]) == ("finished", STEPS, starts - 1)
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    return run, starts


def free_number() -> str:
    """A job number whose MASTER_PORT is free."""
    while True:
        number = random.randrange(20000)
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", 20000 + number))
            except OSError:
                continue
            return str(number)


def weights(run: Path) -> str:
    return hashlib.sha256((run / "final/model.safetensors").read_bytes()).hexdigest()


def test_a_lost_node_costs_steps_and_changes_nothing(whole, run_file):
    cut, starts = trained(run_file, "cut", {"lose_node": 1, "at": 12})
    assert starts == 2
    assert weights(cut) == whole
    events = [json.loads(line) for line in (cut / "events.jsonl").read_text().splitlines()]
    (resumed,) = [event["step"] for event in events if event["event"] == "resume"]
    assert resumed >= 10 and resumed % 5 == 0  # the newest checkpoint before the loss


def test_slices_end_like_an_uninterrupted_run(whole, run_file):
    """Preempted twice, by a signal to rank 0 and then to rank 1, and once a node is lost."""
    faults = {"signal_at": 4, "rank": 0}, {"signal_at": 9, "rank": 1}, {"lose_node": 1, "at": 17}
    cut, starts = trained(run_file, "slices", *faults)
    assert starts == 4
    assert weights(cut) == whole
    events = [json.loads(line) for line in (cut / "events.jsonl").read_text().splitlines()]
    stops = [event["step"] for event in events if event["event"] == "stop"]
    resumes = [event["step"] for event in events if event["event"] == "resume"]
    assert len(stops) == 2 and resumes[:2] == stops  # a preemption loses no step
    assert resumes[2] >= 15 and resumes[2] % 5 == 0
