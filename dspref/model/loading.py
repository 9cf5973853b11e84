"""A model's config and weights, loaded: by the rules of dspref, and under zero.Init where parameters are partitioned."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from dspref.config import ModelSection
from dspref.errors import ConfigError
from dspref.files import flushed_tree, remove, sync_folder
from dspref.model import adapters, alone, digests, families, liger, tiles, vision, weights
from dspref.model.adapters import Adapters
from dspref.model.admission import build_skeleton
from dspref.model.attention import PACKED
from dspref.model.packed import PackedCausalLM
from dspref.terminal import first_line


def quiet() -> None:
    """Keep the libraries' progress bars, advice and deprecation notices off the terminal; errors still come through."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*is deprecated.*")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def load_config(section: ModelSection) -> PretrainedConfig:
    """The model's own config, without what it says of kernels; raises ConfigError in one line where it cannot be had."""
    folder = weights.folder_of(section)
    if adapters.is_saved(str(folder), ""):
        raise ConfigError(
            f"model.name_or_path: {section.name_or_path} is a LoRA adapter; name its model here, and it in model.lora.path"
        )
    said = weights.described(folder, section.name_or_path, section.trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=section.trust_remote_code)
    except Exception as error:  # of a wrong type, not known, in need of code: each has its own exception
        raise ConfigError(f"model.name_or_path: {section.name_or_path}: {_of_config(said, error)}") from None
    families.refuse_other_family(config)
    if type(config) not in families.auto_class(config)._model_mapping and not section.trust_remote_code:
        raise ConfigError(f"model.name_or_path: {section.name_or_path}: {config.model_type} is not a causal language model")
    if not isinstance(config.get_text_config(), PretrainedConfig):
        raise ConfigError(
            f"model.name_or_path: {section.name_or_path}: config.json: text_config: holds no settings; fetch it again"
        )
    _try_generation(folder, section.name_or_path)
    _drop_choices(config)
    return config


def _try_generation(folder: Path, name: str) -> None:
    """Raise ConfigError where what a model says of its generation cannot be read, or not be written as an export will."""
    if not (folder / weights.GENERATION).is_file():
        return
    try:
        said = GenerationConfig.from_pretrained(str(folder))
        said.validate()
        said.to_json_string()
        if methods := [key for key in vars(said) if callable(getattr(GenerationConfig, key, None))]:
            raise ValueError(f"{methods[0]} is no setting")
    except Exception as error:  # a value of a wrong type may fail anywhere in it
        reason = f"{first_line(error)}; mend it, or fetch it again"
        raise ConfigError(f"model.name_or_path: {name}: {weights.GENERATION}: {reason}") from None


def _of_config(said: Mapping[str, Any], error: Exception) -> str:
    kind = said.get("model_type")
    if kind not in CONFIG_MAPPING and "auto_map" not in said:
        return f"config.json: model_type: {str(kind)[:80]!r} is not known to transformers {transformers.__version__}"
    return f"config.json: {first_line(error)}"


def _drop_choices(config: PretrainedConfig) -> None:
    """Forget which kernels a model asks for: some are code of the hub's, and the attention of packs is dspref's own."""
    config._attn_implementation = config._experts_implementation = None
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):  # of the text model, or of a kind of layers
            _drop_choices(value)
        elif name in ("fusion_config", "kernel_config", "use_kernels", "distributed_config", "quantization_config"):
            delattr(config, name)


def load(
    section: ModelSection,
    source: str,
    kernel: str,
    dtype: str,
    zero3: Mapping[str, Any] | None,
    attach: Callable[[PreTrainedModel], Adapters] | None = None,
) -> PackedCausalLM:
    """Build the model with its weights in `dtype`; `attach` puts adapters into it.

    `source` is a folder or hub id of the weights. With `zero3` (a complete DeepSpeed config) parameters are partitioned as
    they are made, and filled one module at a time from memory-mapped files: no rank ever holds the whole model.
    """
    section = section.model_copy(update={"name_or_path": source})
    config = load_config(section)
    published = copy.deepcopy(config)
    if section.disable_dropout:
        _zero_dropout(config)
    weights.fetch(section)
    folder = weights.folder_of(section)
    computed = _computed_buffers(section, config, dtype) if zero3 else {}
    with _partitioned(zero3):
        try:
            loaded: Any = families.auto_class(config).from_pretrained(
                str(folder),
                config=config,
                dtype=getattr(torch, dtype),
                attn_implementation=attention_of(config, kernel),
                use_safetensors=True,
                trust_remote_code=section.trust_remote_code,
                output_loading_info=True,
                **({"quantization_config": _in_4bit(dtype)} if section.load_in_4bit else {}),
            )
        except Exception as error:  # of transformers, safetensors, torch: each has its own
            raise ConfigError(f"model.name_or_path: {source}: {_of_weights(error)}") from None
        lm, report = loaded
        _refuse_missing(lm, report, source)
        for name, buffer in computed.items():
            module, _, own = name.rpartition(".")
            place = lm.get_submodule(module)
            setattr(place, own, buffer.to(getattr(place, own).device))
        if section.liger:
            liger.put_into(lm)
        tiles.put_into(lm, section.tiled_mlp)  # of Liger's forward, where there is one
        # Still under zero.Init's config, by which peft knows that what it reads is in shards.
        attached = attach(lm) if attach else None
    return PackedCausalLM(lm, kernel, published, attached)


