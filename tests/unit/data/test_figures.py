"""Data in numbers, against a slow and obvious count; which pairs are meant; where they lie in packs."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import save_tokenizer

from dspref.data import choosing
from dspref.data.batch import collate
from dspref.data.figures import PADDED_PAIRS, figures, histogram, overlap, padded_tokens, savings, where_packed
from dspref.data.layout import layout
from dspref.data.loader import Packing, place
from dspref.data.sources import Source, find
from dspref.data.store import PairStore, load_pairs
from dspref.data.tokenize import load_tokenizer, tokenize_pairs
from dspref.data.truncate import Limits, TokenizedPair
from dspref.errors import ConfigError

ROWS = [
    {"prompt": "Say yes.", "chosen": " yes it is so", "rejected": " no"},
    {"prompt": "Say yes.", "chosen": " no", "rejected": " yes it is so"},  # the opposite
    {"prompt": "Say yes.", "chosen": " yes it is so", "rejected": " no"},  # again
    {"prompt": "Count to ten, slowly, and then back again.", "chosen": " one two", "rejected": " two one"},
    {"prompt": "Say no.", "chosen": " same", "rejected": " same"},  # left out
    {"prompt": "Sing.", "chosen": " la", "rejected": " la la la la la la la la la la la la la"},
    {"prompt": "Say no.", "chosen": " x", "rejected": ""},  # left out
    {"prompt": "Hum.", "chosen": " a", "rejected": " b"},
]
HELD_OUT = [
    {"prompt": "Sing.", "chosen": " la", "rejected": " la la la la la la la la la la la la la"},
    {"prompt": "Hum.", "chosen": " other", "rejected": " b"},
    {"prompt": "Hum.", "chosen": " b", "rejected": " a"},
    {"prompt": "New.", "chosen": " other", "rejected": " b"},
]
UNLIMITED = Limits()
SHORT = Limits(max_length=24)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return load_tokenizer(str(folder))


def loaded(folder: Path, tokenizer: Any, limits: Limits, *sets: list[dict[str, Any]]) -> tuple[PairStore, list[Any]]:
    listings = []
    for k, rows in enumerate(sets):
        path = folder / f"p{len(list(folder.iterdir()))}{k}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        listings.append(find(Source(str(path), key=f"data.train.{k}")))
    how: Any = {"on_bad_row": "drop", "cache_dir": folder / "cache", "log": lambda line: None}
    return load_pairs(listings, tokenizer, limits, **how), listings


def counted(pairs: list[TokenizedPair], whole: list[TokenizedPair], rows: list[int]) -> dict[str, Any]:
    """What `figures` says, by going through the pairs one after another."""
    plain = [tuple(tuple(part.tolist()) for part in pair[:3]) for pair in pairs]
    scored = [
        tuple(len(pair[k]) if pair[k + 2] is None else int(pair[k + 2].sum()) for k in (1, 2)) for pair in pairs
    ]  # fmt: skip
    lengths = {name: [len(pair[k]) for pair in plain] for k, name in enumerate(("prompt", "chosen", "rejected"))}
    lengths["pair"] = [len(p) + max(len(c), len(r)) for p, c, r in plain]
    cut: dict[str, Any] = {}
    for k, name in enumerate(("prompt", "chosen", "rejected")):
        both = [(len(before[k]), len(after[k])) for before, after in zip(whole, pairs) if len(before[k]) > len(after[k])]
        cut[name] = {"count": len(both), "lost": sum(b - a for b, a in both), "had": sum(b for b, _ in both)}
    prompts = Counter(prompt for prompt, _, _ in plain)
    by_row: dict[Any, set[int]] = {}
    for (prompt, _, _), row in zip(plain, rows):
        by_row.setdefault(prompt, set()).add(row)
    different = set(plain)
    more = [c - r for c, r in scored]
    return {
        "lengths": lengths,
        "cut": cut,
        "pairs": len(plain) - len(different),
        "contradicted": sum((p, r, c) in different for p, c, r in different),
        "prompts": len(prompts),
        "several": sum(n > 1 for n in prompts.values()),
        "of_several": sum(n for n in prompts.values() if n > 1),
        "rows": sum(len(own) > 1 for own in by_row.values()),
        "longer": sum(m > 0 for m in more),
        "equal": sum(m == 0 for m in more),
        "mean": sum(more) / len(more),
        "scored": {"chosen": sum(c for c, _ in scored), "rejected": sum(r for _, r in scored)},
    }


def agree(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, column in expected["lengths"].items():
        said, ordered = found["tokens"][name], sorted(column)
        assert said["total"] == sum(column) and said["mean"] == pytest.approx(sum(column) / len(column))
        for p, value in said["percentiles"].items():  # so many per cent have at most that many
            assert value == ordered[max(math.ceil(int(p) / 100 * len(ordered)) - 1, 0)], (name, p)
    width = found["histogram"]["width"]
    for name, counts in found["histogram"]["counts"].items():
        for k, count in enumerate(counts):
            assert count == sum(k * width <= n < (k + 1) * width for n in expected["lengths"][name])
    for name, numbers in expected["cut"].items():
        assert {key: found["truncated"][name][key] for key in numbers} == numbers
    again, bias = found["repeated"], found["bias"]
    names = ("pairs", "contradicted", "prompts", "prompts_of_several_pairs", "pairs_of_these", "prompts_of_several_rows")
    mine = ("pairs", "contradicted", "prompts", "several", "of_several", "rows")
    assert [again[name] for name in names] == [expected[name] for name in mine]
    assert (bias["chosen_longer"], bias["equal"]) == (expected["longer"], expected["equal"])
    assert bias["mean_difference"] == pytest.approx(expected["mean"])
    assert found["scored"] == expected["scored"]


@pytest.mark.parametrize("limits", [UNLIMITED, SHORT])
def test_the_figures_are_those_of_a_plain_count(limits: Limits, tokenizer: Any, tmp_path: Path) -> None:
    good = [row for row in ROWS if row["rejected"].strip() and row["chosen"] != row["rejected"]]
    store, _ = loaded(tmp_path, tokenizer, limits, ROWS)
    pairs, whole = tokenize_pairs(good, tokenizer, limits), tokenize_pairs(good, tokenizer)
    found = figures(store, np.arange(len(store)))
    agree(found, counted(pairs, whole, list(range(len(good)))))
    if limits is UNLIMITED:
        repeated = found["repeated"]
        assert (repeated["pairs"], repeated["contradicted"], repeated["prompts_of_several_pairs"]) == (1, 2, 1)
        assert found["bias"]["chosen_longer"] == 2 and found["truncated"]["pair"]["count"] == 0
    else:
        assert found["truncated"]["pair"]["count"] == sum(
            any(len(a) < len(b) for a, b in zip(cut[:3], full[:3])) for cut, full in zip(pairs, whole)
        )
        assert found["truncated"]["pair"]["count"] > 0


def test_the_figures_of_real_pairs(shared: Path, tmp_path: Path) -> None:
    """Conversations with masks, two sources in one store, duplicates as real data have them; and each source alone."""
    tokenizer = load_tokenizer(str(shared / "tokenizer" / "gpt2-chatml"))
    sets = []
    for name in ("alpacaeval_train.jsonl", "multiturn_train.jsonl"):
        with open(shared / "data" / name, encoding="utf-8") as file:
            sets.append([json.loads(line) for line, _ in zip(file, range(260))])
    limits = Limits(max_length=400)
    store, listings = loaded(tmp_path, tokenizer, limits, *sets)
    rows = [row for rows in sets for row in rows]
    assert len(store) == len(rows) and store.report["sources"][1]["rows"] == 260
    pairs, whole = tokenize_pairs(rows, tokenizer, limits), tokenize_pairs(rows, tokenizer)
    every = counted(pairs, whole, list(range(len(rows))))
    assert every["several"] and every["cut"]["prompt"]["count"] and every["cut"]["chosen"]["count"]
    agree(figures(store, np.arange(len(store))), every)
    for k, source in enumerate(choosing.sources_of(store, listings, ["a", "b"])):
        own = slice(260 * k, 260 * (k + 1))
        agree(figures(store, source.ids), counted(pairs[own], whole[own], list(range(260))))


def test_rows_and_reasons_are_told_of_each_source(tokenizer: Any, tmp_path: Path) -> None:
    store, _ = loaded(tmp_path, tokenizer, UNLIMITED, ROWS, HELD_OUT, [*ROWS[4:5], *ROWS[:1]])
    first, second, third = store.report["sources"]
    assert (first["rows"], first["pairs"], first["kept"]) == (8, 8, 6)
    assert first["dropped"] == {"rejected: identical to chosen": 1, "rejected: empty answer": 1}
    assert (second["rows"], second["kept"], second["dropped"]) == (4, 4, {})
    assert (third["kept"], third["dropped"]) == (1, {"rejected: identical to chosen": 1})
    assert store.report["dropped"] == {"rejected: identical to chosen": 2, "rejected: empty answer": 1}


def test_what_a_held_out_set_shares_with_training(tokenizer: Any, tmp_path: Path) -> None:
    training, _ = loaded(tmp_path, tokenizer, UNLIMITED, ROWS)
    held_out, _ = loaded(tmp_path, tokenizer, UNLIMITED, HELD_OUT)
    texts = [{(row["prompt"]) for row in rows} for rows in (ROWS, HELD_OUT)]
    both = texts[0] & texts[1]
    equal = [row for row in HELD_OUT if row in ROWS]
    expected = {"prompts": len(both), "pairs_of_these": sum(row["prompt"] in both for row in HELD_OUT), "pairs": len(equal)}
    assert overlap(held_out, training) == expected == {"prompts": 2, "pairs_of_these": 3, "pairs": 1}
    alone, _ = loaded(tmp_path, tokenizer, UNLIMITED, HELD_OUT[3:])
    assert overlap(alone, training) == {"prompts": 0, "pairs_of_these": 0, "pairs": 0}
    assert overlap(training, training)["pairs"] == len(training)


@pytest.mark.parametrize("lengths", [[0], [11], [12], [119], [120], [2047], [1], [5, 900]])
def test_a_histogram_has_few_bars_of_round_width(lengths: list[int]) -> None:
    found = histogram({"x": np.array(lengths)})
    counts, width = found["counts"]["x"], found["width"]
    assert len(counts) <= 12 and sum(counts) == len(lengths) and str(width).rstrip("0") in ("1", "2", "5")
    assert all(counts[n // width] for n in lengths)


def test_padded_tokens_are_those_of_batches_padded_to_their_longest() -> None:
    lengths = np.random.default_rng(3).integers(1, 50, (21, 3))
    expected = 0
    for start in range(0, 21, PADDED_PAIRS):
        batch = lengths[start : start + PADDED_PAIRS]
        expected += 2 * len(batch) * max(int(p + max(c, r)) for p, c, r in batch)
    assert padded_tokens(lengths) == expected and padded_tokens(lengths[:0]) == 0


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_packing_saves_and_where_a_pair_lies(sharing: bool, ranks: int, tokenizer: Any, tmp_path: Path) -> None:
    """Against the batches that a run makes: their tokens, and the pairs that each holds."""
    store, _ = loaded(tmp_path, tokenizer, UNLIMITED, ROWS, HELD_OUT)
    steps = [np.array([3, 0, 1, 8]), np.array([2, 4, 9, 5]), np.array([6, 7])]
    packing = Packing(60, sharing, 0, ranks)
    found, tokens, packs = savings(steps, store, packing), 0, 0
    for number, ids in enumerate(steps, start=1):
        placed = place(store, ids, packing)
        for rank in range(ranks):
            own = Packing(60, sharing, rank, ranks)
            for micro_step, batch in enumerate(placed.packs(store, own), start=1):
                packs += 1
                tokens += len(batch.input_ids) if batch.num_pairs else 0
                for index in batch.pair_ids.tolist():
                    where = where_packed(steps, store, packing, index)
                    assert where is not None
                    assert (where["step"], where["rank"], where["micro_step"]) == (number, rank, micro_step)
                    assert where["pairs"] == batch.pair_ids.tolist()
    assert (found["packed"], found["packs"], found["pairs"]) == (tokens, packs, 10)
    lengths = store.lengths
    assert found["unpadded"] == int((2 * lengths[:, 0] + lengths[:, 1] + lengths[:, 2]).sum())
    assert found["padded"] == sum(padded_tokens(lengths[ids]) for ids in steps)
    assert found["saved"] == pytest.approx(1 - tokens / found["padded"])
    assert where_packed(steps[:1], store, packing, 7) is None


@pytest.mark.parametrize("sharing", [True, False])
def test_the_drawn_pack_is_the_pack_that_runs(sharing: bool, tokenizer: Any) -> None:
    """Its pieces cover the pack's tokens, and see the keys that the last token of each segment attends to."""
    rows = [ROWS[0], ROWS[1], ROWS[3], {**ROWS[0], "rejected": " maybe"}]
    pairs = tokenize_pairs(rows, tokenizer)
    batch, pieces = collate(pairs, range(4), prefix_sharing=sharing), layout(pairs, sharing)
    assert [piece.start for piece in pieces] == np.cumsum([0] + [piece.tokens for piece in pieces])[:-1].tolist()
    assert pieces[-1].stop == len(batch.input_ids)
    starts, bounds = batch.cu_seqlens_q.tolist(), batch.cu_seqlens_k.tolist()
    keys = batch.kv_index.tolist() if batch.kv_index is not None else list(range(len(batch.input_ids)))
    seen = {piece.stop: [at for key in piece.keys for at in range(*key)] for piece in pieces if piece.kind != "prompt"}
    assert seen == {stop: keys[bounds[k] : bounds[k + 1]] for k, stop in enumerate(starts[1:])}
    for piece in pieces:
        for k in piece.pairs:
            own = batch.input_ids[piece.start : piece.stop].tolist()
            sides = {"both": ["chosen", "rejected"]}.get(piece.kind, [piece.kind])
            assert any(own == getattr(pairs[k], side).tolist() for side in sides)
    of_each = [[piece.kind for piece in pieces if k in piece.pairs] for k in range(4)]
    assert all(len(kinds) == (3 if sharing else 4) for kinds in of_each)
    assert any("both" in kinds for kinds in of_each) is sharing


