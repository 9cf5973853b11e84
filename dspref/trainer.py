"""train(config): a preference run, read aloud. The stages around the loop are in `dspref.stages`."""

from __future__ import annotations

import time
from pathlib import Path

from dspref import advice, checkpoint, console, distributed, engine, gradient, model, stages
from dspref import reference as references
from dspref.checkpoint import Progress
from dspref.config import Config
from dspref.data.loader import Step
from dspref.engine import Engine
from dspref.evaluate import evaluate
from dspref.gradient import StepLoss
from dspref.metrics import Displacement, Meter, Recorder
from dspref.objectives import build_objective
from dspref.performance import Account, Clock
from dspref.run_folder import RunFolder


def train(config: Config, source: Path | None = None) -> None:
    """Train a policy on preference pairs, from a checked config to an exported model. Every rank runs this.

    `source` is the file that the config came from; the run folder keeps a copy.
    """
    started = time.monotonic()
    distributed.init(config.train.seed)
    device = engine.bring_up(config.model.dtype)
    model.quiet()
    run = RunFolder(config.output_dir)
    if stages.already_finished(run, config):
        return

    # Everything that can be wrong with the user's files is found here, before the run folder exists.
    kernel, tokenizer, pairs, held_out = stages.prepare(config, device.type)
    layout, loader = stages.plan(config, pairs)
    steps = loader.total_steps(config.train.num_train_epochs, config.train.max_steps)
    sets = {"train": pairs, **held_out}
    origin = stages.open_run(run, config, source, sets)
    stages.introduce(config, pairs, held_out, loader, steps, kernel)

    objective = build_objective(**config.objective.model_dump())
    policy = Engine.for_training(stages.load_policy(config, objective, origin.weights, kernel), config, steps)
    loss = StepLoss(objective, policy.module.router_aux_loss_coef, config.model.router_aux_scope)
    # The reference is scored or loaded while the policy still has its initial weights: before any resume.
    reference = references.build(config, policy, origin, sets, layout)
    for line in advice.of_run(config, policy, loader, kernel):
        distributed.log(f"advice: {line}")
    progress = checkpoint.resume(run, (policy, reference), config.checkpoint.resume, config.train.seed)
    stages.refuse_fewer_steps(run, progress.step, steps)
    recorder = Recorder(run.path, config, progress.tracker_id, progress.metrics_offset)
    view = console.ProgressView(progress.step, steps)
    meter, displacement, clock = Meter(device, loss.router_coef), Displacement(), Clock(device)
    account = Account.of(config, policy, reference, loss.looks_ahead)
    rewards = progress.rewards

    for step in loader.steps(progress.step, steps):
        last = step.number == steps
        logged = step.number == 1 or last or step.number % config.log.every == 0
        rewards = gradient.accumulate(step, policy, loss, reference, rewards, meter if logged else None, clock)
        learning_rate, grad_norm = policy.learning_rate, policy.step()
        reference.follow(step.number)
        clock.lap("update")

        if logged:
            means = meter.reduce()
            stages.check_finite(config, step.number, means["loss"], grad_norm)
            if step.number == 1:
                stages.check_first_step(config, means)
            record = header(step) | {"loss": means.pop("loss"), "grad_norm": grad_norm, "learning_rate": learning_rate}
            record |= means | account.record(step, clock.read())
            recorder.write(record)
            view.show(step.number, record)
            if warning := displacement.watch(record):
                view.note(warning)
        view.advance(step.number)
        evaluation: dict[str, float] = {}
        if held_out and (last or due(step.number, config.train.eval_every)):
            evaluation = evaluate(policy, loss, reference, rewards, held_out, layout)
            recorder.write(header(step) | evaluation)
            view.note(console.evaluation_line(step.number, evaluation, list(held_out)))
        if due(step.number, config.checkpoint.save_every) or (last and config.checkpoint.save_every):
            progress = Progress(step.number, recorder.offset, recorder.tracker_id, rewards)
            checkpoint.save(run, (policy, reference), progress, evaluation)
            checkpoint.prune(run, config.checkpoint)
            view.note(f"step {step.number}: checkpoint committed")
        clock.start()
    view.close()
    recorder.close()
    stages.finish(run, config, policy, tokenizer, origin.weights, held_out, steps, time.monotonic() - started)
    policy.close()


def due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def header(step: Step) -> dict[str, float]:
    return {"step": step.number, "epoch": round(step.epoch, 6)}