def attention_of(config: PretrainedConfig, kernel: str) -> str | dict[str, str]:
    if kernel == alone.ALONE:
        return alone.implementation(families.auto_class(config)._model_mapping[type(config)], config)
    return vision.implementations(config) if vision.is_vision(config) else PACKED


def _computed_buffers(section: ModelSection, config: PretrainedConfig, dtype: str) -> dict[str, Tensor]:
    """What a model computes of its config and no file holds, such as the frequencies of rotary positions, by name.

    Made outside zero.Init, which rounds to the weights' dtype what is made within (transformers 5.23 spares `arange`, 5.17
    nothing): in bf16 every frequency would be up to 0.4 % off, and the positions of long sequences whole turns.
    """
    with init_empty_weights(include_buffers=False):
        twin: Any = families.auto_class(config).from_config(
            copy.deepcopy(config), dtype=getattr(torch, dtype), trust_remote_code=section.trust_remote_code
        )
    return dict(twin.named_non_persistent_buffers())


def _in_4bit(dtype: str) -> transformers.BitsAndBytesConfig:
    """As QLoRA has it (Dettmers et al. 2023, arXiv:2305.14314): normal float, scales quantized again."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def initialise(section: ModelSection, folder: Path, seed: int) -> str:
    """Draw random weights from the config alone and save them, once: policy, reference and resume all read these bytes."""
    if not (folder / weights.WEIGHTS).exists() and not (folder / weights.INDEX).exists():
        torch.manual_seed(seed)
        config = load_config(section)
        model = families.auto_class(config).from_config(
            config, dtype=torch.float32, trust_remote_code=section.trust_remote_code
        )
        draft = folder.with_name(f".{folder.name}.draft")
        remove(draft)
        model.save_pretrained(draft)
        flushed_tree(draft)
        remove(folder)  # whatever it is, it holds no model
        draft.rename(folder)
        sync_folder(folder.parent)
    return str(folder)


def content_digest(section: ModelSection) -> str:
    """sha256 over the bytes of the files that are loaded and what the model's config says; names and paths do not count."""
    digest = hashlib.sha256(config_digest(section).encode())
    files = weights.fetch(section)
    code = weights.folder_of(section).rglob("*.py") if section.trust_remote_code else ()
    for path in sorted([*files, *code]):
        digest.update(bytes.fromhex(digests.sha256(path)))
    return digest.hexdigest()


def config_digest(section: ModelSection) -> str:
    """sha256 over what the model's config says."""
    described = load_config(section).to_dict()
    for name in ("_name_or_path", "transformers_version"):
        described.pop(name, None)
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def skeleton(section: ModelSection) -> PreTrainedModel:
    """The model without weights. Raises ConfigError where none can be built."""
    return build_skeleton(section, load_config(section))


@contextmanager
def _partitioned(zero3: Mapping[str, Any] | None):
    """While open, transformers builds models under zero.Init. The object must live as long as that: transformers keeps
    only a weak reference to it."""
    if zero3 is None:
        with nullcontext():
            yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(dict(zero3))
    yield
    del alive


def _zero_dropout(config: PretrainedConfig) -> None:
    """Set every rate of dropout and of like noise to 0 before the model is built: some families read it only in forward."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):  # of the text model, or of a kind of layers
            _zero_dropout(value)
        elif isinstance(value, float) and any(word in name for word in ("dropout", "pdrop", "layerdrop", "jitter")):
            setattr(config, name, 0.0)


def _refuse_missing(lm: PreTrainedModel, report: Mapping[str, Any], source: str) -> None:
    tied = set(getattr(lm, "all_tied_weights_keys", None) or {})
    missing = sorted(set(report["missing_keys"]) - tied)
    if missing:
        raise ConfigError(
            f"model.name_or_path: {source}: {len(missing)} weights are missing from the checkpoint (first: {missing[0]}) "
            "and would be random; is it a base model without a language-model head?"
        )


def _of_weights(error: Exception) -> str:
    """What is wrong with weights that cannot be loaded, in one line; torch puts the tensor's name in a later one."""
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    if telling := [line for line in lines if "size mismatch" in line]:
        return telling[0][:500]
    if "ignore_mismatched_sizes" in str(error):
        return "a tensor has another shape than config.json gives it; fetch both again"
    return first_line(error)
