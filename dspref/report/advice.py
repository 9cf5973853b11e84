"""What makes a run slower than it need be, each in one line with the setting to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean

from dspref.config import ModelSection
from dspref.data.loader import StepLoader, place
from dspref.engine import memory
from dspref.engine.engine import Engine
from dspref.model import admission, attention
from dspref.report import performance

# A line is worth reading when it is about more than this share of the time, or of the room.
WORTH_SAYING = 0.10
# Tokens per rank and gather at which compute hides ZeRO-3's traffic in a dense bf16 model: 6 FLOPs a weight at half of an
# H100's peak against three transfers of 2 bytes at 350 GB/s. With slower links it takes more.
TOKENS_PER_GATHER = 1_100
# Without checkpointing, a layer keeps about so many vectors of its hidden size for each token, by bytes per value (in 16
# bits two norms keep their inputs in fp32), and 4 of its MLP's: counted on transformers' layers with grouped heads.
HIDDEN_KEPT, MLP_KEPT = {2: 10.5, 4: 8.5}, 4
# Steps of the first epoch that are planned to see how packs come out: it takes milliseconds.
STEPS_LOOKED_AT = 20
# Of a budget over the tokens that it is for, as pairs cannot be cut.
ROOM = 1.05


@dataclass(frozen=True)
class Facts:
    """What is known of a run before its first step: means over steps, of one rank where ranks differ."""

    device: str
    zero_stage: int
    world_size: int
    pairs_per_step: int
    packs_per_step: float
    fill: float
    waiting: float
    tokens_per_rank: int
    """Computed in a step."""
    largest_pack: int
    """Tokens."""
    fewer_packs: tuple[int, float] | None
    """A budget of tokens that was tried, and the packs per step that it gives, where those are fewer."""
    faster_kernel: str | None
    """How to get one, in place of attention sequence by sequence on a GPU."""
    sparsity: float
    """All weights over those that a token meets: 1 for a dense model."""
    checkpointing: bool
    kept_bytes: int
    """That a token's activations would take without gradient checkpointing."""
    free_bytes: int


def of_run(
    section: ModelSection, pairs_per_step: int, zero_stage: int, policy: Engine, loader: StepLoader, kernel: str
) -> list[str]:
    """Advice for a run whose models are in memory."""
    steps, packing = loader.epoch(0)[:STEPS_LOOKED_AT], loader.packing
    placed = [place(loader.store, ids, packing) for ids in steps]
    lm, world = policy.module.lm, packing.world_size
    text, size = lm.config.get_text_config(), performance.size_of(policy.module)
    hidden = performance.number_in(text, "hidden_size", default=0)
    mlp, layers = (
        performance.number_in(text, name, default=otherwise)
        for name, otherwise in (("intermediate_size", 4 * hidden), ("num_hidden_layers", 0))
    )
    value = 4 if section.dtype == "float32" else 2
    packs, per_rank = fmean(len(p.ids[0]) for p in placed), fmean(p.tokens for p in placed) / world
    budget = -int(-per_rank * ROOM // max(int(per_rank / packing.tokens_per_pack), 1) // 256) * 256
    larger = replace(packing, tokens_per_pack=budget)
    then = fmean(len(place(loader.store, ids, larger).ids[0]) for ids in steps)
    # Gradients are not there yet: fp32 ones, and before they are reduced those of the run's type.
    coming = 6 * memory.count_weights(lm) // (world if zero_stage >= 2 else 1)
    facts = Facts(
        device=policy.device.type,
        zero_stage=zero_stage,
        world_size=world,
        pairs_per_step=pairs_per_step,
        packs_per_step=packs,
        fill=fmean(p.fill for p in placed),
        waiting=fmean(p.waiting for p in placed),
        tokens_per_rank=round(per_rank),
        largest_pack=max(p.largest for p in placed),
        fewer_packs=(budget, then) if then < (1 - WORTH_SAYING) * packs else None,
        faster_kernel=_faster_kernel(section, policy, kernel),
        sparsity=memory.count_weights(lm) / max(size.body + size.head, 1),
        checkpointing=section.gradient_checkpointing,
        kept_bytes=round(kept_per_token(hidden, mlp, layers, value)),
        free_bytes=memory.free_memory(policy.device) - coming,
    )
    return list(lines(facts))


def _faster_kernel(section: ModelSection, policy: Engine, kernel: str) -> str | None:
    sizes = admission.head_sizes(policy.module.lm)
    able = [name for name in attention.available(policy.device.type) if not attention.cannot(name, sizes)]
    others = [name for name in able if name != "sdpa"]
    if kernel != "sdpa" or not others:
        return None
    if section.dtype == "float32":
        return f"model.dtype: bfloat16 allows {others[0]}"
    return f"model.attn_implementation: auto may take {others[0]}" if section.attn_implementation == "sdpa" else None


def lines(facts: Facts) -> Iterator[str]:
    """Advice for what the facts show, the dearest first."""
    if facts.faster_kernel:
        yield f"attention runs sequence by sequence (sdpa): {facts.faster_kernel}"
    if facts.waiting > WORTH_SAYING:
        yield (
            f"ranks wait for the slowest {facts.waiting:.0%} of the time: {facts.pairs_per_step} pairs are too few to "
            f"balance over {facts.world_size} ranks; use fewer, or raise train.pairs_per_step (which changes the batch)"
        )
    if facts.fill < 1 - WORTH_SAYING and facts.fewer_packs:
        budget, packs = facts.fewer_packs
        yield (
            f"packs are {facts.fill:.0%} full: data.tokens_per_pack={budget} needs {packs:.3g} a step in place of "
            f"{facts.packs_per_step:.3g}, if memory allows it"
        )
    needed = TOKENS_PER_GATHER * facts.sparsity
    per_gather = facts.tokens_per_rank / max(facts.packs_per_step, 1)
    if facts.device == "cuda" and facts.zero_stage == 3 and facts.world_size > 1 and per_gather < needed:
        yield (
            f"each gather of the weights serves {per_gather:,.0f} tokens, and compute hides it from about {needed:,.0f} on: "
            "raise data.tokens_per_pack, use fewer ranks, or stage 2 where the weights fit"
        )
    kept = facts.kept_bytes * facts.largest_pack
    if facts.checkpointing and 0 < kept < facts.free_bytes / 2:
        yield (
            f"activations would take about {_size(kept)} of {_size(facts.free_bytes)} free memory: "
            "model.gradient_checkpointing=false saves about a quarter of the compute"
        )


def kept_per_token(hidden: float, mlp: float, layers: float, bytes_per_value: int) -> float:
    """Bytes of activations for each token, with gated MLPs; scores of attention are kept by no fused kernel."""
    return layers * bytes_per_value * (HIDDEN_KEPT[bytes_per_value] * hidden + MLP_KEPT * mlp)


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
