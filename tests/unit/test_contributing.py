"""CONTRIBUTING says what is so: its examples of a loss and of a format are carried out in a copy of the package."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SNIPPET = re.compile(r"^# (?P<path>\S+\.py)(: (?P<table>.*))?\n(?P<code>(?:(?!# \S+\.py).*\n?)+)", flags=re.M)


def snippets() -> list[tuple[str, str | None, str]]:
    """(file, table in it or None, code) of each piece of the examples."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = [textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", text, flags=re.M | re.S)]
    return [(m["path"], m["table"], m["code"].strip() + "\n") for block in blocks for m in SNIPPET.finditer(block)]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    # What is compiled, too; but not what another process is writing there.
    shutil.copytree(ROOT / "dspref", folder / "dspref", ignore=shutil.ignore_patterns("*.pyc.*"))
    for name in ("docs", "ds_configs", "launch"):
        (folder / name).symlink_to(ROOT / name)
    for path, table, code in snippets():
        if path.startswith("dspref/"):
            file = folder / path
            text = file.read_text(encoding="utf-8")
            file.write_text(with_row(text, table, code) if table else with_function(text, code), encoding="utf-8")
    return folder


def with_function(text: str, code: str) -> str:
    """Before the first function that stands alone."""
    at = min(node.lineno for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)) - 1
    lines = text.splitlines(keepends=True)
    return "".join([*lines[:at], code, "\n\n", *lines[at:]])


def with_row(text: str, table: str, row: str) -> str:
    """As the first row of a dict: `FORMATS`, or of the losses of a family: `OBJECTIVES["dpo"]`."""
    name, _, entry = table.partition("[")
    (node,) = [n for n in ast.parse(text).body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == name]
    found = node.value
    if entry:
        wanted = entry.strip("]\"'")
        family = next(v for k, v in zip(found.keys, found.values) if k and ast.literal_eval(k) == wanted)
        found = next(argument for argument in family.args if isinstance(argument, ast.Dict))
    lines = text.splitlines(keepends=True)
    line, column = found.lineno - 1, found.col_offset + 1
    lines[line] = f"{lines[line][:column]}\n{row}{lines[line][column:]}"
    return "".join(lines)


def run(program: str, folder: Path) -> str:
    env = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT / 'tests'}:{ROOT / 'tests/unit/objectives'}"}
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_loss_is_one_function_and_one_record(copy: Path) -> None:
    (row,) = [code for path, _, code in snippets() if path.startswith("tests/")]
    assert row.split(",")[1].strip() == '"squared"'
    program = f"""
import runpy, test_objectives, dspref
assert dspref.__file__.startswith({str(copy)!r})
test_objectives.test_golden_values(*{row.strip().rstrip(",")})
from dspref import config
from dspref.errors import ConfigError

QUICKSTART = "launch/configs/quickstart.yaml"
changes = ["objective.rpo_alpha=null", "objective.loss_type=squared", "objective.margin=2.0"]
print(config.resolved(config.load(QUICKSTART, changes))["objective"])
try:
    config.load(QUICKSTART, ["objective.margin=2.0"])
except ConfigError as error:
    print(error)
document = runpy.run_path("docs/make_objectives.py")["document"]()
assert "### `squared`" in document and "(beta (log u_w - log u_l) - margin)^2" in document
assert "The target of the reward margin." in config.schema()
"""
    said = run(program, copy)
    assert "'loss_type': 'squared'" in said and "'margin': 2.0" in said
    assert "objective.margin: does not apply to loss_type sigmoid; it is for squared" in said


def test_a_format_is_one_function_and_one_line(copy: Path) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": [{"role": "assistant", "content": "b"}]}
    said = run(f"from dspref.data.formats import to_preference\nprint(to_preference({row!r}))", copy)
    assert "prompt=[{'role': 'user', 'content': 'q'}], chosen=[{'role': 'assistant', 'content': 'a'}]" in said
    with pytest.raises(AssertionError, match="mixes text and chat"):
        run(f"from dspref.data.formats import to_preference\nprint(to_preference({row!r}))", ROOT)
