"""A plan, for people: the memory of every strategy in a table, then steps, time, disk, and what to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dspref.machine.memory_plan import PARTS
from dspref.terminal import duration, printable

GIB = 2**30
TITLE = "GiB of each rank where it needs most, by ZeRO stage (s: states in host memory, w: weights too)"
# Seconds of arithmetic in a step below which a GPU waits for the host, so that its share of the peak says nothing.
LAUNCHES = 0.1
MOMENTS = {
    "head": "where the LM head's gradient is made, with all activations kept",
    "layer": "in the backward pass of the last layer",
    "end": "at the end of a backward pass, with all gradients in their buckets",
    "update": "in the optimizer's update",
}


def show(plan: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a plan of `run_plan.plan`."""
    console = console or Console(highlight=False)
    width = max(len(name) for name, _ in facts(plan))
    for name, text in facts(plan):
        console.print(Text(f"{name:<{width}}  {printable(text, 400)}"), soft_wrap=True)
    console.print(f"\n{TITLE}", soft_wrap=True)
    console.print(table(plan))
    for line in verdict(plan):
        console.print(Text(line), soft_wrap=True)


def facts(plan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Lines of (name, text): what is planned, and how much work it is."""
    model, machine, load, steps = (plan[name] for name in ("model", "machine", "load", "steps"))
    trained = f", {millions(model['trained'])} trained" if model["frozen_base"] else ""
    yield "model", f"{model['name']}: {millions(model['weights'])} weights{trained}, {model['dtype']}"
    nodes = f" on {machine['nodes']} nodes" if machine["nodes"] > 1 else ""
    of = "rank of this machine" if machine["gpu"] == "CPU" else machine["gpu"]
    yield (
        "on",
        f"{machine['ranks']} x {of}{nodes}, {machine['gib']:.1f} GiB each, of which {machine['reserve']:.0%} stay free",
    )
    yield "data", load["source"]
    per_epoch = f", {steps['per_epoch']:,} steps an epoch" if steps["per_epoch"] else ""
    whole = f", {steps['run']:,} in all" if steps["run"] else ""
    packs = f"{load['packs']:.3g}"
    packs += " pack" if packs == "1" else " packs"
    yield "step", f"{load['pairs_per_step']:,.0f} {load['unit']} in {packs} a rank{per_epoch}{whole}"
    real = f" ({load['real']:,.0f} with each answer's prompt)" if load["real"] > load["computed"] else ""
    tokens = f"{load['computed']:,.0f} computed a step{real}, "
    yield "tokens", f"{tokens}{load['scored']:,.0f} scored; packs {load['fill']:.0%} full, the largest {load['largest']:,}"
    flops = plan["flops"]
    name, unit = ("PFLOPs", 1e15) if flops["step"] >= 1e14 else ("TFLOPs", 1e12)
    epoch = f", {flops['epoch'] / unit:,.4g} an epoch" if flops["epoch"] else ""
    run = f", {flops['run'] / unit:,.4g} the run" if flops["run"] else ""
    again = flops["executed_step"] / flops["step"]
    yield name, f"{flops['step'] / unit:,.4g} a step{epoch}{run}; {again:.2f} times that is executed"
    yield "time", time_of(plan)
    yield "disk", disk_of(plan["disk"])


def time_of(plan: Mapping[str, Any]) -> str:
    seconds, assumed = plan["seconds"], plan["assumed"]
    if seconds["step"] is None:
        of = f"{plan['model']['dtype']} on {plan['machine']['gpu']}"
        other = "; with model.dtype=bfloat16 it is" if plan["machine"]["gpu"] != "CPU" else ""
        return f"not estimated: no peak is known of {of}{other}"
    if seconds["step"] < LAUNCHES:
        return f"not estimated: a step has under {LAUNCHES:g} s of arithmetic, and takes what launching its kernels takes"
    parts = [f"{seconds['step']:.2f} s a step"]
    parts += [
        f"{duration(seconds[name])} {words}" for name, words in (("epoch", "an epoch"), ("run", "the run")) if seconds[name]
    ]
    if seconds["scoring_reference"]:
        parts.append(f"and {duration(seconds['scoring_reference'])} to score the reference, once")
    peak = f"{assumed['peak_flops'] / 1e12:,.0f} TFLOP/s"
    return f"{', '.join(parts)}; assumed: MFU {assumed['mfu']:.0%} (HFU {assumed['hfu']:.0%}) of {peak} in bf16"


def disk_of(disk: Mapping[str, Any]) -> str:
    run = f"{gib(disk['run'])} GiB of room in all, " if disk["run"] is not None else ""
    kept = f"{disk['checkpoints']} at a time" if disk["checkpoints"] else "none is saved (checkpoint.save_every)"
    return f"{run}{gib(disk['checkpoint'])} GiB a checkpoint, {kept}"


def table(plan: Mapping[str, Any]) -> Table:
    """Memory of one GPU by part, in GiB, a strategy a column; parts that no strategy has are left out."""
    rows = plan["strategies"]
    found = Table(box=None, padding=(0, 1))
    found.add_column("", no_wrap=True)
    for row in rows:
        style = "bold" if row["configured"] else ""
        found.add_column(heading(row), justify="right", no_wrap=True, style=style, header_style=style)
    for part in (part for part in PARTS if any(row["parts"][part] for row in rows)):
        found.add_row(part, *(gib(row["parts"][part]) if row["parts"][part] else "" for row in rows))
    found.add_row("in all", *(gib(row["bytes"]) for row in rows))
    found.add_row("fits", *("yes" if row["fits"] else "NO" for row in rows))
    if any(row["host_bytes"] for row in rows):
        found.add_row("host memory", *(gib(row["host_bytes"]) if row["host_bytes"] else "" for row in rows))
    return found


def heading(row: Mapping[str, Any]) -> str:
    """`> 3 sw`: stage 3 with states and weights offloaded, as configured."""
    off = "".join(letter for letter, on in (("s", row["states_on"]), ("w", row["weights_on"])) if on != "gpu")
    return " ".join(word for word in (">" * row["configured"], str(row["stage"]), off) if word)


def verdict(plan: Mapping[str, Any]) -> Iterator[str]:
    """What follows, in lines."""
    memory, machine, tokens, changes = (plan[name] for name in ("memory", "machine", "tokens_per_pack", "changes"))
    room = machine["gib"] * (1 - machine["reserve"])
    yield f"\n>: {memory['strategy']}, as configured; its peak is {MOMENTS[memory['moment']]}"
    if memory["imports_bytes"]:
        yield f"beside this a process has {gib(memory['imports_bytes'])} GiB of what it imports"
    if memory["host_bytes_per_node"]:
        yield f"host memory: {gib(memory['host_bytes_per_node'])} GiB on each node"
    said = f"{gib(memory['bytes'])} GiB of {room:.1f}"
    yield f"it fits: {said}" if memory["fits"] else f"it does not fit: {said}"
    if tokens["largest"] >= tokens["longest_pair"]:
        in_step = plan["load"]["computed"] / machine["ranks"]
        few = f"; a step has {in_step:,.0f} for each rank" if in_step < tokens["largest"] else ""
        largest, configured = f"{tokens['largest']:,}", f"{tokens['configured']:,}"
        yield f"the largest data.tokens_per_pack that fits: {largest} (configured: {configured}{few})"
    else:
        yield f"no data.tokens_per_pack fits: the longest pair has {tokens['longest_pair']:,} tokens"
    if changes:
        yield "change, in this order:"
    for number, change in enumerate(changes, start=1):
        saved = f"saves {gib(change['saves'])} GiB, then {gib(change['total'])}"
        yield f"  {number}. {change['setting']}: {saved} (cost: {change['cost']})"
    if not memory["fits"] and (not changes or changes[-1]["total"] > room * GIB):
        yield "and still it does not fit: use more GPUs (--gpus, --nodes), larger ones (--gpu), or a smaller model"


def gib(count: float) -> str:
    found = count / GIB
    return f"{found:,.0f}" if found >= 100 else f"{found:.1f}" if found >= 0.95 else f"{found:.2f}"


def millions(count: float) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
