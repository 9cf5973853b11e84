"""The races: the same spec run by several variants; and the claims, each a ratio out of a race with its target.

A race is run once and serves all claims about it. Its first variant is the one whose losses the others must reproduce.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workload import (
    DATA,
    MULTI_TURN,
    SINGLE_TURN,
    Spec,
    invented_file,
    model_folder,
    one_pair_per_prompt,
    pairs_file,
    six_pairs_of_four,
    ultrafeedback_lengths,
)

INVENTED = 400
"""Pairs of a file of words without sense, out of which a run takes a stretch."""


@dataclass(frozen=True)
class Setup:
    """What the command line decides."""

    work: Path
    data: Path = DATA
    rounds: int = 3
    steps: int = 5


Variants = dict[str, tuple[str, Spec]]  # name -> (module of benchmarks.variants, spec)


@dataclass(frozen=True)
class Target:
    """A bound on a figure, such as >= 4.0."""

    sign: str
    bound: float

    def met_by(self, value: float) -> bool:
        return {">=": operator.ge, "<=": operator.le}[self.sign](value, self.bound)

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"


@dataclass(frozen=True)
class Claim:
    """How `ours` does against `peer` in a race. Without a target it is shown for context."""

    benchmark: str
    race: str
    what: str
    ours: str
    peer: str
    target: Target | None
    figure: str = "speed"
    """speed: CPU time of the peer / ours, that is tokens and pairs per CPU second, ours / the peer's; time: the inverse;
    memory: peak of ours / the peer's; reference pass: as speed, of the pass before the first step; share of saved tokens:
    speed over what it would be if time were proportional to computed tokens."""


def at_least(bound: float) -> Target:
    return Target(">=", bound)


def at_most(bound: float) -> Target:
    return Target("<=", bound)


# ---------------------------------------------------------------------------------------------------------------------
# Races


def spec(setup: Setup, model: str, *, source: str = SINGLE_TURN, group: int = 1, **values: Any) -> Spec:
    """A run of a model on its pairs; with `group`, on all pairs of four answers to each prompt."""
    run = Spec(model=str(model_folder(model, setup.work, setup.data)), data="", work=str(setup.work), steps=setup.steps)
    run = replace(run, **values)
    if run.objective["name"] == "dpo" and model != "MoE":
        run = replace(run, first_loss=log(2))
    arrange = one_pair_per_prompt if group == 1 else six_pairs_of_four
    count = run.steps * run.pairs_per_step
    path = setup.data / source
    pairs = pairs_file(Path(run.model), count, run.pairs_per_step, run.max_length, path, arrange, group)
    return replace(run, data=str(pairs))


def live(setup: Setup, model: str) -> Variants:
    """DPO with the reference computed in every step."""
    run = spec(setup, model)
    return {
        "dspref": ("dspref_run", run),
        "TRL": ("trl_run", run),
        "TRL default": ("trl_run", replace(run, checkpointing=True)),
        "padded": ("padded", run),
        "dense mask": ("dense_mask", run),
    }


def stored(setup: Setup, model: str) -> Variants:
    """DPO with the reference's log-probs computed before the first step, which is not in the figures (B12 has it)."""
    run = spec(setup, model, reference="stored")
    return {"dspref": ("dspref_run", run), "TRL": ("trl_run", run), "padded": ("padded", run)}


