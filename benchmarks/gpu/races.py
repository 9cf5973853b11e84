"""The races on a GPU (G1, G2, G4, G7, G8): what each variant trains on, when a race is void, and the figures out of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import log
from statistics import mean, median
from typing import Any

from benchmarks.gpu import models
from benchmarks.gpu.child import TimedOut, ask
from benchmarks.gpu.figures import Figure, Sizes
from benchmarks.gpu.train import finished_steps, metrics_file
from benchmarks.processes import Failed
from benchmarks.races import Target, at_least, at_most
from benchmarks.workload import Spec

Found = dict[str, dict[str, Any]]  # variant -> what it measured, or `reason`


@dataclass(frozen=True)
class Claim:
    """dspref against a peer. `of`: speed (times as many useful tokens per second) or memory (share of the peak)."""

    peer: str
    target: Target | None
    of: str = "speed"


Variant = tuple[str, dict[str, Any]]  # (of `train.VARIANTS`, what its spec has beyond the race's)


@dataclass(frozen=True)
class Race:
    shape: str
    lengths: Callable[[Sizes, int], Any]
    """Of the pairs of a step."""
    variants: Mapping[str, Variant]
    """`dspref` first: the others must reproduce its losses."""
    claims: tuple[Claim, ...]
    values: Mapping[str, Any]
    """Of the spec of all variants."""
    first_loss: float | None = log(2)
    pairs: int = 4


CHECKPOINTED = {"checkpointing": True}


def uf_step(sizes: Sizes, pairs: int) -> Any:
    return models.ordinary_step(models.like_ultrafeedback(sizes.max_length), pairs)


def prompt_heavy_step(sizes: Sizes, pairs: int) -> Any:
    return models.ordinary_step(models.prompt_heavy(2 * sizes.max_length), pairs)


RACES: dict[str, Race] = {
    "G1": Race(
        "1.5B",
        uf_step,
        {
            "dspref": ("dspref", {}),
            "TRL default": ("trl", CHECKPOINTED),
            "TRL": ("trl", {}),
            "TRL all in bf16": ("trl_16", {}),
        },
        (
            Claim("TRL default", at_least(2.2)),
            Claim("TRL", at_least(1.9)),
            Claim("TRL", at_most(0.6), "memory"),
            Claim("TRL default", None, "memory"),
            Claim("TRL all in bf16", None),
            Claim("TRL all in bf16", None, "memory"),
        ),
        {"tokens_per_pack": 8192},
    ),
    "G2": Race(
        "1.5B",
        uf_step,
        {"dspref": ("dspref", {}), "TRL precompute": ("trl", {})},
        (Claim("TRL precompute", at_least(2.3)), Claim("TRL precompute", None, "memory")),
        {"tokens_per_pack": 8192, "reference": "stored"},
    ),
    "G4": Race(
        "1.5B",
        prompt_heavy_step,
        {"dspref": ("dspref", {}), "Flex prefix sharing": ("flex", {}), "TRL default": ("trl", CHECKPOINTED)},
        (Claim("Flex prefix sharing", at_least(1.1)), Claim("TRL default", at_least(3.5))),
        {"tokens_per_pack": 16384},
    ),
    "G7": Race(
        "MoE slice",
        uf_step,
        {"dspref": ("dspref", {}), "TRL": ("trl", {}), "TRL all in bf16": ("trl_16", {})},
        (Claim("TRL", at_least(2.2)), Claim("TRL all in bf16", None), Claim("TRL", None, "memory")),
        {"tokens_per_pack": 8192},
        first_loss=None,
        pairs=8,  # with fewer, the update of all experts would be most of a step
    ),
}


def spec_of(sizes: Sizes, race: Race, lengths: Any, made: dict[str, Any], **values: Any) -> Spec:
    seen = models.with_template(lengths)
    longest = int((seen[:, 0] + seen[:, 1:].max(axis=1)).max())
    common = {
        "steps": sizes.warmups + sizes.steps, "pairs_per_step": race.pairs, "max_length": longest, "device": sizes.device,
        "dtype": sizes.dtype, "learning_rate": sizes.learning_rate, "first_loss": race.first_loss,
        "zero_stage": 0 if sizes.dtype == "float32" else 1,  # which keeps fp32 masters, as TRL does
    }  # fmt: skip
    where = {"model": made["model"], "data": made["data"], "work": str(sizes.work)}
    return Spec(**where, **common | dict(race.values) | values)


def wish(sizes: Sizes, name: str) -> dict[str, Any]:
    """What `child.prepare` is asked for, for a race."""
    if name == "G8":
        lengths = models.doubling(*sizes.longest_pairs)
        return {"shape": "1.5B", "lengths": lengths.tolist(), "count": len(lengths), "live": True}
    race = RACES[name]
    count = (sizes.warmups + sizes.steps) * race.pairs
    live = race.values.get("reference", "live") == "live"
    return {"shape": race.shape, "lengths": race.lengths(sizes, race.pairs).tolist(), "count": count, "live": live}


def variants_of(race: Race, sizes: Sizes) -> dict[str, Variant]:
    """In fp32, weights with and without fp32 masters are the same thing."""
    return {
        name: (kind, values)
        for name, (kind, values) in race.variants.items()
        if sizes.dtype != "float32" or kind != "trl_16"
    }


def failed(error: Failed) -> dict[str, Any]:
    """One line, and what else the process said."""
    return {"reason": str(error).splitlines()[0][:300], "said": str(error)}


def trained(
    race: Race, sizes: Sizes, lengths: Any, made: dict[str, Any], left: Callable[[], float], tell: Callable[[Found], None]
) -> Found:
    """All variants one after another, each with its share of the time that is left, and half as much again; what is found is
    told after each."""
    found: Found = {}
    variants = variants_of(race, sizes)
    for k, (variant, (kind, values)) in enumerate(variants.items()):
        spec = asdict(spec_of(sizes, race, lengths, made, **values))
        limit = min(left(), left() / (len(variants) - k) * 1.5)
        try:
            found[variant] = ask("train", {"variant": kind, "spec": spec}, work=sizes.work, device=sizes.device, limit=limit)
        except Failed as error:
            found[variant] = failed(error)
        tell(found)
    return found


def run_race(
    name: str, sizes: Sizes, made: dict[str, Any], left: Callable[[], float], tell: Callable[[Found], None]
) -> dict[str, Any]:
    """The figures of a race, and all about it."""
    race = RACES[name]
    lengths = race.lengths(sizes, race.pairs)
    found = trained(race, sizes, lengths, made, left, tell)
    useful = models.separate(models.with_template(lengths))[0]
    tolerances = TOLERANCES[sizes.dtype]
    for result in found.values():
        if "reason" not in result and (why := fault(result, found["dspref"], useful, race.first_loss, tolerances)):
            result["reason"] = why
    figures = [claimed(claim, found, sizes.warmups) for claim in race.claims if claim.peer in found]
    figures += [figure for variant in found for figure in absolute(variant, found[variant], made, sizes.warmups)]
    step = {key: value for key, value in made.items() if key not in ("model", "data")}
    raw = {"shape": race.shape, "lengths": lengths.tolist(), "tolerances": tolerances, "step": step, "found": found}
    return {"void": found["dspref"].get("reason"), "figures": [figure.record() for figure in figures], "raw": raw}


# ---------------------------------------------------------------------------------------------------------------------
# What comes out

# Largest differences of the first loss from its analytic value, of other losses and their mean from dspref's, and of the
# mean log-prob of the chosen answers in the first step, relative. In bf16 a sum of 300 log-probs is off by some tenths: on
# an H100, losses of TRL with and without fp32 masters were 0.022 apart, root mean square, and 0.0015 in the mean of 25.
TOLERANCES = {
    "float32": {"first_loss": 1e-5, "losses": 1e-3, "mean_loss": 1e-3, "logps": 1e-4},
    "bfloat16": {"first_loss": 1e-2, "losses": 0.1, "mean_loss": 0.015, "logps": 2e-3},
}


def fault(
    result: dict[str, Any], ours: dict[str, Any], useful: int, first_loss: float | None, allowed: dict[str, float]
) -> str | None:
    """Why a variant's numbers count for nothing: it must have done the same steps on the same tokens as dspref."""
    if result["ended"] != "steps":
        return f"it ended for lack of {result['ended']} in step {len(result['losses']) + 1}"
    if any(tokens != useful for tokens in result["useful_tokens"]):
        return f"a step had {result['useful_tokens'][0]} useful tokens, not {useful}"
    if first_loss is not None and not abs(result["losses"][0] - first_loss) <= allowed["first_loss"]:
        return f"the first loss is {result['losses'][0]:.6f}, not {first_loss:.6f}"
    if not ours.get("losses"):
        return "there are no losses of dspref to compare it with"
    if len(result["losses"]) != len(ours["losses"]):
        return f"it did {len(result['losses'])} steps, dspref {len(ours['losses'])}"
    gaps = [abs(a - b) for a, b in zip(result["losses"], ours["losses"])]
    for step, gap in enumerate(gaps, start=1):
        if not gap <= allowed["losses"]:
            return f"losses differ from dspref's by {gap:.2g} in step {step}"
    if not (gap := abs(mean(result["losses"]) - mean(ours["losses"]))) <= allowed["mean_loss"]:
        return f"the mean loss differs from dspref's by {gap:.2g}"
    if not abs(result["logps"][0] / ours["logps"][0] - 1) <= allowed["logps"]:
        return f"the first log-probs are {result['logps'][0]:.6g}, dspref's {ours['logps'][0]:.6g}"
    return None


