"""Nothing in a step waits for the GPU, as far as a CPU can show it: no number is read from a tensor, and none of Python's is
copied into one, which on a GPU waits for all that is under way. And DeepSpeed is not asked to wait."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_batch import grouped_pairs
from tiny import tiny_config, tiny_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dspref
from dspref import distributed
from dspref.config import Config
from dspref.data.batch import PackedBatch, collate
from dspref.data.loader import Step
from dspref.engine import ds_config, engine
from dspref.model import attention
from dspref.model.logps import pair_logps
from dspref.model.packed import PackedCausalLM
from dspref.objectives import RunningMean, build_objective
from dspref.reference.modes import Reference
from dspref.report.metrics import Meter
from dspref.report.performance import Clock
from dspref.training import gradient
from dspref.training.gradient import Instruments, StepLoss
from dspref.training.numbers import Suspects

CPU = torch.device("cpu")
PACKAGE = str(Path(dspref.__file__).parent)

# On a GPU these copy from the host or to it, and wait.
COPIES = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.Tensor.new_tensor}
COPIES |= {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
# Their result, or its size, is read on the host.
READ = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "equal", "is_nonzero"}


class Factories(TorchFunctionMode):
    def __init__(self, seen: set[tuple[str, str]]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        if function in COPIES:
            self.seen.add(place())
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __init__(self, seen: set[tuple[str, str]]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        name, overload = str(func).removeprefix("aten.").rsplit(".", 1)
        by_mask = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        unknown_size = (name, overload) == ("repeat_interleave", "Tensor") and not (kwargs or {}).get("output_size")
        if name in READ or by_mask or unknown_size:
            self.seen.add(place())
        return func(*args, **(kwargs or {}))


def place() -> tuple[str, str]:
    """(file, function) of the innermost call within dspref."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
    return (Path(frames[-1].filename).name, frames[-1].name) if frames else ("", "")


@contextmanager
def watched() -> Iterator[set[tuple[str, str]]]:
    seen: set[tuple[str, str]] = set()
    with Factories(seen), Operators(seen):
        yield seen


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: torch.as_tensor(3.0),
        lambda x: torch.tensor([1, 2]),
        lambda x: x.new_tensor([1.0]),
        lambda x: x.repeat_interleave(x.long()),
    ],
)
def test_the_watch_sees_what_waits(waits):
    with watched() as seen:
        waits(torch.ones(3))
    assert seen


def test_the_watch_lets_pass_what_does_not_wait():
    with watched() as seen:
        values = torch.full((), 3.0) * torch.ones(3)[torch.ones(2, dtype=torch.int64)] / 7
        torch.where(values.isfinite().all(), 1.0, float("nan"))
    assert not seen


class Undistributed:
    """The policy as `gradient` asks it, without DeepSpeed, which waits once a step for reasons of its own."""

    def __init__(self, model: PackedCausalLM, device: torch.device = CPU) -> None:
        self.forward, self.device = model, device

    def backward(self, share: torch.Tensor) -> None:
        share.backward()

    def rehearsing(self) -> Any:
        return torch.no_grad()


def policy_of(family: str, **sizes: Any) -> PackedCausalLM:
    lm = tiny_model(tiny_config(family, 1000, **sizes), seed=1).train()
    lm.config._attn_implementation = attention.PACKED
    return PackedCausalLM(lm, "sdpa")


def packs_of(score_prompt: bool) -> list[PackedBatch]:
    pairs = grouped_pairs(5)
    return [
        collate(pairs[part], range(6)[part], prefix_sharing=True, score_prompt=score_prompt)
        for part in (slice(0, 4), slice(4, 6))
    ]


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
# Attention sequence by sequence asks for their lengths, once a pack; numbers of rows that hosts tell each other are theirs;
# and BCO's running mean is a number of the host's.
KNOWN = {("attention.py", "calls"), ("distributed.py", "gather_rows")}


