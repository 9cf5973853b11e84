"""Pairs as the model will see them, on a terminal or as plain text: tokens with what is scored, and the pack they lie in.

Scored tokens are green where there is colour, and between marks elsewhere.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from dspref.data.spans import CLOSE, CUT, LINE, MORE, OPEN, SPACE, TAB, visible
from dspref.terminal import columns, printable, shown

SCORED, SPECIAL, QUIET, LOST = "green", "magenta", "bright_black", "bold red"
# Of a strip: what a cell shows, and its colour. Its glyphs alone tell the kinds apart.
GLYPHS = {"prompt": "░", "chosen": "█", "rejected": "▒", "both": "▓", "free": "·"}
COLOURS = {"prompt": "blue", "chosen": "green", "rejected": "red", "both": "yellow", "free": QUIET}
WIDTH_OF_NAMES = 10
# Width where there is no terminal, and the widest that is drawn on.
PLAIN_WIDTH, MOST_WIDTH = 100, 160
# Of an answer that stands alone, by what a row becomes (`Family.takes`): what it is if its label is true, and if it is not.
LABELS = {
    "answers": (", desirable", ", undesirable"),
    "list": (", the best of its list", ""),
    "gold": (", the reference (gold) answer of its row", ""),
}
# Answers of a prompt that are drawn.
MOST_ANSWERS = 12
UNSEEN = re.compile(f"([{LINE}{SPACE}{TAB}])")


class _Trimmed(io.TextIOBase):
    """Passes lines on without the spaces at their ends, which rich fills its tables with."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._rest = stream, ""

    def write(self, text: str, /) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        self._stream.write("".join(f"{line.rstrip(' ')}\n" for line in lines))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()


def console() -> Console:
    """Where everything is drawn; as wide as the terminal, or as $COLUMNS says, within reason."""
    own = Console(highlight=False, markup=False, emoji=False)
    file: Any = sys.stdout if in_colour(own) else _Trimmed(sys.stdout)
    return Console(file=file, highlight=False, markup=False, emoji=False, width=min(columns(PLAIN_WIDTH), MOST_WIDTH))


