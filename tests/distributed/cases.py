"""What tests run on every rank. Each function is a case for `Workers.run`; it returns plain values."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from dspref import config as configuration
from dspref import distributed, launcher
from dspref.data.loader import StepLoader
from dspref.data.store import PairStore
from dspref.engine import engine, memory
from dspref.engine.engine import Engine
from dspref.errors import Interrupted, UserError
from dspref.model import loading
from dspref.objectives import RunningMean, build_objective
from dspref.reference import modes as references
from dspref.reference import spec
from dspref.report.metrics import Meter
from dspref.training import demand, gradient, preparation, stages, trainer
from dspref.training.gradient import Instruments, StepLoss


def first_steps(config_path: str, variants: list[list[str]], gradients: bool = True) -> list[dict[str, Any]]:
    """Loss, metrics, gradient norm and gradients of step 1, for each list of overrides.

    Variants of one model on the same data share what is prepared of them.
    """
    prepared: dict[str, Any] = {}
    return [_first_step(config_path, overrides, gradients, prepared) for overrides in variants]


def _first_step(config_path: str, overrides: list[str], gradients: bool, prepared: dict[str, Any]) -> dict[str, Any]:
    config = configuration.load(config_path, overrides)
    policy, reference, loader, loss = _start(config, 1, prepared)
    meter = Meter(policy.device, loss.router_coef)
    step = next(loader.steps(0, 1))
    gradient.accumulate(step, policy, loss, reference, RunningMean(), Instruments(meter))
    grad_norm = policy.step()
    result = {
        **meter.reduce(), "grad_norm": grad_norm, "packs": step.num_packs,
        "gradients": _gradients(policy, config) if gradients else {},
        "full_sizes": sum(p.numel() for p in policy.module.parameters()),
    }  # fmt: skip
    policy.close()
    return result


def _start(
    config: configuration.Config, steps: int, prepared: dict[str, Any] | None = None
) -> tuple[Engine, references.Reference, StepLoader, StepLoss]:
    """A run as `trainer.train` starts it, without a run folder."""
    policy, held_out, loader, weights = _load_policy(config, steps, prepared)
    reference = _build(config, policy, weights, held_out, loader)
    objective = build_objective(**config.objective.model_dump())
    loss = StepLoss(objective, policy.module.router_aux_loss_coef, config.model.router_aux_scope)
    return policy, reference, loader, loss


def _load_policy(
    config: configuration.Config, steps: int, prepared: dict[str, Any] | None = None
) -> tuple[Engine, dict[str, PairStore], StepLoader, str]:
    distributed.init(config.train.seed, sequence=config.parallel.sequence)
    device = engine.bring_up(config.model.dtype)
    loading.quiet()
    prepared = {} if prepared is None else prepared
    key = repr((config.model, config.data_read, stages.reference_spec(config), config.train.optim))
    if key not in prepared:
        prepared[key] = _prepare(config, device.type)
    kernel, _, pairs, held_out = prepared[key]
    objective = build_objective(**config.objective.model_dump())
    _, loader = demand.plan(objective, config.data, config.train, pairs, held_out)
    weights = config.model.name_or_path
    policy = stages.load_policy(config, objective, weights, kernel)
    policy = Engine.for_training(policy, config.train, stages.engine_config(config), steps)
    return policy, held_out, loader, weights


def _prepare(config: configuration.Config, device_type: str) -> Any:
    return preparation.prepare(
        config.model, config.data_read, stages.reference_spec(config), config.train.optim, device_type
    )


def _build(
    config: configuration.Config, policy: Engine, weights: str, held_out: dict[str, PairStore], loader: StepLoader
) -> references.Reference:
    sets = demand.sets(build_objective(**config.objective.model_dump()), loader, held_out)
    beginning = references.InitialWeights(weights, spec.digest(stages.reference_spec(config), weights))
    return references.build(stages.reference_spec(config), policy, beginning, sets, loader.packing)


def _gradients(policy: Engine, config: configuration.Config) -> dict[str, np.ndarray]:
    """The step's gradients, read from AdamW's first moment: (1 - beta1) x gradient after one step without clipping."""
    from deepspeed.utils import safe_get_full_optimizer_state

    assert config.train.max_grad_norm == 0, "clipping would scale what is read here"
    found = {}
    for name, parameter in policy.module.lm.named_parameters():
        if not parameter.requires_grad:
            continue
        if config.zero_stage:
            moment = safe_get_full_optimizer_state(parameter, "exp_avg")
        else:
            moment = policy._engine.optimizer.state[parameter]["exp_avg"]
        assert moment is not None
        found[name] = (moment.float() / (1 - config.train.adam_beta1)).cpu().numpy().copy()
    return found


def second_shards(config_path: str, overrides: list[str]) -> tuple[int, int]:
    """How many parameters have a second shard after the forwards and backwards of a step, and how many there are."""
    config = configuration.load(config_path, overrides)
    policy, reference, loader, loss = _start(config, 1)
    step = next(loader.steps(0, 1))
    gradient.accumulate(step, policy, loss, reference, RunningMean(), Instruments(Meter(policy.device, loss.router_coef)))
    parameters: list[Any] = list(policy.module.parameters())
    there = sum(getattr(p, "ds_secondary_tensor", None) is not None for p in parameters)
    policy.step()
    policy.close()
    return there, len(parameters)


def run_training(config_path: str, overrides: list[str]) -> int:
    """A whole run, as the launcher makes it, in these ranks; its exit code."""
    try:
        trainer.train(configuration.load(config_path, overrides), Path(config_path))
    except (UserError, Interrupted) as error:
        print(error)
        return int(error.exit_code)
    return 0


def said_by_training(config_path: str, overrides: list[str]) -> tuple[int, str]:
    """`run_training`: its exit code, and what was printed by then."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = run_training(config_path, overrides)
    return code, said.getvalue()