def test_which_pairs_are_meant(tokenizer: Any, tmp_path: Path) -> None:
    store, listings = loaded(tmp_path, tokenizer, SHORT, ROWS, HELD_OUT)
    sources = choosing.sources_of(store, listings, ["data.train.0", "data.train.1"])
    assert [(s.first, s.stop, s.first_file) for s in sources] == [(0, 6, 0), (6, 10, 1)]
    sizes = (store.uncut[:, 0] + store.uncut[:, 1:].max(axis=1)).tolist()
    assert choosing.worst(sources, "length")[1] == sizes.index(max(sizes))
    assert choosing.worst(sources, "prompt")[1] == 3, "the longest before it was cut"
    assert store.where(choosing.worst(sources[1:], "margin")[1]).endswith(".jsonl:1")
    assert [index for _, index in choosing.drawn(sources, 99, 0)] == list(range(10)), "each once"
    drawn = [choosing.drawn(sources, 3, seed) for seed in range(20)]
    assert all(source.first <= index < source.stop for one in drawn for source, index in one)
    assert choosing.drawn(sources, 3, 5) == drawn[5] and len({tuple(i for _, i in one) for one in drawn}) > 10
    assert choosing.named(sources, "1") is choosing.named(sources, "data.train.1") is sources[1]
    file = listings[1].names[0]
    for row in (f"{file}:2", f"{Path(file).name}:2"):
        assert choosing.places_meant(sources, row) == (sources[1], [0], 2)
    for row, said in {
        "2": "in which of several sources", "0": "a row's number", "x": "a row's number", "": "a row's number",
        "nope.jsonl:2": "no source here reads", f"{file}:": "a row's number", "٣": "a row's number",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=said) as error:
            choosing.places_meant(sources, row)
        assert str(error.value).isprintable()
    with pytest.raises(ConfigError, match="use one of 0, 1"):
        choosing.named(sources, "2")
    with pytest.raises(ConfigError, match="a single source"):
        choosing.named(sources[:1], "1")


def test_a_row_of_several_files_is_named_with_its_file(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "of").mkdir()
    for k in range(2):
        text = "".join(json.dumps(row) + "\n" for row in ROWS[: k + 1])
        with gzip.open(tmp_path / "of" / f"part{k}.jsonl.gz", "wt") as file:
            file.write(text)
    listing = find(Source(str(tmp_path / "of" / "*.gz")))
    how: Any = {"on_bad_row": "drop", "cache_dir": tmp_path / "cache", "log": lambda line: None}
    store = load_pairs([listing], tokenizer, UNLIMITED, **how)
    sources = choosing.sources_of(store, [listing], ["data.train"])
    with pytest.raises(ConfigError, match=r"in which of 2 files\? give it as FILE:NUMBER, such as .*part0.jsonl.gz:2"):
        choosing.places_meant(sources, "2")
    source, files, line = choosing.places_meant(sources, "part1.jsonl.gz:2")
    assert files == [1] and store.at(source.first_file + 1, line).tolist() == [2] and store.place(2) == (1, 2)
