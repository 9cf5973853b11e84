"""train(config): a preference run, read aloud. What comes before the loop is in `stages`, what follows in `closing`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dspref import config as configuration
from dspref import distributed
from dspref.config import Config
from dspref.data.loader import Step, StepLoader
from dspref.engine import engine
from dspref.engine.engine import Engine
from dspref.errors import Interrupted
from dspref.model import loading
from dspref.objectives import RunningMean, build_objective
from dspref.reference import modes as references
from dspref.reference import spec
from dspref.report import advice, console
from dspref.report.metrics import Recorder
from dspref.report.profiling import Profile
from dspref.run import checkpoint
from dspref.run.checkpoint import Progress
from dspref.run.folder import METRICS, RunFolder
from dspref.run.saving import Saver
from dspref.run.settings import facts_of
from dspref.training import answers, closing, demand, gradient, preparation, publishing, rehearsal, stages
from dspref.training.evaluate import evaluate
from dspref.training.gradient import StepLoss
from dspref.training.numbers import Skips, judge_overfit
from dspref.training.records import StepRecords, header
from dspref.training.session import Session
from dspref.watch.request import Request
from dspref.watch.watch import Watch, watching


def train(config: Config, source: Path | None = None) -> None:
    """Train a policy on preference pairs, from a checked config to an exported model. Every rank runs this.

    `source` is the file that the config came from; the run folder keeps a copy.
    """
    distributed.init(config.train.seed, config.train.hang_timeout, config.parallel.sequence)
    device = engine.bring_up(config.model.dtype)
    loading.quiet()
    run = RunFolder(config.output_dir)
    if not stages.already_finished(run, config):
        with watching(run.path, run.left) as watch:
            _train(config, source, device.type, run, watch)


def _train(config: Config, source: Path | None, device_type: str, run: RunFolder, watch: Watch) -> None:
    started = time.monotonic()
    stages.check_environment(config, device_type)
    # Everything that can be wrong with the user's files is found here, before the run folder exists.
    asked = stages.reference_spec(config)
    kernel, tokenizer, pairs, held_out = preparation.prepare(
        config.model, config.data_read, asked, config.train.optim, device_type
    )
    objective = build_objective(**config.objective.model_dump())
    packing, loader = demand.plan(objective, preparation.laid_out(config.model, config.data), config.train, pairs, held_out)
    prompts = answers.prompts_of(config.log, config.model, held_out, tokenizer)
    steps = loader.total_steps(config.train.num_train_epochs, config.train.asked_steps)
    sets = {"train": pairs, **held_out}
    beginning = stages.open_run(run, config, source, sets, steps, watch)
    stages.introduce(config, tokenizer, pairs, held_out, loader, steps, kernel)
    found = checkpoint.find(run, config.checkpoint.resume)
    done = found.progress.step if found else 0
    stages.refuse_fewer_steps(run, done, steps)
    stages.refuse_late_profile(config.train, done, steps)

    policy = stages.load_policy(config, objective, beginning.weights, kernel)
    policy = Engine.for_training(policy, config.train, stages.engine_config(config), steps)
    loss = StepLoss(objective, policy.module.router_aux_loss_coef, config.model.router_aux_scope)
    # The reference is scored or loaded while the policy still has its initial weights: before any resume.
    with console.scoring(run) as view:
        seen = demand.sets(objective, loader, held_out)
        needs = demand.needs(loader, seen, done, steps)
        reference = references.build(asked, policy, beginning, seen, packing, needs, view)
    of_keys = [*advice.of_rows(config.objective.model_dump(), loader), *advice.of_moving(config.reference, steps)]
    for line in [*of_keys, *advice.of_run(config.model, config.train, config.strategy, policy, loader, kernel)]:
        distributed.remark(f"advice: {line}")
    asking = answers.prepare(
        config.log, prompts, pairs, tokenizer, packing.tokens_per_pack, config.train.seed, run, asked, reference, policy,
        beginning, goes_on=found is not None,
    )  # fmt: skip
    progress = checkpoint.resume(run, found, (policy, reference), config.train.seed)
    recorder = Recorder(run.path, config.log, config.model_dump(mode="json"), progress.tracker_ids, progress.metrics_offset)
    rule, rules = stages.rule_of(config), config.checkpoint
    if rule and rule.exports:
        rules = rules.model_copy(update={"keep_best": rule.metric})
    saver = Saver(run, (policy, reference), rules, facts_of(run, configuration.resolved(config)), watch)
    view = console.ProgressView(progress.step, steps)
    answers.forget_undone(run, progress)

    session = Session(
        config.model, config.train, config.log.every, config.checkpoint.save_every, spec.first_step_tolerance(asked),
        run, policy, reference, loss, pairs, config.data.labels, held_out, packing, recorder, view, watch, saver,
        Profile(run.path, stages.profiled(config.train, done), policy.device, view.note, watch.beat),
        rule, asking,
    )  # fmt: skip
    progress, weights_of = take_steps(session, loader, progress, steps)
    watch.steps_end(may_leave=config.checkpoint.save_every is not None)
    recipe, seconds = stages.recipe(config, asked), time.monotonic() - started
    said = closing.why_it_ended(session, progress, steps)
    closing.finish(run, recipe, policy, tokenizer, beginning.weights, progress.step, weights_of, seconds, said)
    watch.run_ends()
    closing.show_summary(run)
    policy.close()
    if config.export.push_to_hub:
        publishing.push_at_the_end(run.path, config.export.push_to_hub)


def take_steps(session: Session, loader: StepLoader, progress: Progress, steps: int) -> tuple[Progress, int]:
    """All that changes the policy: (where the run ended, the step that its weights are of). Raises as `run_steps`."""
    try:
        if session.asking and not progress.step:  # a signal ends this at once, as all that comes before the first step
            answers.take(
                session.asking, 0, session.policy, session.reference, session.run, session.recorder, session.view,
            )  # fmt: skip
        session.watch.steps_begin(session.train.hang_timeout)
        progress = run_steps(session, loader, progress, steps)
        session.profile.close(over=True)
        return progress, closing.take_best(session, progress)
    except BaseException as error:
        session.saver.leave()
        if isinstance(error, Interrupted):  # of all ranks at once, and what they have is committed
            session.profile.close()
        session.watch.report(error)  # before trackers are waited for
        raise
    finally:
        session.profile.drop()
        session.view.close()
        session.recorder.close()


def run_steps(session: Session, loader: StepLoader, progress: Progress, steps: int) -> Progress:
    """Steps `progress.step` + 1 to `steps`, or until evaluations no longer improve, with what is due between them.

    Raises Interrupted, with a checkpoint committed, where the run was asked to stop, and NumericFault.
    """
    train, policy = session.train, session.policy
    records, sound = StepRecords(session, steps, loader.tokens_of(progress.step)), progress
    skips = Skips(train.max_skipped_steps, session.model.dtype == "float16", progress.skipped)
    if progress.step == 0 and stages.evaluates_at_start(train, session.held_out, steps):
        evaluate_at_start(session)
    if progress.owes_evaluation or progress.owes_samples:
        progress = evaluate_and_save(session, progress, progress.step / loader.steps_per_epoch, progress.step == steps)

    if is_over(session, progress):
        return progress
    if policy.device.type != "cpu" if train.dry_run is None else train.dry_run:
        rehearsal.rehearse(session, loader, progress.step, steps)
    records.end(progress.step)
    session.view.begin()
    for step in loader.steps(progress.step, steps):
        rewards = optimizer_step(session, step, progress.rewards, records)
        if skips.judge(step.number, policy.applied, records.suspects, session.pairs, session.run):
            save_last_good(session, sound)
            raise skips.fault(step.number, sound.step)
        last = step.number == steps
        evaluates = bool(session.held_out) and (last or due(step.number, train.eval_every))
        offset, tracker = session.recorder.offset, session.recorder.tracker_ids
        answers_now = session.asking is not None and session.asking.due(step.number, evaluates, last)
        progress = Progress(step.number, offset, tracker, rewards, evaluates, skips.in_a_row, answers_now, progress.best)
        progress = evaluate_and_save(session, progress, step.epoch, last)
        sound = progress if policy.applied else sound
        if is_over(session, progress):
            break
        records.end(step.number)
    if train.overfit:
        judge_overfit(session.run.path / METRICS)
    return progress


def is_over(session: Session, progress: Progress) -> bool:
    """Whether evaluations no longer improve."""
    return session.rule is not None and session.rule.is_over(progress.best)


def evaluate_at_start(session: Session) -> None:
    """Evaluate the initial policy, which later evaluations are compared with. Left out where the run is asked to stop: it
    does so after step 1."""
    if session.watch.agreed() is not Request.STOP and (found := evaluated(session, RunningMean())) is not None:
        write_evaluation(session, 0, 0.0, found)


def evaluated(session: Session, rewards: RunningMean) -> dict[str, float] | None:
    """Metrics of all held-out pairs; None where the run was asked to stop meanwhile."""
    return evaluate(
        session.policy, session.loss, session.reference, rewards, session.held_out, session.packing,
        must_stop=lambda: session.watch.agreed() is Request.STOP,
    )  # fmt: skip


def write_evaluation(session: Session, step: int, epoch: float, found: dict[str, float]) -> None:
    session.recorder.write(header(step, epoch) | found)
    session.view.note(console.evaluation_line(step, found, list(session.held_out)))


def optimizer_step(session: Session, step: Step, rewards: RunningMean, records: StepRecords) -> RunningMean:
    """One optimizer step, and what is written of it; the running mean of the rewards behind it."""
    policy, looking = session.policy, records.begin(step.number)
    with_step = gradient.accumulate(step, policy, session.loss, session.reference, rewards, looking)
    looking.begin("update")
    learning_rate, grad_norm = policy.learning_rate, policy.step()
    if policy.applied:
        session.reference.follow(step.number)
    looking.begin("")
    records.write(step, learning_rate, grad_norm)
    return with_step if policy.applied else rewards


def save_last_good(session: Session, sound: Progress) -> None:
    """Save the last weights that a step was applied to, before the run ends with a fault."""
    session.saver.wait()
    if checkpoint.newest_step(session.run) < sound.step:  # of later ones the weights are the same
        save(session, sound, {}, at_once=True)
    tell(session)


def evaluate_and_save(session: Session, progress: Progress, epoch: float, last: bool) -> Progress:
    """What is due after a step: an evaluation, answers to prompts, a checkpoint, and the end where somebody asks for it."""
    watch, ask = session.watch, session.watch.agreed(session.saver.wish)
    tell(session)
    found: dict[str, float] | None = {}
    if progress.owes_evaluation or progress.owes_samples:
        session.profile.pause()
    if progress.owes_evaluation and ask is not Request.STOP:
        found = evaluated(session, progress.rewards)
        if found is None:
            ask = Request.STOP
        else:
            write_evaluation(session, progress.step, epoch, found)
            best = session.rule.judge(progress.best, progress.step, found) if session.rule else progress.best
            progress = replace(progress, owes_evaluation=False, metrics_offset=session.recorder.offset, best=best)
            ends = session.asking is not None and is_over(session, progress)
            progress = replace(progress, owes_samples=progress.owes_samples or ends)
    if session.asking and progress.owes_samples and ask is not Request.STOP:
        done = answers.take(
            session.asking, progress.step, session.policy, session.reference, session.run, session.recorder, session.view,
            must_stop=lambda: watch.agreed() is Request.STOP,
        )  # fmt: skip
        progress = replace(progress, owes_samples=not done)
        ask = ask if done else Request.STOP
    every, last = session.save_every, last or is_over(session, progress)
    is_best = bool(found and session.rule and session.rule.exports and progress.best.step == progress.step)
    if ask or is_best or due(progress.step, every) or (last and every):
        save(session, progress, found or {}, at_once=bool(ask) or last)
        watch.granted()
    if ask is Request.STOP:
        raise watch.interruption(f"after step {progress.step}")
    return progress


def save(session: Session, progress: Progress, evaluation: Mapping[str, float], at_once: bool) -> None:
    session.profile.due("checkpoint")
    try:
        session.saver.save(progress, evaluation, at_once)
    finally:
        tell(session)


def tell(session: Session) -> None:
    """What the saver has done beside the steps."""
    for line in session.saver.news():
        session.view.note(line)


def due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
