"""What the data ask of a run: its packs, planned as the run will plan them, for any number of ranks. No model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from glob import glob
from statistics import fmean
from typing import Any

import numpy as np

from dspref import reading
from dspref.config import DataSection, ModelSection, TrainSection, shipped
from dspref.data.loader import Packing, StepLoader, StepPacks, count, longest_pair, place
from dspref.engine import misfits
from dspref.errors import ConfigError
from dspref.machine import built, footprint, shapes
from dspref.machine.run_plan import Load, assumed
from dspref.machine.shapes import ModelShape
from dspref.model import admission, expert_parallel, families, freezing, loading, tiles
from dspref.model.pieces import PROMPTS
from dspref.objectives import Objective
from dspref.ranks import sharing
from dspref.training import preparation

# Steps of an epoch that are looked at: planning one takes milliseconds.
MOST_STEPS = 400
# Tokens of a sequence, where nothing says how long they are.
LONGEST = 2048


def load(
    model: ModelSection,
    data: DataSection,
    train: TrainSection,
    objective: Objective,
    ranks: int,
    mean_tokens: int | None,
    sequence: int = 1,
) -> Load:
    """The load of a run's own pairs, where they are here and can be tokenized; else of pairs with `mean_tokens` for each
    prompt + answer, or as long as they may be, with the reason in its `source`. Of a pack and a pair that `sequence` ranks
    hold between them, it has the part of one.

    Raises DataError as the run would.
    """
    longest = data.max_length or LONGEST
    at_most = f"{longest} tokens a sequence" + (" (data.max_length)" if data.max_length else "")
    missing = next((source.path for source in data.train_sources if not glob(str(shipped(source.path)))), None)
    if mean_tokens:
        why = f"--mean-tokens {mean_tokens}"
    elif missing:
        why = f"{at_most}, as {missing} is not here"
    else:
        try:
            return _of_part(read(model, data, train, objective, ranks, sequence), sequence)
        except ConfigError as error:  # no tokenizer here, no template
            why = f"{at_most}, as the data could not be tokenized ({error})"
    raw = raw_config(model)
    why += ", no images" * bool(raw.get("vision_config"))
    groups, tokens, encoded = ranks // sequence, sequence * data.tokens_per_pack, bool(raw.get("is_encoder_decoder"))
    return _of_part(assumed(train, groups, tokens, mean_tokens or longest, why, encoded), sequence)


def _of_part(load: Load, sequence: int) -> Load:
    return replace(load, largest=-(-load.largest // sequence), longest=-(-load.longest // sequence))


def shape_of(section: ModelSection) -> ModelShape:
    """The numbers of a model: of one stack of layers from its files, of several from the model, built without weights.
    Raises ConfigError where its config.json is not here, or tells no sizes."""
    raw = raw_config(section)
    if not (raw.get("is_encoder_decoder") or raw.get("vision_config")):
        return shapes.of_section(section)
    if (kind := families.kind_of(loading.load_config(section))) == "decoder":
        return shapes.of_section(section)
    lm = loading.skeleton(section)
    named = dict(lm.named_parameters(remove_duplicate=False))
    for name in freezing.frozen(named, section.freeze):
        named[name].requires_grad_(False)
    return built.of_model(lm, kind, lambda parameter: parameter.numel(), shapes.as_saved(section.lora))


def refuse(section: ModelSection, strategy: Mapping[str, Any], max_length: int | None, sequence: int, ranks: int) -> None:
    """Raises ConfigError where these ranks cannot hold packs, or the model's experts, between them, or its MLPs not run in
    tiles, by its config.json."""
    sharing.refuse(sequence, ranks)
    misfits.refuse_spread(strategy, ranks)
    if config := _config_here(section):
        admission.refuse_shared(config, sequence, max_length)
        expert_parallel.refuse(config, strategy, section.dtype)
        if section.tiled_mlp is not False:
            admission.refuse_tiles(section, config, admission.build_skeleton(section, config), max_length)
        if section.tiled_mlp is not False:
            admission.refuse_tiles(section, config, admission.build_skeleton(section, config), max_length)


def ways_for_long_pairs(section: ModelSection, max_length: int | None, sequence: int) -> dict[str, Any]:
    """Which of them this model can go, by the names of `machine.fitting.Asked`."""
    if not (config := _config_here(section)):
        return {}
    try:
        skeleton = admission.build_skeleton(section, config)
    except ConfigError:
        return {}  # which the run says too
    shared = sequence == 1 and admission.why_not_shared(config, max_length) is None
    tiled = tiles.why_not(skeleton) is None and admission.why_alone(config, max_length) is None
    heads = admission.number(config.get_text_config(), "num_attention_heads") if shared else 0
    return {"tiles": tiled, "heads": heads or 0}


def _config_here(section: ModelSection) -> Any:
    """The model's config, where its files are on this machine and can be read; the run says what is wrong with others."""
    try:
        return loading.load_config(section.model_copy(update={"name_or_path": str(footprint.model_folder(section))}))
    except ConfigError:
        return None


