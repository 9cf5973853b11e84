"""The policy under DeepSpeed.

An `Engine` adds to gradients (`backward`) and applies them (`step`), nothing else. What DeepSpeed 0.19.8 does that one would
not expect is handled here; docs/deepspeed.md lists it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dspref import distributed
from dspref.config import TrainSection
from dspref.data.batch import PackedBatch
from dspref.engine import experts, shards
from dspref.engine.accelerator import ACCELERATOR, deepspeed
from dspref.engine.memory import full_state
from dspref.engine.optimizer import make_optimizer, make_scheduler
from dspref.errors import EnvironmentFault
from dspref.model import expert_parallel
from dspref.model.alone import ALONE
from dspref.model.generation import Passage
from dspref.model.logps import TokenLogps
from dspref.model.packed import PackedCausalLM
from dspref.model.router import Ears, Routing
from dspref.model.tiles import Tiled

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def bring_up(dtype: str) -> torch.device:
    """Make DeepSpeed use the process group that `distributed.init` made; this rank's device.

    Raises EnvironmentFault where the device cannot train in `dtype`.
    """
    able = {
        "float16": ACCELERATOR.is_fp16_supported,
        "bfloat16": ACCELERATOR.is_bf16_supported,
        "float32": lambda: True,
    }
    if not able[dtype]():
        raise EnvironmentFault(
            f"model.dtype: {dtype} is not supported on this device ({ACCELERATOR.device_name()}); use float32"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    keep_peak_memory()
    if ACCELERATOR.device_name() == "cpu":
        # Serves tensor-parallel inference only, yet is compiled at every start: 30 s, or a hang on a stale lock.
        # (`import deepspeed.comm.torch as m` would give the real torch: deepspeed.comm imports it under that name.)
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=ACCELERATOR.communication_backend_name(), auto_mpi_discovery=False)
    return torch.device(ACCELERATOR.current_device_name())


def keep_peak_memory() -> None:
    """Leave out DeepSpeed's reports of memory: its bf16 optimizer prints several at every start, and each collects garbage
    and sets back the peak that `perf/memory_gib` tells."""
    for name, module in list(sys.modules.items()):
        if name.startswith("deepspeed.") and hasattr(module, "see_memory_usage"):
            module.see_memory_usage = lambda *_, **__: None  # type: ignore[attr-defined]


class Engine:
    """The policy under DeepSpeed. Every rank must call each method the same number of times."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        self._engine = engine
        self._files = engine.checkpoint_engine = shards.SafeCheckpointEngine(engine._config)
        # It would copy scripts that unpickle (`dspref export` takes their place), and fail on a full disk on one rank alone.
        engine._copy_recovery_script = lambda save_path: None
        self.device = torch.device(ACCELERATOR.current_device_name())
        self._grad_norm: float | None = None
        if engine.zero_optimization_stage() == 0:
            # DeepSpeed gives no gradient norm at stage 0, so there we clip, after its reduction and before the update.
            optimizer.register_step_pre_hook(lambda *_: self._clip_stage0(optimizer, max_grad_norm))

    @classmethod
    def for_training(
        cls, policy: PackedCausalLM, train: TrainSection, ds_config: Mapping[str, Any], total_steps: int
    ) -> Engine:
        """`ds_config`: of `ds_config.training_config`."""
        resolved = dict(ds_config)
        if resolved["zero_optimization"]["stage"] == 0:
            resolved["gradient_clipping"] = 0.0
        if (size := expert_parallel.size_of(resolved)) > 1:
            return cls._spread(policy, train, resolved, total_steps, size)
        if resolved["zero_optimization"]["stage"] == 3:
            _mark_leaves(policy)
        optimizer = make_optimizer(policy, train)
        scheduler = make_scheduler(optimizer, train, total_steps)
        if resolved["zero_optimization"]["stage"] != 3:
            policy.to(ACCELERATOR.current_device_name())
        engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, lr_scheduler=scheduler, config=resolved)
        _announce_dora(policy)
        return cls(engine, optimizer, train.max_grad_norm)

    @classmethod
    def _spread(
        cls, policy: PackedCausalLM, train: TrainSection, resolved: dict[str, Any], total_steps: int, size: int
    ) -> Engine:
        """With the experts of each layer on `size` ranks. DeepSpeed exchanges the layers for others, and only then there
        are the weights that the optimizer is for."""
        resolved[expert_parallel.KEY] = expert_parallel.told(policy.lm.config, size)
        engine, *_ = deepspeed.initialize(
            model=policy,
            optimizer=lambda _: make_optimizer(policy, train),
            lr_scheduler=lambda optimizer: make_scheduler(optimizer, train, total_steps),
            config=resolved,
        )
        policy.ears = Ears(experts.gates(policy.lm))
        optimizer: Any = engine.basic_optimizer
        return cls(engine, optimizer, train.max_grad_norm)

    def forward(self, batch: PackedBatch, with_statistics: bool = False) -> tuple[TokenLogps, Routing | None]:
        """Log-probs of the scored tokens, and what the routers did, where their loss is trained."""
        return self._engine(batch, with_statistics=with_statistics)

    def score(self, batch: PackedBatch) -> tuple[TokenLogps, None]:
        """Log-probs of the scored tokens and nothing else."""
        return self._engine(batch, only_logps=True)

    def read_on(self, passage: Passage) -> tuple[Tensor, Any]:
        """Logits [B, V] behind a passage, and the cache with it."""
        return self._engine(passage)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """No dropout and no gradient inside."""
        training = self.module.training  # the engine's own flag never changes
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train(training)

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, the model is the reference that it holds: adapters off or exchanged, no dropout, no gradient."""
        adapters = self.module.adapters
        with self.evaluating(), adapters.as_reference() if adapters else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def rehearsing(self) -> Iterator[None]:
        """No gradient inside, and afterwards the same random numbers again: a pass before the one that counts, with the
        same dropout."""
        devices = [torch.cuda.current_device()] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            yield

    def backward(self, share: Float[Tensor, ""]) -> None:
        """Add the gradient of a share of the step's loss. Shares of all packs and ranks add up; nothing is averaged."""
        # DeepSpeed averages over ranks, so each share counts world-size fold. This is the only place that knows.
        self._engine.backward(share * distributed.world().size, scale_wrt_gas=False)

    def step(self) -> float:
        """Clip, update, advance the schedule. Returns the L2 norm of the loss's gradient before clipping; where that is not
        finite nothing is updated or advanced, on any rank, and `applied` is False."""
        self._engine.step()
        norm = self._grad_norm if self._engine.zero_optimization_stage() == 0 else self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    @property
    def applied(self) -> bool:
        """Whether the last `step` changed the weights."""
        return self._engine.was_step_applied()

    @property
    def learning_rate(self) -> float:
        """The rate that the next `step` uses."""
        return self._engine.get_lr()[0]

    @property
    def module(self) -> PackedCausalLM:
        return self._engine.module  # type: ignore[return-value]

    def save(self, folder: Path) -> list[Path]:
        """Write this rank's part of weights, optimizer and schedule below `folder`; its files. Raises OSError."""
        self._files.forget()
        adapted = self.module.adapters is not None
        # Beside an adapter the model is as it was: the checkpoint leaves it out.
        self._engine.save_checkpoint(str(folder), tag=shards.FOLDER, save_latest=False, exclude_frozen_parameters=adapted)
        # Optimizer states on NVMe are copied past the checkpoint engine.
        copied = (folder / shards.FOLDER / "offloaded_tensors").glob(f"rank{distributed.world().rank:02d}/**/*")
        return [*self._files.written(), *(path for path in copied if path.is_file())]

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote, on any number of ranks. The next rate is that of this run's schedule."""
        shards.restore(self._engine, folder, strict=self.module.adapters is None)
        scheduler: Any = self._engine.lr_scheduler
        # The optimizer's state has the rate that the schedule of the saved run, which may have had fewer steps, gave it.
        rates = [base * rate(scheduler.last_epoch) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates):
            group["lr"] = rate

    def release_memory(self) -> None:
        """Give back to the device what a pass of another kind than a step's has left in the allocator."""
        if self.device.type != "cpu":
            ACCELERATOR.empty_cache()

    def full_state(self, trained_only: bool = False) -> dict[str, Tensor]:
        """All weights of the inner model by name, or those that are trained, on the CPU of rank 0; empty on the others."""
        return full_state(self.module.lm, trained_only)

    def close(self) -> None:
        self._engine.destroy()

    def _clip_stage0(self, optimizer: Any, max_grad_norm: float) -> None:
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf"))
        self._grad_norm = norm.item()
        # DeepSpeed would update in fp32 whatever the gradient is. It reads this flag, and what has no gradient stays.
        optimizer.overflow = not math.isfinite(self._grad_norm)
        if optimizer.overflow:
            for parameter in parameters:
                parameter.grad = None


