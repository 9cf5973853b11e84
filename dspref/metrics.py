"""Metrics: summed without a sync, reduced once, written to metrics.jsonl first and to trackers second.

Every value is a mean over the whole global batch: sums and counts are added over packs and ranks, then divided.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dspref import distributed
from dspref.config import Config
from dspref.data.batch import PackedBatch
from dspref.objectives import PairLogps, PairLoss

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Meter:
    """Sums and counts by name, on the device. All ranks must add the same names in the same order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._totals: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        """Add `total` over `count` things to the mean called `name`."""
        pair = torch.stack([torch.as_tensor(x, device=self._device, dtype=torch.float64) for x in (total.detach(), count)])
        self._totals[name] = self._totals[name] + pair if name in self._totals else pair

    def add_pairs(self, loss: PairLoss, policy: PairLogps, mean_logits: Float[Tensor, "C"], batch: PackedBatch) -> None:
        """The metrics of one pack under their TRL names, and each term of the loss as `loss/<component>`."""
        pairs = batch.num_pairs
        counts = {"pairs": pairs, "chosen_tokens": policy.chosen_tokens.sum()}
        for component, term in loss.terms.items():
            self.add(f"loss/{component}", term.values.sum(), counts[term.per])
            self._weights[f"loss/{component}"] = term.weight
        margins = loss.chosen_rewards - loss.rejected_rewards
        self.add("rewards/chosen", loss.chosen_rewards.sum(), pairs)
        self.add("rewards/rejected", loss.rejected_rewards.sum(), pairs)
        self.add("rewards/accuracies", (margins > 0).sum(), pairs)
        self.add("rewards/margins", margins.sum(), pairs)
        self.add("logps/chosen", policy.chosen.sum(), pairs)
        self.add("logps/rejected", policy.rejected.sum(), pairs)
        chosen_side = batch.span_index < pairs
        self.add("logits/chosen", (mean_logits * chosen_side).sum(), policy.chosen_tokens.sum())
        self.add("logits/rejected", (mean_logits * ~chosen_side).sum(), policy.rejected_tokens.sum())

    def add_expected(self, loss: PairLoss) -> None:
        """The pair terms of a loss that is known beforehand, as `expected/<component>`."""
        for component, term in loss.terms.items():
            if term.per == "pairs":
                self.add(f"expected/{component}", term.values.sum(), len(term.values))

    def reduce(self) -> dict[str, float]:
        """Means over all ranks since the last call, with `loss` first: one all-reduce, one device sync."""
        if not self._totals:
            return {}
        table = distributed.all_sum(torch.stack(list(self._totals.values()))).cpu()
        means = {name: _mean(*row) for name, row in zip(self._totals, table.tolist())}
        self._totals.clear()
        loss = sum(weight * means[name] for name, weight in self._weights.items())
        if "loss/nll" in means:
            means["nll_loss"] = means["loss/nll"]
        return {"loss": loss, **means}


def _mean(total: float, count: float) -> float:
    return total / count if count else float("nan")


# ---------------------------------------------------------------------------------------------------------------------
# Where metrics go


class Recorder:
    """metrics.jsonl, and trackers beside it. Only rank 0 writes."""

    def __init__(self, folder: Path, config: Config, tracker_id: str | None, offset: int | None) -> None:
        """`offset`: the length of metrics.jsonl at the checkpoint that is resumed; what came after it is cut off, so that
        each step stands there once."""
        self._path = folder / "metrics.jsonl"
        self._file = None
        self._trackers: dict[str, Any] = {}
        self.tracker_id = tracker_id
        if distributed.world().rank != 0:
            return
        self._file = open(self._path, "a", encoding="utf-8")
        kept = min(offset or 0, self._path.stat().st_size)
        if kept < (offset or 0):
            distributed.log(f"warning: {self._path} is shorter than the checkpoint says; earlier steps are missing from it")
        os.truncate(self._path, kept)
        for name in config.log.trackers:
            self._guarded(name, lambda name=name: TRACKERS[name](self, folder, config))

    @property
    def offset(self) -> int:
        """Bytes of metrics.jsonl so far."""
        return self._path.stat().st_size if self._path.exists() else 0

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object, flushed at once; then tell the trackers."""
        if self._file is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        for name, send in list(self._trackers.items()):
            self._guarded(name, lambda send=send: send(record))

    def close(self) -> None:
        if self._file is None:
            return
        self._file.close()
        for name, send in list(self._trackers.items()):
            self._guarded(name, lambda send=send: send(None))

    def _guarded(self, name: str, act: Any) -> None:
        """A tracker that fails is dropped with one line; it never stops the run."""
        try:
            sender = act()
            if sender is not None:
                self._trackers[name] = sender
        except Exception as error:  # trackers raise anything: network, disk, their own bugs
            self._trackers.pop(name, None)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            distributed.log(f"{name}: switched off ({reason}); metrics.jsonl goes on")


def _wandb(recorder: Recorder, folder: Path, config: Config) -> Any:
    import wandb

    settings = wandb.Settings(silent=True, console="off", init_timeout=30)
    run = wandb.init(
        project=config.log.project, name=config.log.run_name or folder.name, dir=str(folder), id=recorder.tracker_id,
        resume="allow" if recorder.tracker_id else None, config=config.model_dump(mode="json"), settings=settings,
    )  # fmt: skip
    recorder.tracker_id = run.id
    return lambda record: run.finish() if record is None else run.log(dict(record), step=record["step"])


def _tensorboard(recorder: Recorder, folder: Path, config: Config) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(record: Mapping[str, Any] | None) -> None:
        if record is None:
            return writer.close()
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "step":
                writer.add_scalar(name, value, record["step"])
        writer.flush()

    return send


# Each opens a tracker and returns what sends a record to it; None as a record closes it.
TRACKERS = {"wandb": _wandb, "tensorboard": _tensorboard}


def training_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The training lines of a metrics.jsonl: those that have `loss`."""
    with open(path, encoding="utf-8") as file:
        yield from (record for record in map(json.loads, file) if "loss" in record)
