"""What a run reads before it begins: model config, tokenizer and pairs, each checked against the others.

Everything that can be wrong with the user's files is found here, before a run folder exists.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dspref import distributed, own_code
from dspref.config import DataSection, ModelSection, SourceSection, TrainSection, cache_folder, shipped
from dspref.data.apart import read_apart
from dspref.data.loader import Packing, StepLoader, sharing_pays
from dspref.data.overlap import shared
from dspref.data.own_format import own_format
from dspref.data.plan import rows_per_epoch
from dspref.data.prompts import OwnPrompt, read_prompts
from dspref.data.rows import one_line
from dspref.data.sight import has_processor, load_processor
from dspref.data.sources import Listing, Source, find
from dspref.data.store import Log, PairStore, load_pairs
from dspref.data.tokenize import load_tokenizer
from dspref.data.truncate import Limits
from dspref.errors import ConfigError, DataError, UserError
from dspref.model import adapters, admission, alone, digests, expert_parallel, families, loading, processors, vision, weights
from dspref.objectives import Objective, own_sources
from dspref.own_code import Used
from dspref.reference.spec import ReferenceSpec, described
from dspref.run.export import warn_of_other_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of LiPO-lambda, whose paper has labels from 0 to 1: beyond it one list has all the gradient.
LARGEST_LABEL = 16.0


def prepare(
    section: ModelSection, data: DataSection, reference: ReferenceSpec, optim: str, device_type: str
) -> tuple[str, PreTrainedTokenizerBase, PairStore, dict[str, PairStore]]:
    """(attention kernel, tokenizer, training pairs, held-out sets by metric prefix), each checked.

    Rank 0 goes first and the others find its work in the cache; nobody waits in a collective.
    """

    def work():
        model_config = loading.load_config(section)
        tokenizer = tokenizer_of(section)
        kernel = admission.check(section, model_config, data.max_length, 0, device_type)
        admission.refuse_shared(model_config, distributed.world().sequence, data.max_length)
        expert_parallel.refuse(model_config, reference.strategy, section.dtype, kernel)
        if section.init == "pretrained":
            admission.check_weights(section, model_config)
        check_adapters(section, optim, device_type)
        if reference.is_another:
            check_reference(reference, 0, device_type)
        if section.tokenizer_name_or_path and distributed.world().rank == 0:
            warn_of_other_tokenizer(tokenizer, model_config, section.trust_remote_code)
        listed = [listing_of(source, key) for key, source in data.source_keys("train").items()]
        of_eval = zip(data.eval_sources, data.source_keys("eval").items())
        apart = {prefix: listing_of(source, key) for prefix, (key, source) in of_eval}
        for listing in apart.values():
            refuse_training_rows(listing, listed)
        pairs = load_sources(data, tokenizer, listed)
        held_out = {prefix: load_sources(data, tokenizer, [listing]) for prefix, listing in apart.items()}
        check_tokens(reference, model_config, [pairs, *held_out.values()], device_type)
        return kernel, tokenizer, pairs, held_out

    found = distributed.in_turn(work)
    keys = [store.key for store in (found[2], *found[3].values())]
    refuse_other_pairs(distributed.gather_objects((socket.gethostname(), keys)))
    return found


def prepare_held_out(
    section: ModelSection, data: DataSection, reference: ReferenceSpec, device_type: str
) -> tuple[str, PreTrainedTokenizerBase, dict[str, PairStore], dict[str, Listing]]:
    """(attention kernel, tokenizer, held-out sets by metric prefix, their files), each checked: for a model that is only
    evaluated."""

    def work():
        model_config = loading.load_config(section)
        tokenizer = tokenizer_of(section)
        kernel = admission.check(section, model_config, data.max_length, 0, device_type)
        admission.check_weights(section, model_config)
        adapters.check(section)
        of_eval = zip(data.eval_sources, data.source_keys("eval").items())
        listings = {prefix: listing_of(source, key) for prefix, (key, source) in of_eval}
        refuse_seen_rows(data, listings)
        sets = {prefix: load_sources(data, tokenizer, [listing]) for prefix, listing in listings.items()}
        check_tokens(reference, model_config, list(sets.values()), device_type)
        return kernel, tokenizer, sets, listings

    found = distributed.in_turn(work)
    refuse_other_pairs(distributed.gather_objects((socket.gethostname(), [store.key for store in found[2].values()])))
    return found


def refuse_seen_rows(data: DataSection, held_out: Mapping[str, Listing]) -> None:
    """As `refuse_training_rows`, where the training files are still there."""
    try:
        listed = [listing_of(source, key) for key, source in data.source_keys("train").items()]
    except UserError:
        return  # the run is over, or elsewhere
    for listing in held_out.values():
        refuse_training_rows(listing, listed)


def refuse_training_rows(listing: Listing, training: Sequence[Listing]) -> None:
    """Raise DataError where a held-out set has rows that are trained on, unless it names the split, and no slice of it."""
    found = shared(listing, training, digests.sha256)
    said = listing.source.split is not None
    if found is None or (said and not found.term.is_slice and found.term.name.casefold() == found.other.name.casefold()):
        return
    key = listing.source.key
    if found.term.is_slice and not found.other.is_slice and len(training) == 1 and found.term.rest is not None:
        rest = f"set {training[0].source.key}.split: {found.term.rest}"
    else:
        rest = "name other rows, such as split: test or train[:5%] with the rest in data.train"
    fix = f"{rest}, or write split: {found.other.name} to evaluate on rows of the training set"
    name = one_line(found.name)
    what = f"rows {listing.source.split!r} of {name} are" if found.term.is_slice else f"{name} is"
    raise DataError(f"{key}: {what} trained on too; fix: {fix}")


def check_tokens(reference: ReferenceSpec, model_config: Any, stores: Sequence[PairStore], device_type: str) -> None:
    """Refuse tokens and lengths that the model, or a reference that is another model, has no embedding for."""
    largest, longest = check_sizes(reference.max_length, model_config, stores)
    if reference.is_another:
        check_reference(reference, largest + 1, device_type, longest)


def check_sizes(max_length: int | None, model_config: Any, stores: Sequence[PairStore]) -> tuple[int, int]:
    """(largest token id, tokens of the longest pair). Refuses what the model has no embedding or no position for."""
    largest, longest = (max(store.report[name] for store in stores) for name in ("largest_id", "longest"))
    admission.refuse_unknown_tokens(model_config, largest)
    if max_length is None:
        admission.refuse_long_pairs(model_config, longest)
    return largest, longest


def refuse_other_pairs(keys: Sequence[tuple[str, list[str]]]) -> None:
    """Raise DataError where a rank has other pairs than rank 0: other files, or another moment of a template's clock.

    `keys`: of each rank, its machine and the keys of its stores."""
    other = next((rank for rank, (_, own) in enumerate(keys) if own != keys[0][1]), None)
    if other is not None:
        raise DataError(
            f"data: rank {other} on {keys[other][0]} has other pairs than rank 0 on {keys[0][0]}; give all machines the "
            "same files, and a token cache (DSPREF_CACHE) that they share"
        )


def tokenizer_of(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer, which knows how an encoder-decoder model reads a pair."""
    name = section.tokenizer_name_or_path or section.name_or_path
    if not shipped(name).is_dir() and (reason := weights.no_folder(name)):
        raise ConfigError(f"model.tokenizer_name_or_path: {name}: {reason}")
    config = loading.load_config(section)
    if vision.is_vision(config):
        return seeing_tokenizer(section, str(shipped(name)))
    tokenizer = load_tokenizer(str(shipped(name)), section.revision, section.chat_template, section.trust_remote_code)
    if families.is_encoder_decoder(config):
        read_apart(tokenizer, families.start_of_answers(config))
    return tokenizer