def seconds(result: dict[str, Any], warmups: int) -> float:
    """The median step after the warm-ups; all steps of a race have the same lengths."""
    return median(result["seconds"][warmups:])


def claimed(claim: Claim, found: Found, warmups: int) -> Figure:
    ours, peer = found["dspref"], found[claim.peer]
    what = {"speed": "useful tokens per second", "memory": "peak memory"}[claim.of]
    for name in ("dspref", claim.peer):
        if reason := found[name].get("reason"):
            return Figure(what, None, "x", claim.peer, claim.target, f"{name}: {reason}")
    if claim.of == "memory":
        value = ours["peak_bytes"] / peak if (peak := peer["peak_bytes"]) else None
    else:
        value = seconds(peer, warmups) / seconds(ours, warmups)
    return Figure(what, value, "x", claim.peer, claim.target)


def absolute(variant: str, result: dict[str, Any], made: dict[str, Any], warmups: int) -> list[Figure]:
    """Tokens per second, model FLOPs utilization and memory of one variant."""
    if reason := result.get("reason"):
        return [Figure(f"{variant}: useful tokens per second", None, " tok/s", reason=reason)]
    step = seconds(result, warmups)
    figures = [
        Figure(f"{variant}: useful tokens per second", result["useful_tokens"][-1] / step, " tok/s"),
        Figure(f"{variant}: peak memory", result["peak_bytes"] / 1e9, " GB"),
    ]
    executed = "padded" if variant.startswith("TRL") else "shared"
    for name, layout in (("useful", "separate"), ("executed", executed)):
        flops, peak = made["flops"][layout], made["peak_flops"]
        value, why = (100 * flops / step / peak, None) if peak else (None, "the peak of this device is not known")
        figures.append(Figure(f"{variant}: MFU, {name} tokens", value, " %", reason=why))
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# G8: the longest pair


