"""A real SLURM on this machine, for tests: munged, slurmctld and a slurmd for each node, on loopback and free ports.

`Cluster(folder)` needs root, and Debian's packages `slurm-wlm` and `munge`; no systemd, no cgroups. It is up in seconds.
Each daemon has a holder: a process that all of the daemon's orphans fall to, as they fall to the init of a machine. A holder
ends with its daemon and whatever that left behind once its standard input closes: also when the tests are killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

DAEMONS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge"}
STOP_SECONDS = 8.0  # from SIGTERM to SIGKILL, for a daemon
BECOME_SUBREAPER = 36  # prctl(2): PR_SET_CHILD_SUBREAPER

# Main can be preempted by urgent, with some seconds of grace.
SLURM_CONF = """\
ClusterName=tests
SlurmctldHost={controller.host}({controller.address})
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
SlurmdTimeout={node_timeout}
ReturnToService=2
FirstJobId={first_job}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no SLURM can be started here."""
    if os.geteuid():
        return "a real SLURM is started by root"
    for command, package in DAEMONS.items():
        if not shutil.which(command, path=path_of_root()):
            return f"no {command}: apt-get install --no-install-recommends {package}"
    return None


def path_of_root() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Place(NamedTuple):
    """Where a daemon runs."""

    name: str
    """Of the node, for SLURM."""
    host: str
    address: str
    enter: tuple[str, ...] = ()
    """What a command is put behind to run there."""


def on_loopback(nodes: int) -> list[Place]:
    """The controller's place, and one for each node: their names are addresses, so that ranks meet there."""
    return [Place(f"127.0.0.{n}" if n else "controller", socket.gethostname(), "127.0.0.1") for n in range(nodes + 1)]


class Cluster:
    """Nodes of 8 pretended CPUs and `gpus` pretended GPUs, in partitions `main` and `urgent`. `places`: that of the
    controller, where the commands are run too, and one for each node; default: two nodes on loopback."""

    def __init__(
        self, folder: Path, places: Sequence[Place] = (), gpus: int = 2, grace: int = 30, node_timeout: int = 10
    ) -> None:
        self.folder = folder
        self.places = {place.name: place for place in places or on_loopback(2)}
        self.controller, *self.nodes = self.places
        self.environment = {**os.environ, "PATH": path_of_root(), "SLURM_CONF": f"{folder}/slurm.conf"}
        self.holders: dict[str, subprocess.Popen[str]] = {}
        for name in ("state", "spool", "jobs"):
            (folder / name).mkdir()
        write_settings(folder, [*self.places.values()], gpus, grace, node_timeout)
        try:
            self.start()
        except BaseException:
            self.stop()
            raise

    def start(self) -> None:
        key = ("key-file", "pid-file", "log-file", "seed-file")
        files = [f"--{name}={self.folder}/munge.{name.partition('-')[0]}" for name in key]
        self.hold("munged", "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
        wait_for((self.folder / "munge.socket").exists, 20, "munged")
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        wait_for(lambda: self.idle() == len(self.nodes), 60, f"a SLURM in {self.folder}")

    def start_controller(self) -> None:
        self.hold(self.controller, "slurmctld", "-D")

    def stop_controller(self) -> None:
        """It keeps what it knows in its folder; jobs go on without it."""
        self.holders.pop(self.controller).communicate(timeout=STOP_SECONDS + 10)

    def start_node(self, node: str) -> None:
        self.hold(node, "slurmd", "-D", "-N", node)

    def lose_node(self, node: str) -> None:
        """The power fails: its slurmd and all that runs on it are gone at once."""
        holder = self.holders.pop(node)
        holder.communicate("now")

    def idle(self) -> int:
        return sum(map(int, self.ask("sinfo", "--noheader", "--partition=main", "--states=idle", "--format=%D").split()))

    def hold(self, name: str, *command: str) -> None:
        """Start a daemon in a holder, at its place if it has one."""
        enter = self.places[name].enter if name in self.places else ()
        with open(self.folder / f"{name}.out", "a") as output:
            self.holders[name] = subprocess.Popen(
                [sys.executable, "-IS", __file__, *enter, *command],
                env=self.environment, cwd=self.folder, stdin=subprocess.PIPE, stdout=output, stderr=output, text=True,
                start_new_session=True,  # Ctrl-C is for the tests, which then stop the cluster
            )  # fmt: skip

    def ask(self, *command: str, timeout: float = 20) -> str:
        """What a command of SLURM answers; nothing where it fails."""
        done = subprocess.run(self.inside(*command), env=self.environment, capture_output=True, text=True, timeout=timeout)
        return done.stdout if done.returncode == 0 else ""

    def inside(self, *command: str) -> list[str]:
        """A command as it is run where the controller is."""
        return [*self.places[self.controller].enter, *command]

    def job(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, ExitCode, Restarts, Reason, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", job)))

    def stop(self) -> None:
        """End the jobs, then every daemon with all that it started."""
        if self.controller in self.holders:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):  # or else the holders end them
                self.ask("scancel", "--user=root")
                wait_for(lambda: not self.ask("squeue", "--noheader"), 15, "the end of the jobs")
        stopping = [self.holders.pop(name) for name in list(self.holders)]
        for holder in stopping[::-1]:  # the munge that all of them use last
            try:
                holder.communicate(timeout=STOP_SECONDS + 10)
            except subprocess.TimeoutExpired:
                holder.kill()
                holder.wait()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for a cluster, which must leave no process. Its path is short: that of a socket may have 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="dspref-slurm-", dir="/tmp"))
    yield folder
    assert processes_of(folder) == []
    shutil.rmtree(folder)


