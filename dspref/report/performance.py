"""How fast a run is, and why: time by phase, tokens and floating-point operations per second, memory."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from dspref import distributed
from dspref.config import ModelSection
from dspref.data.loader import Step
from dspref.engine.engine import Engine
from dspref.machine import flops
from dspref.machine.flops import ModelSize, Work, of_step
from dspref.machine.footprint import EXPERTS
from dspref.machine.gpus import peak_of
from dspref.model import families
from dspref.model.head_room import fits
from dspref.model.packed import PackedCausalLM
from dspref.model.pieces import ATTENTION, Piece, pieces_of
from dspref.model.tiles import Tiled
from dspref.reference.modes import Reference

PHASES = ("data", "forward", "reference", "backward", "update")


class Clock:
    """Where the time of a step goes. On CUDA the device keeps the time, and nothing waits for it before `read`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.start()

    def start(self) -> None:
        """A new step begins, with its data."""
        self.phase, self._marks = "data", []
        self.begin("data")
        self._cpu = time.process_time()

    def begin(self, phase: str) -> None:
        """What is done from now on belongs to `phase`, one of PHASES, or to none."""
        self.phase = phase
        self._marks.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds of each phase of PHASES, of all together (`total`), and of this process's CPU (`cpu`)."""
        if self._cuda:
            self._marks[-1][1].synchronize()
        found: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        for (phase, before), (_, after) in pairwise(self._marks):
            found[phase] += before.elapsed_time(after) / 1000 if self._cuda else after - before
        return found | {"total": sum(found.values()), "cpu": time.process_time() - self._cpu}

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def size_of(model: PackedCausalLM) -> ModelSize:
    """The size of a model, of which this rank may hold a shard only."""
    lm, text = model.lm, model.lm.config.get_text_config()
    experts = number_in(text, *EXPERTS, default=1)
    per_token = number_in(text, "num_experts_per_tok", "moe_k", default=experts) / experts
    kind = families.kind_of(lm.config)
    pieces = pieces_of(lm, kind, _elements, per_token)
    if kind == "decoder":
        heads, hidden = number_in(text, "num_attention_heads", default=1), number_in(text, "hidden_size", default=0)
        channels = 2.0 * heads * number_in(text, "head_dim", default=hidden / heads)
        layers = range(int(number_in(text, "num_hidden_layers", default=0)))
        pieces += [Piece(ATTENTION, channels, False, depth=n, is_attention=True) for n in layers]
    return flops.size_of(pieces)


def number_in(text: Any, *names: str, default: float) -> float:
    """The first of these that a model's config has; of a value for each layer, the mean. A figure in a report is no reason
    to refuse a family that names things otherwise."""
    for name in names:
        value = getattr(text, name, None)
        if isinstance(value, list | tuple) and value and all(isinstance(x, int | float) for x in value):
            return statistics.fmean(value)
        if isinstance(value, int | float) and value > 0:
            return value
    return default


def _elements(parameter: Any) -> int:
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    packed = getattr(parameter, "quant_state", None)  # of weights in 4 bits, whose own shape is that of bytes
    return torch.Size(packed.shape if packed is not None else shape).numel()


@dataclass(frozen=True)
class Account:
    """What a run computes, for its `perf/*` metrics. `reference`: of a live one; None where nothing is computed for it."""

    policy: ModelSize
    reference: ModelSize | None
    recomputes: bool
    device: torch.device
    dtype: str
    vocabulary: int = 0
    looks_ahead: bool = False
    """Whether a step of several packs is computed once without gradient first."""
    tiled: tuple[float, int] = (0.0, 0)
    """Weights of MLPs that are run in tiles, and the tokens of a tile."""

    @classmethod
    def of(cls, section: ModelSection, policy: Engine, reference: Reference, looks_ahead: bool) -> Account:
        live = size_of(reference.module) if reference.module else None
        vocabulary: int = policy.module.lm.config.get_text_config().vocab_size
        recomputes, dtype = bool(section.gradient_checkpointing), section.dtype
        tiled = [part for part in policy.module.modules() if isinstance(part.forward, Tiled)]
        tile = sum(_elements(p) for part in tiled for p in part.parameters()), tiled[0].forward.tokens if tiled else 0
        return cls(size_of(policy.module), live, recomputes, policy.device, dtype, vocabulary, looks_ahead, tile)

    def record(self, step: Step, seconds: Mapping[str, float]) -> dict[str, float]:
        """Of all ranks together: pairs, real tokens (prompt + answer, of both answers), scored ones and computed ones per
        second, between the steps' own beginnings and ends: evaluation, checkpoints and reports are not in them. `mfu`: model
        FLOPs of the policy, `hfu`: all that are executed, with recomputation and a live reference, over the devices' peak.
        Sliding windows are counted as full causal attention."""
        counts, total = step.counts, max(seconds["total"], 1e-9)
        answers = counts["chosen_tokens"] + counts["rejected_tokens"]
        world = distributed.world().size
        found = {
            "pairs_per_second": counts["pairs"] / total,
            "tokens_per_second": counts["tokens"] / total,
            "response_tokens_per_second": answers / total,
            "computed_tokens_per_second": step.computed_tokens / total,
            "pack_fill": step.fill,
            "packs": step.num_packs,
            "seconds": total,
            "cpu_seconds": seconds["cpu"],
            **{f"{phase}_seconds": seconds[phase] for phase in PHASES},
            "memory_gib": peak_memory(self.device) / 2**30,
        }
        useful, executed = self.flops(step)
        found["tflops_per_rank"] = executed / total / world / 1e12
        if peak := peak_flops(self.device, self.dtype):
            found |= {"mfu": useful / total / world / peak, "hfu": executed / total / world / peak}
        return {f"perf/{name}": value for name, value in found.items()}

    def flops(self, step: Step) -> tuple[float, float]:
        """(of the policy's forward and backward, of all that is executed) in a step, on all ranks."""
        work = Work.of_step(step.computed_tokens, step.scored_tokens, step.attention_pairs, step.more)
        packs = step.num_packs * distributed.world().groups
        return of_step(
            self.policy,
            self.reference,
            work,
            recomputes=self.recomputes,
            mlps_again=self.tiled[0] * (step.computed_tokens // packs > self.tiled[1]),
            head_again=not fits(step.scored_tokens // packs, self.vocabulary, self.device.type),
            # Mismatched pairs cost a forward pass of about the step's size.
            looks_ahead=(self.looks_ahead and packs > 1) or "mismatched_answers" in step.counts,
        )


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Dense FLOP/s of the device in 16 bits; None where it is not known, as of CPUs, or where fp32 is asked for."""
    if device.type != "cuda" or dtype == "float32":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this rank has allocated on its GPU, or of the process's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def medians(records: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The `perf/*` of a run, without their prefix: medians over its logged steps, the first left out where it can be."""
    lines = list(records)
    lines = lines[1:] or lines
    names = dict.fromkeys(name for line in lines for name in line if name.startswith("perf/"))
    found = {name: [line[name] for line in lines if isinstance(line.get(name), int | float)] for name in names}
    return {name.removeprefix("perf/"): statistics.median(values) for name, values in found.items() if values}
