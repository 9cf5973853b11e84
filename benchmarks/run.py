"""Run benchmarks: `python -m benchmarks.run [B1 B2 ...] [--rounds 3] [--steps 5] [--work DIR] [--out FILE.json]`.

Each variant runs in a process of its own with one thread, one process at a time, variants interleaved over the rounds. The
results go to a JSON file with every raw number, and to the terminal as a table. A file that exists keeps the benchmarks that
are not run anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.measure import versions
from benchmarks.parts import PARTS
from benchmarks.processes import ENVIRONMENT, Failed, measure
from benchmarks.races import CLAIMS, RACES, Claim, Found, Setup, Target, Variants, fault, seconds, value
from benchmarks.table import as_text
from benchmarks.workload import DATA, Spec, describe


def race(variants: Variants, setup: Setup) -> Found:
    """Every variant once per round, in turn."""
    found: Found = {name: [] for name in variants}
    for turn in range(1, setup.rounds + 1):
        for name, (module, spec) in variants.items():
            result = measure(module, spec)
            found[name].append(result)
            spent = sum(result["cpu_seconds"][1:])
            print(f"  round {turn}: {name:12} {spent:8.2f} CPU s, {result['peak_bytes'] / 2**20:6.0f} MiB", flush=True)
    return found


def run_races(wanted: set[str], races: set[str], setup: Setup) -> Iterator[dict[str, Any]]:
    """Of `races`, those that the wanted benchmarks need, each with only the variants that they need; one record per race."""
    for title, of_race in RACES.items():
        claims = [claim for claim in CLAIMS if claim.race == title in races and claim.benchmark in wanted]
        needed = {name for claim in claims for name in (claim.ours, claim.peer)}
        benchmarks = list(dict.fromkeys(claim.benchmark for claim in claims))
        if claims:
            print(f"{title} ({', '.join(benchmarks)}):", flush=True)
            variants = {name: variant for name, variant in of_race(setup).items() if name in needed}
            yield attempt(title, benchmarks, setup, partial(run_race, variants, claims, setup))


def run_parts(wanted: set[str], setup: Setup) -> Iterator[dict[str, Any]]:
    for benchmark in sorted(wanted & PARTS.keys(), key=number):
        title = PARTS[benchmark].__name__
        print(f"{title} ({benchmark})", flush=True)
        yield attempt(title, [benchmark], setup, partial(run_part, benchmark, setup))


def attempt(title: str, benchmarks: list[str], setup: Setup, job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The record of a race or a part; where a process fails, why it is void."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    about = {"race": title, "benchmarks": benchmarks, "date": when, "hardware": hardware(), "rounds": setup.rounds}
    about |= {"void": None, "claims": []}
    try:
        about |= job()
    except Failed as error:
        about["void"] = str(error).splitlines()[0]
        print(error, flush=True)
    return about


def run_race(variants: Variants, claims: list[Claim], setup: Setup) -> dict[str, Any]:
    """The figures of one race, and all about it."""
    found, tokens = race(variants, setup), describe(next(iter(variants.values()))[1])
    return {
        "void": fault(variants, found),
        "claims": [asdict(claim) | judged(value(claim, found, tokens), claim.target) for claim in claims],
        "cpu_seconds": {name: seconds(rounds) for name, rounds in found.items()},
        "tokens": tokens,
        "specs": {name: without_folders(spec) for name, (_, spec) in variants.items()},
        "found": found,
    }


def without_folders(spec: Spec) -> dict[str, Any]:
    """A spec as others can read it: names of files instead of where they lie on this machine."""
    values = asdict(spec) | {"model": Path(spec.model).name, "data": Path(spec.data).name}
    del values["work"]
    return values


def run_part(benchmark: str, setup: Setup) -> dict[str, Any]:
    """The figures of one part, and its raw numbers."""
    figures, raw = PARTS[benchmark](setup)
    shared = [{"benchmark": benchmark, "what": f.what, "unit": f.unit, "peer": f.peer} for f in figures]
    return {"claims": [about | judged(f.value, f.target) for about, f in zip(shared, figures)], "raw": raw}


def judged(value: float, target: Target | None) -> dict[str, Any]:
    return {"value": value, "target": target and str(target), "met": target and target.met_by(value)}


def number(benchmark: str) -> int:
    return int(benchmark.removeprefix("B"))


def save(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Put a record into a results file, in place of what the file has of these benchmarks in this race; the whole result."""
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"races": []}
    for old in result["races"]:
        if old["race"] == record["race"]:
            old["claims"] = [claim for claim in old["claims"] if claim["benchmark"] not in record["benchmarks"]]
            old["benchmarks"] = [benchmark for benchmark in old["benchmarks"] if benchmark not in record["benchmarks"]]
    kept = [old for old in result["races"] if old["benchmarks"]]
    result = {"versions": versions(), "races": [*kept, record]}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def hardware() -> dict[str, Any]:
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {"processor": names[0] if names else platform.processor(), "cores": os.cpu_count(), "system": platform.system()}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Side-by-side runs of dspref and peers.")
    known = sorted({claim.benchmark for claim in CLAIMS} | PARTS.keys(), key=number)
    parser.add_argument("benchmarks", nargs="*", metavar="B1", help=f"which ones; default: all ({' '.join(known)})")
    parser.add_argument("--races", nargs="+", metavar="RACE", choices=RACES, default=list(RACES), help="only these of them")
    parser.add_argument("--rounds", type=int, default=3, help="times that each variant runs; the least counts")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of a run; the first is not counted")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the preference pairs")
    default = Path(tempfile.gettempdir()) / "dspref-benchmarks"
    parser.add_argument("--work", type=Path, default=default, help="folder for models, tokenizers and runs")
    parser.add_argument("--out", type=Path, help="results; what else is in the file stays; default: in the work folder")
    options = parser.parse_args()
    if unknown := set(options.benchmarks) - set(known):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; there are {' '.join(known)}")
    options.benchmarks = set(options.benchmarks or known)
    return options


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    os.environ.update(ENVIRONMENT)
    setup = Setup(options.work.resolve(), options.data.resolve(), options.rounds, options.steps)
    out = options.out or options.work / "results.json"
    result: dict[str, Any] = {}
    for record in chain(run_races(options.benchmarks, set(options.races), setup), run_parts(options.benchmarks, setup)):
        result = save(out, record)
    print(as_text(result), f"\nraw numbers: {out}")


if __name__ == "__main__":
    main()
