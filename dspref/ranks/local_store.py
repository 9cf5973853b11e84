"""The key-value store of ranks of one machine: a socket in a folder that only their user can enter, and no port.

Torch's own store listens on a port, where every user of the machine, or of the network, may read and write. Run as a
program, this module is the server: a process of its own, so that it answers while rank 0 holds Python's lock, stands still
or has died, and ends with its last client. It imports nothing but Python's own library.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

SOCKET = "socket"
MOST_BYTES = 1 << 28
_SIZE = struct.Struct("<I")


class ContactLost(RuntimeError):
    """The store's server is gone."""


class LocalStore:
    """A connection. The methods are those of torch's stores that dspref uses, with texts as values."""

    def __init__(self, folder: Path, prefix: str = "") -> None:
        """`folder`: of the socket. Raises OSError where nobody serves there."""
        self._folder, self._prefix, self._lock = folder, prefix, Lock()
        self._socket, self._is_clean = _connected(folder), True

    def own(self, prefix: str) -> LocalStore:
        """Another connection, for a thread; its keys stand apart."""
        return LocalStore(self._folder, f"{self._prefix}{prefix}/")

    def close(self) -> None:
        self._socket.close()

    def set(self, key: str, value: str) -> None:
        self._ask("set", key, value)

    def get(self, key: str) -> str:
        """Raises KeyError where there is none: this store does not wait."""
        if (value := self._ask("get", key)) is None:
            raise KeyError(key)
        return value

    def add(self, key: str, number: int) -> int:
        """Add to a counter, which starts at 0; the sum."""
        return self._ask("add", key, number)

    def compare_set(self, key: str, expected: str, desired: str) -> str:
        """Set what has the value `expected` ("": none yet); the value afterwards."""
        return self._ask("compare_set", key, expected, desired)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all are there."""
        return all(self._ask("get", key) is not None for key in keys)

    def delete_key(self, key: str) -> bool:
        return self._ask("delete", key)

    def _ask(self, what: str, key: str, *values: Any) -> Any:
        try:
            with self._lock:
                if not self._is_clean:
                    self._connect_anew()
                self._is_clean = False
                answer = _exchange(self._socket, [what, self._prefix + key, *values])
                self._is_clean = True
                return answer
        except OSError as error:
            raise ContactLost(f"the connection to the store of the ranks is broken: {error.strerror}") from None

    def _connect_anew(self) -> None:
        """A signal ended a question before its answer was read, which would be taken for that of the next one."""
        fresh = _connected(self._folder)
        _exchange(fresh, ["get", ""])  # the server knows it before the other is closed: it ends with its last client
        left, self._socket = self._socket, fresh
        left.close()


def _connected(folder: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(folder / SOCKET))
    except OSError:
        connection.close()
        raise
    return connection


def _exchange(connection: socket.socket, question: list[Any]) -> Any:
    connection.sendall(_framed(question))
    (size,) = _SIZE.unpack(_receive(connection, _SIZE.size))
    return json.loads(_receive(connection, size))


def _receive(connection: socket.socket, size: int) -> bytes:
    parts = b""
    while len(parts) < size:
        if not (part := connection.recv(size - len(parts))):
            raise ConnectionResetError(0, "its server has ended")
        parts += part
    return parts


def serve(folder: Path) -> LocalStore:
    """Start a server in this folder, which it removes when its last client is gone; a first connection. Raises OSError."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / SOCKET))
        listening.listen(128)
        store = LocalStore(folder)  # before there is a server: with this connection it ends
        subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(listening.fileno())], pass_fds=[listening.fileno()], cwd=folder,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    return store


def _framed(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return _SIZE.pack(len(text)) + text


# ---------------------------------------------------------------------------------------------------------------------
# The server


class Server:
    """Values by key, and who is there."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._clients: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()

    async def run(self, listening: socket.socket) -> None:
        # start_unix_server would look for the file of the socket, from Python 3.13 on: here its name leads nowhere.
        server = await asyncio.start_server(self._talk, sock=listening)
        async with server:
            await self._over.wait()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own = asyncio.current_task()
        assert own
        self._clients.add(own)
        try:
            while _is_own(writer.get_extra_info("socket")):
                (size,) = _SIZE.unpack(await reader.readexactly(_SIZE.size))
                if size > MOST_BYTES:
                    break
                what, key, *given = json.loads(await reader.readexactly(size))
                writer.write(_framed(getattr(self, f"_do_{what}")(key, *given)))
                await writer.drain()
        except (OSError, EOFError, ValueError):
            pass  # it has gone
        finally:
            writer.close()
            self._clients.discard(own)
            if not self._clients:
                self._over.set()

    def _do_set(self, key: str, value: str) -> None:
        self._values[key] = value

    def _do_get(self, key: str) -> Any:
        return self._values.get(key)

    def _do_add(self, key: str, number: int) -> int:
        self._values[key] = self._values.get(key, 0) + number
        return self._values[key]

    def _do_compare_set(self, key: str, expected: str, desired: str) -> str:
        if self._values.get(key, "") == expected:
            self._values[key] = desired
        return self._values.get(key, expected)

    def _do_delete(self, key: str) -> bool:
        return self._values.pop(key, None) is not None


def _is_own(connection: Any) -> bool:
    """Whether a process of the same user is at the other end. The folder is closed to others; this is the second lock."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return user == os.geteuid()


def main(descriptor: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # it ends after those whom it serves
    with contextlib.suppress(Exception):
        asyncio.run(Server().run(socket.socket(fileno=descriptor)))
    folder = os.getcwd()
    with contextlib.suppress(OSError):
        for name in os.listdir("."):
            os.unlink(name)
        os.rmdir(folder)


if __name__ == "__main__":
    main(int(sys.argv[1]))
