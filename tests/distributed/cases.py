"""What tests run on every rank. Each function is a case for `Workers.run`; it returns plain values."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from dspref import config as configuration
from dspref import distributed, engine, gradient, launcher, model, stages, trainer
from dspref import reference as references
from dspref.engine import Engine
from dspref.errors import UserError
from dspref.gradient import StepLoss
from dspref.metrics import Meter
from dspref.objectives import RunningMean, build_objective


def first_steps(config_path: str, variants: list[list[str]]) -> list[dict[str, Any]]:
    """Loss, metrics, gradient norm and gradients of step 1, for each list of overrides."""
    return [_first_step(config_path, overrides) for overrides in variants]


def _first_step(config_path: str, overrides: list[str]) -> dict[str, Any]:
    config = configuration.load(config_path, overrides)
    distributed.init(config.train.seed)
    device = engine.bring_up(config.model.dtype)
    model.quiet()
    kernel, _, pairs, held_out = stages.prepare(config, device.type)
    _, loader = stages.plan(config, pairs)
    weights = config.model.name_or_path
    objective = build_objective(**config.objective.model_dump())
    policy = Engine.for_training(stages.load_policy(config, objective, weights, kernel), config, 1)
    sets = {"train": pairs, **held_out}
    origin = references.Origin(weights, references.digest(config, weights))
    reference = references.build(config, policy, origin, sets, loader.layout)
    loss = StepLoss(objective, policy.module.router_aux_loss_coef, config.model.router_aux_scope)
    meter = Meter(device, loss.router_coef)
    step = next(loader.steps(0, 1))
    gradient.accumulate(step, policy, loss, reference, RunningMean(), meter)
    grad_norm = policy.step()
    result = {
        **meter.reduce(), "grad_norm": grad_norm, "packs": step.num_packs, "gradients": _gradients(policy, config),
        "full_sizes": sum(p.numel() for p in policy.module.parameters()),
    }  # fmt: skip
    policy.close()
    return result


def _gradients(policy: Engine, config: configuration.Config) -> dict[str, np.ndarray]:
    """The step's gradients, read from AdamW's first moment: (1 - beta1) x gradient after one step without clipping."""
    from deepspeed.utils import safe_get_full_optimizer_state

    assert config.train.max_grad_norm == 0, "clipping would scale what is read here"
    found = {}
    for name, parameter in policy.module.lm.named_parameters():
        if config.zero_stage:
            moment = safe_get_full_optimizer_state(parameter, "exp_avg")
        else:
            moment = policy._engine.optimizer.state[parameter]["exp_avg"]
        assert moment is not None
        found[name] = (moment.float() / (1 - config.train.adam_beta1)).cpu().numpy().copy()
    return found


def run_training(config_path: str, overrides: list[str]) -> int:
    """A whole run, as the launcher makes it, in these ranks; its exit code."""
    try:
        trainer.train(configuration.load(config_path, overrides), Path(config_path))
    except UserError as error:
        print(error)
        return int(error.exit_code)
    return 0


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
    model.quiet()
    kernel = stages.prepare(config, device.type)[0]
    objective = build_objective(**config.objective.model_dump())
    before, peak, done = _private_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], _private_mb() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    policy = stages.load_policy(config, objective, config.model.name_or_path, kernel)
    done.set()
    watcher.join()
    whole = sum(p.ds_numel for p in policy.parameters()) * 4 / 2**20  # type: ignore[attr-defined]
    own = sum(p.ds_tensor.numel() for p in policy.parameters()) * 4 / 2**20  # type: ignore[attr-defined]
    return {"peak": peak[0], "whole": whole, "own": own}


def _private_mb() -> float:
    """Memory that is this process's own; pages of mapped files are not, the system takes them back at will."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("RssAnon"))
