"""The socket on which the ranks of several machines meet."""

from __future__ import annotations

import ipaddress
import socket


def listening(address: str, port: int) -> socket.socket | None:
    """A socket on the interface of this address alone. None where it is not this machine's, as behind a router, or only
    within it: torch then listens on all."""
    try:
        family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        if ipaddress.ip_address(str(where[0]).partition("%")[0]).is_loopback:
            return None
        return socket.create_server(where[:2], family=family, backlog=2048)
    except (OSError, ValueError):
        return None
