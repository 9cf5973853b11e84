"""How large everything is, and the figures that come out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.races import Target


@dataclass(frozen=True)
class Sizes:
    """How large and how long everything is."""

    work: Path
    tiny: bool = False
    device: str = "cuda"
    dtype: str = "bfloat16"
    warmups: int = 5
    steps: int = 20
    max_length: int = 2048
    longest_pairs: tuple[int, int] = (8192, 2**19)

    @property
    def learning_rate(self) -> float:
        """In fp32 large enough for losses to move; in bf16 as DPO has it."""
        return 1e-4 if self.dtype == "float32" else 1e-6


def tiny_sizes(work: Path) -> Sizes:
    return Sizes(work, True, "cpu", "float32", warmups=1, steps=2, max_length=128, longest_pairs=(64, 256))


@dataclass(frozen=True)
class Figure:
    """A measured value with what it is measured against; `reason`: why there is none."""

    what: str
    value: float | None
    unit: str = "x"
    peer: str = ""
    target: Target | None = None
    reason: str | None = None

    def record(self) -> dict[str, Any]:
        met = None if self.value is None or self.target is None else self.target.met_by(self.value)
        return asdict(self) | {"target": self.target and str(self.target), "met": met}


CUT = {"reason": "there was no time left for it"}


def measured(what: str, found: dict[str, Any], key: str, factor: float, unit: str, target: Target | None = None) -> Figure:
    """`found[key]` x `factor`, or why there is no such number."""
    if reason := found.get("reason"):
        return Figure(what, None, unit, target=target, reason=reason)
    if found[key] is None:
        return Figure(what, None, unit, target=target, reason="not measured on this device")
    return Figure(what, found[key] * factor, unit, target=target)


def ratio(found: dict[str, Any], above: str, below: str, what: str, peer: str, target: Target | None = None) -> Figure:
    """Median seconds of `above` over those of `below`."""
    for name in (above, below):
        if reason := found.get(name, CUT).get("reason"):
            return Figure(what, None, "x", peer, target, f"{name}: {reason}")
    return Figure(what, found[above]["median_seconds"] / found[below]["median_seconds"], "x", peer, target)
