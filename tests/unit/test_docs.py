"""Documents that are written by a program are those that it would write now."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
import runs

from dspref import cli
from dspref.run import status

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_objectives_md_is_current() -> None:
    written = runpy.run_path(str(DOCS / "make_objectives.py"))["document"]()
    assert (DOCS / "objectives.md").read_text(encoding="utf-8") == written, "run: python docs/make_objectives.py"


def test_the_commands_of_seeing_md_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS / "seeing.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    (dspref .*)$", text, flags=re.M)
    assert len(commands) >= 8
    for name in ("a", "b", "mine"):
        runs.write(tmp_path / "runs" / name, steps=8)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        with pytest.raises(SystemExit) as end:
            cli.app(shlex.split(command)[1:])
        missing = command.endswith(".png") and end.value.code == 4  # without the extra dspref[plots]
        assert not end.value.code or missing, command
    assert {"report.html", "both.html", "runs.csv"} <= {path.name for path in tmp_path.iterdir()}
    assert re.split(r"  +", text.split("```\n")[1].splitlines()[0]) == list(status.COLUMNS)
    images = re.findall(r"\]\((images/[^)]+)\)", text)
    assert len(images) == 2 and all((DOCS / image).stat().st_size < 120_000 for image in images)
