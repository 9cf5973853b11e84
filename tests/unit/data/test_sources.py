"""Rows of every kind of file arrive with their values and their place."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dspref.data import parts as parts_module
from dspref.data import rowfiles
from dspref.data.formats import to_preference
from dspref.data.overlap import shared
from dspref.data.sources import BadRow, Row, Source, find, read, sha256
from dspref.data.splits import parse
from dspref.errors import DataError

ROWS = [
    {"prompt": "q1", "chosen": "line\u2028separator \u00e4", "rejected": "b"},
    {"prompt": "q2", "chosen": 'quote " comma , newline \n end', "rejected": "d"},
]


def _jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv_text(rows: list[dict], tmp_path: Path) -> str:
    path = tmp_path / "scratch"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    text = path.read_bytes().decode()
    path.unlink()
    return text


def _places(rows: list[Row | BadRow]) -> list[str]:
    return [row.where.rpartition("/")[2] for row in rows]


def _values(rows: list[Row | BadRow]) -> list[dict]:
    assert all(isinstance(row, Row) for row in rows)
    return [row.values for row in rows if isinstance(row, Row)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_json_lines_have_line_numbers(tmp_path: Path, name: str) -> None:
    data = ("\ufeff" + _jsonl(ROWS).replace("\n", "\r\n\r\n")).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    rows = read(Source(str(tmp_path / name)))
    assert _values(rows) == ROWS
    assert _places(rows) == [f"{name}:1", f"{name}:3"]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl"])
def test_json_array_has_element_numbers(tmp_path: Path, name: str) -> None:
    data = json.dumps(ROWS, indent=2).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    rows = read(Source(str(tmp_path / name)))
    assert _values(rows) == ROWS
    assert _places(rows) == [f"{name}:1", f"{name}:2"]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_has_the_line_where_a_record_starts(tmp_path: Path, name: str) -> None:
    three = [*ROWS, {"prompt": "q3", "chosen": "e", "rejected": "f"}]
    data = ("\ufeff" + _csv_text(three, tmp_path)).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    rows = read(Source(str(tmp_path / name)))
    assert _values(rows) == three
    assert _places(rows) == [f"{name}:2", f"{name}:3", f"{name}:5"]


def test_a_space_behind_the_commas_of_a_header_is_no_part_of_a_name(tmp_path: Path) -> None:
    for header, names in (
        ("prompt, chosen,\trejected ", ["prompt", "chosen", "rejected"]),
        ("prompt, chosen,chosen", ["prompt", " chosen", "chosen"]),
    ):
        (tmp_path / "a.csv").write_text(f"{header}\nq: , a,b \n")
        assert _values(read(Source(str(tmp_path / "a.csv")))) == [dict(zip(names, ["q: ", " a", "b "]))], "texts stay"


def test_parquet_has_row_numbers(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    rows = read(Source(str(tmp_path / "a.parquet")))
    assert _values(rows) == ROWS
    assert _places(rows) == ["a.parquet:1", "a.parquet:2"]


def _calling(name: str, arguments: dict, **more: object) -> dict:
    """A row with one tool, which its answer calls."""
    properties = {key: {"type": "string"} for key in arguments}
    tool = {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    prompt = [{"role": "user", "content": "q"}]
    answer = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    return {"prompt": prompt, "chosen": answer, "rejected": [{"role": "assistant", "content": "b"}], "tools": [tool], **more}


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_what_arrow_adds_is_taken_away_at_every_depth(tmp_path: Path, kind: str) -> None:
    """Arrow gives each object of a column the keys of all of them; rows must mean what they mean as JSON lines."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    rows = [
        _calling("weather", {"city": "Bonn"}, chat_template_kwargs={"thinking": True}),
        _calling("add", {"x": "1", "y": "2"}, chat_template_kwargs={"documents": [{"title": "t"}, {"text": "u"}]}),
        _calling("nothing", {}, chat_template_kwargs={}),
    ]
    table = pa.Table.from_pylist(rows)
    assert "None" in str(table.to_pylist()[0]["tools"]), "Arrow has added nothing, so nothing is tested"
    if kind == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
        path = tmp_path / "a.parquet"
    else:
        Dataset(table).save_to_disk(str(tmp_path / "a"))
        path = tmp_path / "a"
    (tmp_path / "a.jsonl").write_text(_jsonl(rows))
    of_lines = [to_preference(row) for row in _values(read(Source(str(tmp_path / "a.jsonl"))))]
    assert [to_preference(row) for row in _values(read(Source(str(path))))] == of_lines
    assert [preference.chat_template_kwargs for preference in of_lines] == [
        *(row["chat_template_kwargs"] for row in rows[:2]),
        None,
    ]


