"""Which models can be trained packed, and by which attention kernel; the others are refused before anything is built."""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from dspref.config import ModelSection
from dspref.errors import ConfigError, EnvironmentFault
from dspref.model import alone, attention, families, freezing, liger, tiles, vision, weights
from dspref.terminal import first_line

NOT_PACKED = "has attention of its own, in which the sequences of a pack would see each other; use another model"
# Families whose log-probs in training are no function of a sequence, and why.
REFUSED = {
    "phimoe": "samples its experts in training, so that a step would not be a function of its pairs",
    "rwkv": "has a backward pass that fails, as transformers has it: it writes over what it needs",
    "xlstm": "has a backward pass that fails, as transformers has it: it writes over what it needs",
    "reformer": "hashes its tokens by chance, so that a step would not be a function of its pairs",
    "xlnet": "reads a text in other orders than from left to right",
    "blt": "reads bytes in patches, whose ends depend on another model",
    "cpmant": "reads a text in both directions, so that no token of an answer has a probability by what lies before it",
}
# Layers between backbone and head that the forward of packs has too, by family.
BEFORE_HEAD = {"modernbert-decoder": "lm_head"}


def check(section: ModelSection, config: PretrainedConfig, max_length: int | None, vocabulary: int, device_type: str) -> str:
    """Refuse, before anything is built, what cannot run here; the name of the attention kernel if all is well."""
    if section.load_in_4bit:
        require_bitsandbytes("model.load_in_4bit", device_type)
    text = config.get_text_config()
    if section.liger:
        liger.check(text.model_type, device_type)
    refuse_unknown_tokens(config, vocabulary - 1)
    refuse_long_limit(config, max_length)
    encoded = families.FAMILIES.get(config.model_type) if families.is_encoder_decoder(config) else None
    if encoded is not None:
        families.start_of_answers(config)
        _refuse_dropped_layers(section, config)
    if text.model_type in REFUSED:
        raise ConfigError(f"model.name_or_path: {text.model_type} {REFUSED[text.model_type]}; use another model")
    sinks = False
    if _class_of(config) is not None:
        skeleton = build_skeleton(section, config)
        if encoded is None:
            refuse_layers_before_head(skeleton)
        freezing.frozen([name for name, _ in skeleton.named_parameters(remove_duplicate=False)], section.freeze)
        sinks = any("sink" in name.rpartition(".")[2] for name, _ in skeleton.named_parameters())
        reads_images = vision.is_vision(config) and encoded is None
        sizes = head_sizes(vision.language_model(skeleton) if reads_images else skeleton)
        router_coefficient(section, skeleton)
        refuse_tiles(section, config, skeleton, max_length)
        if section.gradient_checkpointing and not skeleton.supports_gradient_checkpointing:
            raise ConfigError(f"model.gradient_checkpointing: {text.model_type} does not support it; set false")
    else:  # of code that comes with the model, which is not run before it is loaded
        sizes = {number(text, "head_dim") or 0}
    if why := why_alone(config, max_length):
        _refuse_other_kernel(section, text.model_type, why)
        return alone.ALONE
    window = number(text, "sliding_window") if getattr(text, "use_sliding_window", True) else None
    return _choose_kernel(
        section,
        device_type,
        sizes,
        window=window if window and (max_length is None or max_length > window) else None,
        softcap=number(text, "attn_logit_softcapping"),
        sinks=sinks,
        dropout=0.0 if section.disable_dropout else _attention_dropout(text),
        position_bias=encoded is not None and encoded.has_bias,
    )


def refuse_tiles(section: ModelSection, config: PretrainedConfig, skeleton: PreTrainedModel, max_length: int | None) -> None:
    """Raise ConfigError where MLPs are to run in tiles, and this model's cannot."""
    if section.tiled_mlp is False:
        return
    tiles.check(skeleton)
    if why := why_alone(config, max_length):  # under ZeRO-3 ranks with longer sequences would gather for more tiles
        kind = config.get_text_config().model_type
        raise ConfigError(f"{tiles.KEY}: {kind} is run one sequence at a time, as {why}; drop the key")


def refuse_shared(config: PretrainedConfig, sequence: int, max_length: int | None) -> None:
    """Raise ConfigError where `sequence` ranks cannot hold a pack between them, for this kind of model or its heads."""
    if sequence == 1:
        return
    if why := why_not_shared(config, max_length):
        raise ConfigError(
            f"parallel.sequence: {sequence}, but {config.model_type} {why}, and its packs are not shared; use 1"
        )
    heads = number(config.get_text_config(), "num_attention_heads")
    if heads and heads % sequence:
        few = math.gcd(heads, sequence)
        raise ConfigError(f"parallel.sequence: {sequence} does not divide the model's {heads} attention heads; use {few}")


