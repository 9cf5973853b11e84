"""Ranks: who I am, how ranks meet, how they sum, wait and speak.

The process group is made here and not by DeepSpeed, so that the same program starts under `deepspeed`, `torchrun`, `srun`
and plain `python`. Slow work of one rank (tokenising, hashing) is waited for by polling the key-value store: a collective
would time out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import FileStore, HashStore, PrefixStore, Store, TCPStore

from dspref.errors import EnvironmentFault, Relayed, exit_code_of
from dspref.ranks import rendezvous, sockets, wire
from dspref.ranks.local_store import ContactLost, LocalStore
from dspref.ranks.log_file import LogFile
from dspref.ranks.rendezvous import MEETING_MINUTES, World, read_environment
from dspref.secrets import redact
from dspref.terminal import shown

T = TypeVar("T")
POLL_SECONDS = 0.2
CLOCK = "%Y-%m-%dT%H:%M:%S"


_world = World()
_leader = 0  # the lowest rank of this machine
_store: Any = None  # a LocalStore, or torch's; None on a single rank
_turns = _purposes = 0
_timeout = timedelta(minutes=30)
_log_file: Any = None
is_announced = partial(rendezvous.is_announced, os.environ)


def world() -> World:
    return _world


def init(seed: int, hang_timeout: float = 1800.0, sequence: int = 1) -> World:
    """Meet the other ranks, choose this rank's device and seed it. Raises EnvironmentFault where ranks do not meet.

    `sequence`: so many ranks will hold a pack between them. Collectives wait some minutes longer than `hang_timeout` seconds
    (0: a day), after which the watch has the first word.
    """
    global _world, _store, _leader, _timeout
    if not dist.is_initialized():
        rendezvous.announce()
    by_tasks = "RANK" not in os.environ
    _world = replace(read_environment(os.environ), sequence=sequence)
    device = _choose_device()
    # What DeepSpeed reads of the world; without LOCAL_SIZE it asks numactl in every reduction on CPU.
    os.environ.update(
        RANK=str(_world.rank),
        WORLD_SIZE=str(_world.size),
        LOCAL_RANK=str(device),
        LOCAL_SIZE=str(_world.local_size),
    )
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
    if _world.is_one_machine:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")  # nobody else hears it, and there is no host name to resolve
    if not dist.is_initialized():
        _store, for_groups = _meet(by_tasks)
        _timeout = timedelta(minutes=_patience(hang_timeout))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=PrefixStore("group", for_groups), rank=_world.rank, world_size=_world.size,
            timeout=_timeout,
        )  # fmt: skip
        hosts = gather_objects("" if _world.is_one_machine else socket.gethostname())
        _leader = hosts.index(hosts[_world.rank])
    set_seed(seed)
    return _world


def _patience(hang_timeout: float) -> float:
    """Minutes that a collective waits."""
    return float(os.environ.get("DEEPSPEED_TIMEOUT", "0")) or (hang_timeout / 60 + 5 if hang_timeout else 24 * 60)


def patience() -> timedelta:
    """How long a collective waits."""
    return _timeout


def _choose_device() -> int:
    """The GPU of this rank. SLURM may show each task one GPU alone, which then is number 0 to it."""
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if visible == 1 and _world.local_size > 1 and "SLURM_PROCID" in os.environ:
        return 0
    if visible and _world.local_rank >= visible:
        raise EnvironmentFault(f"{_world.local_size} ranks on a machine with {visible} visible GPUs; start one rank per GPU")
    return _world.local_rank


def _meet(by_tasks: bool) -> tuple[Any, Store]:
    """The key-value store of the job (None on a single rank), and that of its process groups.

    On one machine neither is a port, so a busy MASTER_PORT is no matter, and nobody else can join.
    """
    if _world.is_one_machine and not by_tasks:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
    if _world.size == 1:
        return None, HashStore()
    if _world.is_one_machine:
        store, file = rendezvous.meet(_world, lambda line: print(shown(redact(line)), file=sys.stderr, flush=True))
        return store, FileStore(str(file), -1)
    store = _store_of_machines()
    return store, store


def _store_of_machines() -> Store:
    timeout = timedelta(minutes=MEETING_MINUTES)
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except KeyError as missing:
        raise EnvironmentFault(f"{missing.args[0]} is not set; export it in the job script, as launch/slurm does") from None
    except ValueError:
        raise EnvironmentFault(f"MASTER_PORT: {os.environ['MASTER_PORT']!r} is not a number") from None
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listening = None if of_agent or _world.rank else sockets.listening(address, port)
    try:
        store = TCPStore(
            address, port, _world.size, _world.rank == 0 and not of_agent, timeout=timeout, wait_for_workers=not of_agent,
            master_listen_fd=listening.detach() if listening else None,
        )  # fmt: skip
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise EnvironmentFault(f"ranks do not meet at {address}:{port}: {str(error).splitlines()[0]}") from None
    # The agent's store outlives a restart, and with it the keys of the attempt before.
    return PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store) if of_agent else store


def own_store(purpose: str) -> Any:
    """A connection of its own to the job's key-value store, for a thread; the keys of each call stand apart. Called on all
    ranks alike. None on a single rank."""
    global _purposes
    _purposes += 1
    if _store is None or _world.size == 1:
        return None
    name = f"{purpose}/{_purposes}"
    return _store.own(name) if isinstance(_store, LocalStore) else PrefixStore(name, _store.clone())


def finish() -> None:
    """Leave the group together."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Waiting without a collective


