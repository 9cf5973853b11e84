"""What a run's data look like, read and tokenized as the run would: `dspref check --data`."""

from __future__ import annotations

import numpy as np

from dspref import distributed, model, stages
from dspref.config import Config, SourceSection
from dspref.data.show import mark
from dspref.data.store import PairStore

# Pairs that are shown of each source.
SHOWN = 3


def report(config: Config, colour: bool = False) -> None:
    """Say, for each source, its rows and pairs, what was left out or cut and why, lengths, and its first pairs as text.

    Raises DataError and ConfigError as the run would.
    """
    model.quiet()
    tokenizer = stages.tokenizer_of(config)
    for name, source in named(config).items():
        distributed.log(f"\n{name}  {source.path}")
        store = stages.load_sources(config, tokenizer, [source], distributed.log)
        distributed.log(figures(store))
        for index in range(min(SHOWN, len(store))):
            distributed.log(f"\n{store.where(index)}\n{mark(store[index], tokenizer, colour)}")


def named(config: Config) -> dict[str, SourceSection]:
    """Every source by its key."""
    data = config.data
    several = isinstance(data.train, list)
    train = {f"data.train.{k}" if several else "data.train": source for k, source in enumerate(data.train_sources)}
    one = isinstance(data.eval, SourceSection)
    return train | {"data.eval" if one else f"data.eval.{name[5:-1]}": s for name, s in data.eval_sources.items()}


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
    scored = getattr(store, "scored", None)
    if scored is not None:
        lines.append(f"scored of them: {int(scored[:, 0].sum()):,} chosen, {int(scored[:, 1].sum()):,} rejected")
    cut = {name: count for name, count in counts["truncated"].items() if count}
    lines.append("cut: " + (", ".join(f"{count:,} x {name}" for name, count in cut.items()) or "none"))
    return "\n".join(lines)