def why_not_shared(config: PretrainedConfig, max_length: int | None) -> str | None:
    """Why no ranks can hold a pack between them, in half a sentence; None where they can."""
    if alone_as := why_alone(config, max_length):
        return f"is run one sequence at a time, as {alone_as}"
    return {"encoder-decoder": "has an encoder", "vision": "reads images"}.get(families.kind_of(config))


def why_alone(config: PretrainedConfig, max_length: int | None) -> str | None:
    """Why a model is run one sequence at a time, in half a sentence; None where it is run over packs."""
    if families.kind_of(config) != "decoder":
        return None
    return alone.reason(config, _class_of(config), max_length)


def _class_of(config: PretrainedConfig) -> Any:
    """Of transformers; None for code that comes with the model."""
    return families.auto_class(config)._model_mapping.get(type(config), None)


def _refuse_other_kernel(section: ModelSection, family: str, why: str) -> None:
    if (asked := section.attn_implementation) not in ("auto", "sdpa"):
        raise ConfigError(
            f"model.attn_implementation: {asked}, but {family} is run one sequence at a time, as {why}; drop the key"
        )


def _refuse_dropped_layers(section: ModelSection, config: PretrainedConfig) -> None:
    """Raise ConfigError where layers would be left out by chance: of each pack and rank others."""
    for name in ("encoder_layerdrop", "decoder_layerdrop"):
        if not section.disable_dropout and (rate := number(config, name)):
            raise ConfigError(
                f"model.disable_dropout: false, and the model leaves out layers by chance ({name} {rate}), on each rank "
                "others; drop the key"
            )


def number(text: PretrainedConfig, name: str) -> Any:
    """A number of a model's config, or None. Raises ConfigError for anything else under that name."""
    value = getattr(text, name, None)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ConfigError(
            f"model.name_or_path: {text.name_or_path}: config.json: {name}: {value!r:.80} is no number; mend it"
        )
    return value


def build_skeleton(section: ModelSection, config: PretrainedConfig) -> PreTrainedModel:
    """The model that a config describes, without weights. Raises ConfigError where it describes none."""
    try:
        with torch.device("meta"):
            return families.auto_class(config).from_config(
                copy.deepcopy(config), trust_remote_code=section.trust_remote_code
            )
    except Exception as error:  # of numbers that do not go together: each family stumbles in its own way
        reason = first_line(error)
        raise ConfigError(
            f"model.name_or_path: {section.name_or_path}: no model comes of its config.json: {reason}"
        ) from None


def check_weights(section: ModelSection, config: PretrainedConfig) -> None:
    """Raise ConfigError for weights that are not there, damaged or quantized, or to which config.json gives another size.

    Only sizes are compared: transformers transposes and renames tensors of some families as it loads them.
    """
    blamed = f"model.name_or_path: {section.name_or_path}"
    found = weights.tensors_of(weights.fetch(section), blamed)
    if type(config) not in families.auto_class(config)._model_mapping:
        return  # of code that comes with the model, which is not run before it is loaded
    for name, wanted in build_skeleton(section, config).state_dict().items():
        if (tensor := found.get(name)) and math.prod(tensor.shape) != wanted.numel():
            raise ConfigError(
                f"{blamed}: {name} is {list(tensor.shape)} in {tensor.file.name}, and {list(wanted.shape)} by config.json; "
                "fetch both again"
            )


def refuse_unknown_tokens(config: PretrainedConfig, largest: int) -> None:
    """Raise ConfigError where a token id is beyond the model's vocabulary. Ids that never occur do no harm."""
    if largest >= (known := number(config.get_text_config(), "vocab_size") or 0):
        raise ConfigError(
            f"model.tokenizer_name_or_path: token id {largest} does not fit the model's vocabulary of {known}; "
            "use the model's own tokenizer"
        )


def refuse_long_limit(config: PretrainedConfig, max_length: int | None) -> None:
    """Raise ConfigError for a `max_length` beyond the model's positions, or those that do not depend on neighbours."""
    text = config.get_text_config()
    positions = number(text, "max_position_embeddings")
    if positions and max_length and max_length > positions:
        raise ConfigError(f"data.max_length: {max_length} is beyond the model's {positions} positions; lower it")
    if families.kind_of(config) != "decoder":
        _refuse_scaled_positions(text, max_length)


def refuse_long_pairs(config: PretrainedConfig, longest: int) -> None:
    """Raise ConfigError where prompt + answer of a pair, `longest` tokens, have more tokens than the model has positions."""
    positions = number(config.get_text_config(), "max_position_embeddings")
    if positions and longest > positions:
        raise ConfigError(
            f"data.max_length: null, and the longest pair has {longest} tokens, beyond the model's {positions} positions; "
            f"set max_length to {positions}"
        )


def positions_of(config: PretrainedConfig) -> int | None:
    """Tokens of a sequence up to which the model has positions, and those do not depend on its neighbours."""
    text = config.get_text_config()
    _, fixed_up_to = alone.scaled_positions(text)
    return fixed_up_to or number(text, "max_position_embeddings")


