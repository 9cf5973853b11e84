"""Whether the ranks of a run are alike: versions, code, config, clocks."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import dspref
from dspref.machine.machine import installed

SKEW_SECONDS = 5.0


def identity(config: str, own: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """What must be the same on all ranks: versions, dspref's code, the config (its text, resolved), and the digests of the
    user's `own` functions."""
    code = hashlib.sha256()
    for path in sorted(Path(dspref.__file__).parent.rglob("*.py")):
        code.update(path.name.encode() + path.read_bytes())
    settings = hashlib.sha256(config.encode()).hexdigest()
    python = ".".join(map(str, sys.version_info[:3]))
    packages = installed()
    packages.pop("wandb", None)  # which rank 0 alone needs
    packages |= {f"the source of {name}": digest[:12] for name, digest in own.items()}
    return {"python": python, **packages, "dspref's code": code.hexdigest()[:12], "the config": settings[:12]}


def difference(identities: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> str | None:
    """The first thing in which a rank differs from rank 0, in one line."""
    for rank, own in enumerate(identities):
        for key in sorted({*own, *identities[0]}):
            here, there = own.get(key, "not installed"), identities[0].get(key, "not installed")
            if here != there:
                remedy = "start all with one file" if key == "the config" else "install the same on all machines"
                return f"rank {rank} on {hosts[rank]} has {key} {here}, rank 0 on {hosts[0]} has {there}; {remedy}"
    return None


def skew(clocks: Sequence[float], hosts: Sequence[str]) -> str | None:
    """The rank whose clock is furthest from rank 0's, if that is far."""
    rank = max(range(len(clocks)), key=lambda rank: abs(clocks[rank] - clocks[0]))
    off = clocks[rank] - clocks[0]
    if abs(off) <= SKEW_SECONDS:
        return None
    return f"the clock of {hosts[rank]} (rank {rank}) is {off:+.0f} s from that of {hosts[0]}; set both by NTP"
