"""Pairs and packs as they are drawn: colour on a terminal, marks elsewhere, cells in proportion."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from dspref.report import census, closeup


def drawn(pairs: list[dict[str, Any]], width: int = 80, **how: Any) -> str:
    file = io.StringIO()
    closeup.draw(pairs, Console(file=file, width=width, highlight=False, markup=False, emoji=False, **how))
    return file.getvalue()


COLOUR: dict[str, Any] = {"force_terminal": True, "color_system": "standard", "no_color": False}


def section(*runs: dict[str, Any], lost: int = 0, gap: int | None = None) -> dict[str, Any]:
    tokens = sum(run["tokens"] for run in runs)
    scored = sum(run["tokens"] for run in runs if run["scored"])
    return {"tokens": tokens, "scored": scored, "lost": lost, "gap": gap, "runs": list(runs)}


def run(text: str, tokens: int, scored: bool = False, special: bool = False) -> dict[str, Any]:
    return {"text": text, "tokens": tokens, "scored": scored, "special": special}


def pair(**sections: dict[str, Any]) -> dict[str, Any]:
    plain = {
        "prompt": section(run("[bold]q :smile:", 2)),
        "chosen": section(run(" a", 1, True)),
        "rejected": section(run(" b", 1, True)),
    }
    return {
        "source": "data.train", "where": "p.jsonl:1", "takes": "pairs", "label": None, "turns": None, "tools": 0,
        "given": {},
        "columns": {}, "limits": "max_length 9", "sections": plain | sections, "pack": None, "more_of_row": 0,
    }  # fmt: skip


def test_scored_tokens_are_green_on_a_terminal_and_between_marks_elsewhere() -> None:
    own = pair(chosen=section(run("head", 1), run("yes", 2, True), run("<end>", 1, True, True), run("tail", 1)))
    marked = drawn([own])
    assert "head⟦yes<end>⟧tail\n" in marked and "5 tokens, 3 scored" in marked and "\x1b" not in marked
    coloured = drawn([own], **COLOUR)
    assert "\x1b[32myes" in coloured and "⟦" not in coloured
    bare = drawn([own], force_terminal=True, color_system="standard", no_color=True)
    assert "⟦yes" in bare and "\x1b[32m" not in bare, "NO_COLOR"
    assert "[bold]q :smile:" in marked, "no markup"


@pytest.mark.parametrize(
    ("gap", "shown"),
    [
        (0, " ✂ 7 tokens ✂ ab⟦cd⟧ef"),
        (2, "ab ✂ 7 tokens ✂ ⟦cd⟧ef"),
        (4, "ab⟦cd⟧ ✂ 7 tokens ✂ ef"),
        (6, "ab⟦cd⟧ef ✂ 7 tokens ✂"),
    ],
)
def test_a_cut_stands_where_it_was_outside_of_the_marks(gap: int, shown: str) -> None:
    own = section(run("ab", 2), run("cd", 2, True), run("ef", 2), lost=7, gap=gap)
    said = drawn([pair(prompt=own)])
    assert shown.strip() in said and "6 tokens, 7 of 13 cut off, for max_length 9" in said
    unknown = drawn([pair(prompt=own | {"gap": None})], width=120)
    assert "ab⟦cd⟧ef ✂ 7 tokens ✂ (where is not known" in unknown


def test_a_cut_within_scored_tokens_parts_their_marks() -> None:
    own = section(run("ab", 2, True), run("cd", 2, True), lost=7, gap=2)
    assert "⟦ab⟧ ✂ 7 tokens ✂ ⟦cd⟧" in drawn([pair(chosen=own)])


@pytest.mark.parametrize("width", [20, 40, 80, 160])
def test_nothing_is_wider_than_the_terminal(width: int) -> None:
    own = pair(prompt=section(run("many words " * 50 + "x" * 200 + "你好" * 60, 99))) | {"pack": PACK}
    own["columns"] = {"a column": "with a value " * 4}
    lines = drawn([own], width).splitlines()
    assert all(len(line) + sum(c > "⺀" for c in line) <= max(width, 32) for line in lines)


PIECES = [
    {"kind": "prompt", "start": 0, "tokens": 25, "group": 0, "pairs": [0], "keys": [(0, 25)], "own": True},
    {"kind": "chosen", "start": 25, "tokens": 25, "group": 0, "pairs": [0], "keys": [(0, 50)], "own": True},
    {"kind": "rejected", "start": 50, "tokens": 10, "group": 0, "pairs": [0], "keys": [(0, 25), (50, 60)], "own": True},
]
PACK = {
    "step": 3, "steps": 9, "rank": 0, "ranks": 2, "held_by": 1, "micro_step": 1, "micro_steps": 2, "evaluation": False,
    "last_step": 9, "tokens": 60, "room": 100, "pairs": 1, "pieces": PIECES,
}  # fmt: skip


def test_a_strip_shows_the_pack() -> None:
    assert closeup.strip(PIECES, 0, 100, 20).plain == "░░░░░█████▒▒········"
    said = drawn([pair() | {"pack": PACK}], width=42)
    assert "step 3 of 9, rank 0 of 2, micro-step 1 of 2; 60 of 100 tokens (60%), 1 pair" in " ".join(said.split())
    bars = [line[22:] for line in said.splitlines() if line.startswith(("  prompt ", "  chosen ", "  rejected "))]
    assert bars == ["░░░░░░░░", "───────████████", "────────       ▒▒▒"]
    large = drawn([pair() | {"pack": PACK | {"room": 30}}])
    assert "60 tokens: a pack of its own" in " ".join(large.split())


def test_kinds_smaller_than_a_cell_have_cells_in_proportion() -> None:
    pieces = []
    for k in range(100):  # 6 of prompt, 2 of each answer
        for kind, start, tokens in (("prompt", 0, 6), ("chosen", 6, 2), ("rejected", 8, 2)):
            pieces.append({"kind": kind, "start": 10 * k + start, "tokens": tokens})
    text = closeup.strip(pieces, 0, 1000, 50).plain
    assert {c: text.count(c) for c in "░█▒"} == {"░": 30, "█": 10, "▒": 10}


@pytest.mark.parametrize(("part", "bar"), [(0, ""), (1, "████"), (0.5, "██"), (0.0001, "▏"), (0.3, "█▎")])
def test_a_bar_shows_that_there_is_something(part: float, bar: str) -> None:
    assert census._bar(part, 4) == bar
