"""A data format of the user's own, from the YAML's `module:function` to pairs, and how it is refused."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_store import contents, words

from dspref import config, own_code
from dspref.data.overlap import shared
from dspref.data.own_format import own_format
from dspref.data.sources import Source, find, sha256
from dspref.data.store import PairStore, load_pairs
from dspref.data.tokenize import Limits
from dspref.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[3]
NUMBERS = itertools.count()
# A layout that no rule of dspref knows.
RAW = [
    {"q": "p1", "turns": [{"text": " a a", "votes": 3}, {"text": " b", "votes": 1}]},
    {"q": "p2", "turns": [{"text": " c", "votes": 0}, {"text": " a b", "votes": 9}]},
    {"q": "p3", "turns": [{"text": " c", "votes": 5}, {"text": " b", "votes": 5}]},
]
PICK = """\
def mine(row):
    better, worse = sorted(row.pop("turns"), key=lambda turn: -turn["votes"])
    if better["votes"] == worse["votes"]:
        return None
    return {"prompt": row["q"], "chosen": better["text"], "rejected": worse["text"]}
"""
PLAIN = [
    {"prompt": "p1", "chosen": " a a", "rejected": " b"},
    {"prompt": "p2", "chosen": " a b", "rejected": " c"},
]

OF_PREFERENCE = "from dspref.data import Preference"

Write = Callable[..., Source]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a module into the working directory, under a name that no other test has, and rows; the source of both."""
    monkeypatch.chdir(tmp_path)

    def written(source: str | None, rows: list[Any] = RAW, file: str = "rows.jsonl", **keys: Any) -> Source:
        name = f"formats_of_test_{next(NUMBERS)}"
        if source is not None:
            (tmp_path / f"{name}.py").write_text(source)
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Source(file, format=f"{name}:mine", **keys)

    return written


def load(*sources: Source, log: list[str] | None = None, on_bad_row: str = "error") -> PairStore:
    say = (log if log is not None else []).append
    return load_pairs(sources, words(), Limits(), cache_dir=Path("cache"), log=say, on_bad_row=on_bad_row)


def plain(tmp_path: Path, rows: list[Any], **keys: Any) -> PairStore:
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load(Source("plain.jsonl", **keys))


def returning(text: str, imports: str = "") -> str:
    return f"{imports}\n\n\ndef mine(row):\n    return {text}\n"


def test_what_it_gives_stands_in_the_place_of_the_row(write: Write, tmp_path: Path) -> None:
    """Row 3 is left out, and said; a function that changes its row changes a copy."""
    log: list[str] = []
    source = write(PICK)
    store = load(source, log=log)
    assert contents(store) == contents(plain(tmp_path, PLAIN))
    assert [store.where(k) for k in range(2)] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert log == [f"data: left out 1 of 3 rows: 1 x {source.format}: left the row out"]
    assert store.report["dropped"] == {f"{source.format}: left the row out": 1}


@pytest.mark.parametrize(
    "text",
    [
        'Preference("p1", " a a", " b")',
        '{"prompt": "p1", "chosen": "p1 a a", "rejected": "p1 b"}',  # which both repeat the prompt, and lose it
        '[{"prompt": "p1", "chosen": " a a", "rejected": " b"}]',
        '{"prompt": "p1", "completions": [" b", " a a"], "scores": [1, 2]}',
        '[Preference("p1", " a a", " b")]',
    ],
)
def test_every_layout_that_is_read_can_be_given(write: Write, tmp_path: Path, text: str) -> None:
    store = load(write(returning(text, OF_PREFERENCE), RAW[:1]))
    assert contents(store) == contents(plain(tmp_path, PLAIN[:1]))


