"""What makes a run slower than it need be, or its answers count unevenly, each in one line with the setting to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from dspref.config import ModelSection, ReferenceSection, TrainSection
from dspref.config.strategy import spreads_experts
from dspref.data.loader import StepLoader, count, longest_pair, place
from dspref.engine import memory
from dspref.engine.engine import Engine
from dspref.machine import built, fitting, footprint, memory_plan, run_plan
from dspref.machine.fitting import Asked
from dspref.machine.layers import Layout, Pack
from dspref.machine.shapes import ModelShape, of_tensors
from dspref.model import admission, attention, families, tiles
from dspref.model.alone import ALONE
from dspref.report import performance

# A line is worth reading when it is about more than this share of the time, or of the room.
WORTH_SAYING = 0.10
# Tokens per rank and gather at which compute hides ZeRO-3's traffic in a dense bf16 model: 6 FLOPs a weight at half of an
# H100's peak against three transfers of 2 bytes at 350 GB/s. With slower links it takes more.
TOKENS_PER_GATHER = 1_100
# Steps of the first epoch that are planned to see how packs come out: it takes milliseconds.
STEPS_LOOKED_AT = 20
# What desirable answers may count for each time that undesirable ones do (KTO's paper, arXiv:2402.01306, eq. 9; its newest
# version has 3/2), and what is advised.
LEAST, MOST, BETWEEN = 1.0, 4 / 3, 7 / 6
# A label of LiPO's paper (arXiv:2402.01878) is at most 1.
LARGEST_LABEL = 1.0
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
    fewer_packs: tuple[int, float] | None
    """A budget of tokens that was tried, and the packs per step that it gives, where those are fewer."""
    faster_kernel: str | None
    """How to get one, in place of attention sequence by sequence on a GPU."""
    sparsity: float
    """All weights over those that a token meets: 1 for a dense model."""
    checkpointing: bool
    kept_bytes: int
    """That activations and the LM head would take without gradient checkpointing."""
    free_bytes: int
    """That neither the run has yet nor the optimizer will need."""
    too_long: tuple[int, int, str] | None = None
    """Bytes that the largest pack needs, those that are free for it, and the settings with which it would fit; where it is
    likely not to."""


def of_run(
    section: ModelSection,
    train: TrainSection,
    strategy: Mapping[str, Any],
    policy: Engine,
    loader: StepLoader,
    kernel: str,
) -> list[str]:
    """Advice for a run whose models are in memory, under a DeepSpeed strategy."""
    steps, packing = loader.epoch(0)[:STEPS_LOOKED_AT], loader.packing
    placed = [place(loader.store, ids, packing) for ids in steps]
    lm, parts = policy.module.lm, packing.parts
    world = packing.world_size * parts
    size = performance.size_of(policy.module)
    packs, per_rank = fmean(len(p.ids[0]) for p in placed), fmean(p.tokens for p in placed) / world
    budget = -int(-per_rank * ROOM // max(int(per_rank * parts / packing.tokens_per_pack), 1) // 256) * 256
    larger = replace(packing, tokens_per_pack=budget * parts)
    then = fmean(len(place(loader.store, ids, larger).ids[0]) for ids in steps)
    layout = Layout(
        policy.device.type,
        footprint.BYTES[section.dtype],
        world,
        packs=2 if packs > 1 else 1,
        moments=2 if train.optim == "adamw_8bit" else 8,
        kernel="sdpa" if kernel == "sdpa" else "fused",
        **run_plan.model_settings(section, lm.config.get_text_config().hidden_size),
        **memory_plan.zero_settings(strategy),
    )
    tokens = sum(p.tokens for p in placed)
    shares = sum(p.scored for p in placed) / tokens, sum(count(loader.store, ids)["tokens"] for ids in steps) / tokens
    largest = -(-max(p.largest for p in placed) // parts)
    most = max(placed, key=lambda step: step.largest).most
    pack = Pack(largest, round(largest * shares[0]), shares[1], most)
    shape, free = shape_of(section, lm), memory.free_memory(policy.device)
    kept, coming = still_to_come(shape, replace(layout, checkpointing=False), pack)
    ways = _ways_for_long_pairs(lm, kernel, parts)
    run = Asked(shape, layout, pack, optim=train.optim, spread=spreads_experts(strategy), **ways)
    facts = Facts(
        device=policy.device.type,
        zero_stage=layout.stage,
        world_size=world,
        pairs_per_step=train.pairs_per_step,
        packs_per_step=packs,
        fill=fmean(p.fill for p in placed),
        waiting=fmean(p.waiting for p in placed),
        tokens_per_rank=round(per_rank),
        fewer_packs=(budget, then) if then < (1 - WORTH_SAYING) * packs else None,
        faster_kernel=_faster_kernel(section, policy, kernel),
        sparsity=memory.count_weights(lm) / max(size.matrices, 1),
        checkpointing=bool(section.gradient_checkpointing),
        kept_bytes=kept,
        free_bytes=free - coming,
        too_long=too_long(run, -(-longest_pair(loader.store, packing.prefix_sharing) // parts), free),
    )
    return list(lines(facts))


def _ways_for_long_pairs(lm: Any, kernel: str, parts: int) -> dict[str, Any]:
    """Which of them this model can go, by the names of `Asked`."""
    alone = kernel == ALONE
    shared = parts > 1 or alone or admission.why_not_shared(lm.config, None)
    heads = 0 if shared else admission.number(lm.config.get_text_config(), "num_attention_heads") or 0
    return {"tiles": not alone and tiles.why_not(lm) is None, "heads": heads}


def shape_of(section: ModelSection, lm: Any) -> ModelShape:
    """The numbers of a model that is in memory, whole or in shards."""
    trained = sum(memory.elements(p) for p in lm.parameters() if p.requires_grad)
    if (kind := families.kind_of(lm.config)) != "decoder":
        return replace(built.of_model(lm, kind, memory.elements, None), frozen_base=section.lora is not None)
    named = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in lm.named_parameters()}
    own = {name: shape for name, shape in named.items() if ".lora_" not in name}
    return replace(of_tensors(own, lm.config.get_text_config().to_dict(), section.lora), trained=trained)


def still_to_come(shape: ModelShape, layout: Layout, pack: Pack) -> tuple[int, int]:
    """Bytes that a run whose models are in memory will need yet: (for activations and the head, for all else), by the
    estimate that `dspref plan` shows."""
    return _split(memory_plan.estimate(shape, layout, pack).parts)


def too_long(run: Asked, longest: int, free: int) -> tuple[int, int, str] | None:
    """As `Facts.too_long`: `longest`: tokens of the longest pair; `free`: bytes, beside the models that are there."""
    kept, coming = _split(run.needs.parts)
    if kept + coming <= free:
        return None
    found = fitting.changes(run, longest, run.needs.total - (kept + coming) + free, fitting.OF_PACKS)
    if not found or found[-1].saves + sum(change.saves for change in found[:-1]) < kept + coming - free:
        return None
    return kept, free - coming, "; ".join(change.setting for change in found)


def _split(parts: Mapping[str, int]) -> tuple[int, int]:
    kept = parts["activations"] + parts["LM head"]
    there = sum(parts[name] for name in ("weights", "fp32 masters", "reference", "framework"))
    return kept, sum(parts.values()) - kept - there


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
    if facts.too_long:
        needed, free, settings = facts.too_long
        yield f"the largest pack takes about {_size(needed)}, and {_size(max(free, 0))} are free for it: {settings}"
    kept = facts.kept_bytes
    if facts.checkpointing and 0 < kept < facts.free_bytes / 2:
        yield (
            f"activations would take about {_size(kept)} of {_size(facts.free_bytes)} free memory: "
            "model.gradient_checkpointing=false saves about a quarter of the compute"
        )


def of_rows(objective: Mapping[str, Any], loader: StepLoader) -> Iterator[str]:
    """Where what rows say of their answers is not what the objective is made for."""
    yield from of_labels(objective, loader)
    yield from of_scores(objective, loader)


def of_labels(objective: Mapping[str, Any], loader: StepLoader) -> Iterator[str]:
    """What KTO's weights should be, where by the first epoch's answers one label counts for much more than the other."""
    if objective["name"] != "kto":
        return
    scored = loader.store.scored[np.concatenate(loader.epoch(0))]
    counts = (scored > 0).sum(axis=0).tolist()
    weights = [objective["desirable_weight"], objective["undesirable_weight"]]
    yield from uneven(counts, weights)


def of_scores(objective: Mapping[str, Any], loader: StepLoader) -> Iterator[str]:
    """Where the scores of lists are far from the labels that LiPO-lambda's weights are made for."""
    scale = objective.get("score_scale")
    if scale is None:
        return
    most = scale * float(np.maximum(*loader.store.given.scores).max())
    if most > LARGEST_LABEL:
        yield (
            f"labels go up to {most:.3g}, and the gain of an answer is 2 to the power of its label; LiPO's paper has labels "
            f"from 0 to 1: objective.score_scale={scale / most:.3g}"
        )