def test_nulls_of_json_lines_stay(tmp_path: Path) -> None:
    row = _calling("f", {"x": None}, chat_template_kwargs={"thinking": None})
    row["tools"][0]["function"]["parameters"]["default"] = None
    (tmp_path / "a.jsonl").write_text(_jsonl([row]))
    (values,) = _values(read(Source(str(tmp_path / "a.jsonl"))))
    preference = to_preference(values)
    assert (preference.tools, preference.chat_template_kwargs) == (row["tools"], {"thinking": None})
    assert preference.chosen == row["chosen"]


def test_saved_data_set_is_read_with_its_split(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    splits = {"train": Dataset.from_list(ROWS[:1]), "test": Dataset.from_list(ROWS[1:])}
    DatasetDict(**splits).save_to_disk(str(tmp_path / "both"))
    splits["train"].save_to_disk(str(tmp_path / "one"))
    assert _values(read(Source(str(tmp_path / "both"), split="test"))) == ROWS[1:]
    assert _values(read(Source(str(tmp_path / "one")))) == ROWS[:1]
    with pytest.raises(DataError, match=r"no split 'dev'; fix: set split to one of test, train"):
        read(Source(str(tmp_path / "both"), split="dev"))


def test_folder_and_glob_are_read_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", "c.csv"):
        text = _csv_text([{"name": name}], tmp_path) if name.endswith("csv") else _jsonl([{"name": name}])
        (tmp_path / name).write_text(text)
    (tmp_path / "README.md").write_text("not data")
    names = [row["name"] for row in _values(read(Source(str(tmp_path))))]
    assert names == ["a.jsonl", "b.jsonl", "c.csv"]
    names = [row["name"] for row in _values(read(Source(str(tmp_path / "*.jsonl"))))]
    assert names == ["a.jsonl", "b.jsonl"]


def test_folder_with_splits_gives_the_files_of_one(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"):
        (tmp_path / "data" / name).write_text(_jsonl([{"name": name[:11]}]))
    assert [row["name"] for row in _values(read(Source(str(tmp_path))))] == ["train-00000", "train-00001"]
    assert [row["name"] for row in _values(read(Source(str(tmp_path), split="test")))] == ["test-00000-"]


def test_max_samples_takes_the_first_rows_over_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(_jsonl(ROWS))
    (tmp_path / "b.jsonl").write_text(_jsonl(ROWS))
    assert _places(read(Source(str(tmp_path), max_samples=3))) == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]


def test_a_bad_row_is_reported_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n[1]\n{"a": "\xff"}\n{"a": NaN}\n{"a": "\\ud800"}\n{"a": 2}\n')
    rows = read(Source(str(path)))
    assert [type(row) for row in rows] == [Row, BadRow, BadRow, BadRow, BadRow, BadRow, Row]
    reasons = [row.error.reason for row in rows if isinstance(row, BadRow)]
    assert reasons == [
        "broken JSON at column 7: Expecting value",
        "list, not an object",
        "not UTF-8: byte 0xff at offset 7 of the line",
        "NaN is not JSON",
        "holds a lone surrogate (\\ud800)",
    ]


def test_escaped_astral_characters_are_no_lone_surrogates(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"a": ["\U0001f600", {"b": "a literal \\u0000"}]}) + "\n")
    assert _values(read(Source(str(path)))) == [{"a": ["\U0001f600", {"b": "a literal \\u0000"}]}]


def test_a_hub_set_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    def load_dataset(path: str, split: str, **options: str) -> datasets.Dataset:
        if path == "owner/absent":
            raise ConnectionError("no\nnetwork")
        return datasets.Dataset.from_list([{"split": split, "k": k, **options} for k in range(4)])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read(Source("owner/name", split="dev[50%:]", name="a", data_dir="b", revision="c"))
    told = {"split": "dev", "name": "a", "data_dir": "b", "revision": "c"}
    assert rows == [Row({**told, "k": k}, "owner/name", k + 1) for k in (2, 3)]
    with pytest.raises(DataError, match=r"^owner/absent: not on disk, .*: no network; fix: .*$"):
        read(Source("owner/absent"))


# ------------------------------------------------------------------------------------------------ what a selector finds


def _tree(root: Path, sizes: dict[str, int], text: dict[str, str] | None = None) -> str:
    """Files with so many rows each, whose rows know their file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, size in sizes.items():
        path, rows = root / name, [{"file": name, "k": k} for k in range(size)]
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text(_jsonl(rows))
    for name, content in (text or {}).items():
        (root / name).write_text(content)
    return str(root)


FLAT = {f"{split}-00000-of-00001.parquet": n for split, n in
        (("train_prefs", 3), ("test_prefs", 2), ("train_sft", 4), ("test_sft", 1))}  # fmt: skip
HUB = {"default/train/0000.parquet": 3, "default/test/0000.parquet": 2}
CONFIGS = {"prefs/train/0000.parquet": 3, "sft/train/0000.parquet": 4, "sft/test/0000.parquet": 1}
PLAIN = {"a.jsonl": 2, "b.jsonl": 3}
README = """---
license: mit
configs:
- config_name: one
  data_files:
  - split: train
    path: data/x-*
  - {split: held, path: [data/y.jsonl]}
