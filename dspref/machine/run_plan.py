"""What a run needs, before it is paid for: memory for every ZeRO stage, steps, operations, time, disk; and what to change.

Arithmetic on a config's sections and on numbers; `Load` is what the data ask for, measured or assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

from dspref.config import CheckpointSection, ModelSection, ReferenceSection, TrainSection
from dspref.config.strategy import spreads_experts
from dspref.machine import fitting, flops, footprint, layers, memory_plan, shapes
from dspref.machine.fitting import Asked
from dspref.machine.flops import Work
from dspref.machine.gpus import Gpu
from dspref.machine.layers import Layout, Live, Pack
from dspref.machine.memory_plan import RESERVE, Estimate
from dspref.machine.shapes import ModelShape
from dspref.model import head_room, tiling
from dspref.model.pieces import PROMPTS

GIB = 2**30


@dataclass(frozen=True)
class Load:
    """What the data ask for: means over the steps of an epoch, of all ranks together where not said otherwise."""

    source: str
    """Where the figures come from, in words."""
    measured: bool
    pairs: int | None
    """In an epoch; None where that is not known."""
    pairs_per_step: float
    packs: float
    """Of each rank."""
    largest: int
    """Tokens of the largest pack."""
    longest: int
    """Tokens of the longest pair, which no pack can be smaller than."""
    computed: float
    real: float
    """Tokens of prompt + answer, of both answers."""
    scored: float
    attention: float
    fill: float
    steps_per_epoch: int | None = None
    unit: str = "pairs"
    """What is counted: examples, where answers stand alone."""
    more: Mapping[str, float] = field(default_factory=dict)
    """Of a step, what an encoder or a tower reads, by the names of `dspref.model.pieces`."""
    most: Mapping[str, float] = field(default_factory=dict)
    """Of the largest pack."""

    @property
    def pack(self) -> Pack:
        """The largest one; scored as the others are."""
        keys = self.real / max(self.computed, 1)
        return Pack(self.largest, round(self.largest * self.scored / max(self.computed, 1)), keys, self.most)

    @property
    def work(self) -> Work:
        return Work.of_step(self.computed, self.scored, self.attention, self.more)


@dataclass(frozen=True)
class Machine:
    """Where a run is to run."""

    gpu: Gpu
    ranks_per_node: int
    nodes: int = 1

    @property
    def ranks(self) -> int:
        return self.ranks_per_node * self.nodes

    @property
    def device(self) -> str:
        return "cpu" if self.gpu.name == "CPU" else "cuda"

    @property
    def room(self) -> float:
        """Bytes that a plan may fill."""
        return self.gpu.gib * GIB * (1 - RESERVE)


def asked(
    model: ModelSection,
    reference: ReferenceSection,
    optim: str,
    needs_reference: bool,
    strategy: Mapping[str, Any],
    machine: Machine,
    load: Load,
    shape_of: Callable[[ModelSection], ModelShape] = shapes.of_section,
) -> Asked:
    """Raises ConfigError where the model's config.json is not here."""
    shape = shape_of(model)
    settings, value = memory_plan.zero_settings(strategy), footprint.BYTES[model.dtype]
    live = None
    if reference.mode_where(needs_reference) == "engine":
        changes = {"lora": None} | ({"name_or_path": reference.name_or_path} if reference.name_or_path else {})
        sharded = settings["stage"] == 3 if reference.zero_stage is None else reference.zero_stage == 3
        own = footprint.BYTES[reference.dtype or model.dtype]
        live = Live(
            shape_of(model.model_copy(update=changes)),
            own,
            sharded,
            reference.offload == "cpu",
            masters=4 if reference.sync_ref_model and own < 4 else 0,
            history=4 + value if reference.bema is not None else 0,
            saved=footprint.per_weight_moving(reference, model.dtype),
        )
    # The kernels that know no fp32 are all but sdpa.
    sdpa = machine.device == "cpu" or model.dtype == "float32" or model.attn_implementation == "sdpa"
    layout = Layout(
        machine.device,
        value,
        machine.ranks,
        packs=2 if load.packs > 1 else 1,
        moments=2 if optim == "adamw_8bit" else 8,
        kernel="sdpa" if sdpa else "fused",
        reference=live,
        **model_settings(model, shape.hidden),
        **settings,
    )
    return Asked(shape, layout, load.pack, reference.moved_by is not None, optim, spread=spreads_experts(strategy))


