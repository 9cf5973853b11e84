"""Which ZeRO stages a run fits at, the largest pack that does, and what to change where it does not fit.

`longest`: tokens of the longest pair, which no pack can be smaller than; `room`: bytes that a plan may fill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

from dspref.machine import layers, memory_plan
from dspref.machine.layers import Layout, Pack
from dspref.machine.memory_plan import Estimate
from dspref.machine.shapes import ModelShape
from dspref.model import tiling

GIB = 2**30
# The longest budget that is tried.
MOST_TOKENS = 2**20
# Where a run has DeepSpeed's settings itself.
OWN = "deepspeed.zero_optimization"
# A change is worth naming that saves more than this share of the memory.
WORTH_NAMING = 0.01


@dataclass(frozen=True)
class Asked:
    """A run, as far as its memory goes."""

    shape: ModelShape
    layout: Layout
    pack: Pack
    moving: bool = False
    """Whether the reference follows the policy, so that it cannot be stored."""
    optim: str = "adamw"
    tiles: bool = False
    """Whether its MLPs can run in tiles."""
    heads: int = 0
    """Of attention, where ranks may hold packs between them and do not."""
    spread: bool = False
    """Whether ranks hold the experts of a layer between them (deepspeed.expert_parallel), which goes with less."""

    @property
    def needs(self) -> Estimate:
        return memory_plan.estimate(self.shape, self.layout, self.pack)


def strategies(run: Asked) -> Iterator[tuple[str, Layout, bool]]:
    """(name, layout, whether it is the run's own) of every ZeRO stage, and of offload where the device has a host."""
    own, on_gpu = run.layout, run.layout.device == "cuda"
    kinds = [(0, "gpu", "gpu")] * (own.value == 4) + [(1, "gpu", "gpu"), (2, "gpu", "gpu")]
    kinds += [(2, "cpu", "gpu")] * on_gpu + [(3, "gpu", "gpu")]
    kinds += [(3, "cpu", "gpu"), (3, "cpu", "cpu")] * on_gpu
    here = (own.stage, own.states_on, own.weights_on)
    if here not in kinds:
        kinds.append(here)
    for stage, states_on, weights_on in sorted(kinds, key=lambda kind: (kind[0], kind[1] != "gpu", kind[2] != "gpu")):
        kind = (stage, states_on, weights_on)
        yield name_of(*kind), own if kind == here else _with(own, *kind), kind == here


def name_of(stage: int, states_on: str, weights_on: str) -> str:
    off = [f"{what} on {where}" for what, where in (("states", states_on), ("weights", weights_on)) if where != "gpu"]
    return f"ZeRO-{stage}" + (f", {', '.join(off)}" if off else "")


def _with(own: Layout, stage: int, states_on: str, weights_on: str) -> Layout:
    live = own.reference and replace(own.reference, sharded=stage == 3)
    overlap = stage == 3 or (own.overlap and stage == own.stage)
    return replace(own, stage=stage, states_on=states_on, weights_on=weights_on, overlap=overlap, reference=live)


# ---------------------------------------------------------------------------------------------------------------------
# What to change


@dataclass(frozen=True)
class Change:
    """A setting that makes a run smaller, with what it costs; bytes of the run with it and all changes before it."""

    setting: str
    cost: str
    saves: int
    total: int


def changes(run: Asked, longest: int, room: float, steps: Sequence[Step] | None = None) -> list[Change]:
    """What to change, in order, until the run fits: first what costs nothing, last what changes the result. Each stands on
    those before it. What a later one makes needless is left out, the dearest first. `steps`: those that are tried."""
    chain: list[Step] = []
    for step in STEPS if steps is None else steps:
        if _after(run, chain, longest, room).needs.total <= room:
            break
        chain.append(step)
    if _after(run, chain, longest, room).needs.total <= room:
        for step in chain[-2::-1]:
            without = [other for other in chain if other is not step]
            chain = without if _after(run, without, longest, room).needs.total <= room else chain
    return _followed(run, chain, longest, room)


def _followed(run: Asked, chain: Sequence[Step], longest: int, room: float) -> list[Change]:
    found: list[Change] = []
    for step in chain:
        if proposal := step(run, longest, room):
            setting, cost, then = proposal
            before, total = run.needs.total, then.needs.total
            if before - total > WORTH_NAMING * before:
                found.append(Change(setting, cost, before - total, total))
                run = then
    return found


def _after(run: Asked, chain: Sequence[Step], longest: int, room: float) -> Asked:
    for step in chain:
        if proposal := step(run, longest, room):
            run = proposal[2] if proposal[2].needs.total < (1 - WORTH_NAMING) * run.needs.total else run
    return run


Proposal = tuple[str, str, Asked] | None
Step = Callable[[Asked, int, float], Proposal]


def _laid(run: Asked, **updates: Any) -> Asked:
    return replace(run, layout=replace(run.layout, **updates))


def _store(run: Asked, longest: int, room: float) -> Proposal:
    if run.layout.reference is None or run.moving:
        return None
    return "reference.mode=stored", "one pass over the pairs, once", _laid(run, reference=None)


def _shard(run: Asked, longest: int, room: float) -> Proposal:
    """The lowest stage that fits, else the third."""
    own = run.layout
    higher = [_with(own, stage, own.states_on, own.weights_on) for stage in (2, 3) if stage > own.stage]
    if own.ranks == 1 or not higher:
        return None
    fitting = (one for one in higher if memory_plan.estimate(run.shape, one, run.pack).total <= room)
    then = next(fitting, higher[-1])
    file = f"zero{then.stage}_offload" if own.states_on != "gpu" else f"zero{then.stage}"
    cost = "traffic: weights are gathered as they are used" if then.stage == 3 else "none"
    return _strategy(run, f"{file}.json", f"{OWN}.stage={then.stage}"), cost, replace(run, layout=then)


def _strategy(run: Asked, file: str, keys: str) -> str:
    """A file of settings, or single keys, where a file in the place of the run's own would take the experts back."""
    return keys if run.spread else f"deepspeed=ds_configs/{file}"


def _recompute(run: Asked, longest: int, room: float) -> Proposal:
    if run.layout.checkpointing:
        return None
    return "model.gradient_checkpointing=true", "about a quarter more compute", _laid(run, checkpointing=True)


def _smaller(run: Asked, longest: int, room: float) -> Proposal:
    """The largest budget that fits, else the longest pair, below which packs do not get smaller."""
    tokens = max(largest_budget(run, room), longest)
    if tokens >= run.pack.tokens:
        return None
    smaller = replace(_laid(run, packs=2), pack=layers.scaled(run.pack, tokens))
    return f"data.tokens_per_pack={tokens}", "more packs a step, each with less to compute; losses stay the same", smaller


def _inputs_out(run: Asked, longest: int, room: float) -> Proposal:
    if not run.layout.checkpointing or run.layout.device != "cuda" or run.layout.inputs_on != "gpu":
        return None
    host = layers.inputs(run.shape, run.layout, run.pack) / GIB
    cost = f"inputs of layers go over PCIe and back, and {host:.1f} GiB of host memory for each rank"
    return "model.gradient_checkpointing=offload", cost, _laid(run, inputs_on="cpu")


def _tile(run: Asked, longest: int, room: float) -> Proposal:
    if not run.tiles or run.layout.tile:
        return None
    tokens = tiling.tokens_of(True, run.shape.hidden)
    return "model.tiled_mlp=true", "MLPs are computed once more", _laid(run, tile=tokens)


def _share(run: Asked, longest: int, room: float) -> Proposal:
    """The fewest ranks whose part of the longest pair fits, else the most."""
    most, found = gcd(run.layout.ranks, run.heads) if run.heads and not run.spread else 1, None
    budget = largest_budget(run, room)
    for count in (n for n in range(2, most + 1) if most % n == 0):
        tokens = max(budget, -(-longest // count))
        if tokens < run.pack.tokens:
            shared = replace(_laid(run, packs=2), pack=layers.scaled(run.pack, tokens), heads=0)
            setting = f"parallel.sequence={count} data.tokens_per_pack={tokens}"
            found = setting, f"{count} ranks hold a pack, and exchange heads in attention; losses stay the same", shared
            if shared.needs.total <= room:
                break
    return found


def _eight_bits(run: Asked, longest: int, room: float) -> Proposal:
    if run.spread or run.layout.moments == 2 or run.layout.device != "cuda" or run.layout.states_on != "gpu":
        return None
    return "train.optim=adamw_8bit", "states are rounded to 8 bits; needs bitsandbytes", _laid(run, moments=2)


def _offload_states(run: Asked, longest: int, room: float) -> Proposal:
    if run.layout.device != "cuda" or run.layout.states_on != "gpu" or run.optim == "adamw_8bit":
        return None
    stage = max(run.layout.stage, 2)
    # What is on the host stays in 32 bits.
    then = replace(_with(run.layout, stage, "cpu", "gpu"), moments=8)
    host = memory_plan.host(run.shape, then) / GIB
    cost = f"updates on the CPU, and {host:.1f} GiB of host memory for each rank"
    keys = f"{OWN}.stage={stage} " * (stage != run.layout.stage) + f"{OWN}.offload_optimizer.device=cpu"
    return _strategy(run, f"zero{stage}_offload.json", keys), cost, replace(run, layout=then)


def _offload_weights(run: Asked, longest: int, room: float) -> Proposal:
    if run.layout.device != "cuda" or run.layout.weights_on != "gpu" or run.layout.four_bits:
        return None
    if run.spread and run.layout.stage < 3:
        return None
    then = replace(_with(run.layout, 3, "cpu", "cpu"), live=min(run.layout.live, 10**8))
    host = memory_plan.host(run.shape, then) / GIB
    cost = f"weights come over PCIe, and {host:.1f} GiB of host memory for each rank"
    live = "stage3_max_live_parameters"
    keys = f"{OWN}.offload_optimizer.device=cpu " * (run.layout.states_on == "gpu")
    keys += f"{OWN}.offload_param.device=cpu {OWN}.{live}=100000000"
    return _strategy(run, f"zero3_offload_all.json, with {live}: 100000000", keys), cost, replace(run, layout=then)


def _adapter(run: Asked, longest: int, room: float) -> Proposal:
    if run.shape.frozen_base or run.spread:
        return None
    # r = 16 on all linear layers: 2 r / h of a square matrix.
    trained = round(run.shape.body * 32 / run.shape.hidden)
    return (
        "model.lora=true",
        "an adapter is trained, not the model",
        replace(run, shape=replace(run.shape, frozen_base=True, trained=trained)),
    )


def largest_budget(run: Asked, room: float) -> int:
    """The largest data.tokens_per_pack that fits, found by bisection."""

    def needs(tokens: int) -> int:
        return memory_plan.estimate(run.shape, run.layout, layers.scaled(run.pack, tokens)).total

    return memory_plan.largest_pack(needs, room, MOST_TOKENS)


# What makes the part smaller that grows with the longest pair.
OF_PACKS: tuple[Step, ...] = (_recompute, _smaller, _inputs_out, _tile, _share)
STEPS: tuple[Step, ...] = (
    _store, _shard, *OF_PACKS, _eight_bits, _offload_states, _offload_weights, _adapter,
)  # fmt: skip