def uneven(counts: Sequence[int], weights: Sequence[float]) -> Iterator[str]:
    """`counts` and `weights`: of desirable answers, of undesirable ones."""
    (good, bad), (of_good, of_bad) = counts, weights
    if not of_good or not of_bad:
        return  # one of the two is not wanted
    if not good or not bad:
        lacking, there = ("undesirable", "desirable") if good else ("desirable", "undesirable")
        yield f"all answers are {there}: without any {lacking} one nothing says what to prefer them to; look at the labels"
        return
    ratio = of_good * good / (of_bad * bad)
    if LEAST <= ratio <= MOST:
        return
    key, value = "desirable", BETWEEN * of_bad * bad / good
    if ratio > MOST:
        key, value = "undesirable", of_good * good / bad / BETWEEN
    yield (
        f"desirable answers weigh {ratio:.3g} times as much as undesirable ones ({good:,} x {of_good:g} to {bad:,} x "
        f"{of_bad:g}), where KTO's paper has 1 to 4/3: objective.{key}_weight={value:.3g}"
    )


def of_moving(section: ReferenceSection, steps: int) -> Iterator[str]:
    """Where a reference that is to follow the policy never does."""
    if section.bema is not None:
        first, keys = section.bema.update_after + section.bema.moves_every, "reference.bema.update_freq and update_after"
    elif section.sync_ref_model:
        first, keys = section.ref_model_sync_steps, "reference.ref_model_sync_steps"
    else:
        return
    if first > steps:
        yield f"the reference first moves after step {first}, and the run has {steps}: it never does; lower {keys}"


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