def in_turn(work: Callable[[], T]) -> T:
    """Every rank does `work`, rank 0 first, then the first rank of each machine, then the rest.

    For work that leaves a result on disk: the first builds it, the others find it, on shared file systems as on local
    ones. A UserError of an earlier rank ends the later ones with the same exit code.
    """
    global _turns
    _turns += 1
    turn = "rank0" if _world.rank == 0 else "leader" if _world.rank == _leader else "rest"
    if turn != "rank0":
        _await(f"turn/{_turns}/0")
    if turn == "rest":
        _await(f"turn/{_turns}/{_leader}")
    try:
        result = work()
    except BaseException as error:
        _announce(turn, {"exit_code": int(exit_code_of(error))})
        raise
    _announce(turn, {})
    return result


def on_main(work: Callable[[], T]) -> T | None:
    """Rank 0 does `work`, however long; the others wait for it, outside any collective. Its result, on rank 0."""
    return in_turn(lambda: work() if _world.rank == 0 else None)


def _announce(turn: str, verdict: dict[str, int]) -> None:
    if _store is None or _world.size == 1 or turn == "rest":
        return
    key = f"turn/{_turns}/{_world.rank}"
    _store.set(key, json.dumps(verdict))
    if verdict and _world.rank == 0:
        # Rank 0 serves the store: it stays until the others have read the verdict, or half a minute.
        deadline = time.monotonic() + 30
        while _store.add(f"{key}/read", 0) < _world.size - 1 and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


def poll(store: Any, keys: list[str], over: Event | None = None) -> bool:
    """Wait until all keys are there. False where `over` is set before they are."""
    pause = POLL_SECONDS / 64  # most work is short; of hours of work the end may be seen a little late
    while not store.check(keys):
        if over and over.is_set():
            return False
        time.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS)
    return True


def _await(key: str) -> None:
    if _store is None:
        return
    poll(_store, [key])
    verdict = json.loads(_store.get(key))
    if verdict:
        if key.endswith("/0"):
            _store.add(f"{key}/read", 1)
        raise Relayed(verdict["exit_code"])