def seeing_tokenizer(section: ModelSection, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a vision-language model, which knows by its processor how images are read."""
    own = section.tokenizer_name_or_path is None or has_processor(name)
    processor = load_processor(
        name if own else str(shipped(section.name_or_path)), section.revision, section.trust_remote_code
    )
    template = section.chat_template or processor.chat_template
    tokenizer = load_tokenizer(name, section.revision, template, section.trust_remote_code)
    dtype = getattr(torch, section.dtype)
    processors.teach(tokenizer, processor, loading.skeleton(section), dtype, section.trust_remote_code)
    return tokenizer


def own_functions(objective: Any, data: DataSection) -> list[Used]:
    """The functions of the user's own that a run names, with the files that they are in. Raises ConfigError."""
    losses = own_sources(**objective.model_dump())
    found = [Used("objective.loss_type", own_code.LOSS, name, source) for name, source in losses.items()]
    for key, source in (*data.source_keys("train").items(), *data.source_keys("eval").items()):
        if source.format:
            found.append(Used(f"{key}.format", own_code.FORMAT, source.format, own_format(source.format, key).source))
    return found


def load_sources(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    listings: Sequence[Listing],
    log: Log = distributed.log,
    summarise: bool = True,
) -> PairStore:
    """The pairs of some sources, tokenized and cut as `data` says; `summarise`: say what was left out or cut."""
    return load_pairs(
        listings, tokenizer, limits_of(data), scored=data.scored, on_bad_row=data.on_bad_row,
        cache_dir=cache_folder("tokens"), log=log, digest=digests.sha256,
        verify=distributed.world().local_rank == 0, summarise=summarise,
    )  # fmt: skip


def own_prompts(file: str, section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> list[OwnPrompt]:
    """The prompts of log.samples_file. Raises DataError for what is no prompt, or is too long for the model."""
    model_config, found = loading.load_config(section), read_prompts(shipped(file), tokenizer)
    positions = admission.positions_of(model_config)
    for prompt in found:
        if positions and len(prompt.ids) >= positions:
            beyond = f"prompt: {len(prompt.ids)} tokens leave no room in the model's {positions} positions"
            raise DataError(f"{prompt.where}: {beyond}; fix: shorten it")
    admission.refuse_unknown_tokens(model_config, max(max(prompt.ids) for prompt in found))
    return found


def limits_of(data: DataSection) -> Limits:
    return Limits(
        data.max_length, data.max_prompt_length, data.max_completion_length, data.truncation_mode, data.min_prompt_length,
        data.on_overlong,
    )  # fmt: skip


def steps_of(
    data: DataSection,
    train: TrainSection,
    pairs: PairStore,
    objective: Objective,
    rank: int,
    world_size: int,
    sequence: int = 1,
) -> tuple[Packing, StepLoader]:
    """How packs are laid out over the ranks, each held by `sequence` of them, and the steps of a run."""
    refuse_for_objective([pairs], objective)
    together = {"row": pairs.rows, "prompt": pairs.same[:, 0], "none": None}[data.keep_together]
    sharing = sharing_pays(pairs, together) if data.prefix_sharing == "auto" else data.prefix_sharing
    packing = Packing(data.tokens_per_pack, sharing, rank, world_size, objective.scores_prompt, objective.family.takes)
    packing = packing.shared_by(sequence)
    weights = [source.weight for source in data.train_sources]
    if not rows_per_epoch(pairs.source_rows, weights):
        raise DataError("data.train: the weights leave no pair per epoch; raise them")
    of_pairs = pairs.given.columns.get("weight")
    if of_pairs is not None and not of_pairs.any():
        raise DataError("data.train: all pairs weigh 0, so that nothing would be trained; fix: mend the column of weights")
    loader = StepLoader(
        pairs, weights, train.pairs_per_step, train.seed, data.shuffle, packing, together, train.overfit is not None
    )
    return packing, loader


def refuse_for_objective(stores: Sequence[PairStore], objective: Objective) -> None:
    """Raise DataError where an objective compares two answers and a row has one, and ConfigError where it asks for log-probs
    of prompts that only an encoder reads."""
    for store in stores if objective.family.takes == "pairs" else ():
        if len(alone := np.flatnonzero((store.scored == 0).any(axis=1))):
            what = f"{store.where(int(alone[0]))}: one answer and a label, and this objective compares two"
            more = f" (also {len(alone) - 1} more rows)" if len(alone) > 1 else ""
            raise DataError(f"{what}{more}; fix: set objective.name: kto or bco, or use a set of pairs")
    if (scale := objective.parts[0].keys.get("score_scale")) is not None:
        for store in stores:
            refuse_large_labels(store, scale)
    score_prompt = objective.scores_prompt
    if score_prompt and any(store.apart for store in stores):
        raise ConfigError(
            "objective.nll_on_prompt: true, but an encoder-decoder model gives a prompt's tokens no probability; set false"
        )
    if score_prompt and any(store.reads_images for store in stores):
        raise ConfigError("objective.nll_on_prompt: true, but image tokens of a prompt are no text to be learned; set false")


def laid_out(section: ModelSection, data: DataSection, say: bool = True) -> DataSection:
    """The data section with packs as the model takes them: no prompt is computed once for several answers of one that reads
    a sequence at a time, which `say` tells. Raises ConfigError where just that is asked for."""
    config = loading.load_config(section)
    why = admission.why_alone(config, data.max_length)
    found = alone.laid_out(data, config, why)
    if why and say:
        distributed.log(alone.told(config, why))
    return found


def refuse_large_labels(store: PairStore, scale: float) -> None:
    """Raise DataError for scores that are no labels of LiPO-lambda, whose gain is 2 to the power of them."""
    largest = np.maximum(*store.given.scores)
    worst = int(largest.argmax())
    if (label := scale * float(largest[worst])) > LARGEST_LABEL:
        what = f"a score of {largest[worst]:g} is a gain of 2^{label:g} under lipo_lambda"
        fix = f"set objective.score_scale: {1 / largest[worst]:.3g}, so that labels go up to 1"
        raise DataError(f"{store.where(worst)}: {what}; fix: {fix}")


def check_adapters(section: ModelSection, optim: str, device_type: str) -> None:
    """Refuse what an adapter or 8-bit states need and this machine, or the disk, has not."""
    adapters.check(section)
    if section.lora:
        adapters.try_on(loading.skeleton(section), section)
    if optim == "adamw_8bit":
        admission.require_bitsandbytes("train.optim: adamw_8bit", device_type)


def check_reference(spec: ReferenceSpec, vocabulary: int, device_type: str, longest: int = 0) -> None:
    """The checks of the policy, for a reference that is another model or has an adapter of its own."""
    section, adapter = described(spec, "")
    try:
        if adapter:
            adapters.folder_of(adapter)
        else:
            model_config = loading.load_config(section)
            admission.check(section, model_config, spec.max_length, vocabulary, device_type)
            families.refuse_other_kind(loading.load_config(spec.policy), model_config)
            if spec.max_length is None:
                admission.refuse_long_pairs(model_config, longest)
            admission.check_weights(section, model_config)
    except UserError as error:
        named = "reference.name_or_path" if spec.section.name_or_path else "reference.adapter_name"
        blamed = re.sub(r"^(model\.(tokenizer_)?name_or_path: )?", f"{named}: ", str(error))
        raise type(error)(blamed) from None


def listing_of(section: SourceSection, key: str) -> Listing:
    """The files that a source of the config names; `key` is its place there."""
    return find(source_of(section, key))


def source_of(section: SourceSection, key: str) -> Source:
    template = section.template.model_dump(exclude_none=True) if section.template else None
    # Keys of the section that say which rows to read, or how, are fields of the source.
    own = ("path", "columns", "template", "as")
    same = {name: getattr(section, name) for name in SourceSection.model_fields if name not in own}
    path = str(shipped(section.path))
    return Source(path, columns=section.columns.named, template=template, as_=section.as_, key=key, **same)
