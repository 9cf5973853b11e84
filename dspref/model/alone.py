"""Models that read one sequence per forward: those whose layers cannot be told where the sequences of a pack begin and end.

The pack is what it is for all models, and so is all that comes behind the hidden states. Only these are made otherwise:
each answer behind its own prompt is a forward of its own, as the authors wrote it, without mask or cache. No prompt is
computed once for several answers. Exact for whatever a layer does with what lies before a token; and slow, as short
sequences fill no GPU. T tokens of a pack, of hidden size d; B sequences of a passage.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from dspref.config import DataSection
from dspref.data.batch import FILLER_TOKENS, PackedBatch
from dspref.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from dspref.model.attention import Segments
    from dspref.model.generation import Passage

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
    listed = [getattr(text, name, None) or [] for name in ("layer_types", "layers_block_type")]
    if others := sorted({str(kind) for kinds in listed for kind in kinds} - COMMON_LAYERS):
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
    rope = getattr(text, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("longrope", "dynamic"):
        return kind, None
    positions = getattr(text, "max_position_embeddings", None)
    return kind, rope.get("original_max_position_embeddings") or positions or 0


def told(config: PretrainedConfig, why: str) -> str:
    """What a run says of it once, in one line."""
    return f"model: {config.model_type} is run one sequence at a time, as {why}: slower, exact"


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


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read(lm: PreTrainedModel, batch: PackedBatch, segments: Segments, routed: bool) -> Any:
    """Hidden states [1, T, d] in the order of the pack, and behind them those of fillers: every rank makes as many forwards
    as the one that has most sequences, since under ZeRO-3 all gather a layer's weights together."""
    segments.seen.append(ALONE)  # by nothing else is a sequence of its own
    states, routers, own = [], [], list(_sequences(batch))
    asked = {"output_router_logits": True} if routed else {}
    for tokens, count in own:
        outputs = _forward(lm, batch.input_ids[tokens][None], **asked)
        states.append(outputs.last_hidden_state[0, -count:])
        routers += [[logits.flatten(0, -2)[-count:] for logits in outputs.router_logits or ()]] if routed else []
    for _ in range(batch.sequences - len(own)):
        states.append(_forward(lm, batch.input_ids.new_zeros(1, FILLER_TOKENS)).last_hidden_state[0])
    layers = [torch.cat(parts) for parts in zip(*routers)] if routed else None
    return SimpleNamespace(last_hidden_state=torch.cat(states)[None], router_logits=layers)


def _sequences(batch: PackedBatch) -> Iterator[tuple[Int[Tensor, "n"], int]]:
    """Of each segment: where in the pack its prompt and answer are, and how many of these, at the end, are its own."""
    queries, keys = batch.cu_seqlens_q.tolist(), batch.cu_seqlens_k.tolist()
    every = torch.arange(len(batch.input_ids), device=batch.input_ids.device) if batch.kv_index is None else batch.kv_index
    for start, end, first, last in zip(queries, queries[1:], keys, keys[1:]):
        yield every[first:last], end - start


def read_on(lm: PreTrainedModel, passage: Passage) -> tuple[Any, Any]:
    """Whole sequences again for each token, padded behind their ends, which no token before sees: caches differ by family,
    and recurrent layers read padding before a sequence. The cache is what has been read."""
    if passage.cache is None:
        lengths, width = passage.attention_mask.sum(dim=1), passage.input_ids.shape[1]
        places = (torch.arange(width, device=lengths.device) + width - lengths[:, None]) % width
        ids = passage.input_ids.gather(1, places)
    else:
        ids, lengths = passage.cache
        ids = torch.cat([ids, ids.new_zeros(len(ids), 1)], dim=1).scatter(1, lengths[:, None], passage.input_ids)
        lengths = lengths + 1
    states = _forward(lm, ids).last_hidden_state
    last = (lengths - 1)[:, None, None].expand(-1, 1, states.shape[-1])
    return SimpleNamespace(last_hidden_state=states.gather(1, last)), (ids, lengths)


def _forward(lm: Any, ids: Int[Tensor, "B n"], **asked: Any) -> Any:
    return lm.base_model(input_ids=ids, **_without_cache(type(lm.base_model)), **asked)


@cache
def _without_cache(backbone: type) -> dict[str, bool]:
    """The argument by which a backbone keeps nothing, where it has one."""
    takes = inspect.signature(backbone.forward).parameters
    return {name: False for name in ("use_cache",) if name in takes}
