"""Ranks on hosts that are apart, each with a network, a host name and a small /dev/shm of its own, under a real SLURM."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hosts_apart
import pytest
import real_slurm
from hosts_apart import own_files, plug_in, pull
from jobs import EVERY, ROOT, STEPS, at_step, check, ended, events, ranks_of, restarted, steps, submit, weights
from real_slurm import Cluster

CLOCK = Path(__file__).with_name("clock.c")

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


def test_torchrun_on_each_host(cluster, whole, run_file):
    """As where no SLURM is: a command a host, which agree on an address."""
    run, torchrun = run_file.parent / "torchrun", str(Path(sys.executable).with_name("torchrun"))
    shape = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=cn1", "--master-port=29411"]
    train = [f"{ROOT}/launch/train.py", "--config", str(run_file), f"output_dir={run}"]
    agents = [
        subprocess.Popen(
            [*cluster.places[node].enter, torchrun, *shape, f"--node-rank={rank}", *train], text=True,
            env=cluster.environment | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank, node in enumerate(cluster.nodes)
    ]  # fmt: skip
    said = [agent.communicate(timeout=240)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert weights(run) == whole


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


def test_caches_that_no_two_hosts_share(cluster, whole, run_file):
    """Each host tokenises, and scores for the reference, into a cache of its own."""
    options = ("--time=10", "--env=DSPREF_CACHE=/dev/shm/cache")
    check(cluster, submit(cluster, run_file, "caches", options, pace=0), whole, restarts=0)
    assert all(list(own_files(cluster, node).glob("cache/*/*")) for node in cluster.nodes)


@pytest.mark.parametrize("seconds", ["+7200", "-7200"])
def test_clocks_that_are_apart(cluster, whole, run_file, tmp_path, seconds):
    clock = tmp_path / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", clock, CLOCK], check=True)
    (own_files(cluster, "cn2") / "clock").write_text(seconds)
    options = ("--time=10", f"--env=LD_PRELOAD={clock}")
    job = submit(cluster, run_file, f"clocks{seconds}", options, pace=0)
    check(cluster, job, whole, restarts=0)
    assert f"the clock of cn2 (rank 1) is {seconds} s from that of cn1" in job.log.read_text()


@pytest.mark.parametrize(
    ("package", "said"),
    [
        ("jinja2", "rank 1 on cn2 has jinja2 0.0.1, rank 0 on cn1 has"),
        ("tokenizers", "cn2: transformers cannot be loaded: tokenizers>="),
    ],
)
def test_a_host_with_another_version_of_a_package_is_refused(cluster, run_file, package, said):
    site = own_files(cluster, "cn2") / "site"
    shutil.rmtree(site, ignore_errors=True)
    about = site / f"{package}-0.0.1.dist-info/METADATA"
    about.parent.mkdir(parents=True)
    about.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.1\n")
    options = ("--time=10", f"--env=PYTHONPATH=/dev/shm/site:{ROOT}")
    job = submit(cluster, run_file, "versions", options, pace=0)
    assert ended(cluster, job.job) == ("FAILED", "4:0", 0)
    assert said in job.log.read_text()
    assert "Traceback" not in job.log.read_text()
    assert not list(job.run.glob("checkpoints/*"))


def test_a_file_that_one_host_lacks_is_said_there(cluster, run_file, tmp_path):
    """Nor is the job queued again, as one is whose ranks were stopped, because SLURM stopped the others."""
    pairs, copy = run_file.with_name("pairs.jsonl"), tmp_path / "pairs.jsonl"
    shutil.copy(pairs, copy)
    shutil.copy(pairs, own_files(cluster, "cn1"))
    job = submit(cluster, run_file, "lacking", (f"data.train.path={copy}", "--time=10"), pace=0)
    copy.unlink()  # before any rank has read its config
    copy.symlink_to("/dev/shm/pairs.jsonl")
    assert ended(cluster, job.job) == ("FAILED", "3:0", 0), job.log.read_text()
    assert f"cn2: {copy}: a link to nothing" in job.log.read_text()
    assert "Traceback" not in job.log.read_text()
