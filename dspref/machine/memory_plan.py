"""The memory that a rank of a run needs, by part, as arithmetic on numbers: no torch, no config, no machine.

A step is looked at in four moments, of which one has the peak:

- `head`: the whole forward pass is kept, and the LM head's gradient is made;
- `layer`: the head is done with, and the backward pass is in the last layer (which is recomputed, with checkpointing);
- `end`: the backward pass has come to the embedding, and all gradients are in their buckets;
- `update`: gradients are flattened beside what the optimizer holds.

T trained weights, F frozen ones, N ranks, v bytes of a weight in forward and backward. What DeepSpeed 0.19.8 holds where was
read in its source (`bf16_optimizer`, `zero/stage_1_and_2`, `zero/stage3`) and measured on CPU ranks:
tests/distributed/test_measured_memory.py. docs/memory.md tells what only a GPU could confirm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dspref.machine import layers
from dspref.machine.layers import DEFAULTS, Layout, Pack, activations, head, in_a_layer
from dspref.machine.shapes import ModelShape

GIB = 2**30

# Bytes that every rank has beside its tensors, by kind of device. On CUDA an assumption: context and kernels 0.6 GiB, work
# spaces of cuBLAS and attention 0.3, buffers of NCCL 0.6. On CPU measured: threads, work spaces, what libraries load late;
# in 16 bits oneDNN's buffers too, one for the forward and one for the backward pass.
FRAMEWORK = {"cuda": int(1.5 * GIB), "cpu": 97 * 2**20}
FRAMEWORK_16_BITS_ON_CPU = 66 * 2**20
# Of the first, what ZeRO's own modules take: stage 0 does without.
ZERO_ON_CPU = 45 * 2**20
# What Python and the libraries take before anything is loaded; on a GPU's machine it is host memory. Measured, torch 2.13.
IMPORTS = 364 * 2**20
# Bytes of a weight in nf4 with double quantization: half a byte, an 8-bit scale for 64 of them, and a few more.
NF4 = 0.516
# Of a device's memory, what is left free for fragments and for packs that are a little larger than those looked at.
RESERVE = 0.08

PARTS = (
    "weights", "fp32 masters", "optimizer states", "gradients", "reference", "activations", "LM head", "ZeRO buffers",
    "ZeRO-3 gather", "framework",
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Bytes of a rank at the moment that needs most, by PARTS; and what it has in host memory."""

    parts: Mapping[str, int]
    moment: str
    host: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate(shape: ModelShape, layout: Layout, pack: Pack) -> Estimate:
    """The memory of one rank."""
    held = states(shape, layout)
    kept, inside = activations(shape, layout, pack), in_a_layer(shape, layout, pack)
    moments = {
        "head": {"gradients": gradients(shape, layout, "begin"), "activations": kept, "LM head": head(shape, layout, pack)},
        "layer": {"gradients": gradients(shape, layout, "begin"), "activations": kept + inside},
        "end": {"gradients": gradients(shape, layout, "end"), "activations": pack.tokens * layout.value * 2 * shape.hidden},
        "update": {"gradients": gradients(shape, layout, "update")},
    }
    buffers = {moment: zero_buffers(shape, layout, moment) for moment in moments}
    gathered = gather(shape, layout)
    found = {
        moment: {
            **held,
            **parts,
            "ZeRO buffers": buffers[moment],
            "ZeRO-3 gather": 0 if moment == "update" else gathered,
        }
        for moment, parts in moments.items()
    }
    peak = max(found, key=lambda moment: sum(found[moment].values()))
    waiting = layers.inputs(shape, layout, pack) if layers.inputs_go(layout) else 0.0
    return Estimate({part: int(found[peak].get(part, 0)) for part in PARTS}, peak, host(shape, layout) + int(waiting))


# ---------------------------------------------------------------------------------------------------------------------
# What stays


def states(shape: ModelShape, layout: Layout) -> dict[str, float]:
    """What lies on the device from step to step.

    Weights: v (T + F), sharded at stage 3. Masters: 4 T / N, at stage 0 (fp32 alone) the weights themselves. AdamW: two
    moments of 4 T / N.
    """
    trained, frozen, shard = shape.trained, shape.frozen, layout.ranks if layout.stage else 1
    base = frozen * layout.value
    if layout.four_bits:  # embedding and head stay as they are
        linear = max(frozen - shape.head * (1 if shape.tied else 2), 0)
        base = linear * NF4 + (frozen - linear) * layout.value
    weights = layout.value * trained + base
    on_device = layout.states_on == "gpu" or layout.device == "cpu"
    return {
        "weights": 0.0 if layout.weights_on != "gpu" else weights / (shard if layout.stage == 3 else 1),
        "fp32 masters": 4 * trained / shard if layout.stage and on_device else 0.0,
        "optimizer states": layout.moments * trained / shard if on_device else 0.0,
        "reference": reference(layout),
        "framework": framework(layout),
    }


def framework(layout: Layout) -> int:
    if layout.device == "cuda":
        return FRAMEWORK["cuda"]
    extra = FRAMEWORK_16_BITS_ON_CPU if layout.value == 2 else 0 if layout.stage else -ZERO_ON_CPU
    return FRAMEWORK["cpu"] + extra


def reference(layout: Layout) -> float:
    """A live second model: v F, sharded by its own ZeRO-3; in host memory only what is gathered. Its own activations come
    and go before those of the policy. One that moves: fp32 masters too (TR-DPO in 16 bits), 4 F; on a CPU BEMA's history."""
    if (live := layout.reference) is None:
        return 0.0
    here = 0 if live.offloaded else live.value + live.masters
    return (here + (live.history if layout.device == "cpu" else 0)) * live.weights_on(layout.ranks)