class Still:
    """A model that is asked and not trained, with what an evaluation needs of an `Engine`."""

    def __init__(self, forward: Any, module: PackedCausalLM) -> None:
        self._forward = forward
        self.module = module
        self.device = torch.device(ACCELERATOR.current_device_name())

    @classmethod
    def of(cls, model: PackedCausalLM, zero3: Mapping[str, Any] | None) -> Still:
        """`zero3`: as `reference_forward` takes it."""
        return cls(reference_forward(model, zero3), model)

    def evaluating(self) -> contextlib.AbstractContextManager[Any]:
        return torch.no_grad()

    def forward(self, batch: PackedBatch, with_statistics: bool = False) -> tuple[TokenLogps, Routing | None]:
        return self._forward(batch, with_statistics=with_statistics)


def reference_forward(reference: PackedCausalLM, zero3: Mapping[str, Any] | None):
    """A frozen model as a function from packs to log-probs: sharded by its own ZeRO-3 engine, with a config of
    `ds_config.reference_config`, or whole on the device."""
    if zero3 is None:
        return reference.to(ACCELERATOR.current_device_name())
    _mark_leaves(reference)
    engine, *_ = deepspeed.initialize(model=reference, config=dict(zero3))
    _announce_dora(reference)
    return engine


def discard(forward: Any) -> None:
    """Free what `reference_forward` made."""
    if isinstance(forward, deepspeed.DeepSpeedEngine):
        forward.destroy()
    parameter: Any
    for parameter in forward.parameters():
        parameter.data = parameter.data.new_empty(0)
        if hasattr(parameter, "ds_tensor"):  # the shard, which the engine's own end leaves alive
            parameter.ds_tensor.data = parameter.ds_tensor.data.new_empty(0)