def in_colour(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def draw(pairs: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Each pair behind a line with its place; before the first, what the marks mean."""
    scored = Text("scored tokens", SCORED) if in_colour(console) else Text(f"{OPEN}scored tokens{CLOSE}")
    legend = (scored, "  ", ("special tokens", SPECIAL) if in_colour(console) else "", "  " * in_colour(console))
    marks = f"{LINE} line end  {SPACE} space  {TAB} tab  {CUT} cut"
    console.print(Text.assemble(*legend, (marks, QUIET)))
    for pair in pairs:
        console.print()
        _draw_pair(pair, console)
        if more := pair["more_of_row"]:
            console.print(f"\n{counted(more, f'more {_unit(pair)}')} of this row not shown")


def _draw_pair(pair: Mapping[str, Any], console: Console) -> None:
    place = f"{pair['where']}  {pair['source']}"
    console.print(Rule(Text(shown(place), "bold"), align="left", style=QUIET))
    if pair["turns"]:
        turns = pair["turns"]
        behind = " | ".join(" ".join(turns[side]) for side in ("chosen", "rejected") if side in turns)
        tools = f"  (with {counted(pair['tools'], 'tool')})" if pair["tools"] else ""
        named(console, "turns", f"{' '.join(turns['prompt'])} > {behind}{tools}")
    if pair["columns"]:
        named(console, "columns", "   ".join(f"{printable(name)}: {_value(v)}" for name, v in pair["columns"].items()))
    for name, section in pair["sections"].items():
        label = "" if pair["label"] is None or name == "prompt" else LABELS[pair["takes"]][not pair["label"]]
        score = pair["given"].get(f"score_{name}")
        named(console, name, _about(name, section, pair["limits"]) + label + ("" if score is None else f", score {score:g}"))
        indented(console, _text_of(section, in_colour(console)))
    if pair["pack"]:
        _draw_pack(pair["pack"], console, _unit(pair))
    else:
        named(console, "pack", "in none of the first epoch's (a source of a weight below 1 is sampled anew each epoch)")


def _unit(pair: Mapping[str, Any]) -> str:
    """What a row and a pack are made of: pairs; examples, where answers stand alone beside them."""
    return "pair" if pair["label"] is None and pair["takes"] != "gold" else "example"


def counted(count: int, what: str) -> str:
    """Such as `1 pair`, `1,200 pairs`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def indented(console: Console, text: Text) -> None:
    for line in text.wrap(console, max(console.width - 2, 20)):
        console.print(Text.assemble("  ", line))


def named(console: Console, name: str, text: str | Text) -> None:
    """A line behind its name; what does not fit goes on below it, indented."""
    lines = (Text(shown(text)) if isinstance(text, str) else text).wrap(console, max(console.width - WIDTH_OF_NAMES, 20))
    for k, line in enumerate(lines):
        console.print(Text.assemble((f"{'' if k else name:<{WIDTH_OF_NAMES}}", "bold"), line))


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else printable(str(value), 60)


def _about(name: str, section: Mapping[str, Any], limits: str) -> str:
    tokens, scored, lost = section["tokens"], section["scored"], section["lost"]
    said = [counted(tokens, "token")]
    if name != "prompt":
        said.append("all scored" if scored == tokens else f"{scored:,} scored")
    if lost:
        said.append(f"{lost:,} of {tokens + lost:,} cut off, for {limits}")
    return ", ".join(said)


def _text_of(section: Mapping[str, Any], colour: bool) -> Text:
    """The runs of a section as one text, with what truncation took marked where it was."""
    runs, text, at, inside = section["runs"], Text(), 0, False
    words = iter(visible([word for run in runs for word in _words(run)]))
    gap = section["gap"] if section["lost"] else None
    cut = f" {CUT} {section['lost']:,} tokens {CUT} " if section["lost"] else ""
    for run in runs:
        scored = bool(run.get("scored"))
        if gap == at:
            if inside and not colour:
                text.append(CLOSE)
            text.append(cut.lstrip() if text.plain[-1:] in ("", "\n") else cut, LOST)
            inside, gap = inside and colour, None
        if scored != inside and not colour:
            text.append(OPEN if scored else CLOSE)
        inside = scored
        if run.get("left_out"):
            text.append(f" {MORE} {run['left_out']:,} tokens {MORE} ", QUIET)
            at += run["left_out"]
            next(words)
            continue
        style = SPECIAL if run["special"] else SCORED if scored else ""
        if run["special"] and scored:
            style = f"{SPECIAL} underline"
        for index in range(len(_words(run))):
            _append(text, next(words), style, run, index, colour)
        at += len(run["ids"]) if "ids" in run else run["tokens"]
    if inside and not colour:
        text.append(CLOSE)
    if gap == at:
        text.append(cut, LOST)
    if section["lost"] and section["gap"] is None:
        text.append(f"{cut}(where is not known: its row could not be read again as it was)", LOST)
    if text.plain.endswith("\n"):
        text.right_crop(1)
    return text


def _words(run: Mapping[str, Any]) -> Sequence[str]:
    """Texts of the tokens where these have ids beside them, else of the whole run."""
    return run["texts"] if "texts" in run else [run.get("text", "")]


def _append(text: Text, word: str, style: str, run: Mapping[str, Any], index: int, colour: bool) -> None:
    """A word, with line ends and such quieter than it, and the id of its token behind it."""
    with_id = "ids" in run
    for part in UNSEEN.split(word.removesuffix("\n").replace(" ", SPACE) if with_id else word):
        text.append(part, QUIET if part in (LINE, SPACE, TAB) and colour else style)
    if with_id:
        text.append(f"/{run['ids'][index]} ", QUIET)
        text.append("\n" if word.endswith("\n") else "")


# ---------------------------------------------------------------------------------------------------------- the pack


def _draw_pack(pack: Mapping[str, Any], console: Console, what: str) -> None:
    where = f"step {pack['step']:,} of {pack['steps']:,}, " if not pack["evaluation"] else "of an evaluation, "
    of_whom = "rank" if pack["held_by"] == 1 else f"group (of {pack['held_by']} ranks)"
    where += f"{of_whom} {pack['rank']} of {pack['ranks']}, micro-step {pack['micro_step']} of {pack['micro_steps']}"
    fill = f"{pack['tokens']:,} of {pack['room']:,} tokens ({pack['tokens'] / pack['room']:.0%})"
    fill += f", {counted(pack['pairs'], what)}"
    if pack["tokens"] > pack["room"]:
        fill = f"{pack['tokens']:,} tokens: a pack of its own, beyond tokens_per_pack ({pack['room']:,})"
    if pack["last_step"] is not None and pack["step"] > pack["last_step"]:
        where += f" (the run ends with step {pack['last_step']:,})"
    named(console, "pack", f"{where}; {fill}")
    width = max(console.width - 2, 8)
    scale = max(pack["room"], pack["tokens"])
    console.print(Text.assemble("  ", strip(pack["pieces"], 0, scale, width)))
    own = [piece for piece in pack["pieces"] if piece["own"]]
    console.print(Text.assemble("  ", (_marks(own, 0, scale, width).rstrip(), "bold")))
    _draw_group(own, pack["pieces"], console)
    there = {piece["kind"] for piece in pack["pieces"]}
    kinds = [(f"{glyph} {kind}   ", COLOURS[kind]) for kind, glyph in GLYPHS.items() if kind in there or kind == "free"]
    indented(console, Text.assemble(*kinds, f"▲ this {what}   ", ("─ keys that it sees", QUIET)))


def _draw_group(own: Sequence[Mapping[str, Any]], pieces: Iterable[Mapping[str, Any]], console: Console) -> None:
    """The prompt of a pair and the answers that run behind it, each in a line with the keys that it sees."""
    numbers = {piece["group"] for piece in own}
    members = [piece for piece in pieces if piece["group"] in numbers]
    first, stop = min(piece["start"] for piece in members), max(piece["start"] + piece["tokens"] for piece in members)
    width = max(console.width - 24, 8)
    for piece in members[:MOST_ANSWERS]:
        cells = [" "] * width
        for key in piece["keys"]:
            for cell in _cells(key[0], key[1], first, stop, width):
                cells[cell] = "─"
        for cell in _cells(piece["start"], piece["start"] + piece["tokens"], first, stop, width):
            cells[cell] = GLYPHS[piece["kind"]]
        bar, style = "".join(cells), COLOURS[piece["kind"]] if piece["own"] else QUIET
        label = piece["kind"] if piece["own"] else "other"
        console.print(Text.assemble(f"  {label:<9}", (f"{piece['tokens']:>9,}  ", QUIET), (bar.rstrip(), style)))
    if (left := len(members) - MOST_ANSWERS) > 0:
        console.print(f"  and {counted(left, 'more answer')} to this prompt")


def strip(pieces: Iterable[Mapping[str, Any]], first: int, stop: int, width: int) -> Text:
    """Tokens `first` to `stop` in so many cells. A cell is of the kind of most of its tokens, and of those before that had
    none: where pieces are smaller than cells, kinds have cells in proportion to their tokens."""
    tokens: list[dict[str, float]] = [{} for _ in range(width)]  # of each kind, in cells
    size = (stop - first) / width
    for piece in pieces:
        start, end = (piece["start"] - first) / size, (piece["start"] + piece["tokens"] - first) / size
        for cell in range(int(start), min(int(end) + 1, width)):
            part = min(end, cell + 1) - max(start, cell)
            tokens[cell][piece["kind"]] = tokens[cell].get(piece["kind"], 0.0) + max(part, 0.0)
    text, owed = Text(), dict.fromkeys(GLYPHS, 0.0)
    for cell in tokens:
        cell["free"] = 1 - sum(cell.values())
        for kind, part in cell.items():
            owed[kind] += part
        kind = max(cell, key=owed.__getitem__)
        owed[kind] -= 1
        text.append(GLYPHS[kind], COLOURS[kind])
    return text


def _marks(pieces: Iterable[Mapping[str, Any]], first: int, stop: int, width: int) -> str:
    cells = [" "] * width
    for piece in pieces:
        for cell in _cells(piece["start"], piece["start"] + piece["tokens"], first, stop, width):
            cells[cell] = "▲"
    return "".join(cells)


def _cells(start: int, end: int, first: int, stop: int, width: int) -> range:
    """The cells that some tokens lie in: one at least."""
    size = max(stop - first, 1) / width
    begin = min(int((start - first) / size), width - 1)
    return range(begin, max(begin + 1, min(round((end - first) / size), width)))
