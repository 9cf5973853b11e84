"""What the CPU benchmarks conclude from what they measured: void races, figures, the table in their README."""

from __future__ import annotations

import json
from itertools import combinations
from math import log
from pathlib import Path
from typing import Any

import pytest

from benchmarks import table
from benchmarks.parts import PARTS
from benchmarks.races import CLAIMS, RACES, Claim, Setup, at_least, at_most, fault, seconds, value
from benchmarks.workload import Spec, Tokens, count_tokens, most_ordinary, six_pairs_of_four

SPEC = Spec(model="m", data="d", work="w", first_loss=log(2))
VARIANTS = {"dspref": ("dspref_run", SPEC), "TRL": ("trl_run", SPEC)}


def measured(cpu: list[float], losses: tuple[float, ...] = (log(2), 0.5, 0.4), **more: Any) -> dict[str, Any]:
    return {"cpu_seconds": cpu, "losses": list(losses), "useful_tokens": [10, 20, 30], "peak_bytes": 100, "extra": {}} | more


def found(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {"dspref": [ours], "TRL": [peer]}


@pytest.mark.parametrize(
    "peer, said",
    [
        (measured([1, 1, 1]), None),
        (measured([1, 1, 1], (log(2), 0.5009, 0.4)), None),
        (measured([1, 1, 1], (log(2), 0.5011, 0.4)), "differ by 0.0011 in step 2"),
        (measured([1, 1, 1], (log(2), float("nan"), 0.4)), "differ"),
        (measured([1, 1], (log(2), 0.5)), "did 2 steps"),
        (measured([1, 1, 1], useful_tokens=[10, 20, 31]), "other tokens"),
    ],
)
def test_a_race_is_void_unless_all_did_the_same(peer: dict[str, Any], said: str | None) -> None:
    reason = fault(VARIANTS, found(measured([1, 1, 1]), peer))
    assert (reason is None) if said is None else (reason is not None and said in reason)


def test_a_race_is_void_when_the_first_loss_is_not_ln_2() -> None:
    same = measured([1, 1, 1], (0.6932, 0.5, 0.4))
    assert "the first loss is 0.693200" in str(fault(VARIANTS, found(same, same)))


def test_of_each_step_the_least_counts_and_the_first_does_not() -> None:
    assert seconds([measured([9, 1, 5]), measured([8, 2, 3])]) == 4


def test_figures_are_ratios_to_the_peer() -> None:
    ours = measured([0, 1, 1], peak_bytes=30, extra={"reference_cpu_seconds": 2.0})
    peer = measured([0, 3, 5], peak_bytes=60, extra={"reference_cpu_seconds": 9.0})
    tokens = {"useful": 120, "shared": 100}

    def of(figure: str) -> float:
        return value(Claim("B0", "race", "what", "dspref", "TRL", None, figure), found(ours, peer), tokens)

    assert of("speed") == 4 and of("time") == 0.25 and of("memory") == 0.5 and of("reference pass") == 4.5
    assert of("share of saved tokens") == pytest.approx(4 / 1.2)
    assert at_least(4.0).met_by(4.0) and not at_least(4.0).met_by(3.999)
    assert at_most(0.38).met_by(0.38) and not at_most(0.38).met_by(0.381)


def test_every_claim_is_of_a_race_that_is_run() -> None:
    assert {claim.race for claim in CLAIMS} == RACES.keys()
    assert not PARTS.keys() & {claim.benchmark for claim in CLAIMS} - {"B12"}


def test_tokens_of_a_step() -> None:
    pairs = [Tokens([1] * 3, [2] * 4, [3] * 2), Tokens([1] * 1, [2] * 1, [3] * 5)]
    assert count_tokens([pairs]) == {"padded": 4 * 7, "useful": 12 + 8, "shared": 9 + 7, "answers": 6 + 6}
    usual, odd = Tokens([1] * 5, [2] * 20, [3] * 18), Tokens([1] * 90, [2] * 1, [3] * 1)
    assert most_ordinary([*[odd] * 8, *[usual] * 40], count=8, per_step=4) >= 4


def test_six_pairs_of_four_answers() -> None:
    rows = [{"prompt": "p", "chosen": a, "rejected": b} for a, b in ("ab", "ac", "da", "be")] + [
        {"prompt": "q", "chosen": "a", "rejected": "b"}
    ]
    made = [(row["chosen"], row["rejected"]) for row in six_pairs_of_four(iter(rows))]
    assert made == list(combinations("abcd", 2))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["B9", "B11"])
def test_parts_run(part: str) -> None:
    """Once, for real; what they measure decides nothing here."""
    figures, raw = PARTS[part](Setup(work=Path("."), rounds=1))
    assert len(figures) >= 2 and raw
    assert all(figure.value > 0 for figure in figures)


def test_the_tables_in_the_readme_are_those_of_the_results() -> None:
    readme, results = table.README.read_text(encoding="utf-8"), table.README.parent / "results"
    of_gpu = table.gpu_markdown(json.loads((results / "h100.json").read_text(encoding="utf-8")))
    assert readme == table.put_into(readme, of_gpu, table.GPU_BEGIN, table.GPU_END)
    result = json.loads((results / "cpu.json").read_text(encoding="utf-8"))
    shown = table.as_markdown(result)
    assert readme == table.put_into(readme, shown, table.BEGIN, table.END)
    assert {race["void"] for race in result["races"]} == {None}
    shown_benchmarks = {row.split("|")[1].strip() for row in shown.splitlines() if row.startswith("| B")}
    assert shown_benchmarks >= {claim.benchmark for claim in CLAIMS if claim.target} | PARTS.keys()
