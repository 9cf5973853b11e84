"""Where the ranks of one machine listen, and what a stranger there gets: nothing, no code, no say."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_of_one_machine_listen_on_loopback_alone(size, all_workers):
    for listening, environment in all_workers[size].run("cases:listening"):
        assert all(address in ("127.0.0.1", "::1") for address in listening), listening
        assert environment == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def test_nothing_that_ranks_send_is_a_pickle(all_workers):
    """What would run code where it arrives is not sent, on any rank; values of all ranks are there, by rank."""
    for rank, (refused, gathered) in enumerate(all_workers[2].run("cases:sent")):
        assert refused == "ranks cannot send each other a Dangerous"
        assert gathered == [(0, {1: Path("/a")}), (1, {1: Path("/a")})], rank


def addresses_of(pid: int) -> list[str]:
    """Where the process listens, by /proc: addresses of TCP sockets in state 0A that it has open."""
    own = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            own.add(os.readlink(link))
        except OSError:
            continue
    found = []
    for table, family, words in (("tcp", socket.AF_INET, 1), ("tcp6", socket.AF_INET6, 4)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                number = bytes.fromhex(fields[1].split(":")[0])
                parts = struct.unpack(f"<{words}I", number)
                found.append(socket.inet_ntop(family, struct.pack(f">{words}I", *parts)))
    return found


def test_a_listening_socket_would_be_found():
    for address in ("127.0.0.1", "0.0.0.0"):
        with socket.create_server((address, 0)):
            assert address in addresses_of(os.getpid())