def _mark_leaves(policy: nn.Module) -> None:
    """Under ZeRO-3, gather modules with experts whole: ranks route differently, so the experts' hooks would run apart.

    Experts are, by family: 3-D weights of one module, or a child called `experts` without such weights. The first are left
    as they are where a backward runs through them several times, as DeepSpeed would reduce a leaf's gradients each time:
    being of one module, they are gathered together anyhow.
    """
    several = getattr(policy, "kernel", None) == ALONE
    for part in policy.modules():
        if isinstance(part.forward, Tiled):  # gathered once, and not for each tile
            deepspeed.utils.set_z3_leaf_module(part, True)
    found = {type(part) for part in policy.modules() if _has_experts(part, listed_alone=several)}
    if found:
        deepspeed.utils.set_z3_leaf_modules(policy, list(found))
        distributed.log(f"ZeRO-3 gathers whole: {', '.join(sorted(kind.__name__ for kind in found))}")


def _has_experts(part: nn.Module, listed_alone: bool) -> bool:
    child = getattr(part, "experts", None)
    if isinstance(child, nn.Module) and not _three_dimensional(child.parameters()):
        return True
    return not listed_alone and not isinstance(part, nn.Conv1d) and _three_dimensional(part.parameters(recurse=False))


def _announce_dora(model: nn.Module) -> None:
    """Tell ZeRO-3 that DoRA's magnitudes read the weights beside them, which their hooks would not gather: a forward that is
    recomputed after a resume would find them empty."""
    part: Any
    for part in model.modules():
        for name, magnitude in getattr(part, "lora_magnitude_vector", {}).items():
            for read in (part.lora_A[name].weight, part.lora_B[name].weight, part.get_base_layer().weight):
                if hasattr(read, "ds_id"):
                    deepspeed.zero.register_external_parameter(magnitude, read)


def _three_dimensional(parameters: Iterable[nn.Parameter]) -> bool:
    # Of a first size of 1: positions and class tokens of image towers.
    shapes = [getattr(p, "ds_shape", p.shape) for p in parameters]
    return any(len(shape) == 3 and shape[0] > 1 for shape in shapes)
