"""Run the benchmarks that need a GPU: `python -m benchmarks.gpu [--only G1 G5] [--out FILE.json] [--minutes 10] [--tiny]`.

Everything is measured in processes of their own, one at a time; what fails, or does not come to an end in its time, is one
line in the results and the others go on. `--tiny` runs the same code on small shapes on a CPU: it shows that it runs, and
says nothing of speed, so that no target is met or missed there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.gpu.child import ask
from benchmarks.gpu.figures import Sizes, tiny_sizes
from benchmarks.gpu.micro import PARTS, Left
from benchmarks.gpu.races import Found, longest_pair, run_race, wish
from benchmarks.processes import Failed
from benchmarks.workload import ROOT

# Seconds of eight minutes, in the order in which they run: what is asked first. What one leaves, the next ones have; and
# where one took more, each still has its own, until all time is over.
SHARES = {"G3": 40, "preparation": 40, "G1": 100, "G2": 55, "G4": 75, "G7": 70, "G5": 35, "G6": 25, "G8": 40}
NAMES = [name for name in SHARES if name != "preparation"]
TITLES = {
    "preparation": "models, tokenizers and pairs",
    "G1": "DPO, 1.5B shape, live reference",
    "G2": "DPO, 1.5B shape, stored reference",
    "G3": "micro-steps of an 8B slice",
    "G4": "DPO with prompts four times as long as answers, 1.5B shape",
    "G5": "attention kernels on packed sequences",
    "G6": "LM head: log-probs of 8,192 targets",
    "G7": "DPO, MoE slice with its balancing loss",
    "G8": "longest pair in the GPU's memory, 1.5B shape",
}


def shares_of(wanted: list[str], minutes: float) -> dict[str, float]:
    """Seconds of the preparation and of each wanted benchmark, in order."""
    shares = {name: share for name, share in SHARES.items() if name in ("preparation", *wanted)}
    return {name: 60 * minutes * share / sum(shares.values()) for name, share in shares.items()}


def deadline(name: str, now: float, shares: dict[str, float]) -> float:
    """Seconds after the start by which a benchmark that begins `now` must be done."""
    planned = dict(zip(shares, accumulate(shares.values())))
    return min(max(planned[name], now + shares[name]), sum(shares.values()))


# ---------------------------------------------------------------------------------------------------------------------
# The driver


def run(wanted: list[str], sizes: Sizes, minutes: float, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All wanted benchmarks; the result so far is saved after each, and after each variant of a race."""
    began, shares = time.monotonic(), shares_of(wanted, minutes)

    def time_of(name: str) -> Left:
        until = began + deadline(name, time.monotonic() - began, shares)
        return lambda: until - time.monotonic()

    def so_far(name: str, found: Found) -> None:
        save(result | {"unfinished": {"id": name, "found": found}})

    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "tiny": sizes.tiny,
        "minutes": minutes,
        "sizes": asdict(sizes) | {"work": sizes.work.name},
        "benchmarks": [],
    }
    wishes = {name: wish(sizes, name) for name in wanted if name not in PARTS}
    setup = {"tiny": sizes.tiny, "device": sizes.device, "dtype": sizes.dtype, "work": str(sizes.work), "races": wishes}
    made: dict[str, Any] = {}
    for name in shares:
        if name == "preparation":
            made = judged(name, partial(prepared, setup, sizes, time_of(name)))
            result |= {"hardware": made.get("hardware"), "versions": made.get("versions")}
        else:
            job = partial(one, name, sizes, made, time_of(name), partial(so_far, name))
            result["benchmarks"].append(judged(name, job, tiny=sizes.tiny))
        result["seconds"] = time.monotonic() - began
        save(result)
    return result


def prepared(setup: dict[str, Any], sizes: Sizes, left: Left) -> dict[str, Any]:
    # It may take what is left of all: without models there is nothing to race.
    return ask("prepare", setup, work=sizes.work, device=sizes.device, limit=3 * left())


def one(name: str, sizes: Sizes, made: dict[str, Any], left: Left, tell: Callable[[Found], None]) -> dict[str, Any]:
    if name in PARTS:
        return PARTS[name](sizes, left)
    of_race = made.get("races", {}).get(name, {"reason": made.get("void")})
    if reason := of_race.get("reason"):
        raise Failed(f"preparation: {reason}")
    return longest_pair(sizes, of_race, left, tell) if name == "G8" else run_race(name, sizes, of_race, left, tell)


def judged(name: str, job: Callable[[], dict[str, Any]], tiny: bool = False) -> dict[str, Any]:
    """The record of a benchmark: its figures and raw numbers, or in `void` one line that says why there are none. Targets
    are for real shapes only."""
    began, record = time.monotonic(), {"id": name, "what": TITLES[name], "void": None, "figures": [], "raw": {}}
    print(f"{name}: {record['what']}", flush=True)
    try:
        record |= job()
    except Failed as error:
        record["void"] = str(error).splitlines()[0][:300]
        print(error, flush=True)
    except Exception as error:  # a fault in the benchmark itself must not cost the others' results
        record["void"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        traceback.print_exc()
    for figure in record["figures"]:
        figure["met"] = None if tiny else figure["met"]
        print(f"  {line_of(figure)}", flush=True)
    return record | {"seconds": time.monotonic() - began}


def line_of(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return f"{figure['what']}{figure['peer'] and ' against ' + figure['peer']}: none, {figure['reason']}"
    verdict = {True: ", met", False: ", missed", None: ""}[figure["met"]]
    goal = f" ({figure['target']}{verdict})" if figure["target"] else ""
    value = figure["value"]
    return f"{figure['what']}: {f'{value:,.0f}' if value >= 1000 else f'{value:.3g}'}{figure['unit']} {figure['peer']}{goal}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="dspref and its peers on one GPU.")
    parser.add_argument("--only", nargs="+", metavar="G1", choices=NAMES, default=NAMES)
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all of them together")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on the CPU, in fp32")
    default = Path(tempfile.gettempdir()) / "dspref-gpu-benchmarks"
    parser.add_argument("--work", type=Path, default=default, help="folder for models and runs; 16 GB")
    parser.add_argument("--out", type=Path, help="results; default: gpu.json in the work folder")
    return parser.parse_args()


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.resolve()
    out = options.out or work / "gpu.json"
    sizes = tiny_sizes(work) if options.tiny else Sizes(work)

    def save(result: dict[str, Any]) -> None:
        text = json.dumps(result, indent=1)
        for folder, name in ((work, "WORK"), (ROOT, "REPOSITORY")):  # results are for others to read
            text = text.replace(str(folder), name)
        out.write_text(text + "\n", encoding="utf-8")

    run(options.only, sizes, options.minutes, save)
    print(f"results: {out}")


if __name__ == "__main__":
    main()
