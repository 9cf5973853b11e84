"""Documents that are written by a program are those that it would write now."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dspref.cli import app

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_objectives_md_is_current() -> None:
    written = runpy.run_path(str(DOCS / "make_objectives.py"))["document"]()
    assert (DOCS / "objectives.md").read_text(encoding="utf-8") == written, "run: python docs/make_objectives.py"


@pytest.mark.parametrize(
    "block", re.findall(r"^```\n\$ dspref (.*?)^```$", (DOCS / "data.md").read_text(encoding="utf-8"), re.M | re.S)
)
def test_what_data_md_shows_is_what_the_command_says(block: str) -> None:
    command, _, shown = block.partition("\n")
    result = CliRunner().invoke(app, shlex.split(command), prog_name="dspref")
    assert result.exit_code == 0 and shown.strip() and shown.strip("\n") in result.stdout
