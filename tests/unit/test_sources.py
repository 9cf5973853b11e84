"""Rows of every kind of file arrive with their values and their place."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from dspref.data.formats import to_preference
from dspref.data.sources import BadRow, Row, Source, read
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
    with pytest.raises(DataError, match=r"no split 'dev'; fix: set data.split to one of \['test', 'train'\]"):
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
    assert len(read(Source(str(tmp_path), split="dev"))) == 3


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

    def load_dataset(path: str, split: str) -> list[dict]:
        if path == "owner/absent":
            raise ConnectionError("no\nnetwork")
        return [{"split": split}]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read(Source("owner/name", split="dev")) == [Row({"split": "dev"}, "owner/name:1")]
    with pytest.raises(DataError, match=r"^owner/absent: not on disk, .*: no network; fix: .*$"):
        read(Source("owner/absent"))
