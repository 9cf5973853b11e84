"""What happens before and after the training loop, one function per stage, in the order of a run."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dspref import (
    adapters,
    admission,
    agreement,
    console,
    distributed,
    engine,
    finite,
    metrics,
    model,
    performance,
    preflight,
    reference,
)
from dspref import weights as weight_files
from dspref.checkpoint import committed_folders
from dspref.config import Config, SourceSection, cache_folder, shipped
from dspref.data.loader import Layout, StepLoader, sharing_pays
from dspref.data.plan import rows_per_epoch
from dspref.data.sources import Source
from dspref.data.store import PairStore, load_pairs
from dspref.data.tokenize import Limits, load_tokenizer
from dspref.engine import Engine
from dspref.errors import ConfigError, DataError, EnvironmentFault, UserError
from dspref.export import adapter_in_words, export, warn_of_other_tokenizer
from dspref.lock import Lock
from dspref.machine import FAIL, Scene
from dspref.model import PackedCausalLM
from dspref.objectives import Objective, build_objective, describe
from dspref.reference import Origin
from dspref.run_folder import RunFolder
from dspref.watch import Watch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens that a sample answer may have.
SAMPLE_TOKENS = 64


def already_finished(run: RunFolder, config: Config) -> bool:
    """True, with the summary printed, if this very run is done. Raises ConfigError for a foreign folder, and for a run
    that would go on with other settings."""
    verdict: dict[str, bool] = {}

    def look() -> None:
        run.refuse_foreign()
        if config.checkpoint.resume == "required" and not committed_folders(run):
            raise ConfigError(f"checkpoint.resume: required, but {run.path} holds no checkpoint; use auto to start anew")
        changes = [] if config.checkpoint.resume == "never" else run.refuse_changes(config)
        for change in changes:
            distributed.log(f"changed since this run began: {change}")
        finished = config.checkpoint.resume != "never" and run.is_finished
        longer = any(change.startswith(("train.max_steps", "train.num_train_epochs")) for change in changes)
        if finished and longer and not committed_folders(run):
            raise ConfigError(
                f"train.max_steps: the run in {run.path} left no checkpoint to go on from (checkpoint.save_every); "
                "start anew with another output_dir= or checkpoint.resume=never"
            )
        verdict["done"] = finished and not longer

    distributed.on_main(look)
    done = distributed.broadcast_object(verdict.get("done", False))
    if done:
        show_summary(run)
        distributed.log("this run is finished; start anew with checkpoint.resume=never, or elsewhere with output_dir=")
    return done


def check_environment(config: Config, device_type: str) -> None:
    """Refuse what would fail later: a machine without room or write access, ranks that are not alike."""
    world, own = distributed.world(), agreement.identity(config)
    scene = Scene(config, ranks=world.local_size, on_gpu=device_type == "cuda")
    looked = preflight.examine(scene, preflight.AT_START) if world.local_rank == 0 else {}
    distributed.gather_objects(None)  # all read their clocks at one moment; no barrier, as NCCL may lack what is checked
    gathered = distributed.gather_objects((socket.gethostname(), time.time(), own, looked))
    hosts, clocks, identities, verdicts = zip(*gathered)
    if different := agreement.difference(identities, hosts):
        raise EnvironmentFault(different)
    for level, line in preflight.complaints(verdicts, hosts):
        if level == FAIL:
            raise EnvironmentFault(line)
        distributed.log(f"warning: {line}")
    if off := agreement.skew(clocks, hosts):
        distributed.log(f"warning: {off}")


def prepare(config: Config, device_type: str) -> tuple[str, PreTrainedTokenizerBase, PairStore, dict[str, PairStore]]:
    """(attention kernel, tokenizer, training pairs, held-out sets by metric prefix), each checked.

    Rank 0 goes first and the others find its work in the cache; nobody waits in a collective.
    """
    section, data = config.model, config.data
    limits = Limits(data.max_length, data.max_prompt_length, data.max_completion_length, data.truncation_mode)

    def work():
        model_config = model.load_config(section)
        name = section.tokenizer_name_or_path or section.name_or_path
        if not shipped(name).is_dir() and (reason := weight_files.no_folder(name)):
            raise ConfigError(f"model.tokenizer_name_or_path: {name}: {reason}")
        tokenizer = load_tokenizer(str(shipped(name)), section.revision, section.chat_template, section.trust_remote_code)
        kernel = admission.check(section, model_config, data.max_length, len(tokenizer), device_type)
        if section.init == "pretrained":
            admission.check_weights(section, model_config)
        check_adapters(config, device_type)
        if config.reference.name_or_path or config.reference.adapter_name not in (None, "base"):
            check_reference(config, len(tokenizer), device_type)
        if section.tokenizer_name_or_path and distributed.world().rank == 0:
            warn_of_other_tokenizer(tokenizer, model_config, section.trust_remote_code)

        def load(sources: list[SourceSection], log) -> PairStore:
            read = [_source(source) for source in sources]
            return load_pairs(read, tokenizer, limits, on_bad_row=data.on_bad_row, cache_dir=cache_folder("tokens"), log=log)

        pairs = load(data.train_sources, distributed.log)
        held_out = {prefix: load([source], distributed.log) for prefix, source in data.eval_sources.items()}
        return kernel, tokenizer, pairs, held_out

    return distributed.in_turn(work)


def check_adapters(config: Config, device_type: str) -> None:
    """Refuse what an adapter or 8-bit states need and this machine, or the disk, has not."""
    adapters.check(config.model)
    if config.model.lora:
        adapters.try_on(model.skeleton(config.model), config.model)
    if config.train.optim == "adamw_8bit":
        admission.require_bitsandbytes("train.optim: adamw_8bit", device_type)


def check_reference(config: Config, vocabulary: int, device_type: str) -> None:
    """The checks of the policy, for a reference that is another model or has an adapter of its own."""
    section, adapter = reference.described(config, "")
    try:
        if adapter:
            adapters.folder_of(adapter)
        else:
            model_config = model.load_config(section)
            admission.check(section, model_config, config.data.max_length, vocabulary, device_type)
            admission.check_weights(section, model_config)
    except UserError as error:
        named = "reference.name_or_path" if config.reference.name_or_path else "reference.adapter_name"
        blamed = re.sub(r"^(model\.(tokenizer_)?name_or_path: )?", f"{named}: ", str(error))
        raise type(error)(blamed) from None


def _source(section: SourceSection) -> Source:
    template = section.template.model_dump(exclude_none=True) if section.template else None
    path, columns = str(shipped(section.path)), section.columns.model_dump()
    return Source(path, section.split, section.max_samples, section.weight, columns, template, section.pairs)


def plan(config: Config, pairs: PairStore) -> tuple[Layout, StepLoader]:
    """How packs are laid out over the ranks, and the steps of the run."""
    data, world = config.data, distributed.world()
    together = {"row": pairs.rows, "prompt": pairs.same[:, 0], "none": None}[data.keep_together]
    sharing = sharing_pays(pairs, together) if data.prefix_sharing == "auto" else data.prefix_sharing
    prompts = build_objective(**config.objective.model_dump()).scores_prompt
    layout = Layout(data.tokens_per_pack, sharing, world.rank, world.size, score_prompt=prompts)
    weights = [source.weight for source in data.train_sources]
    if not rows_per_epoch(pairs.source_rows, weights):
        raise DataError("data.train: the weights leave no pair per epoch; raise them")
    return layout, StepLoader(pairs, weights, config.train.pairs_per_step, config.train.seed, data.shuffle, layout, together)


def open_run(
    run: RunFolder, config: Config, source: Path | None, sets: Mapping[str, PairStore], steps: int, watch: Watch
) -> Origin:
    """Make the run folder, and the weights of a random model; where the run begins.

    Raises DataError where the folder holds a run that began with other pairs or another reference.
    """
    random = config.model.init == "random"
    weights = str(run.path / "init") if random else config.model.name_or_path
    content = {name: store.key for name, store in sets.items()}

    def work() -> None:
        # An adapter of a random model is complete only when that is drawn.
        of_random = random and reference.described(config, "").section.name_or_path == config.model.name_or_path
        if not of_random:
            content["reference"] = reference.digest(config, weights)
        content.update(beginnings(config))
        # Nothing is gone on with before the first checkpoint but random weights: what was mended since is taken as it is.
        anew = config.checkpoint.resume == "never" or not (random or committed_folders(run))
        began = {} if anew else run.run.get("content", {})
        for name in content:
            if began.get(name, content[name]) != content[name]:
                models = {"reference": "the reference model", "model": "the model", "adapter": "the saved adapter"}
                what = f"{models[name]} has" if name in models else f"the pairs of {name.rstrip('_')} have"
                raise DataError(f"{run.path}: {what} changed since this run began; restore, or use another output_dir=")
        watch.lock = Lock.claim(run.path)
        run.open(config, source, engine.training_config(config), steps)
        if random:
            model.initialise(config.model, run.path / "init", config.train.seed)
            content.setdefault("reference", reference.digest(config, weights))
        run.update(content=content)

    distributed.on_main(work)
    distributed.log_to(run.path / "logs")
    run.event("start", world_size=distributed.world().size)
    return Origin(weights, distributed.broadcast_object(content.get("reference", "")))


def beginnings(config: Config) -> dict[str, str]:
    """Digests of what no checkpoint holds: the model's config, the weights below an adapter, a saved adapter's settings."""
    section = config.model
    whole = section.lora is not None and section.init == "pretrained"
    found = {"model": model.content_digest(section) if whole else model.config_digest(section)}
    adapter = adapters.own(section)
    return found | ({"adapter": adapters.digest(adapter)} if adapter else {})


def refuse_fewer_steps(run: RunFolder, done: int, steps: int) -> None:
    """Raise ConfigError where the checkpoint that was resumed is beyond the last step."""
    if done > steps:
        raise ConfigError(
            f"train.max_steps: {steps}, but {run.path} is at step {done}; raise it, or use another output_dir="
        )


def introduce(
    config: Config, pairs: PairStore, held_out: Mapping[str, PairStore], loader: StepLoader, steps: int, kernel: str
) -> None:
    """The banner: what is about to happen, in numbers."""
    world, train = distributed.world(), config.train
    prompt, chosen, rejected = pairs.lengths.mean(axis=0)
    evaluated = "".join(f", {len(store)} held out ({name.rstrip('_')})" for name, store in held_out.items())
    sharing = "on" if loader.layout.prefix_sharing else "off"
    rows = {
        "model": f"{config.model.name_or_path} ({config.model.init}, {config.model.dtype})",
        **({"adapter": adapter_in_words(config)} if config.model.lora else {}),
        "objective": describe(**config.objective.model_dump()),
        "reference": reference.describe(config),
        "data": f"{len(pairs)} pairs, mean tokens {prompt:.0f} prompt + {chosen:.0f} | {rejected:.0f}{evaluated}",
        "packs": f"{config.data.tokens_per_pack} tokens, prefix sharing {sharing}, attention {kernel}",
        "steps": f"{steps} of {train.pairs_per_step} pairs ({loader.steps_per_epoch} an epoch), lr {train.learning_rate:g}",
        "engine": f"ZeRO-{config.zero_stage} on {world.size} rank{'s' if world.size > 1 else ''}",
        "run": config.output_dir,
    }
    console.banner(rows)


def load_policy(config: Config, objective: Objective, weights: str, kernel: str) -> PackedCausalLM:
    zero3 = engine.training_config(config) if config.zero_stage == 3 else None
    policy = model.load(config.model, weights, kernel, config.model.dtype, zero3, reference.attach(config))
    finite.refuse_not_finite(policy.lm, "model.name_or_path", weights, config.model.dtype)
    policy = model.prepare_for_training(policy, config.model, with_collision=objective.needs_collision)
    if coefficient := policy.router_aux_loss_coef:
        over = {"micro": "each micro-step", "step": "each step"}[config.model.router_aux_scope]
        distributed.log(f"experts: load-balancing loss x {coefficient:g}, over the tokens of {over} on all ranks")
    return policy


def finish(
    run: RunFolder,
    config: Config,
    policy: Engine,
    tokenizer: PreTrainedTokenizerBase,
    weights: str,
    held_out: Mapping[str, PairStore],
    steps: int,
    seconds: float,
) -> None:
    """Export and verify the model, record the summary, show it, answer sample prompts."""
    written = run.path / "metrics.jsonl"

    def sum_up() -> dict[str, Any]:
        speed = performance.medians(metrics.training_lines(written))
        return {"step": steps, "seconds": round(seconds, 1), "learned": learned(written), "speed": speed}

    # Rank 0 wrote that file: another would read half of a line that is still on its way.
    summary = distributed.on_main(sum_up) or {}
    last = {name: values[1] for name, values in summary.get("learned", {}).items()}
    export(run, policy, tokenizer, config, weights, {"step": steps, "metrics": last})
    run.event("finish", step=steps)

    def close() -> None:
        if config.log.samples and held_out:
            write_samples(run, config, tokenizer, weights, next(iter(held_out.values())))
        run.update(state="finished", summary=summary)

    distributed.on_main(close)
    show_summary(run)


def learned(path: Path) -> dict[str, tuple[float | None, float]]:
    """(first, last) of what matters in metrics.jsonl: training loss, reward accuracy and margin, then evaluations.

    Values that are not finite, those of skipped steps, are left out.
    """
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    training = [record for record in metrics.training_lines(path) if record["loss"] is not None]
    names = ("loss", "nll_loss", "aux_loss", "rewards/accuracies", "rewards/margins")
    table = {name: (training[0][name], training[-1][name]) for name in names if training and name in training[-1]}
    evaluations = [record for record in records if "loss" not in record]
    for name in sorted({key for record in evaluations for key in record if key.endswith(names)}):
        values = [record[name] for record in evaluations if record.get(name) is not None]
        if not values:
            continue
        table[name] = (values[0] if len(values) > 1 else None, values[-1])
    return table


def show_summary(run: RunFolder) -> None:
    if distributed.world().rank != 0:
        return
    path = run.path / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    if rows:
        console.samples(rows)
    prompt = harmless(console.printable(rows[0]["prompt"] if rows else "Hello", limit=60))
    more, loaded = "", f"'{run.final}'"
    if adapters.is_saved(str(run.final), ""):
        # pipeline would look for the tokenizer beside the model below the adapter, and leave DoRA's magnitudes out.
        more = "from peft import AutoPeftModelForCausalLM as LM; "
        loaded = f"LM.from_pretrained('{run.final}'), tokenizer='{run.final}'"
    ask = f"pipeline('text-generation', {loaded})([{{'role': 'user', 'content': '{prompt}'}}])"
    console.summary(
        run.run["summary"],
        {"model": str(run.final), "metrics": str(run.path / "metrics.jsonl")},
        [f'python -c "{more}from transformers import pipeline; print({ask})"'],
    )


def harmless(text: str) -> str:
    """Text from data in a command that people paste into a shell: letters, digits and plain punctuation."""
    return re.sub(r"[^\w ,.:;?()+*=-]", "", text)


def write_samples(
    run: RunFolder, config: Config, tokenizer: PreTrainedTokenizerBase, weights: str, store: PairStore
) -> None:
    """Answer the first held-out prompts with the initial and the final model, by plain transformers (samples.jsonl)."""
    pairs = [store[i] for i in range(min(config.log.samples, len(store)))]
    prompts = [pair.prompt.tolist() for pair in pairs]
    stop = cast(int, tokenizer.eos_token_id)
    answers = [
        model.generate(load(), prompts, SAMPLE_TOKENS, stop)
        for load in (
            lambda: model.load_beginning(config.model, weights),
            lambda: model.load_plain(str(run.final), config.model.trust_remote_code),
        )
    ]
    rows = [
        {
            "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
            "before": tokenizer.decode(before, skip_special_tokens=True),
            "after": tokenizer.decode(after, skip_special_tokens=True),
            "chosen": tokenizer.decode(pair.chosen, skip_special_tokens=True),
        }
        for prompt, pair, before, after in zip(prompts, pairs, *answers)
    ]
    (run.path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
