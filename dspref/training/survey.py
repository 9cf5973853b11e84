"""What a run's data look like, read and tokenized as the run would: `dspref check --data`. `inspection` begins with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dspref import distributed
from dspref.config import DataSection, ModelSection, TrainSection
from dspref.data.choosing import SourcePairs, sources_of
from dspref.data.show import mark
from dspref.data.sight import sight_of
from dspref.data.store import Log, PairStore
from dspref.model import admission, loading
from dspref.objectives import Objective
from dspref.training import preparation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Pairs that are shown of each source.
SHOWN = 3


@dataclass(frozen=True)
class Survey:
    """The data of a run, as it would read them. The pairs of all training sources are in one store, those of each held-out
    set in one of its own."""

    model_config: Any
    tokenizer: PreTrainedTokenizerBase
    train: list[SourcePairs]
    held_out: list[SourcePairs]

    @property
    def stores(self) -> list[PairStore]:
        return [self.train[0].store, *(source.store for source in self.held_out)]

    def check_sizes(self, max_length: int | None) -> None:
        """Raises ConfigError for tokens or lengths that the model has no embedding or no position for."""
        preparation.check_sizes(max_length, self.model_config, self.stores)


def read(model: ModelSection, data: DataSection, log: Log = distributed.log, summarise: bool = True) -> Survey:
    """Read and tokenize all sources, from the cache that a run uses. Raises DataError and ConfigError as the run would.
    `summarise`: say what was left out or cut."""
    loading.quiet()
    model_config = loading.load_config(model)
    tokenizer = preparation.tokenizer_of(model)
    admission.refuse_long_limit(model_config, data.max_length)
    train, held_out = (
        {name: preparation.listing_of(source, name) for name, source in data.source_keys(of).items()}
        for of in ("train", "eval")
    )
    for listing in held_out.values():
        preparation.refuse_training_rows(listing, list(train.values()))

    def load(named: dict[str, Any]) -> list[SourcePairs]:
        listings = list(named.values())
        store = preparation.load_sources(data, tokenizer, listings, log, summarise)
        return sources_of(store, listings, list(named))

    return Survey(
        model_config, tokenizer, load(train), [source for key, one in held_out.items() for source in load({key: one})]
    )


def report(
    model: ModelSection,
    data: DataSection,
    train: TrainSection,
    objective: Objective,
    colour: bool = False,
    prompts: str | None = None,
) -> None:
    """Say, for each source, its rows and pairs, what was left out or cut and why, lengths, and its first pairs as text; and
    the first of `prompts`, the file of log.samples_file.

    Raises DataError and ConfigError as the run would.
    """
    found = read(model, data)
    for source in (*found.train, *found.held_out):
        distributed.log(f"\n{source.key}  {source.listing.source.path}\n{figures(source)}")
        for index in source.ids[:SHOWN].tolist():
            pair = source.store[index]
            chosen = "reference" if objective.family.takes == "gold" and not len(pair.rejected) else "chosen"
            distributed.log(f"\n{source.store.where(index)}\n{mark(pair, found.tokenizer, colour, chosen)}")
    found.check_sizes(data.max_length)
    preparation.steps_of(
        preparation.laid_out(model, data, say=False), train, found.train[0].store, objective, rank=0, world_size=1
    )
    preparation.refuse_for_objective([source.store for source in found.held_out], objective)
    if prompts:
        own = preparation.own_prompts(prompts, model, found.tokenizer)
        ids, sight = own[0].ids, sight_of(found.tokenizer)
        if sight is not None:
            ids = sight.collapsed(np.asarray(ids), own[0].shown.pictures).tolist()
        distributed.log(f"\nlog.samples_file  {prompts}\nprompts {len(own):,}\n\n{found.tokenizer.decode(ids)}")


def figures(source: SourcePairs) -> str:
    """Rows, pairs and lengths of a source, a line each."""
    counts, ids = source.store.report["sources"][source.number], source.ids
    there = source.store.scored[ids] > 0
    unit = "pairs" if there.all() else "examples"
    lines = [
        f"rows {counts['rows']:,}, {unit} {counts['kept']:,} of {counts['pairs']:,}",
        f"{'tokens':<10}{'min':>8}{'median':>8}{'max':>8}{'total':>12}",
    ]
    lengths = source.store.lengths[ids]
    columns = {"prompt": lengths[:, 0], "chosen": lengths[there[:, 0], 1], "rejected": lengths[there[:, 1], 2]}
    lines += _lengths(columns)
    chosen, rejected = source.store.scored[ids].sum(axis=0).tolist()
    lines.append(f"scored of them: {chosen:,} chosen, {rejected:,} rejected")
    return "\n".join(lines)


def _lengths(columns: Mapping[str, np.ndarray]) -> list[str]:
    lines = []
    for name, column in columns.items():
        if not len(column):
            continue
        least, middle, most = (int(value) for value in np.percentile(column, [0, 50, 100]))
        lines.append(f"{name:<10}{least:>8,}{middle:>8,}{most:>8,}{int(column.sum()):>12,}")
    return lines


def in_numbers(pairs: PairStore, takes: str) -> str:
    """How many pairs, lists, or answers that stand alone, and their mean lengths: of answers, of those that there are.
    `takes`: what a row becomes, as in `Family`."""
    there = pairs.scored > 0
    chosen, rejected = (pairs.lengths[there[:, k], k + 1].sum() / max(there[:, k].sum(), 1) for k in range(2))
    counts = there.sum(axis=0)
    what = f"{len(pairs)} pairs" if there.all() else f"{counts[0]} desirable, {counts[1]} undesirable answers"
    if takes == "list":
        what = f"{len(pairs)} answers in {len(set(pairs.rows.tolist()))} lists"
    elif takes == "gold":
        what = f"{counts[1]} pairs, {counts[0] - counts[1]} gold answers"
    return f"{what}, mean tokens {pairs.lengths[:, 0].mean():.0f} prompt + {chosen:.0f} | {rejected:.0f}"