def two_copies(layout: Layout) -> bool:
    """Stage 1 in bf16 without offload: DeepSpeed's BF16_Optimizer, which keeps fp32 gradients of all weights, adds those in
    16 bits to them when a backward pass is done, and then sets these to zero but does not free them before the update."""
    return layout.stage == 1 and layout.value == 2 and layout.states_on == "gpu"


def gradients(shape: ModelShape, layout: Layout, moment: str) -> float:
    """Gradients, but for those in a bucket (see `zero_buffers`).

    stage 0      fp32, all: 4 T
    stage 1      all, 4 T; in bf16 always there, and v T beside them from the first backward pass of a step on
    stage 2      own part, 4 T / N, from the end of the first pack on
    stage 3      own part, 4 T / N, always there
    In the update the own part is flattened: once more 4 T / N (stage 3: by sub-groups).
    """
    trained, ranks, later = shape.trained, layout.ranks, layout.packs > 1
    own = 4 * trained / ranks
    if layout.stage == 0:
        return 4 * trained if later or moment != "begin" else 0.0
    if two_copies(layout):
        return (4 + layout.value * (later or moment != "begin")) * trained
    if layout.stage == 1:
        if moment == "update":
            return 4 * trained + own
        return 4 * trained if later or moment == "end" else 0.0
    if layout.states_on != "gpu" and layout.device != "cpu":
        return 0.0  # they go to the host as they come
    if layout.stage == 2:
        # In fp32 a pack's own part is copied out of the bucket before it is added to that of the packs before.
        copies = {"begin": float(later), "end": 1.0 + (later and layout.value == 4), "update": 2.0}
        return own * copies[moment]
    return own + (4 * min(trained, layout.sub_group) / ranks if moment == "update" else 0.0)


def zero_buffers(shape: ModelShape, layout: Layout, moment: str) -> float:
    """Buckets in which gradients are reduced.

    A GPU allocates them whole (`reduce_bucket_size` elements, twice with `overlap_comm` at stage 2), a CPU only what is
    written to. Stage 2 has one in the backward pass, stage 3 always, stages 0 and 1 reduce at the end of a step.
    """
    filled = min(shape.trained, layout.bucket)
    # gloo keeps a rank's share of what it sums
    share = layout.value * filled / layout.ranks if layout.device == "cpu" and layout.ranks > 1 else 0.0
    if layout.stage == 0 or two_copies(layout):
        return 4 * filled if moment == "update" and layout.ranks > 1 else 0.0
    if layout.stage == 1:
        whole = layout.bucket if layout.device == "cuda" and layout.contiguous else 0
        return 4.0 * whole + (share if moment == "update" else 0.0)
    size = layout.value * (layout.bucket if layout.device == "cuda" and layout.contiguous else filled)
    if layout.stage == 2:
        if layout.device == "cpu":
            return size + share if moment == "end" else 0.0
        return size * (2 if layout.overlap else 1) if moment != "update" else 0.0
    # reduce-scatter copies the bucket, and gives a rank its share
    return size + (layout.value * filled * (1 + 1 / layout.ranks) if moment == "end" else 0.0)


def gather(shape: ModelShape, layout: Layout) -> float:
    """Whole weights under ZeRO-3: up to `stage3_max_live_parameters` of them, so a model with fewer is gathered whole, and
    stays so from a forward pass to its backward pass."""
    if layout.stage != 3 or (layout.ranks == 1 and layout.weights_on == "gpu"):
        return 0.0
    return layout.value * min(shape.trained + shape.frozen, max(layout.live, shape.largest))


def host(shape: ModelShape, layout: Layout) -> int:
    """Bytes in host memory for each rank: masters, moments, gradients and a copy in 16 bits of what is offloaded to it; a
    reference that is, and what BEMA keeps beside one: an fp32 mean and the policy's beginning, (4 + v) F."""
    own, found = shape.trained / layout.ranks, 0.0
    if layout.states_on == "cpu":
        found += own * (4 + layout.moments + 4 + layout.value + (4 if layout.packs > 1 else 0))
    if layout.weights_on == "cpu":
        found += layout.value * (shape.trained + shape.frozen) / layout.ranks
    if live := layout.reference:
        there = (live.value + live.masters) * live.offloaded + live.history * (layout.device != "cpu")
        found += there * live.weights_on(layout.ranks)
    return int(found)


# ---------------------------------------------------------------------------------------------------------------------
# What fits


def largest_pack(needs: Callable[[int], int], room: float, most: int) -> int:
    """The most tokens per pack, in 256s, for which `needs` (bytes, growing with them) is within `room`; 0 where none is."""
    low, high = 0, most // 256
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needs(256 * middle) <= room else (low, middle - 1)
    return 256 * low


def zero_settings(strategy: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Layout that a DeepSpeed strategy decides."""
    zero = strategy.get("zero_optimization") or {}
    stage = int(zero.get("stage", 0))

    def device(key: str) -> str:
        found = (zero.get(key) or {}).get("device", "none")
        return "gpu" if found == "none" else str(found)

    overlap = zero.get("overlap_comm")
    return {
        "stage": stage,
        "states_on": device("offload_optimizer"),
        "weights_on": device("offload_param"),
        "bucket": int(zero.get("reduce_bucket_size", DEFAULTS["reduce_bucket_size"])),
        "live": int(zero.get("stage3_max_live_parameters", DEFAULTS["stage3_max_live_parameters"])),
        "sub_group": int(zero.get("sub_group_size", DEFAULTS["sub_group_size"])),
        "contiguous": bool(zero.get("contiguous_gradients", True)),
        "overlap": stage == 3 if overlap is None else bool(overlap) and stage != 1,
    }
