"""What happens before the training loop, one function per stage, in the order of a run; first, what sections stand for."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspref import config as configuration
from dspref import distributed, terminal
from dspref.config import Config, ModelSection, TrainSection, lower_is_better
from dspref.data.loader import StepLoader
from dspref.data.show import mark
from dspref.data.store import PairStore
from dspref.engine import ds_config, finite, memory, misfits, sequence
from dspref.errors import ConfigError, DataError, EnvironmentFault, IOFault
from dspref.machine import agreement, preflight, run_plan
from dspref.machine.context import FAIL, CheckContext, Verdict
from dspref.machine.gpus import Gpu
from dspref.model import adapters, expert_parallel, loading, packed
from dspref.model.packed import PackedCausalLM
from dspref.objectives import Objective, build_objective, describe, needs_reference
from dspref.reference import spec
from dspref.reference.modes import InitialWeights
from dspref.reference.spec import ReferenceSpec
from dspref.report import console
from dspref.report.profiling import in_steps
from dspref.run.best import Rule
from dspref.run.checkpoint import committed_folders
from dspref.run.folder import RunFolder, content_key
from dspref.run.settings import refuse_changes, refuse_other_code
from dspref.training import foresight, preparation, survey
from dspref.training.closing import show_summary
from dspref.training.model_card import OF_STEP, Recipe, adapter_in_words
from dspref.watch import lock
from dspref.watch.watch import Watch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What data.scored means for conversations, in the banner.
SCORED = {
    "assistant": "of conversations, what the assistant writes, each turn with its end token (data.scored: assistant)",
    "last": "of conversations, the assistant's last turn with its end token (data.scored: last)",
    "all": "everything behind the prompt, as TRL has it (data.scored: all)",
}


# Changed keys by which a finished run may have steps to take.
LONGER = ("train.max_steps", "train.num_train_epochs", "train.stop_when")
# Of the pairs that a run trains on, so many may be evaluated at its start unasked.
EVALUATION_SHARE = 0.1


def reference_spec(config: Config) -> ReferenceSpec:
    needed = needs_reference(**config.objective.model_dump())
    return ReferenceSpec(config.reference, config.model, needed, config.strategy, config.data.max_length)


def recipe(config: Config, reference: ReferenceSpec) -> Recipe:
    """What the model card says of a run. Reads no file: by now those that the config names may be gone."""
    data = [source.path for source in config.data.train_sources]
    name, objective, train = Path(config.output_dir).name, config.objective.model_dump(), config.train
    words = spec.in_words(reference)
    return Recipe(name, config.model, objective, words, data, train.pairs_per_step, train.learning_rate)


def already_finished(run: RunFolder, config: Config) -> bool:
    """True, with the summary printed, if this very run is done. Raises ConfigError for a foreign folder, and for a run
    that would go on with other settings."""
    verdict: dict[str, bool] = {}

    def look() -> None:
        anew = config.checkpoint.resume == "never"
        run.refuse_foreign(anew)
        lock.refuse_held(run.path)
        for warning in [] if anew else run.look():
            distributed.log(warning)
        if config.checkpoint.resume == "required" and not committed_folders(run):
            raise ConfigError(f"checkpoint.resume: required, but {run.path} holds no checkpoint; use auto to start anew")
        changes = [] if anew else refuse_changes(run, configuration.resolved(config), configuration.given(config))
        if not anew:
            refuse_other_code(run, preparation.own_functions(config.objective, config.data))
        for change in changes:
            distributed.log(f"changed since this run began: {change}")
        finished = not anew and run.is_finished
        if finished:
            refuse_late_merge(run, config.model, changes)
        longer = any(change.startswith(LONGER) for change in changes)
        if finished and longer and not committed_folders(run):
            raise ConfigError(
                f"train.max_steps: the run in {run.path} left no checkpoint to go on from (checkpoint.save_every); "
                "start anew with another output_dir= or checkpoint.resume=never"
            )
        verdict["done"] = finished and not longer and not must_export_again(run)
        if verdict["done"]:
            lock.clear(run.path)

    distributed.on_main(look)
    done = distributed.broadcast_object(verdict.get("done", False))
    if done:
        show_summary(run)
        distributed.log("this run is finished; start anew with checkpoint.resume=never, or elsewhere with output_dir=")
    return done


def refuse_late_merge(run: RunFolder, section: ModelSection, changes: list[str]) -> None:
    """Raise ConfigError where a finished run is to be exported otherwise than it was: nothing would be done."""
    if not any(change.startswith("model.lora.merge_on_export") for change in changes):
        return
    merges = section.lora is not None and section.lora.merge_on_export
    has = "the adapter" if merges else "the merged model"
    export = terminal.command("dspref", "export", run.path, "--to", "FOLDER", "--merge")
    remedy = f"merge it by `{export}`" if merges else f"its adapter is in {run.path / 'adapter'}"
    raise ConfigError(f"model.lora.merge_on_export: {run.path} is finished, and final/ holds {has}; {remedy}")


def must_export_again(run: RunFolder) -> bool:
    """Whether the model of a finished run is no longer what the run wrote. Raises IOFault where it cannot be had again."""
    damaged = run.damage_of_export()
    if damaged and not committed_folders(run):
        raise IOFault(
            f"{run.path / damaged}: is not what the run wrote, and no checkpoint has the model (checkpoint.save_every); "
            "restore it, or train again with checkpoint.resume=never"
        )
    if damaged:
        distributed.log(f"warning: {run.path / damaged} is not what the run wrote; it is exported again from a checkpoint")
    return damaged is not None


def check_environment(config: Config, device_type: str) -> None:
    """Refuse what would fail later: a machine without room or write access, ranks that are not alike, or not those that
    the DeepSpeed settings ask for."""
    world, mine = distributed.world(), preparation.own_functions(config.objective, config.data)
    own = agreement.identity(configuration.dump(config), {used.name: used.source.sha256 for used in mine})
    context = CheckContext(config, ranks=world.local_size, on_gpu=device_type == "cuda")
    looked = preflight.examine(context, preflight.AT_START) if world.local_rank == 0 else {}
    distributed.gather_objects(None)  # all read their clocks at one moment; no barrier, as NCCL may lack what is checked
    gathered = distributed.gather_objects((socket.gethostname(), time.time(), own, looked))
    hosts, clocks, identities, verdicts = zip(*gathered)
    if different := agreement.difference(identities, hosts):
        raise EnvironmentFault(different)
    misfits.refuse(config.strategy)
    if config.model.gradient_checkpointing == "offload" and device_type == "cpu":
        distributed.log("model.gradient_checkpointing: offload saves nothing on a CPU, whose memory is the host's")
    for line in misfits.notes(config.strategy):
        distributed.log(line)
    verdicts = [{name: Verdict(*verdict) for name, verdict in found.items()} for found in verdicts]
    for level, line in preflight.complaints(verdicts, hosts):
        if level == FAIL:
            raise EnvironmentFault(line)
        distributed.log(f"warning: {line}")
    if off := agreement.skew(clocks, hosts):
        distributed.log(f"warning: {off}")


def foresee(config: Config, card: Gpu, gpus: int, nodes: int, mean_tokens: int | None) -> dict[str, Any]:
    """What the run would need on such a machine: `run_plan.plan`. Reads its data, where they are here and no mean length is
    given; no weights.

    Raises ConfigError where the model's config.json is not here, and as the run would for its data.
    """
    loading.quiet()
    objective, data, ranks = build_objective(**config.objective.model_dump()), config.data_read, gpus * nodes
    machine, shared = run_plan.Machine(card, gpus, nodes), config.parallel.sequence
    foresight.refuse(config.model, config.strategy, data.max_length, shared, ranks)
    foresight.shape_of(config.model)  # before the data, which may take long
    load = foresight.load(config.model, data, config.train, objective, ranks, mean_tokens, shared)
    needed = needs_reference(**config.objective.model_dump())
    run = run_plan.asked(
        config.model, config.reference, config.train.optim, needed, config.strategy, machine, load, foresight.shape_of
    )
    if run.needs.total > machine.room:
        run = replace(run, **foresight.ways_for_long_pairs(config.model, data.max_length, shared))
    return run_plan.plan(
        run, config.model, config.train, config.checkpoint, Path(config.output_dir), machine, load,
        tokens_per_pack=data.tokens_per_pack, looks_ahead=objective.reads_twice or config.model.router_aux_scope == "step",
        scores_reference=config.reference.mode_where(needed) == "stored",
    )  # fmt: skip


def open_run(
    run: RunFolder, config: Config, source: Path | None, sets: Mapping[str, PairStore], steps: int, watch: Watch
) -> InitialWeights:
    """Make the run folder, and the weights of a random model; where the run begins.

    Raises DataError where the folder holds a run that began with other pairs or another reference.
    """
    random = config.model.init == "random"
    weights = str(run.path / "init") if random else config.model.name_or_path
    content, reference = {name: store.key for name, store in sets.items()}, reference_spec(config)

    def work() -> None:
        # An adapter of a random model is complete only when that is drawn.
        of_random = random and spec.described(reference, "").section.name_or_path == config.model.name_or_path
        if not of_random:
            content["reference"] = spec.digest(reference, weights)
        content.update(content_digests(config.model))
        # Before the first step nothing is gone on with but random weights: what was mended since is taken as it is.
        anew = config.checkpoint.resume == "never" or not (random or run.has_steps)
        began = {} if anew else run.run.get("content", {})
        for name in content:
            if began.get(name, content[name]) != content[name]:
                raise DataError(f"{run.path}: {changed(name, sets)}; restore, or use another output_dir=")
        watch.lock = lock.Lock.claim(run.path)
        own = preparation.own_functions(config.objective, config.data)
        content.update({content_key(used): used.source.sha256 for used in own})
        again = config.checkpoint.resume == "never"
        run.open(configuration.resolved(config), source, engine_config(config), steps, again, own)
        if random:
            loading.initialise(config.model, run.path / "init", config.train.seed)
            content.setdefault("reference", spec.digest(reference, weights))
        run.update(content=content)

    distributed.on_main(work)
    # What was drawn so far depends on what a start before this one left: random weights are drawn once, on rank 0.
    distributed.set_seed(config.train.seed)
    distributed.log_to(run.path / "logs")
    run.event("start", world_size=distributed.world().size)
    return InitialWeights(weights, distributed.broadcast_object(content.get("reference", "")))


def changed(name: str, sets: Mapping[str, PairStore]) -> str:
    """What a run began with and is another now, in words."""
    models = {"reference": "the reference model", "model": "the model", "adapter": "the saved adapter"}
    if name in models:
        return f"{models[name]} has changed since this run began"
    cause = " (the chat template writes the date by strftime_now: the likely cause)" if sets[name].reads_clock else ""
    return f"the pairs of {name.rstrip('_')} have changed since this run began{cause}"


def content_digests(section: ModelSection) -> dict[str, str]:
    """Digests of what no checkpoint holds: the model's config, the weights below an adapter, a saved adapter's settings."""
    whole = section.lora is not None and section.init == "pretrained"
    found = {"model": loading.content_digest(section) if whole else loading.config_digest(section)}
    adapter = adapters.own(section)
    return found | ({"adapter": adapters.digest(adapter)} if adapter else {})


def refuse_fewer_steps(run: RunFolder, done: int, steps: int) -> None:
    """Raise ConfigError where the checkpoint that was resumed is beyond the last step."""
    if done > steps:
        raise ConfigError(
            f"train.max_steps: {steps}, but {run.path} is at step {done}; raise it, or use another output_dir="
        )


def refuse_late_profile(train: TrainSection, done: int, steps: int) -> None:
    """Raise ConfigError where steps are to be profiled that the run does not have; say so where they are done."""
    if train.profile is None:
        return
    first, last = train.profile.steps
    if last > steps:
        raise ConfigError(f"train.profile.steps: there is no step {last}, the run has {steps}; name earlier ones")
    if last <= done:
        distributed.log(
            f"warning: train.profile: the run goes on after step {done}, and has {in_steps(first, last)} behind it; "
            "nothing is profiled"
        )


def profiled(train: TrainSection, done: int) -> tuple[int, int] | None:
    """The first and the last step to profile of a run that goes on after `done`."""
    first, last = train.profile.steps if train.profile else (0, 0)
    return (max(first, done + 1), last) if last > done else None


def evaluates_at_start(train: TrainSection, held_out: Mapping[str, PairStore], steps: int) -> bool:
    """Whether the initial policy is evaluated; `auto`: where that is cheap, as a pair is only read."""
    pairs = sum(len(store) for store in held_out.values())
    few = pairs <= EVALUATION_SHARE * steps * train.pairs_per_step
    return pairs > 0 and (few if train.eval_at_start == "auto" else train.eval_at_start)


def rule_of(config: Config) -> Rule | None:
    """By which evaluations are judged, where anything follows from them."""
    stop, exports = config.train.stop_when, config.export.weights == "best"
    if config.judged_by is None or not (stop or exports):
        return None
    lower = stop.direction == "min" if stop and stop.direction else bool(lower_is_better(config.judged_by))
    return Rule(config.judged_by, lower, stop.min_delta if stop else 0.0, stop.patience if stop else None, exports)


def introduce(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    pairs: PairStore,
    held_out: Mapping[str, PairStore],
    loader: StepLoader,
    steps: int,
    kernel: str,
) -> None:
    """The banner: what is about to happen, in numbers; in one line behind the nine or more of DeepSpeed's launcher. In the
    log file the first pair too, as text with its scored tokens marked."""
    world, train = distributed.world(), config.train
    takes = loader.packing.takes
    what = OF_STEP[takes] if takes != "answers" else "pairs" if (pairs.scored > 0).all() else "answers"
    sizes = {name: len(set(one.rows.tolist()) if takes in ("list", "gold") else one) for name, one in held_out.items()}
    evaluated = "".join(f", {size} held out ({name.rstrip('_')})" for name, size in sizes.items())
    sharing = "on" if loader.packing.prefix_sharing else "off"
    pace = f"of {train.pairs_per_step} {what} ({loader.steps_per_epoch} an epoch), lr {train.learning_rate:g}"
    shared = f", packs held by {world.sequence} each" if world.sequence > 1 else ""
    if (together := expert_parallel.size_of(config.strategy)) > 1:
        shared += f", experts held by {together} between them"
    rows = {
        "model": f"{config.model.name_or_path} ({config.model.init}, {config.model.dtype})",
        **({"adapter": adapter_in_words(config.model.lora)} if config.model.lora else {}),
        "objective": describe(**config.objective.model_dump()),
        "reference": spec.in_words(reference_spec(config)),
        "data": f"{survey.in_numbers(pairs, takes)}{evaluated}",
        "scored": SCORED[config.data.scored],
        "packs": f"{config.data.tokens_per_pack} tokens, prefix sharing {sharing}, attention {kernel}",
        "steps": f"{steps} {pace}",
        "engine": f"ZeRO-{config.zero_stage} on {world.size} rank{'s' if world.size > 1 else ''}{shared}",
        "run": config.output_dir,
    }
    brief = f"{rows['run']}: {rows['objective']}; {steps} steps {pace}; {rows['engine']}; more in logs/rank-0.log"
    console.banner(rows, brief if distributed.is_announced() else None)
    console.first_pair(mark(pairs[0], tokenizer))


def engine_config(config: Config) -> dict[str, Any]:
    """The policy's DeepSpeed config."""
    return ds_config.training_config(config.strategy, config.model.dtype, config.train)


def load_policy(config: Config, objective: Objective, weights: str, kernel: str) -> PackedCausalLM:
    reference = reference_spec(config)
    zero3 = engine_config(config) if config.zero_stage == 3 else None
    policy = loading.load(
        config.model, weights, kernel, config.model.dtype, zero3, spec.attach(reference, config.train.seed)
    )
    finite.refuse_not_finite(policy.lm, config.model.dtype, partial(spec.source_in_policy, reference, weights))
    policy.group = sequence.group()
    policy = packed.prepare_for_training(policy, config.model, with_collision=objective.needs_collision)
    if config.model.freeze:
        still = sum(memory.elements(p) for p in policy.lm.parameters() if not p.requires_grad)
        share = still / memory.count_weights(policy.lm)
        tied = packed.frozen_with(policy.lm, config.model.freeze)
        more = f"; {', '.join(tied)} too, being the same weights as one of them" if tied else ""
        distributed.log(f"model.freeze: {share:.1%} of the weights stay as they are{more}")
    if coefficient := policy.router_aux_loss_coef:
        over = {"micro": "each micro-step", "step": "each step"}[config.model.router_aux_scope]
        distributed.log(f"experts: load-balancing loss x {coefficient:g}, over the tokens of {over} on all ranks")
    return policy
