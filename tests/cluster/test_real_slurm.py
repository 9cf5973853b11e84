"""Jobs on a real SLURM of two nodes, a rank on each: however one is cut into slices, it ends like a run that never was."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import real_slurm
from jobs import (
    EVERY,
    Submitted,
    assert_no_step_lost,
    at_step,
    check,
    ended,
    events,
    queued_again,
    ranks_of,
    restarted,
    shown,
    submit,
)
from real_slurm import Cluster, wait_for
from tiny import preference_rows

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := real_slurm.missing():
        pytest.skip(reason)
    with real_slurm.scratch() as folder:
        try:
            cluster = Cluster(folder)
        except AssertionError as error:  # a container may forbid what the daemons need; what they said is in the folder
            pytest.skip(f"no SLURM comes up here: {error}")
        yield cluster
        cluster.stop()


def test_nothing_is_left_of_a_cluster_whose_tests_are_killed(cluster):
    code = """if True:
        import pathlib, sys, time, real_slurm
        cluster = real_slurm.Cluster(pathlib.Path(sys.argv[1]))
        assert cluster.ask("sbatch", "--nodes=2", "--output=/dev/null", "--wrap", "srun sleep 600")
        time.sleep(600)
    """
    with real_slurm.scratch() as folder:

        def tasks() -> list[str]:
            return [process for process in real_slurm.processes_of(folder) if process.endswith("/sleep 600 ")]

        with subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=Path(__file__).parent) as tests:
            try:
                wait_for(lambda: len(tasks()) == 2, 60, "the step of a job")
            finally:
                tests.kill()
        wait_for(lambda: not real_slurm.processes_of(folder), 30, "the end of all daemons and tasks")


def test_a_normal_end(cluster, whole, run_file):
    check(cluster, submit(cluster, run_file, "normal", pace=0), whole, restarts=0)


def test_at_its_time_limit_a_job_commits_and_queues_again(cluster, whole, run_file):
    job = submit(cluster, run_file, "limit", ("--time=10", "--signal-seconds=60"), pace=5)
    at_step(job, 1)
    cluster.ask("scontrol", "update", f"jobid={job.job}", "TimeLimit=2")
    restarted(cluster, job)
    check(cluster, job, whole, restarts=1)
    assert_no_step_lost(job)


@pytest.fixture(scope="module")
def signalled(cluster: Cluster, whole: str, run_file: Path) -> tuple[Submitted, Submitted, str]:
    """Two runs of a sweep, which differ in nothing that decides a weight. The first is queued again after a signal by hand;
    and what was shown of it then."""
    sweep = run_file.parent / "two.sweep"
    sweep.write_text("checkpoint.save_every=5\ncheckpoint.save_every=7\n")
    array = submit(cluster, run_file, "array", ("--time=10", f"--sweep={sweep}"))
    first, second = (
        Submitted(array.run / str(k), f"{array.job}_{k}", array.run / f"logs/slurm-{array.job}_{k}.out", array.gate)
        for k in range(2)
    )
    at_step(first, 1)
    cluster.ask("scancel", "--signal=USR1", first.job)
    queued_again(cluster, first)
    said = shown(cluster, first.run)
    restarted(cluster, first)
    return first, second, said


def test_a_signal_by_hand_to_one_run_of_an_array(signalled, cluster, whole):
    first, second, _ = signalled
    check(cluster, first, whole, restarts=1)
    check(cluster, second, whole, restarts=0)
    assert_no_step_lost(first)


def test_status_of_a_job_that_is_queued_again(signalled):
    *_, said = signalled
    assert re.search("pending|queued", said)
    assert "the same command again" not in said, "which would be refused"


@pytest.fixture(scope="module")
def preempted(cluster: Cluster, whole: str, run_file: Path) -> Submitted:
    """A job whose nodes one of higher rank has had."""
    job = submit(cluster, run_file, "preempted")
    at_step(job, 1)
    asked = ("--partition=urgent", "--nodes=2", "--gpus-per-node=2", "--output=/dev/null")
    urgent = cluster.ask("sbatch", "--parsable", *asked, "--wrap", "sleep 1").strip()
    restarted(cluster, job)
    assert ended(cluster, urgent)[0] == "COMPLETED"
    return job


def test_a_job_of_higher_rank_takes_the_nodes(preempted, cluster, whole):
    check(cluster, preempted, whole, restarts=1)
    assert_no_step_lost(preempted)


def test_of_a_job_that_slurm_requeues_nothing_else_is_said(preempted):
    assert "not requeued" not in preempted.log.read_text()


def test_a_node_loses_its_power(cluster, whole, run_file):
    job = submit(cluster, run_file, "lost")
    at_step(job, 1)
    job.gate.write_text("0.2")
    at_step(job, EVERY + 2)
    cluster.lose_node("127.0.0.2")
    try:
        restarted(cluster, job)
    finally:
        cluster.start_node("127.0.0.2")
    check(cluster, job, whole, restarts=1)
    (resume,) = events(job.run, "resume")
    assert resume["step"] >= EVERY and resume["step"] % EVERY == 0


def test_an_array_scores_the_reference_in_shares(cluster, whole, run_file):
    """The command of docs/references.md, whose parts are blocks of pairs: here, one of each data set."""
    folder = run_file.parent
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(7, seed=6)))
    store, held_out = f"reference.store={folder}/store", f"data.eval.path={folder}/held_out.jsonl"
    (folder / "score.sh").write_text(
        f"""#!/bin/bash