- config_name: two
  data_files: data/y.jsonl
---
text
"""

# Each case: files with their rows, the selectors, and the rows of each file that is read (a number: of all files together),
# or what the refusal says.
# fmt: off
SELECTORS: dict[str, tuple[dict[str, int], dict[str, str], object]] = {
    "a flat split": (FLAT, {"split": "train_prefs"}, {"train_prefs-00000-of-00001.parquet": 3}),
    "its first rows": (FLAT, {"split": "train_prefs[:2]"}, 2),
    "a misspelt flat split": (FLAT, {"split": "trian_prefs"}, "no split 'trian_prefs'; fix: set split to one of test_"),
    "train is not train_prefs": (FLAT, {}, "no split 'train'"),
    "prefs is not a split": (FLAT, {"split": "prefs"}, "no split 'prefs'"),
    "a slice of a split that is not there": (FLAT, {"split": "train[:2]"}, "no split 'train'"),
    "flat in data/": ({f"data/{name}": n for name, n in FLAT.items()}, {"split": "test_sft"}, 1),
    "any name in data/": ({"data/prefs-00000-of-00002.parquet": 1, "data/prefs-00001-of-00002.parquet": 2,
                           "data/sft-00000-of-00001.parquet": 4}, {"split": "prefs"}, 3),
    "a hash behind the shard": ({"train-00000-of-00001-b42a775f407cee45.parquet": 2,
                                 "test-00000-of-00001-0123456789abcdef.parquet": 1}, {}, 2),
    "config/split/": (HUB, {}, {"default/train/0000.parquet": 3}),
    "config/split/ of test": (HUB, {"split": "test"}, 2),
    "config/split/ of dev": (HUB, {"split": "dev"}, "no split 'dev'; fix: set split to one of test, train"),
    "a split of another name in config/split/": ({"default/best/0000.parquet": 3, "default/rest/0000.parquet": 2},
                                                 {"split": "best"}, 3),
    "split/": ({"train/0000.parquet": 3, "train/0001.parquet": 1, "test/0000.parquet": 2}, {}, 4),
    "split/ with files of any name": ({"train/x.jsonl": 3, "train/more/y.jsonl": 1, "test/z.jsonl": 2}, {}, 4),
    "several configs": (CONFIGS, {}, "holds several data sets (prefs, sft); fix: choose one by name"),
    "one of several configs": (CONFIGS, {"name": "sft"}, 4),
    "a config that is not there": (CONFIGS, {"name": "dpo"}, "name: no folder 'dpo'; fix: use one of prefs, sft"),
    "a split of one config alone": (CONFIGS, {"split": "test"}, 1),
    "configs with flat splits": ({"a/train.jsonl": 1, "b/train.jsonl": 2}, {}, "several data sets (a, b)"),
    "a config below data/": ({"data/a/train-00000-of-00001.parquet": 1, "data/b/train-00000-of-00001.parquet": 2},
                             {"name": "b"}, 2),
    "data_dir": (CONFIGS, {"data_dir": "sft", "split": "test"}, 1),
    "a data_dir that is not there": (CONFIGS, {"data_dir": "stf"}, "data_dir: no folder 'stf'"),
    "plain files are train": (PLAIN, {}, 5),
    "plain files have no test": (PLAIN, {"split": "test"}, "no file's name says a split (a.jsonl, b.jsonl)"),
    "plain files beside named ones": ({**PLAIN, "train.jsonl": 1}, {}, 1),
    "plain files beside others' names": ({**PLAIN, "test.jsonl": 1}, {}, "no split 'train'; fix: set split to one of test"),
    "a name before the split": ({"alpaca_train.jsonl": 2, "alpaca_test.jsonl": 1}, {"split": "test"}, 1),
    "a word that only begins so": ({"training_notes.jsonl": 2, "trainer.jsonl": 1, "train.jsonl": 4}, {}, 4),
    "numbered files": ({"train_1.jsonl": 1, "train_2.jsonl": 2, "test1.jsonl": 4}, {}, 3),
    "another word for validation": ({"train.jsonl": 2, "dev.jsonl": 1}, {"split": "validation"}, 1),
    "two other words": ({"val.jsonl": 2, "dev.jsonl": 1}, {"split": "validation"}, 3),
    "one of two other words": ({"val.jsonl": 2, "dev.jsonl": 1}, {"split": "dev"}, {"dev.jsonl": 1}),
    "all words for a split": ({"my_train_set.jsonl": 2, "training.jsonl": 3, "latest.jsonl": 1, "train/x_training.jsonl": 4,
                               "constrained_test.jsonl": 5}, {"split": "train"}, 9),
    "all words for a split in one folder": ({"my_train_set.jsonl": 2, "training.jsonl": 3, "latest.jsonl": 1,
                                             "TRAIN-data-00000-of-00001.parquet": 4, "constrained_test.jsonl": 5}, {}, 9),
    "folder and name in two words": ({"train/training.jsonl": 2, "train/my_train_set.jsonl": 1}, {}, 3),
    "what is beside a saved data set": ({**PLAIN, "dataset_info.json": 1}, {}, 5),
    "folder and name disagree": ({"train/test.jsonl": 2}, {}, "its folder says split train, its name says test"),
    "two splits": (HUB, {"split": "train+test"}, 5),
    "two splits, one not there": (HUB, {"split": "train+dev"}, "no split 'dev'"),
    "rows from a place": (PLAIN, {"split": "train[2:4]"}, {"b.jsonl": 2}),
    "rows to the end": (PLAIN, {"split": "train[4:]"}, 1),
    "a share": (PLAIN, {"split": "train[:50%]"}, 2),
    "the rest of a share": (PLAIN, {"split": "train[50%:]"}, 3),
    "the last rows": (PLAIN, {"split": "train[-2:]"}, {"b.jsonl": 2}),
    "all but the last rows": (PLAIN, {"split": "train[:-2]"}, 3),
    "slices of slices": (PLAIN, {"split": "train[:1]+train[-1:]"}, {"a.jsonl": 1, "b.jsonl": 1}),
    "more rows than there are": (PLAIN, {"split": "train[:99]"}, 5),
    "no row of those that are there": (PLAIN, {"split": "train[99:]"}, "split 'train[99:]' selects no row"),
    "an empty slice": (PLAIN, {"split": "train[2:2]"}, "selects no row"),
    "a slice from behind": (PLAIN, {"split": "train[4:2]"}, "selects no row"),
    "no notation": (PLAIN, {"split": "train[:2"}, "not a split; fix: write train, train[:1000]"),
    "rounding": (PLAIN, {"split": "train[:50%](pct1_dropremainder)"}, "not a split"),
    "rows and percent": (PLAIN, {"split": "train[1:50%]"}, "mixes rows and percent"),
    "more than all": (PLAIN, {"split": "train[:101%]"}, "more than 100 %"),
    "an empty split": (PLAIN, {"split": ""}, "not a split"),
    "revision of a folder": (PLAIN, {"revision": "main"}, "revision has no effect on a folder"),
    "a glob": (FLAT, {"path": "*.parquet", "split": "train_prefs"}, 3),
    "a misspelt split of a glob": (FLAT, {"path": "*.parquet", "split": "trian_prefs"}, "no split 'trian_prefs'"),
    "a glob of several splits": (FLAT, {"path": "*.parquet"}, "no split 'train'"),
    "a glob of one split": (FLAT, {"path": "test_prefs-*"}, 2),
    "a glob of one split, and another asked for": (FLAT, {"path": "test_prefs-*", "split": "train"}, "no split 'train'"),
    "a glob over folders": (HUB, {"path": "*/*/*.parquet", "split": "test"}, 2),
    "name beside a glob": (FLAT, {"path": "*.parquet", "name": "x"}, "name has no effect on a file"),
    "a file": (PLAIN, {"path": "b.jsonl"}, 3),
    "a slice of a file": (PLAIN, {"path": "b.jsonl", "split": "train[:2]"}, 2),
    "a split of a file": (PLAIN, {"path": "b.jsonl", "split": "test"}, "no split 'test' in a single file"),
    "the split of a file": (FLAT, {"path": "test_sft-00000-of-00001.parquet", "split": "test_sft"}, 1),
    "data_dir beside a file": (PLAIN, {"path": "b.jsonl", "data_dir": "x"}, "data_dir has no effect on a file"),
    "what lies beside data": ({**PLAIN, "dataset_infos.json": 1, "__cache/c.jsonl": 1, ".git/d.jsonl": 1}, {}, 5),
    "README": ({"data/x-1.jsonl": 2, "data/y.jsonl": 3, "README.md": 0}, {}, "holds several data sets (one, two)"),
    "README by name": ({"data/x-1.jsonl": 2, "data/y.jsonl": 3, "README.md": 0}, {"name": "one"}, 2),
    "README, its own split": ({"data/x-1.jsonl": 2, "data/y.jsonl": 3, "README.md": 0}, {"name": "one", "split": "held"}, 3),
    "README without split": ({"data/x-1.jsonl": 2, "data/y.jsonl": 3, "README.md": 0}, {"name": "two"}, 3),
    "README whose files are gone": ({"data/z.jsonl": 3, "README.md": 0}, {"name": "two"}, "files that its README.md names"),
}
# fmt: on


@pytest.mark.parametrize("case", SELECTORS)
def test_a_selector_finds_its_rows_or_refuses(tmp_path: Path, case: str) -> None:
    files, selectors, expected = SELECTORS[case]
    root = _tree(tmp_path / "set", files, {"README.md": README} if "README.md" in files else None)
    source = Source(**{**selectors, "path": f"{root}/{selectors['path']}" if "path" in selectors else root})
    if isinstance(expected, str):
        with pytest.raises(DataError) as caught:
            read(source)
        message = str(caught.value)
        assert expected in message and "; fix: " in message and "\n" not in message
        return
    found = Counter(row["file"] for row in _values(read(source)))
    assert found == expected if isinstance(expected, dict) else found.total() == expected


def test_slices_are_those_of_datasets() -> None:
    """But a negative share which rounds to no row is no row: `datasets` takes train[-1%:] of ten rows for all of them."""
    from datasets import ReadInstruction

    slices = ("[:]", "[:2]", "[2:]", "[-3:]", "[:-3]", "[33%:66%]", "[:50%]", "[25%:]", "[:1_0]", "[-10%:]", "[:-10%]")
    for count in (1, 3, 10, 199, 200, 201):
        for slice_ in slices[: None if count >= 10 else -2]:
            (term,) = parse(f"train{slice_}", "x")
            start, stop = term.bounds(count)
            (theirs,) = ReadInstruction.from_spec(f"train{slice_}").to_absolute({"train": count})
            mine = range(count)[start:stop]
            assert len(mine) == max(0, theirs.to - theirs.from_), (slice_, count)
            assert not mine or mine[0] == theirs.from_


def test_saved_tables_below_a_folder(tmp_path: Path) -> None:
    """What save_to_disk writes, split by split or several sets side by side."""
    from datasets import Dataset, DatasetDict

    tables = {"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}
    for name, table in tables.items():
        table.save_to_disk(str(tmp_path / "apart" / name))
    DatasetDict(**tables).save_to_disk(str(tmp_path / "configs" / "a"))
    DatasetDict(**tables).save_to_disk(str(tmp_path / "configs" / "b"))
    assert len(read(Source(str(tmp_path / "apart")))) == 2
    assert len(read(Source(str(tmp_path / "apart"), split="test"))) == 1
    assert len(read(Source(str(tmp_path / "apart"), split="train[:50%]"))) == 1
    with pytest.raises(DataError, match="no split 'dev'"):
        read(Source(str(tmp_path / "apart"), split="dev"))
    with pytest.raises(DataError, match=r"several data sets \(a, b\)"):
        read(Source(str(tmp_path / "configs")))
    assert len(read(Source(str(tmp_path / "configs"), name="b", split="test"))) == 1
    Dataset.from_list(ROWS, split="test").save_to_disk(str(tmp_path / "one"))
    assert len(read(Source(str(tmp_path / "one")))) == 2, "a single table is itself, whatever its split"
    with pytest.raises(DataError, match="no split 'train'; fix: set split to one of test"):
        read(Source(str(tmp_path / "one"), split="train"))


@pytest.mark.parametrize("word", ["json", "text", "csv", "parquet", "imagefolder", "arrow", "webdataset"])
def test_a_kind_of_file_is_no_hub_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """`datasets` has builders of these names, which would read whatever lies in the working folder."""
    _tree(tmp_path, PLAIN)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"^{word}: '{word}' is a kind of file, not a data set"):
        read(Source(word))


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    kinds = {"pipe.jsonl": "a pipe", "gone.jsonl": "a link to nothing", "zero.jsonl": "a device"}
    with socket.socket(socket.AF_UNIX) as server:
        before = os.getcwd()
        os.chdir(tmp_path)  # the path of a socket is short
        server.bind("socket.jsonl")
        os.chdir(before)
        for name, kind in {**kinds, "socket.jsonl": "a socket"}.items():
            with pytest.raises(DataError, match=f"{name}: {kind}, not a file; fix: "):
                read(Source(str(tmp_path / name)))
            with pytest.raises(DataError, match=f"{name}: {kind}, not a file; fix: "):
                read(Source(str(tmp_path / f"{name[:3]}*.jsonl")))
    with pytest.raises(DataError, match=r"/zero\.jsonl: a device, not a file; fix: "):
        read(Source(str(tmp_path)))
    with pytest.raises(DataError, match="/dev/zero: a device, not a file"):
        read(Source("/dev/zero"))


def test_a_folder_that_cannot_be_read_and_a_link_to_itself(tmp_path: Path) -> None:
    _tree(tmp_path, {"in/a.jsonl": 2})
    (tmp_path / "in" / "round").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(_tree(tmp_path.parent / f"{tmp_path.name}-elsewhere", {"b.jsonl": 1}))
    assert len(read(Source(str(tmp_path)))) == 3


def test_what_grows_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowfiles, "INFLATION_FLOOR", 2**16)
    monkeypatch.setattr(rowfiles, "MAX_LINE_BYTES", 2**18)
    monkeypatch.setattr(rowfiles, "MAX_ARRAY_BYTES", 2**17)
    bombs = {
        "blank.jsonl.gz": (gzip.compress(b"\n" * 10**6), "grows to more than 100 times its size"),
        "rows.jsonl.gz": (gzip.compress(b'{"a": 1}\n' * 10**6), "grows to more than 100 times its size"),
        "fields.csv.gz": (gzip.compress(b"a\n" * 10**6), "grows to more than 100 times its size"),
        "line.jsonl.gz": (gzip.compress(b"0" * 10**6), "a line of more than"),
        "zeros.jsonl": (b"\0" * 10**6, "a line of more than"),
        "array.json": (b"[\n" + b"0,\n" * 10**5 + b"0]", "an array of more than"),
    }
    for name, (data, reason) in bombs.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name}(:1)?: {reason}.*; fix: "):
            read(Source(str(tmp_path / name)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_key_that_is_there_twice_is_a_bad_row(tmp_path: Path, name: str) -> None:
    rows = ['{"a": 1, "b": {"c": 1}}', '{"a": 1, "a": 2}', '{"b": [{"c": 1, "d": 0, "c": 1}]}', '{"a": NaN}']
    array = name.endswith("json")
    (tmp_path / name).write_text(("[" if array else "") + (",\n" if array else "\n").join(rows) + ("]" if array else ""))
    found = read(Source(str(tmp_path / name)))
    assert _places(found) == [f"{name}:{k}" for k in (1, 2, 3, 4)]
    errors = [row.error for row in found if isinstance(row, BadRow)]
    assert [error.field for error in errors] == ["a", "c", "json"]
    assert errors[0].reason == "this key is there twice in one object"


def test_lists_on_lines_of_their_own_are_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1]\n[2]\n")
    assert [type(row) for row in read(Source(str(tmp_path / "a.json")))] == [BadRow, BadRow]


def test_held_out_rows_that_are_trained_on_are_found(tmp_path: Path) -> None:
    """By content, whatever the files are called, and by place, where slices are read."""
    root = Path(_tree(tmp_path, {"x/train.jsonl": 10, "x/test.jsonl": 2, "y.jsonl": 3}))
    (root / "copy.jsonl").write_bytes((root / "x/train.jsonl").read_bytes())
    (root / "x/more").mkdir()

    def meet(held_out: Source, *training: Source) -> str | None:
        found = shared(find(held_out), [find(source) for source in training], sha256)
        return found and found.name

    x, y, copy = f"{root}/x", Source(f"{root}/y.jsonl"), f"{root}/copy.jsonl"
    train, half = f"{root}/x/train.jsonl", Source(x, split="train[:50%]")
    assert meet(Source(x), y, half) == train
    assert meet(Source(copy), y, half) == copy
    assert meet(Source(x, split="test"), y, half) is None
    for rows, most in zip(
        ("train[:10%]", "train[4:]", "train[-6:]", "train[50%:]+train[:1]", "train"), (None, None, None, None, 1)
    ):
        assert meet(Source(x, split=rows, max_samples=most), half) == train, rows
        assert meet(Source(x, split=rows, max_samples=most), Source(x)) == train, rows
    for rows in ("train[50%:]", "train[5:]", "train[-5:]", "train[7:9]", "train[-5:-2]"):
        assert meet(Source(x, split=rows), half) is None, rows
        assert meet(Source(copy, split=rows), half) is None, rows
    assert meet(Source(x, split="train[5:]"), Source(x, max_samples=5)) is None
    assert meet(Source(x, split="train[5:]"), Source(x, max_samples=6)) == train
    # A place in a split of several files is one in a file.
    both = f"{root}/[cy]*.jsonl"
    assert meet(Source(both, split="train[:10]"), y) is None
    assert meet(Source(both, split="train[:11]"), y) == f"{root}/y.jsonl"
    assert meet(Source(both, split="train[10:]"), Source(copy)) is None


SAID = [{"prompt": f"q{k}", "chosen": "caf\u00e9", "rejected": "b", "n": k} for k in range(20)]


def _lines_of(rows: list[dict[str, Any]], end: str = "\n", **how: Any) -> bytes:
    return "".join(json.dumps(row, **how) + end for row in rows).encode()


# Ways to write the rows of one file once more.
COPIES: dict[str, bytes] = {
    "train.jsonl.gz": gzip.compress(_lines_of(SAID)),
    "blank.jsonl": _lines_of(SAID) + b"\n",
    "between.jsonl": b"\n" + _lines_of(SAID, "\n\n"),
    "lines.jsonl": _lines_of(SAID, "\r\n"),
    "no_end.jsonl": _lines_of(SAID)[:-1],
    "mark.jsonl": b"\xef\xbb\xbf" + _lines_of(SAID),
    "order.jsonl": _lines_of(SAID, sort_keys=True, separators=(" ,", " : ")),
    "escapes.jsonl": _lines_of(SAID, ensure_ascii=False),
    "kind.ndjson": _lines_of(SAID),
    "array.json": json.dumps(SAID, indent=1).encode(),
    "more.jsonl": _lines_of([row | {"id": k, "none": None} for k, row in enumerate(SAID)]),
    "table.csv": b"rejected,chosen,prompt\n" + "".join(f'b,"{row["chosen"]}",{row["prompt"]}\n' for row in SAID).encode(),
}


@pytest.mark.parametrize("name", [*COPIES, "table.parquet", "saved"])
def test_rows_that_are_written_in_another_way_are_the_same_rows(tmp_path: Path, name: str) -> None:
    from datasets import Dataset

    (tmp_path / "train.jsonl").write_bytes(_lines_of(SAID))
    if name in COPIES:
        (tmp_path / name).write_bytes(COPIES[name])
    elif name == "saved":
        Dataset.from_list(SAID).save_to_disk(str(tmp_path / name))
    else:
        Dataset.from_list(SAID).to_parquet(str(tmp_path / name))

    def meet(split: str | None = None, of_train: str | None = None) -> bool:
        training = find(Source(str(tmp_path / "train.jsonl"), split=of_train))
        return shared(find(Source(str(tmp_path / name), split=split)), [training], sha256) is not None

    assert meet() and meet("train[:1]") and meet("train[9:]", "train[:10]")
    assert not meet("train[10:]", "train[:50%]")


@pytest.mark.parametrize(
    "rows",
    [
        SAID[:-1], [*SAID, SAID[0] | {"prompt": "else"}], SAID[1:], [*SAID[:19], SAID[19] | {"chosen": "c"}],
        SAID[::-1], [SAID[0] | {"prompt": "Q0"}, *SAID[1:]],
    ],
)  # fmt: skip
def test_other_rows_are_no_copy(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    (tmp_path / "train.jsonl").write_bytes(_lines_of(SAID))
    (tmp_path / "other.jsonl").write_bytes(_lines_of(rows))
    both = [find(Source(str(tmp_path / name))) for name in ("other.jsonl", "train.jsonl")]
    assert shared(both[0], both[1:], sha256) is None


def test_rows_that_are_split_into_files_anew_are_the_same_rows(tmp_path: Path) -> None:
    for name, rows in {"whole": SAID, "parts/train-0": SAID[:7], "parts/train-1": SAID[7:]}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_bytes(_lines_of(rows))
    whole, parts = Source(f"{tmp_path}/whole.jsonl"), Source(f"{tmp_path}/parts")
    for held_out, training in ((whole, parts), (parts, whole)):
        found = shared(find(held_out), [find(training)], sha256)
        assert found and found.name == held_out.path
    assert shared(find(whole), [find(Source(f"{tmp_path}/parts/train-1.jsonl"))], sha256) is None


def test_of_files_that_differ_one_row_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every start looks at them, also one that finds its tokens in the cache."""
    read_rows: list[int] = []
    plain = parts_module.rows_of

    def counted(path: Path):
        for row in plain(path):
            read_rows.append(row.line)
            yield row

    monkeypatch.setattr(parts_module, "rows_of", counted)
    for k in range(3):
        (tmp_path / f"{k}.jsonl").write_bytes(_lines_of([row | {"prompt": f"{k} {row['prompt']}"} for row in SAID]))
    listings = [find(Source(f"{tmp_path}/{k}.jsonl")) for k in range(3)]
    assert shared(listings[0], listings[1:], sha256) is None and read_rows == [1, 1, 1]
    read_rows.clear()
    assert shared(listings[0], listings[:1], sha256) is not None and not read_rows


