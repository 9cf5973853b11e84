"""Malformed files and rows: each gives one line that names the file, the line, what is wrong and a fix."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from test_tokenize import merging
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from dspref.data.sources import Source
from dspref.data.store import PairStore, load_pairs
from dspref.data.tokenize import Limits
from dspref.errors import DataError

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}"
    "{{ m.content + ' </s> ' }}{% endfor %}"
)


def line(**row: object) -> bytes:
    return json.dumps({"prompt": "p", "chosen": " a", "rejected": " b"} | row).encode() + b"\n"


def chat(prompt: object = None, chosen: object = None) -> bytes:
    """One chat row whose prompt or chosen may be replaced."""
    user, answer, other = (
        {"role": role, "content": c} for role, c in (("user", "p"), ("assistant", "a"), ("assistant", "b"))
    )
    return line(prompt=prompt or [user], chosen=[answer] if chosen is None else chosen, rejected=[other])


def without(name: str, **row: object) -> bytes:
    values = json.loads(line(**row))
    return json.dumps({key: value for key, value in values.items() if key != name}).encode() + b"\n"


GOOD = line()
USER = {"role": "user", "content": "p"}

# Each case: the file's name, its bytes (None: no such file), the line (None: the whole file), the reason.
CASES: dict[str, tuple[str, bytes | None, int | None, str]] = {
    # The file as a whole
    "missing file": ("a.jsonl", None, None, "no such file"),
    "missing file with a near name": (
        "present.json",
        None,
        None,
        "no such file or folder; fix: did you mean",
    ),
    "glob without a match": ("*.parquet", None, None, "matches no file"),
    "empty file": ("a.jsonl", b"", None, "empty"),
    "blank lines only": ("a.jsonl", b"\n \r\n\n", None, "empty"),
    "only a BOM": ("a.jsonl", b"\xef\xbb\xbf", None, "empty"),
    "empty array": ("a.json", b"[]", None, "empty"),
    "header-only csv": ("a.csv", b"prompt,chosen,rejected\n", None, "empty"),
    "unknown kind": ("a.txt", b"hello", None, "unknown kind of file"),
    "not a gzip": ("a.jsonl.gz", GOOD, None, "not a complete gzip"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(GOOD * 50)[:-9], None, "not a complete gzip"),
    "gzip under another name": ("a.jsonl", gzip.compress(GOOD), None, "compressed with gzip"),
    "not a parquet": ("a.parquet", b"PAR1 no", None, "not a readable parquet file"),
    "UTF-16": ("a.jsonl", "\ufeff{}".encode("utf-16-le"), 1, "UTF-16"),
    "broken array": ("a.json", b'[\n{"prompt": "p"},\n{"prompt" "p"}]', 3, "column 11"),
    "cut array": ("a.json", b'[{"prompt": "p"},', 1, "broken JSON array"),
    "object over several lines": ("a.json", b'{\n"prompt": "p"\n}', 1, "spread over several lines"),
    "csv that is not UTF-8": ("a.csv", b"prompt,chosen,rejected\np,\xff,b\n", 2, "byte 0xff at offset 2"),
    "csv with an open quote": ("a.csv", b'prompt,chosen,rejected\np,"a,b\n', 2, "broken CSV"),
    "csv with a column twice": ("a.csv", b"prompt,chosen,chosen\np,a,b\n", 1, "same name"),
    # One row
    "0xff byte": ("a.jsonl", GOOD + b'{"prompt": "\xff"}\n', 2, "byte 0xff at offset 12"),
    "latin-1": ("a.jsonl", GOOD + '{"prompt": "\u00e4"}\n'.encode("latin-1"), 2, "not UTF-8: byte 0xe4"),
    "multibyte cut at the end": ("a.jsonl", GOOD + '{"prompt": "\u00e4'.encode()[:-1], 2, "not UTF-8"),
    "NUL byte": ("a.jsonl", GOOD + b'{"prompt": "\0"}\n', 2, "NUL byte at offset 12"),
    "escaped NUL": ("a.jsonl", GOOD + line(chosen="a\0b"), 2, "chosen: holds a NUL"),
    "lone surrogate": ("a.jsonl", GOOD + line(chosen="\ud800"), 2, "chosen: holds a lone surrogate"),
    "lone surrogate in a message": ("a.jsonl", chat(chosen=[{"role": "\udc00"}]), 1, "chosen: holds a lone"),
    "cut line": ("a.jsonl", GOOD + b'{"prompt": "p", "cho\n' + GOOD, 2, "broken JSON at column 17"),
    "trailing comma": ("a.jsonl", GOOD + b'{"prompt": "p",}\n', 2, "broken JSON at column 1"),
    "single quotes": ("a.jsonl", b"{'prompt': 'p'}\n", 1, "broken JSON at column 2"),
    "two objects on a line": ("a.jsonl", GOOD + GOOD.strip() + GOOD, 2, "broken JSON at column"),
    "NaN": ("a.jsonl", GOOD + b'{"prompt": NaN}\n', 2, "NaN is not JSON"),
    "Infinity": ("a.jsonl", GOOD + b'{"prompt": -Infinity}\n', 2, "-Infinity is not JSON"),
    "endless integer": ("a.jsonl", GOOD + b'{"prompt": ' + b"9" * 5000 + b"}\n", 2, "unreadable JSON"),
    "endless nesting": ("a.jsonl", GOOD + b'{"prompt": ' + b"[" * 99999 + b"\n", 2, "unreadable JSON"),
    "a list": ("a.jsonl", GOOD + b"[1]\n", 2, "row: list, not an object"),
    "a string": ("a.jsonl", GOOD + b'"text"\n', 2, "row: str, not an object"),
    "a number": ("a.jsonl", GOOD + b"1\n", 2, "row: int, not an object"),
    "null": ("a.jsonl", GOOD + b"null\n", 2, "row: null, not an object"),
    "array of strings": ("a.json", b'["a"]', 1, "row: str, not an object"),
    "csv row with too few fields": ("a.csv", b"prompt,chosen,rejected\np,a\n", 2, "row: 2 fields"),
    "csv without an answer": ("a.csv", b"prompt,chosen,rejected\np,,b\n", 2, "chosen: empty answer"),
    "missing column": ("a.jsonl", GOOD + without("rejected"), 2, "rejected: no column 'rejected'"),
    "misspelt column": ("a.jsonl", without("chosen", choosen="a"), 1, "set data.train.columns.chosen: choosen"),
    "wrong case": ("a.jsonl", without("prompt", Prompt="q"), 1, "set data.train.columns.prompt: Prompt"),
    "null field": ("a.jsonl", GOOD + line(chosen=None), 2, "chosen: null"),
    "null prompt": ("a.jsonl", GOOD + line(prompt=None), 2, "prompt: null"),
    "integer": ("a.jsonl", GOOD + line(chosen=1), 2, "chosen: int, not text"),
    "object": ("a.jsonl", GOOD + line(chosen={}), 2, "chosen: dict, not text"),
    "text and chat": ("a.jsonl", GOOD + line(chosen=[USER]), 2, "row: mixes text and chat"),
    "no shared prefix": ("a.jsonl", without("prompt", chosen="x", rejected="y"), 1, "prompt: no such column"),
    "empty answer": ("a.jsonl", GOOD + line(rejected=""), 2, "rejected: empty answer"),
    "white space": ("a.jsonl", GOOD + line(chosen=" \n\t"), 2, "chosen: empty answer"),
    "identical": ("a.jsonl", GOOD + line(chosen=" b"), 2, "rejected: identical to chosen"),
    "identical in tokens": (
        "a.jsonl",
        GOOD + line(chosen=" A", rejected=" B"),
        2,
        "identical to chosen after tok",
    ),
    "empty message list": ("a.jsonl", GOOD + chat(chosen=[]), 2, "chosen: empty message list"),
    "unknown role": ("a.jsonl", chat(chosen=[{"role": "a b", "content": "a"}]), 1, "chosen[0].role: unknown"),
    "no role": ("a.jsonl", chat(chosen=[{"content": "a"}]), 1, "chosen[0].role: missing"),
    "no content": ("a.jsonl", chat(chosen=[{"role": "assistant"}]), 1, "chosen[0].content: missing"),
    "user twice": ("a.jsonl", chat(chosen=[USER | {"content": "x"}]), 1, "chosen: no assistant message"),
    "template refuses": (
        "a.jsonl",
        chat() + chat([USER | {"content": "bad"}]),
        2,
        "chat_template: TemplateError",
    ),
    "control characters": ("a.jsonl", chat(chosen=[{"role": "\x1b[31m\nx"}]), 1, "chosen[0].role: unknown"),
}


def load(source: Source, cache_dir: Path) -> None:
    names = ["<unk>", "</s>", "p", "a", "b"]
    backend = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )
    load_pairs([source], tokenizer, Limits(), on_bad_row="error", cache_dir=cache_dir, log=lambda line: None)


def assert_one_line(message: str, place: str, reason: str) -> None:
    assert message.startswith(place), message
    assert reason in message
    assert re.search(r"; fix: \S", message), message
    assert message.isprintable(), message


@pytest.mark.parametrize("case", CASES)
def test_bad_data_is_one_line_with_place_reason_and_fix(case: str, tmp_path: Path) -> None:
    name, data, number, reason = CASES[case]
    (tmp_path / "present.jsonl").write_bytes(GOOD)
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        load(Source(str(tmp_path / name)), tmp_path / "cache")
    place = f"{tmp_path / name}:{number}: " if number else f"{tmp_path / name}: "
    assert_one_line(str(caught.value), place, reason)


@pytest.mark.parametrize("prompt", ["s", "i"])
def test_a_prompt_that_the_tokenizer_joins_with_the_answers_is_one_line_and_its_fix_works(
    prompt: str, tmp_path: Path
) -> None:
    def loaded(before: str) -> PairStore:
        (tmp_path / "a.jsonl").write_bytes(line(prompt=prompt, chosen=f"{before}k", rejected=f"{before}n"))
        how = {"on_bad_row": "error", "cache_dir": tmp_path / "cache", "log": print}
        return load_pairs([Source(str(tmp_path / "a.jsonl"))], merging(), Limits(), **how)

    with pytest.raises(DataError) as caught:
        loaded("")
    assert_one_line(
        str(caught.value), f"{tmp_path / 'a.jsonl'}:1: prompt: ", "its tokens become others where an answer follows"
    )
    assert "fix: begin the answers with a space" in str(caught.value)
    assert loaded(" ").lengths.tolist() == [[1, 3, 3]]


def test_a_folder_without_data_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text("nothing")
    with pytest.raises(DataError) as caught:
        load(Source(str(tmp_path / "folder")), tmp_path / "cache")
    assert_one_line(str(caught.value), f"{tmp_path}/folder: ", "holds no data file")


def test_a_parquet_file_without_rows_is_one_line(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.string()) for name in ("prompt", "chosen", "rejected")])
    pq.write_table(schema.empty_table(), tmp_path / "a.parquet")
    with pytest.raises(DataError) as caught:
        load(Source(str(tmp_path / "a.parquet")), tmp_path / "cache")
    assert_one_line(str(caught.value), f"{tmp_path}/a.parquet: ", "empty")


def test_a_parquet_file_whose_counts_are_wrong_is_one_line(tmp_path: Path) -> None:
    """The reader would end the process: `terminate called after throwing an instance of 'std::length_error'`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1]}).select([]), tmp_path / "a.parquet")
    with pytest.raises(DataError) as caught:
        load(Source(str(tmp_path / "a.parquet")), tmp_path / "cache")
    assert_one_line(str(caught.value), f"{tmp_path}/a.parquet: ", "counts of rows or columns are wrong")


@pytest.mark.parametrize("sign", ["state.json", "dataset_dict.json"])
def test_a_damaged_saved_data_set_is_one_line(sign: str, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    for name in (sign, "dataset_info.json"):
        (tmp_path / "saved" / name).write_text("{")
    with pytest.raises(DataError) as caught:
        load(Source(str(tmp_path / "saved")), tmp_path / "cache")
    assert_one_line(str(caught.value), f"{tmp_path}/saved: ", "damaged saved data set")


@pytest.mark.parametrize("name", ["a\x1b[2J.jsonl", "a\nb.jsonl", "a\u202eb.jsonl", "a" * 200 + ".jsonl"])
def test_a_name_of_a_file_is_printable_wherever_it_is_told(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for content in (b"", GOOD + b"{", GOOD + line(rejected=""), None):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            load(Source(str(path)), tmp_path / "cache")
        assert_one_line(str(caught.value), f"{tmp_path}/a", ".jsonl")
