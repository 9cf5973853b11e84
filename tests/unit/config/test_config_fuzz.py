"""Whatever a config or a command line holds, the answer is a config or a line for each fault, and never a traceback."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_config import BAD, EXAMPLE
from typer.testing import CliRunner

from dspref import config, launcher, secrets
from dspref.cli import app
from dspref.config.foreign import FOREIGN_KEYS
from dspref.config.load import MAX_LINES
from dspref.config.sections import Config
from dspref.errors import ConfigError, ExitCode

FAST, ALONE, LONG = 100, 200, 2000  # ALONE: without a longer one
# Texts that have bitten readers of YAML, of paths, of numbers and of terminals.
ODD = (
    *(
        "",
        " ",
        "~",
        "~x",
        "$A",
        "${A",
        "null",
        "yes",
        "1e-6",
        "1_000",
        "=",
        "a=b",
        "{{",
        "{% if %}",
        "\0",
        "\x1b[31m",
        "a\nb",
    ),
    *("&a [*a]", "*a", "!!python/object:x", "- a", "{", "[", "'", '"', "#", ": ", "%", "²", "٣", "\ud800", "🤖" * 9),
    *("dpo", "auto", "none", "cpu", "9" * 5000, "x" * 300, "../../x", "/dev/zero", "hf_" + "a" * 30),
)
TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(ODD))
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 10**30, 1e308, float("nan"), float("inf")]))
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
KEYS = st.one_of(
    TEXTS,
    st.sampled_from(sorted({*FOREIGN_KEYS, *Config.model_fields, "path", "lr", "columns", "template", "name", "loss_type"})),
)
BASES = [yaml.safe_load(text) for text in (EXAMPLE, *(case[0] for case in BAD.values()))]


def places(node: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


@st.composite
def documents(draw: Callable) -> Any:
    """A config with some of its keys renamed, taken out, added, or with other values."""
    document = json.loads(json.dumps(draw(st.sampled_from(BASES))))
    for _ in range(draw(st.integers(0, 4))):
        path = draw(st.sampled_from(sorted(places(document), key=repr)))
        node = document
        for key in path[:-1]:
            node = node[key]
        kind = draw(st.sampled_from(["value", "value", "rename", "drop", "add"]))
        if not path:
            if isinstance(document, dict):
                document[draw(KEYS)] = draw(VALUES)
        elif kind == "value":
            node[path[-1]] = draw(VALUES)
        elif kind == "add" and isinstance(node[path[-1]], dict):
            node[path[-1]][draw(KEYS)] = draw(VALUES)
        elif kind == "rename" and isinstance(node, dict):
            node[draw(KEYS)] = node.pop(path[-1])
        elif kind == "drop":
            node.pop(path[-1])
    return document


@st.composite
def files(draw: Callable) -> bytes:
    """The text of a config, whole or with a few characters changed."""
    text = draw(
        st.one_of(documents().map(lambda d: json.dumps(d, indent=draw(st.sampled_from([None, 1])))), st.just(EXAMPLE))
    )
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(TEXTS) + text[at + draw(st.integers(0, 3)) :]
    return text.encode("utf-8", "surrogatepass")


TARGETS = (
    *("output_dir", "train.seed", "data.train", "data.train.0.path", "data.train.path", "model.lora.r", "model"),
    *("deepspeed.zero_optimization.stage", "objective.loss_type", "log.trackers.0", "x.y.z", "data.eval.a.b.c"),
)
SET = st.builds("{}={}".format, st.one_of(TEXTS, st.sampled_from(TARGETS)), st.one_of(TEXTS, VALUES.map(json.dumps)))
OVERRIDES = st.one_of(TEXTS, SET)


@contextmanager
def folder() -> Iterator[None]:
    """An empty working directory."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        try:
            yield
        finally:
            os.chdir(before)


def check_config(content: bytes, overrides: list[str]) -> None:
    with folder():
        Path("x.yaml").write_bytes(content)
        try:
            loaded = config.load("x.yaml", overrides)
        except ConfigError as error:
            lines = str(error).split("\n")
            begins = ("x.yaml", "override '", "s.json", "... and")
            assert all(line.isprintable() and line.startswith(begins) for line in lines), lines
            assert len(set(lines)) == len(lines) <= MAX_LINES + 1
            assert secrets.kind_of(str(error)) is None
            return
        Path("again.yaml").write_text(config.dump(loaded), encoding="utf-8")
        assert config.resolved(config.load("again.yaml")) == config.resolved(loaded)


COMMANDS = ("check", "doctor", "train", "score", "submit", "status", "export", "schema", "", "--version", "--help", "chekc")
OPTIONS = (
    *("x.yaml", "--config", "--config=x.yaml", "--show", "--json", "--data", "--dry-run", "--nodes", "0", "-1", "--share"),
    *("2/2", "--verify", "--", "-h", "--help", "--to", "nowhere", ".", "~", "$X", "--sweep", "--lr", "3"),
)
WORDS = st.one_of(OVERRIDES, st.sampled_from(OPTIONS))


def check_arguments(content: bytes, arguments: list[str]) -> None:
    """A command line in this process; a run itself is never reached, as no data are there."""
    with folder():
        Path("x.yaml").write_bytes(content)
        result = CliRunner().invoke(app, arguments)
        assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
        assert result.exit_code in {int(code) for code in ExitCode} - {1, 130}, (arguments, result.output)
        assert "Traceback" not in result.output


def check_launcher(content: bytes, arguments: list[str]) -> None:
    with folder():
        Path("x.yaml").write_bytes(content)
        try:
            options = launcher.parse(arguments)
            config.load(options.config, options.overrides)
        except ConfigError:
            pass
        except SystemExit as left:  # --help, or what argparse refuses
            assert left.code in (0, 2)


def anyhow(examples: int) -> Any:
    calm = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=examples, deadline=None, suppress_health_check=calm, database=None, derandomize=True)


LISTS = st.lists(OVERRIDES, max_size=3)
# A broken file, or one that names data which are not there: no command may get as far as a run.
SAFE = st.one_of(files(), st.just(b"model: {name_or_path: /none}\ndata: {train: /none.jsonl}\noutput_dir: out\n"))
LINES = st.tuples(st.sampled_from(COMMANDS), st.lists(WORDS, max_size=4)).map(lambda line: [line[0], *line[1]])
QUICK = LINES.filter(lambda words: not {"train", "score", "--data"} & {*words})


@anyhow(FAST)
@given(files(), LISTS)
def test_no_config_gives_a_traceback(content: bytes, overrides: list[str]) -> None:
    check_config(content, overrides)


@anyhow(FAST)
@given(SAFE, QUICK)
def test_no_command_line_gives_a_traceback(content: bytes, arguments: list[str]) -> None:
    check_arguments(content, arguments)


@anyhow(ALONE)
@given(SAFE, st.lists(WORDS, max_size=4))
def test_no_arguments_of_the_launcher_give_a_traceback(content: bytes, arguments: list[str]) -> None:
    check_launcher(content, arguments)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@anyhow(LONG)
@given(files(), LISTS)
def test_no_config_of_many_gives_a_traceback(content: bytes, overrides: list[str]) -> None:
    check_config(content, overrides)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@anyhow(LONG)
@given(SAFE, QUICK)
def test_no_command_line_of_many_gives_a_traceback(content: bytes, arguments: list[str]) -> None:
    check_arguments(content, arguments)
