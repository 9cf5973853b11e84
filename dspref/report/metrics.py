"""Metrics: summed without a sync, reduced once, written to metrics.jsonl first and to trackers second.

Every value is a mean over the whole global batch: sums and counts are added over packs and ranks, then divided.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dspref import distributed
from dspref.config import LogSection
from dspref.data.batch import CHOSEN, PROMPT, REJECTED, PackedBatch
from dspref.files import read_lines
from dspref.model.logps import TokenLogps
from dspref.model.router import Routing, balance, load_metrics
from dspref.objectives.families import PairLogps, PairLoss
from dspref.reading import is_number
from dspref.report.trackers import TrackerThread
from dspref.run.folder import METRICS, mend_tail
from dspref.run.record import NAME as RECORD

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


class Sources:
    """The sources of a mixture, whose pairs lie one behind the other in a store."""

    def __init__(self, labels: Sequence[str], rows: Sequence[int], device: torch.device) -> None:
        self.labels = tuple(labels)
        self._ends = torch.tensor(list(accumulate(rows)), device=device)

    def of(self, pair_ids: Tensor) -> Tensor:
        """The number of the source of each pair: int64 [P]."""
        return torch.bucketize(pair_ids, self._ends, right=True)


class Meter:
    """Sums and counts by name, on the device. All ranks must add the same names in the same order."""

    def __init__(self, device: torch.device, router_coef: float = 0.0, sources: Sources | None = None) -> None:
        """`router_coef`: weight of `aux_loss` in the loss; `sources`: those whose pairs are told apart."""
        self._device, self._sources = device, sources
        self._totals: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {"aux_loss": router_coef} if router_coef else {}
        self._routing: Routing | None = None

    def add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        """Add `total` over `count` things to the mean called `name`."""
        # A number is made on the device: to copy it there would wait for all that is under way.
        many = count if isinstance(count, torch.Tensor) else torch.full((), count, device=self._device)
        pair = torch.stack([x.detach().to(torch.float64) for x in (total, many)])
        self._totals[name] = self._totals[name] + pair if name in self._totals else pair

    def add_pairs(self, loss: PairLoss, pairs: PairLogps, pair_ids: Tensor | None = None) -> None:
        """The metrics of some pairs under their TRL names, and each term of the loss as `loss/<component>`.

        Of pairs with `pair_ids`, loss, accuracy and margin of each source too, as `source/<label>/...`.
        """
        for component, term in loss.terms.items():
            self.add(f"loss/{component}", term.values.sum(), pairs.count(term.per))
            self._weights[f"loss/{component}"] = term.weight
        values = {**loss.metrics, **{f"lengths/{side}": pairs.counts(f"{side}_tokens") for side in ("chosen", "rejected")}}
        if loss.judged is None:
            margins = loss.metrics["rewards/chosen"] - loss.metrics["rewards/rejected"]
            values |= {"rewards/accuracies": margins > 0, "rewards/margins": margins}
        for name, of_pairs in values.items():
            self.add(name, of_pairs.sum(), _counts(name, loss, pairs).sum())
        if self._sources and pair_ids is not None:
            each = {f"loss/{component}": (term.values, pairs.counts(term.per)) for component, term in loss.terms.items()}
            margin = ["rewards/margins"] if loss.judged is None else list(OF_MARGIN)
            told = ["rewards/accuracies", *margin]
            each |= {name: (values[name], _counts(name, loss, pairs)) for name in told}
            self._add_by_source(self._sources, self._sources.of(pair_ids), each)

    def _add_by_source(self, sources: Sources, source: Tensor, each: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """`each`: values and counts of pairs, [P] both, by metric."""
        for name, columns in each.items():
            table = torch.zeros(2, len(sources.labels), dtype=torch.float64, device=self._device)
            table.index_add_(1, source, torch.stack([column.detach().double() for column in columns]))
            for label, total, count in zip(sources.labels, *table):
                self.add(f"{SOURCE}{label}/{name}", total, count)

    def add_logits(self, tokens: TokenLogps, pairs: PairLogps, batch: PackedBatch) -> None:
        """Mean logits of a pack's scored answer tokens; mean entropy of both sides', and how many of the chosen ones are the
        policy's most likely, where the forward was asked for them."""
        side = batch.span_index // max(batch.num_pairs, 1)
        chosen = side == CHOSEN
        if pairs.gold is not None and batch.num_pairs:
            chosen &= pairs.gold[batch.span_index % batch.num_pairs] == 0
        if tokens.entropy is not None and tokens.hit is not None:
            answers = pairs.chosen_tokens.sum() + pairs.rejected_tokens.sum()
            self.add("entropy", (tokens.entropy * (side < PROMPT)).sum(), answers)
            self.add("mean_token_accuracy", (tokens.hit * chosen).sum(), pairs.count("chosen_tokens"))
        self.add("logits/chosen", (tokens.mean_logits * chosen).sum(), pairs.count("chosen_tokens"))
        self.add("logits/rejected", (tokens.mean_logits * (side == REJECTED)).sum(), pairs.count("rejected_tokens"))

    def add_gap(self, pairs: PairLogps, reference: PairLogps) -> None:
        """How far policy and reference are apart, as `gap`: the mean over answers of |log-ratio| per token."""
        chosen = (pairs.chosen - reference.chosen).abs() / pairs.chosen_tokens.clamp(min=1)
        rejected = (pairs.rejected - reference.rejected).abs() / pairs.rejected_tokens.clamp(min=1)
        self.add("gap", (chosen + rejected).sum(), pairs.count("answers"))

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
        rows = dict(zip(self._totals, table.tolist()))
        # A step may have no pair of a source, nor, of single answers, any that is desirable.
        means = {name: _mean(*row) for name, row in rows.items() if row[1] or not _may_be_empty(name)}
        if routing:
            load = Routing(*routing)
            # An evaluation asks for no share of a step: there the balance is that of all its tokens.
            means.setdefault("aux_loss", balance(load.probabilities, load.load, load.tokens, load.tokens).item())
            means |= load_metrics(load.load)
        self._totals.clear()
        self._routing = None
        loss = sum(weight * means[name] for name, weight in self._weights.items())
        for label in self._sources.labels if self._sources else ():
            terms = [(name, f"{SOURCE}{label}/{name}") for name in self._weights]
            found = [self._weights[name] * means.pop(of_source) for name, of_source in terms if of_source in means]
            means |= {f"{SOURCE}{label}/loss": sum(found)} if found else {}
        for component in ("loss/nll", "loss/sft"):
            if component in means:
                means["nll_loss"] = means[component]
        for label in self._sources.labels if self._sources else ():
            sides = {name: means.pop(f"{SOURCE}{label}/{name}", None) for name in OF_MARGIN}
            means |= {f"{SOURCE}{label}/{name}": value for name, value in _margin(sides).items()}
        if "rewards/margins" not in means:
            means |= _margin(means)
        return {"loss": loss, **means}


