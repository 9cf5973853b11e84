"""Data in numbers on a terminal: rows, lengths, what was cut, what comes twice, what packing saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dspref.report.closeup import QUIET, counted, named
from dspref.terminal import shown

# Percentiles that there is room for.
SHOWN = {"0": "min", "25": "25 %", "50": "median", "75": "75 %", "95": "95 %", "99": "99 %", "100": "max"}
EIGHTHS = " ▏▎▍▌▋▊▉█"
MOST_REASONS = 12
ROOMY = 92
# Of the columns, by what a row becomes (`Family.takes`).
LEGENDS = {
    "pairs": "pair: its prompt + the longer answer",
    "answers": "chosen: desirable, rejected: undesirable; pair: a prompt + its answer",
    "list": "chosen: the best of a list, rejected: the others; pair: a prompt + its answer",
    "gold": "chosen: of pairs, and gold answers; pair: a prompt + its longer answer, or + the gold one",
}


def draw(said: Mapping[str, Any], console: Console) -> None:
    _draw_sources(said, console)
    for key, figures in said["sets"].items():
        console.print()
        console.print(Text(shown(f"{key}, as the model gets it: {_what(figures)}"), "bold"))
        if figures["pairs"]:
            _draw_lengths(figures, console)
            _draw_histogram(figures["histogram"], console)
        console.print()
        for name, text in _lines(figures, said["limits"]):
            named(console, name, text)
        if "packing" in figures:
            _draw_packing(figures["packing"], console, _unit(figures))
    console.print()
    for key, shared in said["overlap"].items():
        named(console, "held out", f"{key}: {_overlap(shared, _unit(*said['sets'].values()))}")
    for note, count in said["notes"].items():
        named(console, "note", f"{count:,} x {note}")
    for warning in said["warnings"]:
        named(console, "warning", warning)
    if said["overlap"] or said["notes"] or said["warnings"]:
        console.print()


def _unit(*sets: Mapping[str, Any]) -> str:
    """What is counted: pairs; examples, where some are of one answer."""
    return "example" if any(figures["answers"]["single"] for figures in sets) else "pair"


def _what(figures: Mapping[str, Any]) -> str:
    """Such as `12 pairs`, or `7 desirable and 5 undesirable answers`."""
    pairs, answers = figures["pairs"], figures["answers"]
    if not answers["single"]:
        return counted(pairs, "pair")
    if figures["takes"] == "list":
        return f"{counted(pairs, 'answer')} in {counted(figures['rows'], 'list')}"
    if figures["takes"] == "gold":
        return f"{counted(pairs - answers['single'], 'pair')} and {counted(answers['single'], 'gold answer')}"
    both = f" ({answers['single']:,} of them alone)" if pairs > answers["single"] else ""
    return f"{answers['chosen']:,} desirable and {counted(answers['rejected'], 'undesirable answer')}{both}"


def _table(*columns: str, padding: int = 2) -> Table:
    """The first column to the left, numbers to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, padding, 0, 0), header_style="bold")
    for k, column in enumerate(columns):
        table.add_column(column, justify="right" if k else "left", overflow="fold", no_wrap=bool(k))
    return table


def _draw_sources(said: Mapping[str, Any], console: Console) -> None:
    table = _table("source", "rows", f"{_unit(*said['sets'].values())}s", "left out", "")
    table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    for source in said["sources"]:
        weight = f"  (weight {source['weight']:g})" if source["weight"] != 1 else ""
        files = f"  ({source['files']:,} files)" if source["files"] > 1 else ""
        left_out = source["pairs"] - source["kept"]
        numbers = [f"{n:,}" for n in (source["rows"], source["kept"], left_out)]
        table.add_row(Text(shown(source["key"])), *numbers, Text(shown(f" {source['path']}{files}{weight}")))
    console.print(table)
    for source in said["sources"]:
        for reason, count in list(source["dropped"].items())[:MOST_REASONS]:
            named(console, "left out", f"{count:,} x {reason}  ({source['key']})")
        if (rest := len(source["dropped"]) - MOST_REASONS) > 0:
            named(console, "left out", f"and for {rest:,} more reasons  ({source['key']})")
        if files := source["files_left_out"]:
            named(console, "not read", f"{', '.join(files[:5])}: in no split  ({source['key']})")


def _draw_lengths(figures: Mapping[str, Any], console: Console) -> None:
    table = _table("tokens", *SHOWN.values(), "mean", "total", padding=2 if console.width >= ROOMY else 1)
    for name, spread in figures["tokens"].items():
        values = [f"{spread['percentiles'][p]:,}" for p in SHOWN]
        # A pair is as long as its longer answer makes it: the sum of that is nothing that is computed.
        total = f"{spread['total']:,}" if name != "pair" else ""
        table.add_row(name, *values, f"{spread['mean']:,.0f}", total)
    console.print(table)
    legend = LEGENDS[figures["takes"] if figures["answers"]["single"] else "pairs"]
    console.print(Text(f"{legend}, which max_length limits", QUIET))


