"""dspref: reading, rendering and tokenizing all pairs of a file into an empty cache, without training on them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.measure import Measurement, main, spent
from benchmarks.workload import Spec
from dspref.data import store
from dspref.data.sources import Source
from dspref.data.tokenize import Limits, load_tokenizer


def run(spec: Spec) -> Measurement:
    found, tokenizer = Measurement(), load_tokenizer(spec.model)
    limits, source = Limits(spec.max_length), Source(spec.data)
    with tempfile.TemporaryDirectory(dir=spec.work) as folder, spent(found.extra, store, "load_pairs", "tokens"):
        where = {"cache_dir": Path(folder), "log": print}
        pairs = store.load_pairs([source], tokenizer, limits, on_bad_row="error", scored="all", **where)
    prompt, chosen, rejected = pairs.lengths.sum(axis=0).tolist()
    found.useful_tokens = [2 * prompt + chosen + rejected]
    return found


if __name__ == "__main__":
    main(run)
