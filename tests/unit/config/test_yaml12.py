"""YAML as people write it and as nobody should: values with their places, or one line."""

from __future__ import annotations

import os
import string
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspref import reading
from dspref.config import strategy
from dspref.config.sections import in_full
from dspref.config.yaml12 import MAX_DEPTH, Position, apply_override, parse
from dspref.errors import ConfigError

DOCUMENT = "train: {seed: 1}\ndata:\n  train:\n    - path: a\n"

# What stands in a file, where it is blamed, and why.
REFUSED = {
    "alias of itself": ("a: &x [*x]\n", "1:8", "aliases"),
    "alias of itself in a mapping": ("a: &x {b: *x}\n", "1:11", "aliases"),
    "alias as a key": ("a: &x b\n*x : 1\n", "2:1", "aliases"),
    "alias of a scalar": ("a: &x 1\nb: *x\n", "2:4", "aliases"),
    "alias without an anchor": ("a: *x\n", "1:4", "aliases"),
    "empty float": ("a: !!float ''\n", "1:4", "as float"),
    "float of words": ("a: !!float abc\n", "1:4", "as float"),
    "underlined float": ("a: !!float 1_0.5\n", "1:4", "as float"),
    "base 60": ("a: !!int 1:30\n", "1:4", "as int"),
    "other digits": ("a: !!int ١٢\n", "1:4", "as int"),
    "null of words": ("a: !!null 5\n", "1:4", "as null"),
    "bool of words": ("a: !!bool yes\n", "1:4", "as bool"),
    "list as an integer": ("a: !!int [1]\n", "1:4", "as int"),
    "integer of 5,000 digits": (f"a: {'1' * 5000}\n", "1:4", "cannot read this value"),
    "integer of 5,000 hexadecimal digits": (f"a: 0x{'1' * 5000}\n", "1:4", "cannot read this value"),
    "set": ("a: !!set {b}\n", "1:4", "the tag '!!set'"),
    "binary": ("a: !!binary aGVsbG8=\n", "1:4", "the tag '!!binary'"),
    "date": ("a: !!timestamp 2001-01-01\n", "1:4", "the tag '!!timestamp'"),
    "ordered": ("a: !!omap [b: 1]\n", "1:4", "the tag '!!omap'"),
    "pairs": ("a: !!pairs [b: 1]\n", "1:4", "the tag '!!pairs'"),
    "merge by tag": ("? !!merge '<<'\n: {b: 1}\n", "1:3", "the tag '!!merge'"),
    "Python by another name": ("%TAG ! tag:yaml.org,2002:python/\n---\na: !object:os.system x\n", "3:4", "python/object"),
    "list": ("a: " + "[" * (MAX_DEPTH + 1), "1:53", "nested too deeply"),
    "mapping": ("{a: " * (MAX_DEPTH + 1), "1:198", "nested too deeply"),
    "20,000 levels": ("a: " + "[" * 20_000, "1:53", "nested too deeply"),
    "indented by a tab": ("a:\n\tb: 1\n", "2:1", "indent with spaces, not tabs"),
    "null character": ("a: 1\nb: \0\n", "2:4", "unacceptable character #x0000"),
    "bell": ("a: \a\n", "1:4", "unacceptable character #x0007"),
    "surrogate": ('a: "\\ud800"\n', "1:4", "surrogate"),
    "key that does not print": ('"a\\e[31m": 1\n', "1:1", "text that prints"),
    "YAML 3": ("%YAML 3.0\n---\na: 1\n", "1:1", "incompatible"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_refused_at_its_place(case: str, tmp_path: Path) -> None:
    text, place, reason = REFUSED[case]
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError) as refusal:
        parse(tmp_path / "x.yaml")
    message = str(refusal.value)
    assert message.startswith(f"{tmp_path}/x.yaml:{place}: ") and reason in message and message.isprintable()


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_in_a_file_is_refused_in_an_override(case: str) -> None:
    text, _, _ = REFUSED[case]
    with pytest.raises(ConfigError, match=r"^override '") as refusal:
        apply_override({}, {(): Position("x.yaml")}, f"train={text}")
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("key", ["²", "٣", "1²", "9" * 30])
def test_what_is_no_index_is_a_name(key: str) -> None:
    """`isdigit` takes a superscript for a digit, and `int` does not."""
    document: dict[str, Any] = {"train": {}, "list": [0]}
    apply_override(document, {(): Position("x.yaml")}, f"train.{key}=1")
    assert document["train"] == {key: 1}
    with pytest.raises(ConfigError, match="no such section or list item"):
        apply_override(document, {(): Position("x.yaml")}, f"list.{key}=1")


def test_a_short_form_is_written_out_only_by_an_override_that_is_taken() -> None:
    document: dict[str, Any] = {"data": {"train": "a.jsonl"}}
    with pytest.raises(ConfigError, match="a mapping of keys, not a list"):
        apply_override(document, {(): Position("x.yaml")}, "data.train.0.path=b", in_full)
    assert document == {"data": {"train": "a.jsonl"}}
    positions = {(): Position("x.yaml"), ("data",): Position("x.yaml", 1, 1), ("data", "train"): Position("x.yaml", 2, 3)}
    apply_override(document, positions, "data.train.split=test", in_full)
    assert document == {"data": {"train": {"path": "a.jsonl", "split": "test"}}}
    assert positions["data", "train"] == Position("x.yaml", 2, 3) and positions["data", "train", "split"].line == 0


@pytest.mark.parametrize(
    "override",
    ["a\nb=1", "a\x1b[3m=1", "train.\0=1", "a=\x1b", "a={b: 1, b: 2}", "=", ".", "a..b=", "\ud800=1", "a=\udcff"],
)
def test_an_override_is_blamed_on_one_line_that_prints(override: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        apply_override({}, {(): Position("x.yaml")}, override)
    assert str(refusal.value).isprintable()


# ------------------------------------------------------------------------------------------------ files of other kinds


@pytest.fixture
def kinds(tmp_path: Path) -> dict[str, Path]:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"#" * (reading.PAGE + 1))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "endless").symlink_to("/dev/zero")
    names = ("pipe", "large", "loop", "endless", "absent", "x" * 300, "nul\0")
    return {"folder": tmp_path, "device": Path("/dev/zero"), **{name: tmp_path / name for name in names}}