def longest_pair(
    sizes: Sizes, made: dict[str, Any], left: Callable[[], float], tell: Callable[[Found], None]
) -> dict[str, Any]:
    """Every step trains on one pair, twice as long as the one before, until the memory or the time is used up."""
    lengths = models.doubling(*sizes.longest_pairs)
    race = Race("1.5B", lambda *_: lengths, {}, (), {})
    changes = {"pairs_per_step": 1, "steps": len(lengths), "tokens_per_pack": 16384, **CHECKPOINTED}
    found: Found = {}
    for variant, kind, share in (("dspref", "dspref", 0.5), ("TRL", "trl", 1.0)):
        spec = spec_of(sizes, race, lengths, made, **changes)
        limit = left() * share
        shutil.rmtree(metrics_file(spec, kind).parent, ignore_errors=True)  # of a run that was ended
        try:
            arguments = {"variant": kind, "spec": asdict(spec)}
            found[variant] = ask("train", arguments, work=sizes.work, device=sizes.device, limit=limit)
        except Failed as error:
            losses = [record["loss"] for record in finished_steps(metrics_file(spec, kind))]
            found[variant] = failed(error)
            if losses:
                ended = "time" if isinstance(error, TimedOut) else "failure"
                found[variant] = {"ended": ended, "losses": losses, "said": str(error)}
        tell(found)
    totals = models.with_template(lengths)[:, :2].sum(axis=1).tolist()
    figures = longest_figures(found, totals, TOLERANCES[sizes.dtype])
    raw = {"shape": "1.5B", "tokens": totals, "found": found}
    return {"void": found["dspref"].get("reason"), "figures": [figure.record() for figure in figures], "raw": raw}


ENDS = {
    "memory": "until its memory ended",
    "time": "until its time ended",
    "failure": "until it failed",
    "steps": "which is the longest tried",
}


def longest_figures(found: Found, totals: list[int], allowed: dict[str, float]) -> list[Figure]:
    """Tokens of the longest sequence of each variant, and their ratio where the peer came to an end of its memory: where
    dspref was stopped by something else, the ratio is a lower bound."""
    figures, longest = [], {}
    for variant, result in found.items():
        reason = result.get("reason")
        if not reason and not result["losses"]:
            reason = f"not one step was finished: it ended for lack of {result['ended']}"
        if not reason:
            longest[variant] = totals[len(result["losses"]) - 1]
        how = "" if reason else f", {ENDS[result['ended']]}"
        figures.append(Figure(f"{variant}: longest sequence of a pair{how}", longest.get(variant), " tokens", reason=reason))
    why = next((f"{figure.what.split(':')[0]}: {figure.reason}" for figure in figures if figure.reason), None)
    if not why:
        why = no_ratio(found, allowed)
    value = None if why else longest["dspref"] / longest["TRL"]
    bound = "" if why or found["dspref"]["ended"] == "memory" else ", at least"
    return [Figure(f"longest sequence{bound}", value, "x", "TRL", at_least(4.0), why), *figures]


def no_ratio(found: Found, allowed: dict[str, float]) -> str | None:
    ours, peer = found["dspref"], found["TRL"]
    if peer["ended"] != "memory":
        return f"TRL did not come to the end of its memory but got as far as it is said here, {ENDS[peer['ended']]}"
    if not abs(ours["losses"][0] - log(2)) <= allowed["first_loss"]:
        return f"the first loss is {ours['losses'][0]:.6f}, not ln 2"
    gaps = [abs(a - b) for a, b in zip(ours["losses"], peer["losses"])]
    worst = next((gap for gap in gaps if not gap <= allowed["losses"]), None)
    return None if worst is None else f"losses of TRL and dspref differ by {worst:.2g}"