SIDES = ("/chosen", "/rejected")
OF_MARGIN = ("rewards/chosen", "rewards/rejected")


def _margin(means: Mapping[str, float | None]) -> dict[str, float]:
    """Of answers that stand alone: the difference of their means, where there are answers of either kind."""
    chosen, rejected = (means.get(name) for name in OF_MARGIN)
    return {} if chosen is None or rejected is None else {"rewards/margins": chosen - rejected}


def _may_be_empty(name: str) -> bool:
    """Whether a metric is about one source alone, or about chosen answers or rejected ones."""
    return name.startswith(SOURCE) or name.endswith(SIDES) or name == "mean_token_accuracy"


def _counts(name: str, loss: PairLoss, pairs: PairLogps) -> Int[Tensor, "P"]:
    """What the mean of a metric is over: of each example, how many."""
    if name.endswith(SIDES):
        return pairs.counts(f"{name.rpartition('/')[2]}_answers")
    return loss.judged if loss.judged is not None and name == "rewards/accuracies" else pairs.counts("pairs")


# Before the metrics of each source of a mixture.
SOURCE = "source/"


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
        if not {"rewards/chosen", "rewards/margins"} <= record.keys():
            return None
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

    def __init__(
        self, folder: Path, log: LogSection, settings: Mapping[str, Any], tracker_ids: Mapping[str, str], offset: int | None
    ) -> None:
        """`settings`: of the run, for trackers. `tracker_ids`: their own names for it. `offset`: the length of
        metrics.jsonl at the checkpoint that is resumed; what came after it is cut off: each step stands there once."""
        self._path = folder / METRICS
        self._file = None
        self._trackers: list[TrackerThread] = []
        self.tracker_ids = dict(tracker_ids)
        if distributed.world().rank != 0:
            return
        mend_tail(self._path, offset or 0)
        self._file = open(self._path, "a", encoding="utf-8")
        self._length = self._path.stat().st_size
        for name in log.trackers:
            thread = TrackerThread(name, folder, log, settings, self.tracker_ids.get(name))
            self._trackers.append(thread)
            if thread.run_id:
                self.tracker_ids[name] = thread.run_id

    @property
    def offset(self) -> int:
        """Bytes of metrics.jsonl so far."""
        return self._path.stat().st_size if self._path.exists() else 0

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object, flushed at once; then hand it to the trackers."""
        if self._file is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._refind()
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        self._length = os.fstat(self._file.fileno()).st_size
        for thread in self._trackers:
            thread.send(record)

    def show(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Answers to prompts, for the trackers alone: names of images as one text."""
        samples = [{name: ", ".join(x) if isinstance(x, list) else x for name, x in row.items()} for row in samples]
        for thread in self._trackers:
            thread.send({"step": step, "samples": samples})

    def _refind(self) -> None:
        """Begin the file anew where it was removed or cut while it was open, and say so."""
        assert self._file is not None
        own, there = os.fstat(self._file.fileno()), _stat(self._path)
        if there is not None and (there.st_ino, there.st_dev) == (own.st_ino, own.st_dev) and there.st_size >= self._length:
            return
        if not (self._path.parent / RECORD).exists():
            return  # the whole folder, or all that is in it: the watch knows what to do
        self._file.close()
        distributed.log(f"warning: {self._path} was removed or cut while the run wrote it; lines before this step are lost")
        if there is not None:
            mend_tail(self._path)
        self._file = open(self._path, "a", encoding="utf-8")
        self._length = self._path.stat().st_size

    def close(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._file = None
        for thread in self._trackers:
            thread.close()


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def training_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The training lines of a metrics.jsonl: those that have `loss`, a number, or null where it was not finite."""
    for line in read_lines(path):
        if "loss" in line and (line["loss"] is None or is_number(line["loss"])):
            yield line
