"""How a model of each kind reads a pack, and goes on reading behind it: all in which kinds of models differ for `packed`.

T tokens of a pack, of hidden size d; B sequences of a passage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from dspref.data.batch import PackedBatch
from dspref.model import alone, families, one_by_one, vision
from dspref.model.admission import backbone_of, refuse_layers_before_head
from dspref.model.attention import Segments
from dspref.model.generation import Passage


def _of_head(lm: PreTrainedModel) -> torch.Tensor | None:
    return getattr(lm.get_output_embeddings(), "bias", None)


@dataclass(frozen=True)
class Reader:
    """What must be known of a kind of model."""

    check: Callable[[PreTrainedModel], None]
    """Raises ConfigError for a model that `read` would not run as its authors do."""
    read: Callable[[PreTrainedModel, PackedBatch, Segments, bool], Any]
    """(model, pack, its segments, whether routers are asked for) -> what the backbone makes of a pack: `last_hidden_state`
    [1, T, d], and what its routers did."""
    read_on: Callable[[PreTrainedModel, Passage], tuple[Any, Any]]
    """-> what the backbone makes of a passage, `last_hidden_state` [B, T, d], and the cache behind it."""
    tell: Callable[[PreTrainedModel], None] = lambda lm: None
    """Has the model listen to what it is told of a pack beside its arguments."""
    head_bias: Callable[[PreTrainedModel], torch.Tensor | None] = _of_head
    """Of the vocabulary, [V]."""


def reader_of(config: PretrainedConfig, kernel: str) -> Reader:
    """By the kind of model that a config is of, and what computes its attention."""
    if kernel == alone.ALONE:
        return READERS["alone"]
    if families.is_encoder_decoder(config):
        return READERS["encoder-decoder"]
    return READERS["vision-language" if vision.is_vision(config) else "causal"]


# ---------------------------------------------------------------------------------------------------------------------
# Causal models, with a tower for images or without


def _read(lm: PreTrainedModel, batch: PackedBatch, segments: Segments, routed: bool) -> Any:
    if batch.images is not None:
        vision.family_of(lm.config)  # says why not
    return _backbone(lm, batch, segments, routed, batch.computed.position_ids[None])


def _read_on(lm: PreTrainedModel, passage: Passage, **seen: torch.Tensor) -> tuple[Any, Any]:
    """`seen`: further arguments of the backbone."""
    outputs = backbone_of(lm)(
        input_ids=passage.input_ids,
        attention_mask=passage.attention_mask,
        position_ids=passage.position_ids,
        past_key_values=passage.cache,
        use_cache=True,
        **seen,
    )
    return outputs, outputs.past_key_values


def _check_vision(lm: PreTrainedModel) -> None:
    vision.family_of(lm.config)
    refuse_layers_before_head(lm)


def _see(lm: PreTrainedModel, batch: PackedBatch, segments: Segments, routed: bool) -> Any:
    """The tower reads the images of a pack, each once, and the language model all sequences."""
    several_axes = batch.position_ids.ndim == 2
    with vision.shown(lm, batch.images) as seen:
        positions = batch.position_ids[:, None] if several_axes else batch.position_ids[None]
        return _backbone(lm, batch, segments, routed, positions, **seen)


def _see_on(lm: PreTrainedModel, passage: Passage) -> tuple[Any, Any]:
    with vision.shown(lm, passage.images) as seen:
        return _read_on(lm, passage, **seen)


def _backbone(
    lm: PreTrainedModel, batch: PackedBatch, segments: Segments, routed: bool, positions: torch.Tensor, **seen: Any
) -> Any:
    return backbone_of(lm)(
        input_ids=batch.computed.input_ids[None],
        position_ids=positions,
        use_cache=False,
        segments=segments,
        **seen,
        **({"output_router_logits": True} if routed else {}),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Encoder-decoder models


def _read_apart(lm: Any, batch: PackedBatch, segments: Segments, routed: bool) -> Any:
    """The encoder reads the prompts of a pack, each once, and the decoder the answers."""
    assert batch.prompts is not None, "a pack without prompts apart is for a model without an encoder"
    encoder, decoder = lm.get_encoder(), lm.get_decoder()
    try:
        families.place(encoder, batch.prompts.position_ids)
        families.place(decoder, batch.position_ids)
        prompts = encoder(input_ids=batch.prompts.input_ids[None], segments=segments)
        return decoder(
            input_ids=batch.input_ids[None], encoder_hidden_states=prompts.last_hidden_state, use_cache=False,
            segments=segments,
        )  # fmt: skip
    finally:
        families.place(encoder, None)
        families.place(decoder, None)


def _write_on(lm: Any, passage: Passage) -> tuple[Any, Any]:
    if passage.begins is not None:
        # Positions of an encoder begin with a row, and so must the prompts, which end together.
        padding = passage.attention_mask.shape[1] - passage.attention_mask.sum(dim=1, keepdim=True)
        places = (torch.arange(passage.input_ids.shape[1], device=padding.device) + padding) % passage.input_ids.shape[1]
        mask = passage.attention_mask.gather(1, places)
        states = lm.get_encoder()(input_ids=passage.input_ids.gather(1, places), attention_mask=mask).last_hidden_state
        read, past = passage.begins, None
    else:
        read, (states, mask, past) = passage.input_ids, passage.cache
    outputs = lm.get_decoder()(
        input_ids=read, encoder_hidden_states=states, encoder_attention_mask=mask, past_key_values=past, use_cache=True
    )
    return outputs, (states, mask, outputs.past_key_values)


def _final_bias(lm: PreTrainedModel) -> torch.Tensor | None:
    bias = getattr(lm, "final_logits_bias", None)
    return None if bias is None else bias[0]


READERS: dict[str, Reader] = {
    "causal": Reader(refuse_layers_before_head, _read, _read_on),
    "alone": Reader(refuse_layers_before_head, one_by_one.read, one_by_one.read_on),
    "vision-language": Reader(_check_vision, _see, _see_on, vision.tell),
    "encoder-decoder": Reader(
        lambda lm: families.refuse_other_family(lm.config), _read_apart, _write_on, families.tell, _final_bias
    ),
}
