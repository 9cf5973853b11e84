"""What a run's data look like, read and tokenized as the run would: `dspref check --data`."""

from __future__ import annotations

import numpy as np

from dspref import distributed
from dspref.config import DataSection, ModelSection
from dspref.data.show import mark
from dspref.data.store import PairStore
from dspref.model import admission, loading
from dspref.training import preparation

# Pairs that are shown of each source.
SHOWN = 3


def report(model: ModelSection, data: DataSection, colour: bool = False) -> None:
    """Say, for each source, its rows and pairs, what was left out or cut and why, lengths, and its first pairs as text.

    Raises DataError and ConfigError as the run would.
    """
    loading.quiet()
    model_config = loading.load_config(model)
    tokenizer = preparation.tokenizer_of(model)
    admission.refuse_long_limit(model_config, data.max_length)
    stores = []
    train, held_out = (
        {name: preparation.listing_of(source, name) for name, source in data.source_keys(of).items()}
        for of in ("train", "eval")
    )
    for listing in held_out.values():
        preparation.refuse_training_rows(listing, list(train.values()))
    for name, listing in {**train, **held_out}.items():
        distributed.log(f"\n{name}  {listing.source.path}")
        store = preparation.load_sources(data, tokenizer, [listing])
        stores.append(store)
        distributed.log(figures(store))
        for index in range(min(SHOWN, len(store))):
            distributed.log(f"\n{store.where(index)}\n{mark(store[index], tokenizer, colour)}")
    preparation.check_sizes(data.max_length, model_config, stores)


def figures(store: PairStore) -> str:
    """Rows, pairs and lengths of a store, a line each."""
    counts, lengths = store.report, store.lengths
    lines = [
        f"rows {counts['rows']:,}, pairs {len(store):,} of {counts['pairs']:,}",
        f"{'tokens':<10}{'min':>8}{'median':>8}{'max':>8}{'total':>12}",
    ]
    for name, column in zip(("prompt", "chosen", "rejected"), lengths.T):
        least, middle, most = (int(value) for value in np.percentile(column, [0, 50, 100]))
        lines.append(f"{name:<10}{least:>8,}{middle:>8,}{most:>8,}{int(column.sum()):>12,}")
    chosen, rejected = store.scored.sum(axis=0).tolist()
    lines.append(f"scored of them: {chosen:,} chosen, {rejected:,} rejected")
    return "\n".join(lines)