# ---------------------------------------------------------------------------------------------------------------------
# Collectives


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over all ranks, in place."""
    if dist.is_initialized() and _world.size > 1:
        dist.all_reduce(values)
    return values


def sum_of_groups(values: torch.Tensor) -> torch.Tensor:
    """As `all_sum`, of what the ranks that hold a pack between them have alike, which counts once."""
    return all_sum(values.zero_() if _world.part else values)


def largest(value: int) -> int:
    """The largest of all ranks' values."""
    if not dist.is_initialized() or _world.size == 1:
        return value
    found = torch.tensor([value])
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found.item())


def sum_over_ranks(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Sums over all ranks of some tensors of one type, by one all-reduce, without gradient."""
    flat = all_sum(torch.cat([value.detach().flatten() for value in values]))
    return tuple(part.view_as(value) for part, value in zip(flat.split([v.numel() for v in values]), values))


def gather_rows(table: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """The rows of all groups' tables [n, k], alike in a group, behind one another, and which of them are this rank's."""
    sizes = torch.zeros(_world.groups, dtype=torch.int64)  # on the CPU: hosts agree, and wait for no device
    sizes[_world.group] = len(table)
    counts = sum_of_groups(sizes).tolist()
    start = sum(counts[: _world.group])
    rows = table.new_zeros(sum(counts), table.shape[1])
    rows[start : start + len(table)] = table
    return sum_of_groups(rows), slice(start, start + len(table))


def gather_objects(value: T) -> list[T]:
    """Every rank's value, by rank. Values as in `wire`: torch would send pickles, which run code where they arrive."""
    if not dist.is_initialized() or _world.size == 1:
        return [value]
    own = torch.frombuffer(bytearray(wire.to_bytes(value)), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(_world.size)]
    dist.all_gather(sizes, torch.tensor([len(own)]))
    longest = max(int(size) for size in sizes)
    rows = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(rows, torch.nn.functional.pad(own, (0, longest - len(own))))
    return [wire.from_bytes(row[: int(size)].numpy().tobytes()) for row, size in zip(rows, sizes)]


def broadcast_object(value: T) -> T:
    """Rank 0's value."""
    return gather_objects(value if _world.rank == 0 else None)[0]  # type: ignore[return-value]


def barrier() -> None:
    if dist.is_initialized() and _world.size > 1:
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Seeds, words


def set_seed(seed: int) -> None:
    """Seed python, numpy and torch; every rank draws its own dropout."""
    random.seed(seed + _world.rank)
    np.random.seed((seed + _world.rank) % 2**32)
    torch.manual_seed(seed + _world.rank)


def log(message: str, stamp: bool = False) -> None:
    """Say something once: rank 0 on standard output (behind the time, with `stamp`), every rank in its log file."""
    if _world.rank == 0:
        said = shown(redact(message))
        print(f"{time.strftime(CLOCK)} {said}" if stamp else said, flush=True)
    note(message)


def note(message: str) -> None:
    """Say something in this rank's log file alone, behind the time."""
    if _log_file is not None:
        with contextlib.suppress(OSError):  # a full disk is told by what must be written
            _log_file.write(f"{time.strftime(CLOCK)} {shown(redact(message))}\n")


def remark(message: str) -> None:
    """Say in the log file what not everyone needs, and on the terminal where that launcher has not filled it."""
    (note if is_announced() else log)(message)


def first_to_say(message: str) -> bool:
    """True on exactly one of the ranks that ask about the same message: all leave alike, one speaks."""
    if _store is None or _world.size == 1:
        return True
    try:
        return _store.add(f"said/{hashlib.sha256(message.encode()).hexdigest()}", 1) == 1
    except (dist.DistError, ContactLost):  # what serves the store is gone
        return True


def log_to(folder: Path) -> None:
    """Keep a log per rank; what libraries print on ranks other than 0 goes there too, instead of to the terminal."""
    global _log_file
    folder.mkdir(parents=True, exist_ok=True)
    _log_file = LogFile(folder / f"rank-{_world.rank}.log")
    if _world.rank != 0:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout = sys.stderr = _log_file
