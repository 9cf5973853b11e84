"""Documents that are written by a program are those that it would write now."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_objectives_md_is_current() -> None:
    written = runpy.run_path(str(DOCS / "make_objectives.py"))["document"]()
    assert (DOCS / "objectives.md").read_text(encoding="utf-8") == written, "run: python docs/make_objectives.py"
