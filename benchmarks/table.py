"""The table of a results file: on the terminal, and in README.md between two markers (`python -m benchmarks.table FILE`)."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
GPU_BEGIN, GPU_END = "<!-- gpu results: begin -->", "<!-- gpu results: end -->"
HEADER = ("benchmark", "what", "measured", "target", "")


def rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row of cells per figure; what is void says why in place of its figures."""
    for race in result["races"]:
        if race["void"]:
            yield (" ".join(race["benchmarks"]), race["race"], f"VOID: {race['void']}", "", "")
            continue
        for claim in race["claims"]:
            verdict = {True: "met", False: "missed", None: ""}[claim["met"]]
            yield (claim["benchmark"], claim["what"], measured(claim), claim["target"] or "", verdict)


def measured(claim: dict[str, Any]) -> str:
    """`4.12x TRL`: so many times as fast as TRL, or for memory so many times as much."""
    number = f"{claim['value']:,.0f}" if claim["value"] >= 1000 else f"{claim['value']:.3g}"
    return f"{number}{claim.get('unit', 'x')} {claim['peer']}".rstrip()


def ordered(result: dict[str, Any]) -> list[tuple[str, ...]]:
    return sorted(rows(result), key=lambda row: int(row[0].split()[0].removeprefix("B")))


def as_text(result: dict[str, Any]) -> str:
    table = [HEADER, *ordered(result)]
    widths = [max(len(row[k]) for row in table) for k in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table)


def as_markdown(result: dict[str, Any]) -> str:
    table = [HEADER, ("---",) * len(HEADER), *ordered(result)]
    lines = [f"| {' | '.join(row)} |" for row in table]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines += ["", *(f"- {line}" for line in measurements(result)), f"- {versions}"]
    return "\n".join(lines)


def measurements(result: dict[str, Any]) -> Iterator[str]:
    """A line for each day and machine: what was measured there."""
    apart: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for race in result["races"]:
        apart[race["date"][:10], race["hardware"]["processor"]].append(race)
    for (date, processor), races in sorted(apart.items()):
        names = sorted({name for race in races for name in race["benchmarks"]}, key=lambda name: int(name[1:]))
        yield f"{', '.join(names)}: {date}, {processor}; least of {min(race['rounds'] for race in races)} rounds or more"


def gpu_markdown(result: dict[str, Any]) -> str:
    """The figures of a results file of `benchmarks.gpu`; what has no value is in the file."""
    table = [HEADER, ("---",) * len(HEADER)]
    for benchmark in result["benchmarks"]:
        for figure in benchmark["figures"]:
            verdict = {True: "met", False: "missed", None: ""}[figure["met"]]
            if figure["value"] is not None:
                table.append((benchmark["id"], figure["what"], measured(figure), figure["target"] or "", verdict))
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([*lines, "", f"- {result['date'][:10]}, {result['hardware']['device']}; {versions}"])


def put_into(text: str, table: str, begin: str, end: str) -> str:
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}"


def main() -> None:
    result = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    of_gpu = "benchmarks" in result
    table, marks = (gpu_markdown(result), (GPU_BEGIN, GPU_END)) if of_gpu else (as_markdown(result), (BEGIN, END))
    README.write_text(put_into(README.read_text(encoding="utf-8"), table, *marks), encoding="utf-8")


if __name__ == "__main__":
    main()