def raw_config(section: ModelSection) -> dict[str, Any]:
    """A model's config.json as it is; {} where it is not here."""
    folder = footprint.model_folder(section)
    try:
        found = reading.read_json(folder / "config.json", strict=False) if folder else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def most_of(placed: Sequence[StepPacks]) -> dict[str, float]:
    """What an encoder reads of the largest pack; and a tower of the one with most for it."""
    largest = max(placed, key=lambda step: step.largest).most
    return dict(largest) if PROMPTS in largest else {name: max(p.most[name] for p in placed) for name in largest}


def read(
    model: ModelSection, data: DataSection, train: TrainSection, objective: Objective, ranks: int, sequence: int = 1
) -> Load:
    """The load of a run's own pairs, read and tokenized as the run would, into the cache that it will use.

    Raises DataError and ConfigError as the run would.
    """
    tokenizer = preparation.tokenizer_of(model)
    listings = [preparation.listing_of(source, key) for key, source in data.source_keys("train").items()]
    pairs = preparation.load_sources(data, tokenizer, listings)
    data = preparation.laid_out(model, data, say=False)
    packing, loader = preparation.steps_of(data, train, pairs, objective, 0, ranks, sequence)
    return load_of(loader, packing, loader.total_steps(train.num_train_epochs, train.asked_steps))


def load_of(loader: StepLoader, packing: Packing, total: int) -> Load:
    """The load of the first epoch, or of its first `total` steps, from steps all over it."""
    steps = loader.epoch(0)
    # The last is short: it counts where it is all there is.
    chosen = (steps[:-1] or steps)[:total]
    chosen = [chosen[i] for i in np.unique(np.linspace(0, len(chosen) - 1, min(len(chosen), MOST_STEPS)).astype(int))]
    placed = [place(loader.store, ids, packing) for ids in chosen]
    pairs = sum(len(ids) for ids in steps)
    unit = "pairs" if (loader.store.scored > 0).all() else "examples"
    return Load(
        source=f"planned from the run's {len(loader.store):,} {unit}"
        + (", prompts shared" if packing.prefix_sharing else ""),
        measured=True,
        pairs=pairs,
        unit=unit,
        pairs_per_step=fmean(len(ids) for ids in chosen),
        packs=fmean(len(p.ids[0]) for p in placed),
        largest=max(p.largest for p in placed),
        longest=longest_pair(loader.store, packing.prefix_sharing),
        computed=fmean(p.tokens for p in placed),
        real=fmean(count(loader.store, ids)["tokens"] for ids in chosen),
        scored=fmean(p.scored for p in placed),
        attention=fmean(p.attention for p in placed),
        fill=fmean(p.fill for p in placed),
        steps_per_epoch=loader.steps_per_epoch,
        more={name: fmean(p.more[name] for p in placed) for name in placed[0].more},
        most=most_of(placed),
    )
