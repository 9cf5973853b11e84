"""Places for the daemons of a cluster that are apart as machines are: with a network, a host name and a /dev/shm each.

A switch joins them by cables that can be pulled. Needs root and iproute2; the files of the machine are shared.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from real_slurm import Cluster, Place, descendants

SUBNET = "10.99.0"
# In the namespaces of a place: names of its own, and of the others.
SETTLE = 'hostname "$0" && mount --bind "$1" /etc/hosts && mount -t tmpfs -o size=64m tmpfs /dev/shm && shift && exec "$@"'


@contextlib.contextmanager
def apart(folder: Path, nodes: int = 2) -> Iterator[list[Place]]:
    """The places of a controller `ctl` and of nodes `cn1`, `cn2`, ..., all gone at the end."""
    names = ["ctl", *(f"cn{n}" for n in range(1, nodes + 1))]
    addresses = {name: f"{SUBNET}.{254 if name == 'ctl' else name[2:]}" for name in names}
    hosts = folder / "hosts"
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items()))
    made = [namespace("switch")]
    try:
        ip("netns", "add", made[0])
        ip("-n", made[0], "link", "add", "br0", "type", "bridge")
        ip("-n", made[0], "link", "set", "br0", "up")
        for name, address in addresses.items():
            made.append(own := namespace(name))
            ip("netns", "add", own)
            ip("link", "add", name, "netns", made[0], "type", "veth", "peer", "name", "eth0", "netns", own)
            ip("-n", made[0], "link", "set", name, "master", "br0", "up")
            ip("-n", own, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", own, "link", "set", "eth0", "up")
            ip("-n", own, "link", "set", "lo", "up")
        yield [Place(name, name, address, enter(name, hosts)) for name, address in addresses.items()]
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def pull(name: str) -> None:
    """The cable of a place."""
    ip("-n", namespace("switch"), "link", "set", name, "down")


def plug_in(name: str) -> None:
    ip("-n", namespace("switch"), "link", "set", name, "up")


def own_files(cluster: Cluster, node: str) -> Path:
    """The /dev/shm of a node that is up, as the jobs on it see it, and nobody else."""
    (daemon, *_) = descendants(cluster.holders[node].pid)
    return Path("/proc", str(daemon), "root", "dev", "shm")


def enter(name: str, hosts: Path) -> tuple[str, ...]:
    inside = ("nsenter", f"--net=/run/netns/{namespace(name)}", "unshare", "--uts", "--mount", "sh", "-c", SETTLE)
    return (*inside, name, str(hosts))


def namespace(name: str) -> str:
    """Its name on this machine, where others test too."""
    return f"dspref-{os.getpid()}-{name}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
