"""Ranks on hosts that are apart, each with a network, a host name and a small /dev/shm of its own, under a real SLURM."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator

import hosts_apart
import pytest
import real_slurm
from hosts_apart import plug_in, pull
from jobs import EVERY, STEPS, at_step, check, ended, events, ranks_of, restarted, steps, submit
from real_slurm import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.soak, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := real_slurm.missing():
        pytest.skip(reason)
    if not shutil.which("ip") or not shutil.which("nsenter"):
        pytest.skip("no ip or nsenter: apt-get install iproute2 util-linux")
    with real_slurm.scratch() as folder, hosts_apart.apart(folder) as places:
        cluster = Cluster(folder, places)
        yield cluster
        cluster.stop()


def test_a_normal_end(cluster, whole, run_file):
    check(cluster, submit(cluster, run_file, "apart", pace=0), whole, restarts=0)


def test_a_cable_that_is_mended_in_time_costs_time_alone(cluster, whole, run_file):
    job = submit(cluster, run_file, "cable")
    at_step(job, 2)
    pull("cn2")
    time.sleep(6)  # less than after which SLURM gives a node up
    before = steps(job.run)[-1]
    assert before < STEPS
    plug_in("cn2")
    at_step(job, before + 1)
    job.gate.unlink()
    check(cluster, job, whole, restarts=0)


def test_a_host_without_power(cluster, whole, run_file):
    """No word comes of it, not even that its connections are closed."""
    job = submit(cluster, run_file, "powerless")
    at_step(job, 1)
    job.gate.write_text("0.2")
    at_step(job, EVERY + 2)
    pull("cn2")
    cluster.lose_node("cn2")
    try:
        restarted(cluster, job)
    finally:
        plug_in("cn2")
        cluster.start_node("cn2")
    check(cluster, job, whole, restarts=1)
    (resume,) = events(job.run, "resume")
    assert resume["step"] >= EVERY and resume["step"] % EVERY == 0


def test_a_rank_that_is_killed_on_another_host_is_named(cluster, whole, run_file):
    job = submit(cluster, run_file, "killed")
    at_step(job, 2)
    os.kill(ranks_of(job)[1], signal.SIGKILL)
    assert ended(cluster, job.job)[0] == "FAILED"
    log, error = job.log.read_text(), json.loads((job.run / "run.json").read_text())["error"]
    assert "Traceback" not in log and "gloo" not in log
    assert "rank 1" in error or "cn2" in error, error