def like_ultrafeedback(setup: Setup, model: str) -> Variants:
    """`live` on words without sense, but with UltraFeedback's lengths at half their size: longer prompts, more padding."""
    folder = model_folder(model, setup.work, setup.data)
    lengths = np.maximum(ultrafeedback_lengths(INVENTED) // 2, 1).tolist()
    run = spec(setup, model, source=str(invented_file(folder, INVENTED, lengths)))
    return {"dspref": ("dspref_run", run), "TRL": ("trl_run", run), "padded": ("padded", run)}


def prompt_heavy(setup: Setup) -> Variants:
    run = spec(setup, "B", source=MULTI_TURN, max_length=1024, reference="stored", tokens_per_pack=8192)
    return {
        "shared": ("dspref_run", replace(run, prefix_sharing=True)),
        "separate": ("dspref_run", replace(run, prefix_sharing=False)),
        "TRL": ("trl_run", run),
    }


def prompt_groups(setup: Setup) -> Variants:
    run = spec(setup, "B", group=6, pairs_per_step=6, max_length=1024, reference="stored")
    return {"dspref": ("dspref_run", run), "TRL": ("trl_run", run)}


OBJECTIVES: dict[str, dict[str, Any]] = {
    "SimPO": {"name": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
    "CPO": {"name": "cpo", "loss_type": "sigmoid", "beta": 0.1},
    "ORPO": {"name": "orpo", "beta": 0.1},
}


def objective(setup: Setup, name: str) -> Variants:
    run = spec(setup, "A", reference="none", objective=OBJECTIVES[name])
    return {"dspref": ("dspref_run", run), "TRL": ("trl_run", run)}


def stages(setup: Setup) -> Variants:
    run = spec(setup, "B", reference="stored")
    return {f"ZeRO-{stage}": ("dspref_run", replace(run, zero_stage=stage)) for stage in (1, 3)}


def experts(setup: Setup) -> Variants:
    run = spec(setup, "MoE")
    return {"dspref": ("dspref_run", run), "TRL": ("trl_run", run)}


RACES: dict[str, Callable[[Setup], Variants]] = {
    "live A": lambda setup: live(setup, "A"),
    "live B": lambda setup: live(setup, "B"),
    "lengths A": lambda setup: like_ultrafeedback(setup, "A"),
    "lengths B": lambda setup: like_ultrafeedback(setup, "B"),
    "stored A": lambda setup: stored(setup, "A"),
    "stored B": lambda setup: stored(setup, "B"),
    "prompt-heavy": prompt_heavy,
    "prompt groups": prompt_groups,
    **{name: lambda setup, name=name: objective(setup, name) for name in OBJECTIVES},
    "stages": stages,
    "experts": experts,
}

SHARE = "share of saved tokens"
CLAIMS = [
    Claim("B1", "live A", "DPO, large vocabulary, live reference", "dspref", "TRL", at_least(4.0)),
    Claim("B1", "live A", "the same", "dspref", "TRL default", None),
    Claim("B2", "live B", "DPO, heavy body, live reference", "dspref", "TRL", at_least(2.7)),
    Claim("B2", "live B", "the same", "dspref", "TRL default", None),
    Claim("B3", "stored A", "DPO, large vocabulary, stored reference", "dspref", "TRL", at_least(4.5)),
    Claim("B3", "stored B", "DPO, heavy body, stored reference", "dspref", "TRL", at_least(3.0)),
    Claim("B3", "stored A", "the same on A", "dspref", "padded", None),
    Claim("B3", "stored B", "the same on B", "dspref", "padded", None),
    Claim("B4", "live A", "DPO, large vocabulary, live reference", "dspref", "padded", at_least(1.5)),
    Claim("B4", "live A", "the same", "dspref", "dense mask", None),
    Claim("B4", "live B", "DPO, heavy body, live reference", "dspref", "padded", at_least(2.0)),
    Claim("B4", "live B", "the same", "dspref", "dense mask", None),
    Claim("B5", "prompt-heavy", "sharing prompts, over its saving of tokens", "shared", "separate", at_least(0.93), SHARE),
    Claim("B5", "prompt-heavy", "sharing prompts, multi-turn DPO", "shared", "separate", None),
    Claim("B5", "prompt-heavy", "multi-turn DPO, stored reference", "shared", "TRL", None),
    Claim("B6", "prompt groups", "six pairs of four answers, stored reference", "dspref", "TRL", at_least(6.0)),
    Claim("B7", "SimPO", "SimPO, large vocabulary", "dspref", "TRL", at_least(3.3)),
    Claim("B7", "CPO", "CPO, large vocabulary", "dspref", "TRL", at_least(3.3)),
    Claim("B7", "ORPO", "ORPO, large vocabulary", "dspref", "TRL", at_least(3.3)),
    Claim("B8", "live A", "peak memory, large vocabulary", "dspref", "TRL", at_most(0.38), "memory"),
    Claim("B8", "live B", "peak memory, heavy body", "dspref", "TRL", at_most(0.55), "memory"),
    Claim("B12", "stored A", "reference pass, large vocabulary", "dspref", "TRL", at_least(4.0), "reference pass"),
    Claim("B12", "stored B", "reference pass, heavy body", "dspref", "TRL", at_least(4.0), "reference pass"),
    Claim("B16", "stages", "step on one rank, heavy body, stored reference", "ZeRO-3", "ZeRO-1", at_most(1.10), "time"),
    Claim("B18", "experts", "mixture of experts with its balancing loss", "dspref", "TRL", at_least(2.5)),
    Claim("B19", "lengths A", "lengths like UltraFeedback's, large vocabulary", "dspref", "TRL", None),
    Claim("B19", "lengths A", "the same", "dspref", "padded", None),
    Claim("B19", "lengths B", "lengths like UltraFeedback's, heavy body", "dspref", "TRL", None),
    Claim("B19", "lengths B", "the same", "dspref", "padded", None),
]


# ---------------------------------------------------------------------------------------------------------------------
# What comes out of a race

LOSS_TOLERANCE, FIRST_LOSS_TOLERANCE = 1e-3, 1e-5

Found = dict[str, list[dict[str, Any]]]  # variant -> what it measured in each round


def fault(variants: Variants, found: Found) -> str | None:
    """Why a race is void, or None: every variant must have trained on the same tokens and computed the same losses."""
    first, *_ = found
    expected = found[first][0]
    for name, rounds in found.items():
        for result in rounds:
            if result["useful_tokens"] != expected["useful_tokens"]:
                return f"{name} trained on other tokens than {first}"
            if len(result["losses"]) != len(expected["losses"]):
                return f"{name} did {len(result['losses'])} steps, {first} {len(expected['losses'])}"
            gaps = [abs(a - b) for a, b in zip(result["losses"], expected["losses"])]
            for step, gap in enumerate(gaps, start=1):
                if not gap <= LOSS_TOLERANCE:
                    return f"losses of {name} and {first} differ by {gap:.2g} in step {step}"
    analytic = variants[first][1].first_loss
    if analytic is not None and not abs(expected["losses"][0] - analytic) <= FIRST_LOSS_TOLERANCE:
        return f"the first loss is {expected['losses'][0]:.6f}, not {analytic:.6f}"
    return None


def seconds(rounds: list[dict[str, Any]]) -> float:
    """CPU seconds of the steps after the first, each the least of all rounds: other load can only add."""
    return sum(min(step) for step in zip(*(result["cpu_seconds"][1:] for result in rounds)))


def value(claim: Claim, found: Found, tokens: dict[str, int]) -> float:
    """The claim's figure; `tokens`: of the race's data (`workload.describe`)."""
    ours, peer = found[claim.ours], found[claim.peer]
    match claim.figure:
        case "memory":
            return min(r["peak_bytes"] for r in ours) / min(r["peak_bytes"] for r in peer)
        case "time":
            return seconds(ours) / seconds(peer)
        case "reference pass":
            return _least(peer, "reference_cpu_seconds") / _least(ours, "reference_cpu_seconds")
        case "share of saved tokens":
            return seconds(peer) / seconds(ours) / (tokens["useful"] / tokens["shared"])
        case _:
            return seconds(peer) / seconds(ours)


def _least(rounds: list[dict[str, Any]], name: str) -> float:
    return min(result["extra"][name] for result in rounds)