@pytest.mark.parametrize(
    ("files", "split", "rows"),
    [
        (["pairs_train_v2", "pairs_test_v2"], "train", 1),
        (["pairs_train_v2", "pairs_test_v2"], None, 1),
        (["pairs-train-v1.1", "pairs-valid-v1.1"], "validation", 2),
        (["pairs_train_v1", "pairs_train_v2"], "train", "set split to one of train_v1, train_v2"),
        (["pairs_train", "pairs_train_v2"], "train", 1),
        (["pairs_train_v1", "pairs_train_v2"], "train_v2", 2),
        (["train_prefs", "test_prefs"], "train", "set split to one of test_prefs, train_prefs"),
    ],
)
def test_a_version_behind_the_name_of_a_split(files: list[str], split: str | None, rows: int | str, tmp_path: Path) -> None:
    root = _tree(tmp_path, {f"{name}.jsonl": k for k, name in enumerate(files, start=1)})
    if isinstance(rows, int):
        assert len(read(Source(root, split=split))) == rows
    else:
        with pytest.raises(DataError, match=rows):
            read(Source(root, split=split))


@pytest.mark.parametrize(
    ("names", "split", "left"),
    [
        (["orca", "hh", "uf_train"], None, ["hh.jsonl", "orca.jsonl"]),
        (["my_train_set", "training", "latest", "constrained_test"], "train", ["latest.jsonl"]),
        (["train", "train_extra", "trainer", "test"], None, ["train_extra.jsonl", "trainer.jsonl"]),
        (["train", "test"], None, []),
        (["train", "test", "more"], "train+test", ["more.jsonl"]),
        (["a", "b"], None, []),
    ],
)
def test_files_that_are_in_no_split_are_told(names: list[str], split: str | None, left: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text('{"x": 1}\n')
    assert find(Source(str(tmp_path), split=split)).left_out == left


def test_no_file_and_no_shard_is_left_out_in_silence(tmp_path: Path) -> None:
    """A pattern that finds more than the split, and half of a download."""
    for name in ("train.jsonl", "train_extra.jsonl", "more.jsonl"):
        (tmp_path / name).write_text('{"x": 1}\n')
    assert len(read(Source(f"{tmp_path}/*.jsonl", split="train"))) == 1, "so it was asked"
    with pytest.raises(DataError, match=r"more\.jsonl says no split, and others say train; fix: write split: train"):
        read(Source(f"{tmp_path}/*.jsonl"))
    half = tmp_path / "half"
    (half / "data").mkdir(parents=True)
    (half / "data" / "train-00001-of-00003.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(DataError, match=r"2 of 3 shards of train are missing, the first is 00000; fix: fetch them"):
        read(Source(str(half)))
    assert len(read(Source(f"{half}/data/train-00001-*"))) == 1, "a pattern names it"
    for language in ("en", "de"):
        (tmp_path / "z" / language).mkdir(parents=True)
        (tmp_path / "z" / language / "train.jsonl").write_text('{"x": 1}\n')
    assert len(read(Source(f"{tmp_path}/z/*/train.jsonl"))) == 2


@pytest.mark.parametrize(
    ("names", "options", "fix"),
    [
        (["train.jsonl", "test.jsonl"], {"split": "dev"}, "set data.eval.split to one of test, train"),
        (["a/train.jsonl", "b/train.jsonl"], {}, "choose one by data.eval.name"),
        (["train.jsonl"], {"revision": "x"}, "drop data.eval.revision"),
    ],
)
def test_the_keys_of_a_held_out_source_are_its_own(
    names: list[str], options: dict[str, Any], fix: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"x": 1}\n')
    with pytest.raises(DataError, match=f"fix: {re.escape(fix)}"):
        find(Source(str(tmp_path), key="data.eval", **options))


def test_of_several_data_sets_a_card_may_name_the_one_that_is_meant(tmp_path: Path) -> None:
    """As `datasets` has it: `default: true`, or the name `default`."""
    for k, name in enumerate(("a", "b", "default"), start=1):
        (tmp_path / f"{name}.jsonl").write_text('{"x": 1}\n' * k)

    def rows(*entries: str, **options: Any) -> int:
        text = "".join(f"- config_name: {entry}\n  data_files: {entry.split()[0]}.jsonl\n" for entry in entries)
        (tmp_path / "README.md").write_text(f"---\nconfigs:\n{text}---\n")
        return len(read(Source(str(tmp_path), **options)))

    marked = "b\n  default: true"
    assert rows("a", marked) == 2
    assert rows("a", marked, name="a") == 1
    assert rows("a", "default") == 3
    for entries in (("a", "b"), ("a", "b\n  default: false"), ("a\n  default: true", marked), ("default", marked)):
        with pytest.raises(DataError, match="several data sets"):
            rows(*entries)


def test_what_files_are_called_breaks_no_message(tmp_path: Path) -> None:
    """A name may hold line breaks, marks that turn the direction of text, and escapes of a terminal."""
    (tmp_path / "train\n\u202e\x1b[31m.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(DataError, match="no split 'test'") as error:
        find(Source(str(tmp_path), split="test"))
    assert str(error.value).isprintable()
    (tmp_path / "README.md").write_text('---\nconfigs:\n- config_name: "a\\n\\u202e"\n  data_files: train*\n---\n')
    with pytest.raises(DataError, match="no data set 'x'") as error:
        find(Source(str(tmp_path), name="x"))
    assert str(error.value).isprintable()