def run_training_in(folder: str, config_path: str, overrides: list[str]) -> int:
    """`run_training` with `folder` as the working directory."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        return run_training(config_path, overrides)
    finally:
        os.chdir(before)


def command_line(arguments: list[list[str]]) -> list[tuple[int, str]]:
    """(exit code, what stood on standard error) of several command lines, in this process."""
    import contextlib
    import io

    results = []
    for line in arguments:
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            code = launcher.main(line)
        results.append((code, errors.getvalue()))
    return results


def memory_of_loading(config_path: str, overrides: list[str]) -> dict[str, float]:
    """MB of private memory at the peak of loading the policy under ZeRO-3, of the whole model, and of this rank's shards."""
    config = configuration.load(config_path, overrides)
    distributed.init(config.train.seed)
    device = engine.bring_up(config.model.dtype)
    loading.quiet()
    kernel = _prepare(config, device.type)[0]
    objective = build_objective(**config.objective.model_dump())
    before = _private_mb()
    with _Peak() as peak:
        policy = stages.load_policy(config, objective, config.model.name_or_path, kernel)
    whole = sum(p.ds_numel for p in policy.parameters()) * 4 / 2**20  # type: ignore[attr-defined]
    own = sum(p.ds_tensor.numel() for p in policy.parameters()) * 4 / 2**20  # type: ignore[attr-defined]
    return {"peak": peak.mb - before, "whole": whole, "own": own}