def _draw_histogram(histogram: Mapping[str, Any], console: Console) -> None:
    width, counts = histogram["width"], histogram["counts"]
    bars = len(next(iter(counts.values())))
    labels = [f"{k * width:,} - {(k + 1) * width - 1:,}" for k in range(bars)]
    digits = max(len(f"{n:,}") for column in counts.values() for n in column)
    of_label = max(map(len, labels)) + 2
    room = max((console.width - of_label) // len(counts) - digits - 3, 4)
    console.print()
    head = "".join(f"{name:<{room + digits + 3}}" for name in counts)
    console.print(Text.assemble((f"{'tokens':<{of_label}}{head.rstrip()}", "bold")))
    for k, label in enumerate(labels):
        line = Text(f"{label:>{of_label - 2}}  ")
        for name, column in counts.items():
            bar = _bar(column[k] / max(*column, 1), room)
            line.append(bar, {"prompt": "blue", "chosen": "green", "rejected": "red"}[name])
            line.append(f"{f' {column[k]:,}' if column[k] else '':<{room - len(bar) + digits + 3}}", QUIET)
        line.rstrip()
        console.print(line)


def _bar(part: float, room: int) -> str:
    """A bar of eighths of a cell; what is there at all is seen."""
    eighths = max(round(part * room * 8), 1 if part else 0)
    return EIGHTHS[8] * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")


def _lines(figures: Mapping[str, Any], limits: str) -> Iterator[tuple[str, str]]:
    cut = [_cut(name, figures["truncated"][name]) for name in ("prompt", "chosen", "rejected")]
    pairs, unit, answers = figures["truncated"]["pair"], _unit(figures), figures["answers"]
    lost = "; ".join(filter(None, cut))
    beyond = f"beyond {limits}" if limits else "there is no limit"
    yield "cut", f"{_of(pairs['count'], pairs['share'], unit)} {beyond}: {lost}" if lost else f"nothing ({beyond})"
    again = figures["repeated"]
    several = _of(again["prompts_of_several_pairs"], again["prompts_of_several_pairs_share"], "", "are", "is")
    rows = f", {again['prompts_of_several_rows']:,} in several rows" if again["prompts_of_several_rows"] else ""
    yield (
        "prompts",
        f"{again['prompts']:,} different; {several} in several {unit}s ({counted(again['pairs_of_these'], unit)}){rows}",
    )
    said = [f"{_of(again['pairs'], again['pairs_share'], unit, 'repeat', 'repeats')} an earlier one"]
    if again["contradicted"]:
        said.append(f"{again['contradicted']:,} of the others say the opposite of another")
    if figures["pairs"] > answers["single"] or not answers["single"]:
        said.append(f"{figures['identical_answers']:,} with chosen equal to rejected left out")
    yield "twice", "; ".join(said)
    yield "length", _length(figures)
    yield (
        "scored",
        f"{figures['scored']['chosen']:,} tokens of chosen, {figures['scored']['rejected']:,} of rejected answers",
    )


def _length(figures: Mapping[str, Any]) -> str:
    """Whether length alone tells the better answers from the others."""
    answers, bias = figures["answers"], figures["bias"]
    if answers["single"] and figures["takes"] != "gold":
        means = [figures["scored"][side] / max(answers[side], 1) for side in ("chosen", "rejected")]
        good, bad = ("the best", "the others") if figures["takes"] == "list" else ("desirable", "undesirable ones")
        return f"{good} answers have {means[0]:,.1f} scored tokens on average, {bad} {means[1]:,.1f}"
    return (
        f"chosen is longer in {bias['chosen_longer_share']:.1%} of pairs, equal in {bias['equal_share']:.1%}; chosen - "
        f"rejected: {bias['mean_difference']:+,.1f} scored tokens on average, median {bias['median_difference']:+,.0f}"
    )


def _of(count: int, part: float, what: str, many: str = "", one: str = "") -> str:
    """Such as `12 pairs (0.6 %) repeat`."""
    verb = f" {one if count == 1 else many}" if many else ""
    return f"{counted(count, what) if what else f'{count:,}'} ({part:.1%}){verb}"


def _cut(name: str, figures: Mapping[str, Any]) -> str:
    count, lost, had = figures["count"], figures["lost"], figures["had"]
    if not count:
        return ""
    what = {"prompt": "prompt", "chosen": "chosen answer", "rejected": "rejected answer"}[name]
    return f"{_of(count, figures['share'], what, 'lost', 'lost')} {lost / had:.0%} of their tokens ({lost:,} of {had:,})"


def _overlap(shared: Mapping[str, int], unit: str) -> str:
    if not shared["prompts"]:
        return "none of its prompts is in the training set"
    are = "is" if shared["prompts"] == 1 else "are"
    words = f"{shared['prompts']:,} of its prompts ({counted(shared['pairs_of_these'], unit)}) {are} in the training set too"
    return f"{words}, {shared['pairs']:,} of these {unit}s with the same answer{'s' if unit == 'pair' else ''}"


def _draw_packing(packing: Mapping[str, Any], console: Console, unit: str) -> None:
    table = _table("tokens to compute", "in all", "share")
    rows: Sequence[tuple[str, int]] = (
        (f"padded, {packing['padded_pairs']} {unit}s a batch", packing["padded"]),
        ("without padding", packing["unpadded"]),
        ("packed, prompts shared" if packing["prefix_sharing"] else "packed, no prompts shared", packing["packed"]),
    )
    for name, tokens in rows:
        table.add_row(name, f"{tokens:,}", f"{tokens / max(packing['padded'], 1):.1%}")
    console.print()
    console.print(table)
    ranks, steps = counted(packing["ranks"], "rank"), counted(packing["steps"], "step")
    packs = f"{counted(packing['packs'], 'pack')} of {packing['tokens_per_pack']:,} tokens, {packing['fill']:.0%} full"
    named(console, "packing", f"{packs}; {steps} on {ranks}; saves {packing['saved']:.1%} of the tokens")