def model_settings(model: ModelSection, hidden: int) -> dict[str, Any]:
    """The fields of a Layout that a model's section decides."""
    return {
        "checkpointing": bool(model.gradient_checkpointing),
        "inputs_on": "cpu" if model.gradient_checkpointing == "offload" else "gpu",
        "tile": tiling.tokens_of(model.tiled_mlp, hidden),
        "liger": model.liger,
        "four_bits": model.load_in_4bit,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Time


def work_of(run: Asked, load: Load, looks_ahead: bool) -> tuple[float, float]:
    """FLOPs of a step on all ranks: (of the policy's forward and backward, of all that is executed)."""
    live = run.layout.reference
    return flops.of_step(
        run.shape.work,
        live.shape.work if live else None,
        load.work,
        recomputes=run.layout.checkpointing,
        head_again=not head_room.fits(run.pack.scored, run.shape.vocabulary, run.layout.device),
        mlps_again=_in_tiles(run),
        looks_ahead=looks_ahead and load.packs * run.layout.ranks > 1,
    )


def _in_tiles(run: Asked) -> float:
    """Weights of MLPs that are computed once more, tile by tile."""
    shape, tiled = run.shape, layers.in_tiles(run.shape, run.layout, run.pack)
    return shape.layers * shape.hidden * shape.inner * (2 + shape.gated) if tiled else 0.0


def assumed(train: TrainSection, ranks: int, tokens_per_pack: int, mean_tokens: int, why: str, apart: bool = False) -> Load:
    """The load of pairs whose sequences have `mean_tokens` each, nothing shared and half of them scored. `apart`: an encoder
    reads the prompt of a pair once. Of images nothing is known."""
    half, pairs = mean_tokens // 2, train.pairs_per_step
    pair = half + 2 * (mean_tokens - half) if apart else 2 * mean_tokens
    in_pack = max(tokens_per_pack // pair, 1)
    packs = ceil(pairs / (in_pack * ranks))
    of_pair: dict[str, float] = {}
    if apart:
        own, across = (mean_tokens - half) * (mean_tokens - half + 1), 2 * half * (mean_tokens - half)
        of_pair = {PROMPTS: half, "prompt_attention": half**2, "cross_attention": across, "attention": own}
    largest = min(in_pack, ceil(pairs / ranks))
    shared = "each prompt encoded once" if apart else "prompts not shared"
    return Load(
        source=f"assumed: {why}, {shared}, half of the tokens scored",
        measured=False,
        pairs=None,
        pairs_per_step=pairs,
        packs=packs,
        largest=largest * pair,
        longest=pair,
        computed=pairs * pair,
        real=pairs * 2 * mean_tokens,
        scored=pairs * (2 * (mean_tokens - half) if apart else mean_tokens),
        attention=pairs * (sum(n for name, n in of_pair.items() if name != PROMPTS) or mean_tokens * (mean_tokens + 1)),
        fill=pairs * pair / (packs * ranks * tokens_per_pack),
        more={name: pairs * n for name, n in of_pair.items()},
        most={name: largest * n for name, n in of_pair.items()},
    )


# ---------------------------------------------------------------------------------------------------------------------
# All of it


def plan(
    run: Asked,
    model: ModelSection,
    train: TrainSection,
    checkpoint: CheckpointSection,
    output_dir: Path,
    machine: Machine,
    load: Load,
    *,
    tokens_per_pack: int,
    scores_reference: bool,
    looks_ahead: bool,
) -> dict[str, Any]:
    """The whole plan, as plain values: what `--format json` prints. Bytes, seconds, FLOPs; None where not known."""
    need, room = run.needs, machine.room
    rows = [
        {
            "name": name,
            **{key: getattr(layout, key) for key in ("stage", "states_on", "weights_on")},
            "configured": own,
            **_row(memory_plan.estimate(run.shape, layout, run.pack), room),
        }
        for name, layout, own in fitting.strategies(run)
    ]
    largest = fitting.largest_budget(run, room)
    return {
        "model": {"name": model.name_or_path, "dtype": model.dtype, **asdict(run.shape)},
        "machine": {
            "gpu": machine.gpu.name,
            "gib": machine.gpu.gib,
            "reserve": RESERVE,
            "ranks": machine.ranks,
            "nodes": machine.nodes,
        },
        "memory": {
            **_row(need, room),
            "strategy": next(row["name"] for row in rows if row["configured"]),
            "moment": need.moment,
            "gradient_checkpointing": run.layout.checkpointing,
            "tokens": run.pack.tokens,
            "scored": run.pack.scored,
            "host_bytes_per_node": need.host * machine.ranks_per_node,
            "imports_bytes": memory_plan.IMPORTS if machine.device == "cpu" else 0,
        },
        "strategies": rows,
        "tokens_per_pack": {"configured": tokens_per_pack, "largest": largest, "longest_pair": load.longest},
        "changes": [asdict(change) for change in fitting.changes(run, load.longest, room)],
        "load": asdict(load),
        **_work(run, train, machine, load, scores_reference, looks_ahead),
        "disk": _disk(run, model, train, checkpoint, output_dir),
    }


def _row(need: Estimate, room: float) -> dict[str, Any]:
    return {"parts": dict(need.parts), "bytes": need.total, "fits": need.total <= room, "host_bytes": need.host}


def _work(
    run: Asked, train: TrainSection, machine: Machine, load: Load, scores_reference: bool, looks_ahead: bool
) -> dict[str, Any]:
    """Steps, operations and time."""
    useful, executed = work_of(run, load, looks_ahead)
    per_epoch = load.steps_per_epoch
    steps = train.asked_steps or (ceil(train.num_train_epochs * per_epoch) if per_epoch else None)
    # fp32 has another peak, which is not assumed.
    rate = machine.gpu.peak * machine.gpu.mfu * machine.ranks if run.layout.value == 2 else 0.0
    seconds = executed / rate if rate else None
    scoring = None
    if scores_reference and rate:
        once = replace(run.shape, frozen_base=False).work.forward(load.work)
        scoring = once * min(steps or 0, per_epoch or steps or 0) / rate or None

    def of(count: int | None, value: float | None) -> float | None:
        return None if count is None or value is None else count * value

    return {
        "steps": {"per_epoch": per_epoch, "run": steps},
        "flops": {"step": useful, "executed_step": executed, "epoch": of(per_epoch, useful), "run": of(steps, useful)},
        "seconds": {
            "step": seconds,
            "epoch": of(per_epoch, seconds),
            "run": of(steps, seconds),
            "scoring_reference": scoring,
        },
        "assumed": {"hfu": machine.gpu.mfu, "mfu": machine.gpu.mfu * useful / executed, "peak_flops": machine.gpu.peak},
    }


def _disk(
    run: Asked, model: ModelSection, train: TrainSection, rules: CheckpointSection, output_dir: Path
) -> dict[str, Any]:
    still = 0 if run.shape.frozen_base else run.shape.frozen
    each = run.shape.trained * footprint.per_weight(train.optim, model.dtype, run.layout.stage)
    each += still * footprint.BYTES[model.dtype]
    live = run.layout.reference
    moving = live.saved if live else 0
    each += moving * live.shape.weights if live else 0
    return {
        "checkpoint": each,
        "checkpoints": footprint.checkpoints_to_come(rules, train.asked_steps, output_dir),
        "run": footprint.of_run(model, train, rules, run.layout.stage, output_dir, moving),
    }