def processes_of(folder: Path) -> list[str]:
    """Processes that have to do with a cluster: of each, its number and command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = (place / "cmdline").read_bytes(), (place / "environ").read_bytes()
        except OSError:  # it has just ended
            continue
        if int(place.name) != os.getpid() and str(folder).encode() in words + variables:
            found.append(f"{place.name}: {words.replace(bytes(1), b' ').decode(errors='replace')}")
    return found


def write_settings(folder: Path, places: list[Place], gpus: int, grace: int, node_timeout: int) -> None:
    ports = free_ports(len(places))
    controller, *nodes = places
    described = [
        f"NodeName={node.name} NodeHostname={node.host} NodeAddr={node.address} Port={port} CPUs=8 RealMemory=4000 "
        f"Gres=gpu:{gpus}"
        for node, port in zip(nodes, ports[1:], strict=True)
    ]
    text = SLURM_CONF.format(
        controller=controller, folder=folder, ports=ports, grace=grace, node_timeout=node_timeout,
        nodes="\n".join(described), first_job=first_job(),
    )  # fmt: skip
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # any, or slurmd looks for one that is mounted
    files = [folder / f"gpu{k}" for k in range(gpus)]  # a GPU without a file drains its node
    for file in files:
        file.touch()
    lines = [f"NodeName={node.name} Name=gpu File={file}\n" for node in nodes for file in files]
    (folder / "gres.conf").write_text("".join(lines))
    with open(os.open(folder / "munge.key", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as key:
        key.write(os.urandom(128))


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def first_job() -> int:
    """A number from which fifty jobs find the MASTER_PORT that is made of theirs free."""
    while True:
        first = random.randrange(1, 200) * 50
        try:
            for port in range(20000 + first, 20050 + first):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return first


def wait_for(true: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.2)


# ---------------------------------------------------------------------------------------------------------------------
# A holder


def hold(command: list[str]) -> None:
    """Run a daemon until standard input closes, and end all that it started; at once where it says `now`."""
    ctypes.CDLL(None).prctl(BECOME_SUBREAPER, 1, 0, 0, 0)
    daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    said = b""
    while True:
        reap()
        if select.select([0], [], [], 0.1)[0]:
            word = os.read(0, 100)
            said += word
            if not word:
                break
    deadline = time.monotonic() + (0 if said == b"now" else STOP_SECONDS)
    if time.monotonic() < deadline and daemon.pid in descendants(os.getpid()):
        os.kill(daemon.pid, signal.SIGTERM)
    while running := descendants(os.getpid()):
        if time.monotonic() > deadline or daemon.pid not in running:
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
        reap()


def reap() -> None:
    """As init does, so that nobody waits for a process that has ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def descendants(root: int) -> list[int]:
    """The processes below a process, from the root down."""
    children: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(place.read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(place.parent.name))
    found, left = [], [root]
    while left:
        left += (below := children.get(left.pop(0), []))
        found += below
    return found


if __name__ == "__main__":
    hold(sys.argv[1:])