def test_a_list_is_several_pairs_of_one_row_and_a_fault_of_one_does_not_touch_the_others(write: Write) -> None:
    text = (
        '[{"prompt": row["q"], "chosen": " a", "rejected": " b"}, {"prompt": row["q"], "chosen": " c", "rejected": " b"}, 3]'
    )
    source, log = write(returning(text), RAW[:2]), []
    store = load(source, on_bad_row="drop", log=log)
    assert store.rows.tolist() == [0, 0, 1, 1]
    reason = f"{source.format}: {Path(own_code.found(source.format or '', own_code.FORMAT, os.getcwd())[1].path)}:4: "
    assert store.report["dropped"] == {f"{reason}[2] of the list is int; a format gives a dict, a Preference, a list of "
                                       "these, or None": 2}  # fmt: skip
    assert log[-1].startswith("data: left out 2 of 6 pairs: 2 x ")


def test_a_preference_is_taken_as_it_is(write: Write, tmp_path: Path) -> None:
    """Answers that begin with the prompt's text keep it, where those of a row lose it."""
    source = write(returning('Preference("p1", " p1 a", " p1 b")', OF_PREFERENCE), RAW[:1])
    ids = contents(load(source))[0]
    lost = contents(plain(tmp_path, [{"prompt": "p1", "chosen": " p1 a", "rejected": " p1 b"}]))[0]
    assert [len(part) for part in ids] == [1, 3, 3] and [len(part) for part in lost] == [1, 2, 2]


@pytest.mark.parametrize("whole", ["dict", "Preference"])
def test_as_and_pairs_go_with_it(write: Write, whole: str) -> None:
    """`as: chat` makes messages of its texts, `pairs` pairs of its scored answers."""
    rows = [{"q": "p1", "a": [" a", " b", " c"]}]
    scored = write(returning('{"prompt": row["q"], "completions": row["a"], "scores": [2, 3, 1]}'), rows)
    assert len(load(scored)) == 3
    assert len(load(Source(**{**vars(scored), "pairs": "best_against_worst"}))) == 1
    pair = f"{whole}(prompt='p1', chosen='a', rejected='b')"
    text = write(returning(pair, OF_PREFERENCE), rows, as_="chat")
    tokenizer = words()
    tokenizer.chat_template = (
        "{% for m in messages %}c {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}c {% endif %}"
    )
    store = load_pairs([text], tokenizer, Limits(), cache_dir=Path("cache"), log=print, on_bad_row="error")
    c, a, p1, end = (tokenizer.convert_tokens_to_ids(word) for word in ("c", "a", "p1", "</s>"))
    assert contents(store)[0][:2] == [[c, p1, end, c], [a, end]]


def test_pairs_without_effect_are_refused_by_what_it_gives(write: Write) -> None:
    source = write(PICK, pairs="best_against_rest")
    with pytest.raises(DataError) as caught:
        load(source)
    assert str(caught.value).endswith(
        f"no row holds several answers; fix: drop it, or give completions and scores by {source.format}"
    )


def test_rows_of_a_format_speak_one_way(write: Write) -> None:
    """A `system` that it gives for a later row makes a conversation of the first one too."""
    text = '{"prompt": "p1", "chosen": "a", "rejected": "b", **({"system": "c"} if row["q"] == "p3" else {})}'
    tokenizer = words()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} </s> {% endfor %}"
    store = load_pairs([write(returning(text))], tokenizer, Limits(), cache_dir=Path("cache"), log=print, on_bad_row="error")
    p1, end, c = (tokenizer.convert_tokens_to_ids(word) for word in ("p1", "</s>", "c"))
    assert [pair[0] for pair in contents(store)] == [[p1, end], [p1, end], [c, end, p1, end]]


