"""Whatever bytes and rows a data file has, it is read or refused in words: never a traceback."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bad_rows import TEMPLATE
from test_store import words

from dspref.data.sources import Source
from dspref.data.store import load_pairs
from dspref.data.tokenize import Limits
from dspref.errors import DataError

FIELDS = ("prompt", "chosen", "rejected", "completions", "scores", "tools", "chat_template_kwargs", "messages", "p1")
ROLES = ("system", "user", "assistant", "tool", "gpt")
texts = st.one_of(st.sampled_from(["", " a", " b", "p1", " a b c", "\0", "\ud800", "</s>", "{x}"]), st.text(max_size=6))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(texts, st.sampled_from(FIELDS)), inner, max_size=3)
    ),
    max_leaves=8,
)
messages = st.lists(
    st.one_of(st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": st.one_of(texts, values)}), values),
    max_size=4,
)
fields = st.one_of(texts, messages, values, st.lists(texts, max_size=3))
good = st.fixed_dictionaries({"prompt": st.just("p1"), "chosen": st.just(" a"), "rejected": st.just(" b")})
rows = st.one_of(good, st.dictionaries(st.sampled_from(FIELDS), fields, max_size=5), values)
mutations = st.lists(
    st.tuples(st.sampled_from(["cut", "flip", "insert", "drop", "repeat"]), st.floats(0, 1), st.binary(max_size=4)),
    max_size=3,
)
hows = st.fixed_dictionaries(
    {},
    optional={
        "columns": st.dictionaries(st.sampled_from(FIELDS[:6]), st.sampled_from(FIELDS), max_size=3),
        "pairs": st.sampled_from(["all", "best_against_rest", "best_against_worst"]),
        "max_samples": st.integers(1, 3),
        "split": st.sampled_from(["train", "train[:1]", "train[1:]", "train[-1:]", "train[:50%]", "test", "train+train"]),
        "template": st.just({"prompt": "{p1}", "chosen": "{chosen}", "rejected": "{rejected}"}),
    },
)


def as_lines(items: list[Any]) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


def as_array(items: list[Any]) -> bytes:
    return json.dumps(items, indent=1).encode()


def as_csv(items: list[Any]) -> bytes:
    out = io.StringIO()
    table = [item for item in items if isinstance(item, dict)]
    names = list(dict.fromkeys(name for item in table for name in item))
    writer = csv.writer(out)
    writer.writerow(names)
    for item in table:
        writer.writerow([str(item.get(name, "")).encode(errors="replace").decode() for name in names])
    return out.getvalue().encode(errors="replace")


def as_parquet(items: list[Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist([item for item in items if isinstance(item, dict) and item]), out)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, ValueError, TypeError):
        return b"PAR1"
    return out.getvalue()


KINDS = {"jsonl": as_lines, "json": as_array, "ndjson": as_lines, "csv": as_csv, "parquet": as_parquet}


def mutated(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for what, share, more in changes:
        at = int(share * len(data))
        match what:
            case "cut":
                data = data[:at]
            case "flip":
                data = data[:at] + bytes(255 - byte for byte in data[at : at + 1]) + data[at + 1 :]
            case "insert":
                data = data[:at] + more + data[at:]
            case "drop":
                data = data[:at] + data[at + 5 :]
            case _:
                data = data[:at] + data
    return data


def is_read_or_refused(
    items: list[Any], kind: str, packed: bool, changes: list, how: dict[str, Any], on_bad_row: str
) -> None:
    tokenizer = words()
    tokenizer.chat_template = TEMPLATE
    folder = Path(tempfile.mkdtemp())
    try:
        name = f"a.{kind}.gz" if packed and kind != "parquet" else f"a.{kind}"
        data = mutated(KINDS[kind](items), changes)
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        source = Source(f"{folder}/{name}", **how)
        said: list[str] = []
        try:
            store = load_pairs(
                [source], tokenizer, Limits(8), on_bad_row=on_bad_row, cache_dir=folder / "cache", log=said.append
            )
        except DataError as error:
            for line in str(error).splitlines():
                assert line.isprintable() and (
                    line.startswith((str(folder), "... ")) and ("; fix: " in line or line[0] == ".")
                ), line
        else:
            assert len(store) == len([store[i] for i in range(len(store))]) > 0
            assert all(store.where(i).startswith(f"{folder}/{name}:") for i in range(len(store)))
        assert all(line.isprintable() for line in said)
    finally:
        shutil.rmtree(folder)


hostile = given(
    st.lists(rows, max_size=4),
    st.sampled_from(sorted(KINDS)),
    st.booleans(),
    mutations,
    hows,
    st.sampled_from(["error", "drop"]),
)
quiet = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "derandomize": True}


@settings(max_examples=100, **quiet)
@hostile
def test_a_hostile_file_is_read_or_refused_in_words(items, kind, packed, changes, how, on_bad_row) -> None:
    is_read_or_refused(items, kind, packed, changes, how, on_bad_row)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=2000, **quiet)
@hostile
def test_two_thousand_hostile_files(items, kind, packed, changes, how, on_bad_row) -> None:
    is_read_or_refused(items, kind, packed, changes, how, on_bad_row)