def _refuse_scaled_positions(text: PretrainedConfig, max_length: int | None) -> None:
    """A pair would depend on its neighbours."""
    kind, fixed_up_to = alone.scaled_positions(text)
    if fixed_up_to is not None and (max_length is None or max_length > fixed_up_to):
        raise ConfigError(
            f"data.max_length: {text.model_type}'s {kind} positions depend on the longest sequence beyond {fixed_up_to} "
            f"tokens; set max_length to {fixed_up_to} or less"
        )


def _attention_dropout(text: PretrainedConfig) -> float:
    return max(number(text, name) or 0.0 for name in ("attention_dropout", "attn_pdrop", "dropout_rate"))


def head_sizes(lm: torch.nn.Module) -> set[int]:
    """Sizes of the queries' heads in a model's attention layers, as far as these tell them."""
    layers = [part for part in lm.modules() if "Attention" in type(part).__name__]
    told = (
        getattr(part, "qk_head_dim", None) or getattr(part, "head_dim", None) or getattr(part, "key_value_proj_dim", None)
        for part in layers
    )
    return {size for size in told if isinstance(size, int)}


def _choose_kernel(section: ModelSection, device_type: str, sizes: set[int], **asked: float | None) -> str:
    """The kernel that the config names, or for `auto` the fastest here that can do what the model asks."""
    able = attention.available(device_type)
    if section.attn_implementation not in ("auto", *able):
        raise EnvironmentFault(
            f"model.attn_implementation: {section.attn_implementation} is not available here ({device_type}); "
            f"use auto, or one of {', '.join(able)}"
        )
    if section.attn_implementation != "auto":
        candidates = [section.attn_implementation]
    else:
        candidates = able if section.dtype in ("bfloat16", "float16") else ["sdpa"]  # the varlen kernels know no fp32
    reasons = {kernel: attention.cannot(kernel, sizes, **asked) for kernel in candidates}
    for kernel, reason in reasons.items():
        if reason is None:
            return kernel
    raise ConfigError(f"model.attn_implementation: {reasons[candidates[-1]]}")


def require_bitsandbytes(key: str, device_type: str) -> None:
    """Raise EnvironmentFault where a key asks for what bitsandbytes does on CUDA alone."""
    if device_type != "cuda":
        raise EnvironmentFault(f"{key}: bitsandbytes trains on CUDA only, and this device is {device_type}; drop the key")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EnvironmentFault(f"{key}: bitsandbytes is not installed; pip install 'dspref[bitsandbytes]'")


def backbone_of(lm: PreTrainedModel) -> Any:
    """What makes hidden states, up to the head; some have it under another name than they say (Llama 4)."""
    base: Any = lm.base_model
    return getattr(lm, "model", lm) if base is lm else base


def refuse_layers_before_head(lm: PreTrainedModel) -> None:
    """Raise ConfigError where more than a linear head follows the backbone: the forward here would leave it out."""
    head, backbone = lm.get_output_embeddings(), backbone_of(lm)
    # A softcap as a module (Inkling 2) is in the head's transform.
    known = ("logit_softcap", BEFORE_HEAD.get(lm.config.model_type))
    between = [name for name, part in lm.named_children() if part not in (head, backbone) and name not in known]
    if between or all(part is not head for part in lm.children()):
        kind = lm.config.model_type
        if type(lm.config) in AutoModelForMaskedLM._model_mapping:  # BERT and its kin, which know no left to right
            raise ConfigError(f"model.name_or_path: {kind} is an encoder, and no causal language model; use another model")
        layers = ", ".join(between) or "no head of its own"
        raise ConfigError(f"model.name_or_path: {kind} has {layers} after its backbone; use another model")


def router_coefficient(section: ModelSection, lm: PreTrainedModel) -> float:
    """Weight of the load-balancing loss: the YAML's, else the model's own. Raises ConfigError for a model without it."""
    # transformers' own sign that a family has this loss: its modeling file holds the function, its head knows the top k.
    # (Zero experts: a dense model of a family that has both.)
    has_loss = hasattr(sys.modules[type(lm).__module__], "load_balancing_loss_func")
    trains = has_loss and bool(getattr(lm, "num_experts_per_tok", 0))
    asked = section.router_aux_loss_coef
    if asked and not trains:
        raise ConfigError(
            f"model.router_aux_loss_coef: {lm.config.model_type} has no router with a load-balancing loss; remove the key"
        )
    # Read from the model, which names it alike for all families but JetMoE; configs hide it in several places.
    own = getattr(lm, "router_aux_loss_coef", getattr(lm, "aux_loss_coef", None)) if trains else None
    coefficient = float(own or 0.0) if asked is None else asked
    if section.router_aux_scope == "step" and not coefficient:
        raise ConfigError("model.router_aux_scope: step has no effect without a load-balancing loss; drop the key")
    return coefficient
