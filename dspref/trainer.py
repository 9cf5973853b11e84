"""train(config): a preference run, read aloud. The stages around the loop are in `dspref.stages`."""

from __future__ import annotations

import time
from pathlib import Path

from dspref import checkpoint, console, distributed, engine, model, stages
from dspref import reference as references
from dspref.checkpoint import Progress, RunFolder
from dspref.config import Config
from dspref.data.loader import Step
from dspref.engine import Engine
from dspref.evaluate import evaluate
from dspref.logps import pair_logps
from dspref.metrics import Meter, Recorder
from dspref.objectives import Objective, build_objective, total
from dspref.reference import Reference


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
    policy = Engine.for_training(stages.load_policy(config, origin.weights, kernel), config, steps)
    # The reference is scored or loaded while the policy still has its initial weights: before any resume.
    reference = references.build(config, policy, origin, sets, layout, run.path)
    progress = checkpoint.resume(run, policy, config.checkpoint.resume)
    stages.refuse_fewer_steps(run, progress.step, steps)
    recorder = Recorder(run.path, config, progress.tracker_id, progress.metrics_offset)
    view = console.ProgressView(progress.step, steps)
    meter = Meter(device)

    for step in loader.steps(progress.step, steps):
        clock, last = time.monotonic(), step.number == steps
        logged = step.number == 1 or last or step.number % config.log.every == 0
        accumulate(step, policy, objective, reference, meter if logged else None)
        learning_rate, grad_norm = policy.learning_rate, policy.step()

        if logged:
            means = meter.reduce()
            stages.check_finite(config, step.number, means["loss"], grad_norm)
            if step.number == 1:
                stages.check_first_loss(config, means)
            record = header(step) | {"loss": means.pop("loss"), "grad_norm": grad_norm, "learning_rate": learning_rate}
            record |= means | performance(step, time.monotonic() - clock)
            recorder.write(record)
            view.show(step.number, record)
        view.advance(step.number)
        evaluation: dict[str, float] = {}
        if held_out and (last or due(step.number, config.train.eval_every)):
            evaluation = evaluate(policy, objective, reference, held_out, layout)
            recorder.write(header(step) | evaluation)
            view.note(console.evaluation_line(step.number, evaluation, list(held_out)))
        if due(step.number, config.checkpoint.save_every) or (last and config.checkpoint.save_every):
            progress = Progress(step.number, recorder.offset, recorder.tracker_id)
            checkpoint.save(run, policy, progress, evaluation)
            checkpoint.prune(run, config.checkpoint)
            view.note(f"step {step.number}: checkpoint committed")
    view.close()
    recorder.close()
    stages.finish(run, config, policy, tokenizer, origin.weights, held_out, steps, time.monotonic() - started)
    policy.close()


def accumulate(step: Step, policy: Engine, objective: Objective, reference: Reference, meter: Meter | None) -> None:
    """Add the gradient of the step's loss, pack by pack, and its metrics where `meter` asks for them."""
    for batch in step.packs:
        batch = batch.to(policy.device)
        logps, mean_logits = policy.logps(batch)
        policy_logps = pair_logps(logps, batch.span_index, batch.num_pairs)
        reference_logps = reference("train", batch)
        loss = objective(policy_logps, reference_logps)
        policy.backward(total(loss, step.counts))
        if meter:
            meter.add_pairs(loss, policy_logps, mean_logits, batch)
        if meter and step.number == 1 and reference_logps:
            meter.add_expected(objective(reference_logps, reference_logps))


def due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def header(step: Step) -> dict[str, float]:
    return {"step": step.number, "epoch": round(step.epoch, 6)}


def performance(step: Step, seconds: float) -> dict[str, float]:
    """Throughput of all ranks together (pairs, tokens of both sequences, scored tokens), and how full the packs were."""
    answers = step.counts["chosen_tokens"] + step.counts["rejected_tokens"]
    return {
        "perf/pairs_per_second": step.counts["pairs"] / seconds,
        "perf/tokens_per_second": step.counts["tokens"] / seconds,
        "perf/response_tokens_per_second": answers / seconds,
        "perf/pack_fill": step.fill,
        "perf/packs": step.num_packs,
        "perf/seconds": seconds,
    }