#SBATCH --array=0-1 --nodes=2 --ntasks-per-node=1 --gpus-per-node=1 --output={folder}/score-%a.out
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
srun {sys.executable} -m dspref.cli score {run_file} output_dir=none {store} {held_out} \
  --share $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT
"""
    )
    job = cluster.ask("sbatch", "--parsable", f"{folder}/score.sh").strip()
    for k, pairs in enumerate((18, 7)):
        assert ended(cluster, f"{job}_{k}")[:2] == ("COMPLETED", "0:0"), (folder / f"score-{k}.out").read_text()
        assert f"reference: scored {pairs} of 25 pairs" in (folder / f"score-{k}.out").read_text()
    scored = submit(cluster, run_file, "scored", (store, "--time=10"), pace=0)
    check(cluster, scored, whole, restarts=0)
    assert "reference: scored 0 of 18 pairs" in scored.log.read_text()


@pytest.mark.parametrize("during", ["warm_up", "imports"])
def test_stopped_before_its_first_step_a_job_queues_again(during, cluster, whole, run_file):
    job = submit(cluster, run_file, during, pace=0)
    if during == "imports":
        wait_for(lambda: ranks_of(job), 60, f"a rank of {job.run}")
    else:
        wait_for(lambda: job.log.exists() and "dspref: job" in job.log.read_text(), 60, f"a line in {job.log}")
    cluster.ask("scancel", "--signal=USR1", job.job)
    restarted(cluster, job)
    check(cluster, job, whole, restarts=1)


@pytest.mark.soak
def test_a_controller_that_is_down_is_asked_again(cluster, whole, run_file):
    job = submit(cluster, run_file, "alone", pace=30)
    at_step(job, 1)
    cluster.ask("scancel", "--signal=USR1", job.job)
    cluster.stop_controller()
    try:
        job.gate.unlink()
        wait_for(lambda: not ranks_of(job), 60, f"the end of the ranks of {job.run}")
        time.sleep(40)  # srun itself has patience for half of that
    finally:
        cluster.start_controller()
    wait_for(lambda: cluster.job(job.job), 30, "the controller")
    restarted(cluster, job)
    check(cluster, job, whole, restarts=1)
    assert_no_step_lost(job)


def test_a_folder_with_a_space(cluster, whole, run_file):
    check(cluster, submit(cluster, run_file, "with a space", pace=0), whole, restarts=0)


def test_the_exit_code_of_a_job_is_that_of_the_run(cluster, run_file):
    (run_file.parent / "bad.jsonl").write_text('{"prompt": "a"}\n')
    job = submit(cluster, run_file, "bad", ("--time=10", f"data.train.path={run_file.parent}/bad.jsonl"), pace=0)
    assert ended(cluster, job.job)[:2] == ("FAILED", "3:0"), job.log.read_text()


def test_status_says_why_a_job_waits_and_that_it_was_cancelled(cluster, run_file):
    cluster.ask("scontrol", "update", "partitionname=main", "state=down")
    try:
        job = submit(cluster, run_file, "waits", pace=0)
        assert cluster.job(job.job)["JobState"] == "PENDING"
        waiting = shown(cluster, job.run)
        cluster.ask("scancel", job.job)
    finally:
        cluster.ask("scontrol", "update", "partitionname=main", "state=up")
    assert ended(cluster, job.job)[0] == "CANCELLED"
    assert "pending" in waiting.lower() and "PartitionDown" in waiting
    assert "cancelled" in shown(cluster, job.run).lower()


def test_a_setup_file_that_fails_is_named(cluster, run_file):
    setup = run_file.parent / "setup.sh"
    setup.write_text("exit 9\n")
    job = submit(cluster, run_file, "setup", ("--time=10", f"--setup={setup}"), pace=0)
    assert ended(cluster, job.job)[0] == "FAILED"
    (line,) = [line for line in job.log.read_text().splitlines() if "dspref" in line and "setup.sh" in line]
    said = shown(cluster, job.run)
    assert "failed" in said.lower() and "setup.sh" in said, line
