"""Metrics: summed without a sync, reduced once, written to metrics.jsonl first and to trackers second.

Every value is a mean over the whole global batch: sums and counts are added over packs and ranks, then divided.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dspref import distributed
from dspref.config import Config
from dspref.data.batch import CHOSEN, REJECTED, PackedBatch
from dspref.families import PairLogps, PairLoss
from dspref.logps import TokenLogps
from dspref.router import Routing, balance, load_metrics
from dspref.secrets import redact_words

if TYPE_CHECKING:
    from torch import Tensor


class Meter:
    """Sums and counts by name, on the device. All ranks must add the same names in the same order."""

    def __init__(self, device: torch.device, router_coef: float = 0.0) -> None:
        """`router_coef`: weight of `aux_loss` in the loss."""
        self._device = device
        self._totals: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {"aux_loss": router_coef} if router_coef else {}
        self._routing: Routing | None = None

    def add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        """Add `total` over `count` things to the mean called `name`."""
        pair = torch.stack([torch.as_tensor(x, device=self._device, dtype=torch.float64) for x in (total.detach(), count)])
        self._totals[name] = self._totals[name] + pair if name in self._totals else pair

    def add_pairs(self, loss: PairLoss, pairs: PairLogps) -> None:
        """The metrics of some pairs under their TRL names, and each term of the loss as `loss/<component>`."""
        for component, term in loss.terms.items():
            self.add(f"loss/{component}", term.values.sum(), pairs.count(term.per))
            self._weights[f"loss/{component}"] = term.weight
        margins = loss.metrics["rewards/chosen"] - loss.metrics["rewards/rejected"]
        values = {
            **loss.metrics,
            "rewards/accuracies": margins > 0,
            "rewards/margins": margins,
            "lengths/chosen": pairs.chosen_tokens,
            "lengths/rejected": pairs.rejected_tokens,
        }
        for name, of_pairs in values.items():
            self.add(name, of_pairs.sum(), pairs.count("pairs"))

    def add_logits(self, tokens: TokenLogps, pairs: PairLogps, batch: PackedBatch) -> None:
        """Mean logits of a pack's scored answer tokens."""
        side = batch.span_index // max(batch.num_pairs, 1)
        self.add("logits/chosen", (tokens.mean_logits * (side == CHOSEN)).sum(), pairs.count("chosen_tokens"))
        self.add("logits/rejected", (tokens.mean_logits * (side == REJECTED)).sum(), pairs.count("rejected_tokens"))

    def add_gap(self, pairs: PairLogps, reference: PairLogps) -> None:
        """How far policy and reference are apart, as `gap`: the mean over answers of |log-ratio| per token."""
        chosen = (pairs.chosen - reference.chosen).abs() / pairs.chosen_tokens
        rejected = (pairs.rejected - reference.rejected).abs() / pairs.rejected_tokens
        self.add("gap", (chosen + rejected).sum() / 2, pairs.count("pairs"))

    def add_load(self, routing: Routing) -> None:
        """What the routers did with a pack, for the load of each expert and the balance of all tokens together."""
        kept = [x.detach().double() for x in (routing.probabilities, routing.load, routing.tokens)]
        self._routing = Routing(*(a + b for a, b in zip(self._routing, kept)) if self._routing else kept)

    def reduce(self) -> dict[str, float]:
        """Means over all ranks since the last call, with `loss` first: one all-reduce, one device sync."""
        if not self._totals:
            return {}
        sums = [torch.stack(list(self._totals.values())), *(self._routing or ())]
        table, *routing = (part.cpu() for part in distributed.sum_over_ranks(*sums))
        means = {name: _mean(*row) for name, row in zip(self._totals, table.tolist())}
        if routing:
            load = Routing(*routing)
            # An evaluation asks for no share of a step: there the balance is that of all its tokens.
            means.setdefault("aux_loss", balance(load.probabilities, load.load, load.tokens, load.tokens).item())
            means |= load_metrics(load.load)
        self._totals.clear()
        self._routing = None
        loss = sum(weight * means[name] for name, weight in self._weights.items())
        for component in ("loss/nll", "loss/sft"):
            if component in means:
                means["nll_loss"] = means[component]
        return {"loss": loss, **means}


def _mean(total: float, count: float) -> float:
    return total / count if count else float("nan")


class Displacement:
    """Watches for likelihood displacement: chosen answers grow less likely while the margin still grows."""

    STEPS = 30

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=self.STEPS)
        self._told = False

    def watch(self, record: Mapping[str, float]) -> str | None:
        """A warning, once, when the last 30 logged steps show it."""
        self._seen.append((record["rewards/chosen"], record["rewards/margins"]))
        chosen, margins = zip(*self._seen)
        if self._told or len(chosen) < self.STEPS or not (falls(chosen) and falls([-m for m in margins])):
            return None
        self._told = True
        return (
            f"warning: chosen answers have grown less likely over {self.STEPS} logged steps (rewards/chosen "
            f"{chosen[0]:.3g} to {chosen[-1]:.3g}) while the margin grew: likelihood displacement; a smaller learning rate, "
            "a larger beta, or an NLL term where the objective has one, holds them"
        )


def falls(values: Sequence[float]) -> bool:
    """Whether the thirds of a series fall one below the other, by more than its noise."""
    if not all(map(math.isfinite, values)):
        return False
    size = len(values) // 3
    thirds = [values[:size], values[size : 2 * size], values[2 * size :]]
    first, middle, last = map(statistics.fmean, thirds)
    noise = math.sqrt(sum(statistics.variance(third) / len(third) for third in (thirds[0], thirds[2])))
    return first > middle > last and first - last > 3 * noise


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

    # It keeps the command line word for word, and would add the working tree's code, changes and origin.
    sys.argv[:] = redact_words(sys.argv)
    settings = wandb.Settings(
        silent=True, console="off", init_timeout=30, save_code=False, disable_code=True, disable_git=True
    )
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