@pytest.mark.parametrize(
    ("objective", "allowed"),
    [
        ({"name": "dpo", "loss_type": "sigmoid"}, set()),
        ({"name": "dpo", "loss_type": ["sigmoid", "ipo", "sft"], "ld_alpha": 0.5, "use_weighting": True}, set()),
        ({"name": "dpo", "loss_type": "robust", "f_divergence_type": "js_divergence", "label_smoothing": 0.1}, set()),
        ({"name": "dpo", "loss_type": ["aot", "aot_pair"]}, set()),
        ({"name": "dpo", "loss_type": "bco_pair"}, {("gradient.py", "_with_step")}),
        ({"name": "dpo", "loss_type": "discopop", "rpo_alpha": 0.5}, set()),
        ({"name": "simpo"}, set()),
        ({"name": "cpo", "loss_type": "ipo"}, set()),
        ({"name": "orpo"}, set()),
        ({"name": "kto"}, set()),
        ({"name": "bco"}, {("gradient.py", "_with_step")}),
        ({"name": "dpo", "experts": "micro"}, set()),
        ({"name": "dpo", "experts": "step"}, set()),
    ],
    ids=str,
)
def test_a_logged_step_waits_for_nothing(objective, allowed):
    """Packs through a model, loss, metrics and gradient; what is reduced at its end is read on the host, once."""
    scope = objective.pop("experts", None)
    only = {"dpo": "sigmoid", "cpo": "sigmoid"}.get(objective["name"], objective["name"])
    made = build_objective(**{"loss_type": only} | objective)
    model = policy_of("qwen3_moe", **EXPERTS) if scope else policy_of("qwen2")
    model.with_collision, model.router_aux_loss_coef = made.needs_collision, 0.1 if scope else 0.0
    packs = packs_of(made.scores_prompt)
    with torch.no_grad():
        tables = {id(batch): pair_logps(model(batch, only_logps=True)[0], batch) for batch in packs}
    counts = {"pairs": 6, "chosen_tokens": 60, "rejected_tokens": 60, "chosen_and_prompt_tokens": 90, "tokens": 300}
    counts |= {"answers": 12, "mismatched_answers": 12}
    step = Step(1, 1.0, len(packs), packs, counts, 1.0, mismatched=packs)
    meter = Meter(CPU, model.router_aux_loss_coef)
    base = iter([tables[id(batch)] for batch in packs] * 2)
    reference = Reference(lambda name, batch: next(base))
    looking = Instruments(meter, Clock(CPU), Suspects())
    loss = StepLoss(made, model.router_aux_loss_coef, scope or "micro")
    with watched() as seen:
        gradient.accumulate(step, Undistributed(model), loss, reference, RunningMean(), looking)  # type: ignore[arg-type]
    in_dspref = {where for where in seen if where[0]}
    assert in_dspref - KNOWN == allowed
    assert all(p.grad is not None for p in model.parameters())
    assert "loss" in meter.reduce()


def test_rows_are_counted_by_hosts():
    """A tensor without storage has no number that could be read."""
    rows, own = distributed.gather_rows(torch.zeros(3, 2, device="meta"))
    assert rows.shape == (3, 2) and own == slice(0, 3)


# ---------------------------------------------------------------------------------------------------------------------
# DeepSpeed


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_keeps_no_clock_of_its_own(stage):
    """Its throughput timer waits for the GPU at every forward from the second step on, unless it is turned off."""
    from deepspeed.utils.config import get_timers_config

    config = Config.model_validate(
        {
            "model": {"name_or_path": "m", "dtype": "float32"},
            "data": {"train": {"path": "p"}},
            "objective": {"name": "dpo"},
            "deepspeed": {"zero_optimization": {"stage": stage}},
            "output_dir": "o",
        }
    )
    own = ds_config.training_config(config.strategy, "float32", config.train)
    for resolved in (own, ds_config.reference_config(config.strategy, "float32", "none")):
        assert not get_timers_config(resolved).enabled


def test_deepspeed_leaves_the_peak_of_memory_alone(capsys):
    """It is imported by name into many modules; the one that reports whatever it is asked is the bf16 optimizer's."""
    import deepspeed.runtime.bf16_optimizer as plain

    engine.keep_peak_memory()
    plain.see_memory_usage("begin bf16_optimizer", force=True)
    assert capsys.readouterr().out == ""
    modules = [module for name, module in sys.modules.items() if name.startswith("deepspeed.")]
    reports = [module.see_memory_usage for module in modules if hasattr(module, "see_memory_usage")]
    assert reports and {report.__module__ for report in reports} == {"dspref.engine.engine"}