def _private_mb() -> float:
    """Memory that is this process's own; pages of mapped files are not, the system takes them back at will."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("RssAnon"))


def followed_reference(config_path: str, overrides: list[str], steps: int) -> list[dict[str, dict[str, np.ndarray]]]:
    """All weights of policy and reference, as the forward reads them, after each step of a run; on rank 0."""
    config = configuration.load(config_path, overrides)
    policy, reference, loader, loss = _start(config, steps)
    moving = reference.moving
    assert moving is not None
    states = []
    for step in loader.steps(0, steps):
        gradient.accumulate(step, policy, loss, reference, RunningMean(), Instruments())
        policy.step()
        reference.follow(step.number)
        shown = {"policy": policy.module.lm, "reference": moving.sides.reference}
        full = {name: memory.full_state(lm) for name, lm in shown.items()}
        states.append({name: {k: v.float().numpy() for k, v in state.items()} for name, state in full.items()})
    policy.close()
    return states


def memory_of_reference(config_path: str, overrides: list[str]) -> dict[str, float]:
    """MB of private memory that the reference costs this rank while it is built, then, and while it is moved once, after
    step 512; and of one whole model."""
    config = configuration.load(config_path, overrides)
    policy, held_out, loader, weights = _load_policy(config, 1)
    start = _private_mb()
    with _Peak() as building:
        reference = _build(config, policy, weights, held_out, loader)
    steady = _private_mb()
    with _Peak() as moving:
        reference.follow(512)
    whole = sum(p.ds_numel for p in policy.module.parameters()) * 4 / 2**20  # type: ignore[attr-defined]
    costs = {"building": building.mb - start, "kept": steady - start, "moving": moving.mb - steady}
    policy.close()
    return {**costs, "whole": whole, "steady": steady}


class _Peak:
    """The most private memory while it is open."""

    def __enter__(self) -> _Peak:
        self.mb, self._done = _private_mb(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.mb = max(self.mb, _private_mb())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def reference_values(config_path: str, variants: list[list[str]]) -> list[dict[str, np.ndarray]]:
    """[n, 4] log-prob sums of all training pairs, for each list of overrides: `reference` and `policy`, each asked twice in
    the middle of training, reference first."""
    return [_reference_values(configuration.load(config_path, overrides)) for overrides in variants]


def _reference_values(config: configuration.Config) -> dict[str, np.ndarray]:
    import torch

    from dspref.data.loader import place
    from dspref.model.logps import pair_logps
    from dspref.reference.filling import COLUMNS

    policy, reference, loader, _ = _start(config, 1)
    pairs, layout = loader.store, loader.packing
    found: dict[str, list[np.ndarray]] = {"reference": [], "policy": []}
    for name in ("reference", "policy") * 2:
        sums = torch.zeros(len(pairs), len(COLUMNS))
        for batch in place(pairs, np.arange(len(pairs)), layout).packs(pairs, layout):
            logps = reference("train", batch) if name == "reference" else pair_logps(policy.forward(batch)[0], batch)
            assert logps is not None
            sums[batch.pair_ids] = torch.stack([getattr(logps, column).detach() for column in COLUMNS], dim=1)
        found[name].append(distributed.all_sum(sums).numpy().copy())
    policy.close()
    return {name: np.stack(tables) for name, tables in found.items()}


def weights_after(config_path: str, overrides: list[str], steps: int) -> dict[str, np.ndarray]:
    """All weights of the policy's inner model by name, after some steps; empty on ranks other than 0."""
    policy, reference, loader, loss = _start(configuration.load(config_path, overrides), steps)
    for step in loader.steps(0, steps):
        gradient.accumulate(step, policy, loss, reference, RunningMean(), Instruments())
        policy.step()
    state = {name: tensor.numpy() for name, tensor in policy.full_state().items()}
    policy.close()
    return state


def score_reference(
    config_path: str, overrides: list[str], share: tuple[int, int] = (0, 1), verify: int = 0
) -> tuple[int, str]:
    """What `dspref score` does in these ranks; its exit code, and what this rank printed."""
    import contextlib
    import io

    from dspref.training import scorer

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            scorer.score(configuration.load(config_path, overrides), share, verify)
        except UserError as error:
            print(error)
            return int(error.exit_code), said.getvalue()
    return 0, said.getvalue()


def evaluated(config_path: str, overrides: list[str], source: str | None) -> dict[str, Any] | str:
    """What `dspref evaluate` finds in these ranks, or why it finds nothing."""
    from dspref.training import held_out

    config = configuration.load(config_path, overrides)
    reference, objective = stages.reference_spec(config), config.objective.model_dump()
    run = Path(config.output_dir)
    try:
        return held_out.held_out(
            held_out.Asked(config.model, config.data, objective, reference, config.train.seed, run), source
        )
    except UserError as error:
        return str(error)


def environment_of_unlike_ranks(config_path: str) -> str:
    """What the check before a run says where each rank has a config of its own."""
    world = distributed.init(seed=0)
    try:
        stages.check_environment(configuration.load(config_path, [f"train.seed={world.rank}"]), "cpu")
    except UserError as error:
        return str(error)
    return ""


def listening() -> tuple[list[str], dict[str, str | None]]:
    """Addresses where this rank listens once its group is there; what gloo and NCCL are told."""
    from test_meeting import addresses_of

    distributed.init(seed=0)
    distributed.barrier()
    distributed.own_store("test")
    found = addresses_of(os.getpid())
    distributed.barrier()
    return found, {name: os.environ.get(name) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}


class Dangerous:
    def __reduce__(self) -> Any:
        return os.mkdir, ("PWNED",)


def sent() -> tuple[str, list[Any]]:
    world = distributed.init(seed=0)
    try:
        distributed.gather_objects(Dangerous())
        refused = ""
    except TypeError as error:
        refused = str(error)
    return refused, distributed.gather_objects((world.rank, {1: Path("/a")}))