def test_the_example_of_the_docs_reads_its_rows(write: Write, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "rows.md").read_text(encoding="utf-8").partition("## A format of your own")[2]
    (module,), (section,) = (re.findall(rf"^```{kind}\n(.*?)^```$", text, re.M | re.S) for kind in ("python", "yaml"))
    name = re.match(r"# (\w+\.py)\n", module)
    (tmp_path / (name[1] if name else "")).write_text(module)
    train = yaml.safe_load(section)["data"]["train"]
    rows = [{"question": "p1", "answers": [{"text": f" {word}", "votes": votes} for word, votes in given]}
            for given in ([("b", 1), ("a a", 3)], [("a", 2), ("c", 2)])]  # fmt: skip
    (tmp_path / train["path"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert contents(load(Source(**train))) == contents(plain(tmp_path, PLAIN[:1]))


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def test_the_tokens_are_found_again_until_the_function_or_what_it_imports_is_another(write: Write, tmp_path: Path) -> None:
    """Of files that it imports, those of the user's count, at any depth; each edit is seen by a fresh process."""
    write(None)
    (tmp_path / "picked").mkdir()
    files = {
        "picked/__init__.py": "",
        "picked/mine.py": "import json\nfrom . import words\n\ndef mine(row):\n    return words.pair(row)\n\nother = mine\n",
        "picked/words.py": "import beside\n\ndef pair(row):\n    return {'prompt': row['q'], 'chosen': beside.A}\n",
        "beside.py": "A = ' a'\n",
        "unrelated.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    code = "from dspref.data.own_format import own_format; print(own_format('picked.mine:mine', 'data.train').identity)"

    def identity() -> str:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
        ).stdout

    seen = [identity()]
    for name in files:
        if name != "unrelated.py":
            (tmp_path / name).write_text(files[name] + "\n# an edit\n")
            seen.append(identity())
    assert len({*seen}) == len(seen)
    (tmp_path / "unrelated.py").write_text("# an edit\n")
    assert identity() == seen[-1]


def test_another_format_has_other_tokens_and_the_same_has_the_same(write: Write, tmp_path: Path) -> None:
    same, copy = write(PICK), write(PICK)
    other = write(PICK + "\n# an edit\n")
    addresses = [load(source).address for source in (same, same, copy, other)]
    assert addresses[0] == addresses[1] == addresses[2] != addresses[3]
    assert load(same).key == load(other).key  # the pairs themselves are the same


def test_its_file_alone_is_its_digest(write: Write, tmp_path: Path) -> None:
    own = own_format(str(write(PICK).format), "data.train")
    assert own.identity == ["mine", sha256(Path(own.source.path))]


def test_held_out_rows_are_found_among_training_rows_by_what_it_gives(write: Write, tmp_path: Path) -> None:
    """Files that differ, and say the same pairs."""
    (tmp_path / "training").mkdir()
    for name, half in (("0", RAW[:1]), ("1", RAW[1:2])):
        (tmp_path / "training" / f"train-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in half))
    one = Source("training/*.jsonl", format=write(PICK).format)
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PLAIN))
    listings = [find(source) for source in (Source("test.jsonl", key="data.eval"), one)]
    assert shared(listings[0], [listings[1]], sha256) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Faults in a row


MEND = "fix: mend the row or the function, or set data.on_bad_row: drop"
ALSO = "(also rows.jsonl:2, rows.jsonl:3)"
# Each: (the function, what is said behind the place of the row and the format). HERE is the path of the user's file.
BAD_ROWS: dict[str, tuple[str, str]] = {
    "raises": (PICK.replace("row.pop", "row['a'].pop"), f"HERE:2: KeyError: 'a' {ALSO}; {MEND}"),
    "exits": ("import sys\n\n\ndef mine(row):\n    sys.exit('no\\nmore')\n", "HERE:5: SystemExit: no more (also"),
    "recurses": ("def mine(row):\n    return mine(row)\n", "HERE:2: RecursionError: maximum recursion depth exceeded"),
    "raises elsewhere": (returning("json.loads('{')", "import json"), "HERE:5: JSONDecodeError: Expecting property"),
    "a text": (
        returning("row['q']"),
        f"HERE:4: it is str; a format gives a dict, a Preference, a list of these, or None {ALSO}; {MEND}",
    ),
    "texts": (returning("('p', 'a', 'b')"), "HERE:4: it is tuple; a format gives"),
    "nothing among pairs": (returning("[None]"), "HERE:4: [0] of the list is null; a format gives"),
    "a surrogate": (
        returning("{'prompt': 'p', 'chosen': '\\ud800', 'rejected': 'b'}"),
        f"HERE:4: it holds a lone surrogate (\\ud800) {ALSO}; {MEND}",
    ),
    "without end": (returning("[x := {}, x.update(prompt=x)][:1]"), "HERE:4: [0] of the list is nested too deeply"),
    "no answer": (
        returning("{'prompt': 'p', 'better': 'a', 'rejected': 'b'}"),
        "chosen: no column 'chosen' among ['better', 'prompt', 'rejected'] "
        f"{ALSO}; fix: mend HERE:4, or set data.on_bad_row: drop",
    ),
    "an empty answer": (returning("{'prompt': 'p', 'chosen': '', 'rejected': 'b'}"), "chosen: empty answer"),
    "a number": (returning("{'prompt': 'p', 'chosen': 3, 'rejected': 'b'}"), "chosen: int, not text or a message list"),
    "a mixed pair": (
        returning("Preference('p', [{'role': 'user', 'content': 'x'}], 'b')", OF_PREFERENCE),
        "row: mixes text and chat: prompt is text, chosen is chat, rejected is text",
    ),
    "an image that is none": (returning("{'prompt': 'p', 'chosen': 'a', 'rejected': 'b', 'images': 3}"), "images"),
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_fault_of_it_is_a_bad_row(write: Write, tmp_path: Path, fault: str) -> None:
    function, expected = BAD_ROWS[fault]
    source = write(function)
    name = str(source.format)
    with pytest.raises(DataError) as caught:
        load(source)
    expected = expected.replace("HERE", str(tmp_path / name.replace(":mine", ".py")))
    assert str(caught.value).startswith(f"rows.jsonl:1: {name}: {expected}") and "\n" not in str(caught.value)


def test_bad_rows_are_dropped_and_counted(write: Write) -> None:
    source = write(PICK.replace("turn[", "turn.get('no', turn)[") + "\n", [*RAW, {"q": "p4"}])
    store = load(source, on_bad_row="drop")
    dropped = list(store.report["dropped"])
    assert len(store) == 2 and len(dropped) == 2
    assert dropped[1].endswith(".py:2: KeyError: 'turns'") and dropped[0].endswith("left the row out")


def test_a_row_that_is_left_out_is_no_bad_row_and_none_is_left_is_said(write: Write, tmp_path: Path) -> None:
    source = write(returning("None"))
    with pytest.raises(DataError) as caught:
        load(source)
    assert f"none of 3 rows is left (3 x {source.format}: left the row out); fix: mend {tmp_path}/" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Refused with the config


def run_file(tmp_path: Path, **train: Any) -> Path:
    values = {"data": {"train": {"path": "rows.jsonl", **train}}, "model": {"name_or_path": "m"}, "output_dir": "out"}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return tmp_path / "x.yaml"


# Each: (source or None, the key, what the line says). MODULE stands for the module's name, HERE for its path.
FAULTS: dict[str, tuple[str | None, str, str]] = {
    "no module": (None, "MODULE:mine", "no module MODULE, neither in the working directory (FOLDER) nor installed"),
    "no function": ("def main(row):\n    pass\n", "MODULE:mine", "HERE: has no function mine; did you mean 'main'?"),
    "a class": ("class mine:\n    pass\n", "MODULE:mine", "HERE: mine is no function of Python (def)"),
    "a file": (PICK, "./MODULE.py:mine", "must be written module:function, such as MODULE:mine, not './MODULE.py:mine'"),
    "a word": (PICK, "chatml", "must be written module:function, such as my_formats:my_format, not 'chatml'"),
    "syntax": ("def mine(row)\n", "MODULE:mine", "HERE:1: SyntaxError: expected ':'"),
    "import": ("import no_such_thing\n", "MODULE:mine", "HERE:1: ModuleNotFoundError: No module named 'no_such_thing'"),
    "exits": ("import sys\nsys.exit(3)\n", "MODULE:mine", "HERE:2: SystemExit: 3"),
    "of two": (
        "def mine(row, other):\n    pass\n",
        "MODULE:mine",
        "HERE:1: is a function of row, other, and must be one of a row",
    ),
    "of nothing": ("def mine():\n    pass\n", "MODULE:mine", "HERE:1: is a function of nothing, and must be one of a row"),
    "yields": (
        "def mine(row):\n    yield row\n",
        "MODULE:mine",
        "HERE:1: is no plain function (yield, async); return a dict",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_had_is_one_line_of_the_config(write: Write, tmp_path: Path, fault: str) -> None:
    source, key, words_of = FAULTS[fault]
    module = str(write(source).format).removesuffix(":mine")
    path = run_file(tmp_path, format=key.replace("MODULE", module))
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    expected = words_of.replace("HERE", str(tmp_path / f"{module}.py")).replace("FOLDER", str(tmp_path))
    assert str(caught.value).startswith(f"{path}:4:5: data.train.format: {expected.replace('MODULE', module)}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("beside", "key"),
    [
        ({"columns": {"prompt": "q"}}, "data.train.columns.prompt"),
        ({"columns": {"images": "pictures"}}, "data.train.columns.images"),
        ({"template": {"prompt": "{q}", "chosen": "{a}", "rejected": "{b}"}}, "data.train.template"),
    ],
)
def test_what_names_fields_too_is_refused(write: Write, tmp_path: Path, beside: dict[str, Any], key: str) -> None:
    path = run_file(tmp_path, format=write(PICK).format, **beside)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    line = f"{key}: has no effect beside format, whose function names the fields itself; drop one of them"
    assert str(caught.value).endswith(line) and "\n" not in str(caught.value)


def test_a_file_that_would_stand_for_a_library_is_refused(write: Write, tmp_path: Path) -> None:
    """`datasets` is not loaded yet, and would be this file from here on."""
    write(None)
    (tmp_path / "datasets.py").write_text(PICK)
    code = "from dspref.data.own_format import own_format; own_format('datasets:mine', 'data.train')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    expected = f"{tmp_path}/datasets.py: dspref, or what it stands on, has a module datasets; give yours another name"
    assert done.stderr.splitlines()[-1].endswith(f"ConfigError: data.train.format: {expected}")


def test_no_torch_is_loaded_for_it(write: Write, tmp_path: Path) -> None:
    path = run_file(tmp_path, format=write(PICK).format)
    code = (
        f"import sys; from dspref import config; config.load({str(path)!r}); print({{'torch', 'numpy'}} & {{*sys.modules}})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_what_lies_in_a_run_folder_is_not_run_and_pointed_to(write: Write, tmp_path: Path) -> None:
    name = str(write(None).format)
    path = run_file(tmp_path, format=name)
    kept = own_code.kept_at(tmp_path, own_code.FORMAT, name)
    kept.parent.mkdir()
    kept.write_text(f"open({str(tmp_path / 'has run')!r}, 'w')\n{PICK}")
    with pytest.raises(ConfigError, match=f"no module .*; the run has it in {kept}: copy it here if you trust it$"):
        config.load(path)
    assert not (tmp_path / "has run").exists()


@pytest.mark.parametrize(("place", "name"), [(".", "formats.kept"), ("formats", "kept"), ("..", "run.formats.kept")])
@pytest.mark.parametrize("kind", own_code.KINDS)
def test_a_module_in_a_run_folder_is_not_run_where_the_yaml_names_it_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, name: str, kind: own_code.Kind
) -> None:
    (tmp_path / "run" / "formats").mkdir(parents=True)
    (tmp_path / "run" / "config.resolved.yaml").write_text("")
    (tmp_path / "run" / "formats" / "kept.py").write_text(f"open({str(tmp_path / 'has run')!r}, 'w')\n{PICK}")
    monkeypatch.chdir(tmp_path / "run" / place)
    with pytest.raises(ConfigError, match=f"^{tmp_path}/run is a run folder, and what lies in one is not run; copy"):
        own_code.found(f"{name}:mine", kind, os.getcwd())
    assert not (tmp_path / "has run").exists()


def test_the_schema_knows_how_it_is_written() -> None:
    schema = pytest.importorskip("jsonschema").Draft202012Validator(json.loads(config.schema()))
    run = {"model": {"name_or_path": "m"}, "output_dir": "out"}
    for name, good in (("a.b:c", True), (None, True), ("chatml", False), ("a.b:", False), ("./a.py:c", False)):
        assert schema.is_valid(run | {"data": {"train": {"path": "p", "format": name}}}) == good, name