def test_only_files_are_read_and_nothing_waits(kinds: dict[str, Path]) -> None:
    """Each in one line, at once: what waits for a writer, or never ends, would fail this test by its time limit."""

    def look() -> None:
        for name, path in kinds.items():
            for read in (parse, strategy.load):
                with pytest.raises(ConfigError) as refusal:
                    read(path)
                assert len(str(refusal.value).splitlines()) == 1, name

    done: list[BaseException | None] = []

    def watched() -> None:
        try:
            look()
            done.append(None)
        except BaseException as error:
            done.append(error)

    thread = threading.Thread(target=watched, daemon=True)
    thread.start()
    thread.join(30)
    assert done == [None], done


def test_a_file_that_tells_no_size_is_read(tmp_path: Path) -> None:
    assert b"MemTotal" in reading.read_bytes("/proc/meminfo")
    with pytest.raises(OSError, match="larger than 10 bytes"):
        reading.read_bytes("/proc/meminfo", 10)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        "[NaN]",
        "[-Infinity]",
        "[" * 100_000,
        '{"a":' * 70 + "1" + "}" * 70,
        "1" * 5000,
        "",
        "{",
        '"\\ud8',
    ],
    ids=lambda text: text[:12],
)
def test_json_that_two_readers_would_read_differently(text: str) -> None:
    with pytest.raises(ValueError) as refusal:
        reading.parse_json(text)
    assert reading.words(refusal.value).isprintable()


# ----------------------------------------------------------------------------------------------------- nothing escapes

PIECES = st.sampled_from(
    [
        *(
            "a: ",
            "b: ",
            "&x ",
            "*x",
            "[",
            "]",
            "{",
            "}",
            ",",
            "\n",
            "  ",
            "- ",
            "? ",
            "<<: ",
            "!!int ",
            "!!float ",
            "''",
            '"',
        ),
        *("!!null ", "!!set ", "!!python/object:os.system ", "1e5", "0x", "0o9", "~", "---\n", "...\n", "%TAG ! x\n", "|\n"),
        *(">-\n", "\t", "\0", "\ufeff", "²", "\u2028", "# c\n", "'", ".nan", "1" * 5000, "é", "\\ud800", "[" * 60, "=", "."),
    ]
)
TEXTS = st.one_of(
    st.lists(PIECES, max_size=12).map("".join),
    st.text(alphabet=string.printable + "²٣\0\x85\ufeff", max_size=40),
    st.builds(
        lambda at, piece: DOCUMENT[:at] + piece + DOCUMENT[at:], st.integers(0, len(DOCUMENT)), PIECES
    ),
)  # fmt: skip


def reads_or_refuses(text: str, folder: Path) -> None:
    (folder / "x.yaml").write_bytes(text.encode(errors="surrogatepass"))
    try:
        document, positions = parse(folder / "x.yaml")
        assert isinstance(document, dict) and positions[()] == Position(f"{folder}/x.yaml")
    except ConfigError as refusal:
        assert str(refusal).startswith(f"{folder}/x.yaml:") and str(refusal).isprintable()
    for override in (text, f"train={text}", f"data.train.0.{text}=1"):
        document = {"train": {"seed": 1}, "data": {"train": [{"path": "a"}]}}
        try:
            apply_override(document, {(): Position("x.yaml")}, override)
            repr(document)  # an alias of itself would not end
        except ConfigError as refusal:
            assert str(refusal).startswith("override '") and str(refusal).isprintable()


@given(TEXTS)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_escapes(tmp_path: Path, text: str) -> None:
    reads_or_refuses(text, tmp_path)


@pytest.mark.slow
@given(TEXTS)
@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_escapes_of_many(tmp_path: Path, text: str) -> None:
    reads_or_refuses(text, tmp_path)
