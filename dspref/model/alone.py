"""Which models read one sequence per forward: those whose layers cannot be told where the sequences of a pack begin and end.

`one_by_one` has how.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from dspref.config import DataSection
from dspref.errors import ConfigError

# What stands for the name of an attention kernel.
ALONE = "of its own, one sequence at a time"
# Layers that transformers has hand their queries, keys and values to the common attention function.
COMMON_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})
# Families that use the common attention function, or seem to, and yet see beyond a sequence of a pack.
NOT_TOLD = {
    "nemotron": "its attention is not told where sequences begin",
    "doge": "it makes an attention mask of its own",
}


def reason(config: PretrainedConfig, family: Any, max_length: int | None) -> str | None:
    """Why a causal model reads one sequence per forward, in half a sentence; None where it reads packs.

    `family`: its class in transformers, None for code that comes with a model."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or []
    if others := sorted(set(map(str, kinds)) - COMMON_LAYERS):
        return f"its {', '.join(others)} layers take no boundaries of sequences"
    if text.model_type in NOT_TOLD:
        return NOT_TOLD[text.model_type]
    if family is not None and not family._supports_attention_backend:
        return "its layers take no boundaries of sequences"
    kind, fixed_up_to = scaled_positions(text)
    if fixed_up_to is not None and (max_length is None or max_length > fixed_up_to):
        return f"its {kind} positions depend on the longest sequence beyond {fixed_up_to} tokens"
    return None


def scaled_positions(text: PretrainedConfig) -> tuple[str, int | None]:
    """Some rotary embeddings change with the longest sequence of a forward: their kind, and up to where they do not."""
    every = getattr(text, "rope_parameters", None) or {}
    of_kinds = (own for own in every.values() if isinstance(own, dict))  # where layers of several kinds have their own
    rope = next((own for own in (every, *of_kinds) if own.get("rope_type") in ("longrope", "dynamic")), every)
    kind = rope.get("rope_type", "default")
    if kind not in ("longrope", "dynamic"):
        return kind, None
    positions = getattr(text, "max_position_embeddings", None)
    return kind, rope.get("original_max_position_embeddings") or positions or 0


def told(config: PretrainedConfig, why: str, which: str = "model") -> str:
    """What a run says of it once, in one line."""
    return f"{which}: {config.model_type} is run one sequence at a time, as {why}: slower, exact"


def laid_out(data: DataSection, config: PretrainedConfig, why: str | None) -> DataSection:
    """The data section as such a model has its packs; as it is where `why` is None. Raises ConfigError where it asks for
    prompts that are computed once."""
    if why is None:
        return data
    if data.prefix_sharing is True:
        raise ConfigError(
            f"data.prefix_sharing: true, but {config.model_type} is run one sequence at a time, as {why}; drop the key"
        )
    return data.model_copy(update={"prefix_sharing": False})


def implementation(family: Any, config: PretrainedConfig) -> str:
    """transformers' own attention for plain sequences: its class `family` (or a model of it) as its authors have it."""
    text = config.get_text_config()
    # transformers hands softcaps and sinks to torch's attention too, which does without.
    loses = getattr(text, "attn_logit_softcapping", None) or not getattr(family, "_supports_sdpa", False)
    return "eager" if loses else "sdpa"
