"""What makes a run slower than it need be, each in one line with the setting to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from dspref import distributed, engine, performance
from dspref.config import Config
from dspref.data.loader import StepLoader, place
from dspref.engine import Engine

# A line is worth reading when it is about more than this share of the time, or of the room.
WORTH_SAYING = 0.10
# Tokens per rank and gather at which compute hides ZeRO-3's traffic in a dense bf16 model: 6 FLOPs a weight at half of an
# H100's peak against three transfers of 2 bytes at 350 GB/s. With slower links it takes more.
TOKENS_PER_GATHER = 1_100
# Without checkpointing, a layer keeps about 6 vectors of its hidden size and 4 of its MLP's for each token.
HIDDEN_KEPT, MLP_KEPT = 6, 4
# Steps of the first epoch that are planned to see how packs come out: it takes milliseconds.
STEPS_LOOKED_AT = 20


@dataclass(frozen=True)
class Facts:
    """What is known of a run before its first step: means over steps, of one rank where ranks differ."""

    device: str
    kernel: str
    zero_stage: int
    world_size: int
    packs_per_step: float
    fill: float
    waiting: float
    tokens_per_pack: int
    """The budget."""
    tokens_per_rank: int
    """Computed in a step."""
    pairs_per_step: int
    sparsity: float
    """All weights over those that a token meets: 1 for a dense model."""
    checkpointing: bool
    kept_bytes: int
    """That a token's activations would take without gradient checkpointing."""
    free_bytes: int


def of_run(config: Config, policy: Engine, loader: StepLoader, kernel: str) -> list[str]:
    """Advice for a run whose models are in memory."""
    placed = [place(loader.store, ids, loader.layout) for ids in loader.epoch(0)[:STEPS_LOOKED_AT]]
    lm, world = policy.module.lm, distributed.world().size
    text, size = lm.config.get_text_config(), performance.size_of(policy.module)
    mlp = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    value = 4 if config.model.dtype == "float32" else 2
    facts = Facts(
        device=policy.device.type,
        kernel=kernel,
        zero_stage=config.zero_stage,
        world_size=world,
        packs_per_step=fmean(len(p.ids[0]) for p in placed),
        fill=fmean(p.fill for p in placed),
        waiting=fmean(p.waiting for p in placed),
        tokens_per_pack=config.data.tokens_per_pack,
        tokens_per_rank=round(fmean(p.tokens for p in placed) / world),
        pairs_per_step=config.train.pairs_per_step,
        sparsity=engine.count_weights(lm) / max(size.body + size.head, 1),
        checkpointing=config.model.gradient_checkpointing,
        kept_bytes=kept_per_token(text.hidden_size, mlp, text.num_hidden_layers, value),
        free_bytes=engine.free_memory(policy.device),
    )
    return list(lines(facts))


def lines(facts: Facts) -> Iterator[str]:
    """Advice for what the facts show, the dearest first."""
    if facts.device == "cuda" and facts.kernel == "sdpa":
        yield (
            "attention runs sequence by sequence (sdpa): pip install flash-attn, or set model.dtype: bfloat16, for which "
            "torch has a packed kernel"
        )
    if facts.waiting > WORTH_SAYING:
        yield (
            f"ranks wait for the slowest {facts.waiting:.0%} of the time: {facts.pairs_per_step} pairs are too few to "
            f"balance over {facts.world_size} ranks; raise train.pairs_per_step"
        )
    if facts.packs_per_step > 1 and facts.fill < 1 - WORTH_SAYING:
        budget = _rounded(facts.tokens_per_rank / max(int(facts.packs_per_step * facts.fill), 1) * 1.05)
        yield (
            f"packs are {facts.fill:.0%} full, {facts.packs_per_step:.3g} a step: data.tokens_per_pack={budget} would need "
            "fewer"
        )
    needed = TOKENS_PER_GATHER * facts.sparsity
    per_gather = facts.tokens_per_rank / max(facts.packs_per_step, 1)
    if facts.device == "cuda" and facts.zero_stage == 3 and facts.world_size > 1 and per_gather < needed:
        yield (
            f"each gather of the weights serves {per_gather:,.0f} tokens, and compute hides it from about {needed:,.0f} on: "
            "raise train.pairs_per_step and data.tokens_per_pack, or use stage 2 where the weights fit"
        )
    kept = facts.kept_bytes * min(facts.tokens_per_pack, facts.tokens_per_rank)
    if facts.checkpointing and kept < facts.free_bytes / 2:
        yield (
            f"activations would take about {_size(kept)} of {_size(facts.free_bytes)} free memory: "
            "model.gradient_checkpointing=false saves about a quarter of the compute"
        )


def kept_per_token(hidden: int, mlp: int, layers: int, bytes_per_value: int) -> int:
    """Bytes of activations for each token (Korthikanti et al. 2022, arXiv:2205.05198, eq. 2, without the scores of attention
    that fused kernels do not keep, and for gated MLPs)."""
    return layers * bytes_per_value * (HIDDEN_KEPT * hidden + MLP_KEPT * mlp)


def _rounded(tokens: float) -> int:
    """Up to the next multiple of 256."""
    return -int(-tokens // 256) * 256


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
