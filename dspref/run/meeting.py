"""Where threads of all ranks meet, through the job's key-value store: a collective of theirs would meet one of the main
threads'."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar

from dspref import distributed

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")


class Channel:
    """A connection for meetings. All ranks make it, and its meetings, alike."""

    def __init__(self, purpose: str) -> None:
        self._store, self._meetings = distributed.own_store(purpose), 0

    def meeting(self) -> Meeting:
        self._meetings += 1
        return Meeting(self._store, str(self._meetings))


class Over(Exception):
    """Nobody waits for the others any more."""


@dataclass(frozen=True)
class Meeting:
    """Every rank reports to rank 0 once, and rank 0 answers. Values go as JSON."""

    _store: Store | None
    """None on a single rank."""
    _name: str
    over: Event = field(default_factory=Event)
    """Set it to end what waits here, by Over."""

    def report(self, said: Any) -> list[Any] | None:
        """On rank 0 the reports of all ranks, by rank, as soon as they are there; None on the others, which do not wait."""
        if self._store is None:
            return [said]
        world = distributed.world()
        if world.rank != 0:
            self._store.set(f"{self._name}/{world.rank}", json.dumps(said))
            return None
        keys = [f"{self._name}/{rank}" for rank in range(1, world.size)]
        self._await(keys)
        reports = [said, *(json.loads(self._store.get(key)) for key in keys)]
        for key in keys:
            self._store.delete_key(key)
        return reports

    def answer(self, own: T) -> T:
        """Rank 0's answer, on all ranks; what the others give is not looked at."""
        key = f"{self._name}/answer"
        if self._store is None:
            return own
        if distributed.world().rank == 0:
            self._store.set(key, json.dumps(own))
            return own
        self._await([key])
        return json.loads(self._store.get(key))

    def _await(self, keys: list[str]) -> None:
        assert self._store is not None
        if not distributed.poll(self._store, keys, self.over):
            raise Over
