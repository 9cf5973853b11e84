"""Encoder-decoder families whose packs can be run: how each begins an answer, what its head does, and where its modules
must be told that several sequences lie in a row.

transformers hands attention to `attention.packed_attention` for all of them. But positions are counted from the beginning of
a row, and the T5 family makes its position bias for all queries and keys of a row: of a pack, as large as its square. Such
modules get a forward of their own here, for packs alone; else they do as their authors wrote.
T tokens of a pack, H heads, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

from dspref.data.apart import Start
from dspref.errors import ConfigError
from dspref.model import vision
from dspref.model.attention import Segments, packed_attention

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Family:
    """What a family of encoder-decoder models has of its own."""

    has_bias: bool = False
    """Attention has a bias by distance, and no scale: the kernels that know no bias cannot do it."""
    wraps_last: bool = False
    """An answer's last token, the language, is the decoder's first (mBART); else the config has that."""
    scaled_by: str | None = None
    """The setting of its config by which hidden states are multiplied by 1 / sqrt(d) before the head."""


FAMILIES: dict[str, Family] = {
    "t5": Family(has_bias=True, scaled_by="scale_decoder_outputs"),
    "mt5": Family(has_bias=True),
    "umt5": Family(has_bias=True, scaled_by="tie_word_embeddings"),
    "bart": Family(),
    "mbart": Family(wraps_last=True),
    "marian": Family(),
    "m2m_100": Family(),
    "pegasus": Family(),
}


def refuse_other_kind(policy: PretrainedConfig, reference: PretrainedConfig) -> None:
    """Raise ConfigError for a reference that does not read what the policy reads."""
    if (vision.is_vision(policy) or vision.is_vision(reference)) and policy.model_type != reference.model_type:
        what = f"is a {reference.model_type} and does not read images as the policy does, a {policy.model_type}"
        raise ConfigError(f"model.name_or_path: {reference.name_or_path} {what}; use another reference")
    kinds = [is_encoder_decoder(config) and start_of_answers(config) for config in (policy, reference)]
    if kinds[0] != kinds[1]:
        if not all(kinds):
            what = "is an encoder-decoder model" if kinds[1] else "is no encoder-decoder model, as the policy is"
        else:
            what = "begins its answers with another token than the policy (decoder_start_token_id)"
        raise ConfigError(f"model.name_or_path: {reference.name_or_path} {what}; use another reference")


def start_of_answers(config: PretrainedConfig) -> Start:
    """What the decoder of a model reads before an answer. Raises ConfigError where its config does not say so."""
    family = FAMILIES[config.model_type]
    start = getattr(config, "decoder_start_token_id", None)
    if start is None and not family.wraps_last:
        reason = "config.json: decoder_start_token_id: missing; set it to the id that the decoder reads before an answer"
        raise ConfigError(f"model.name_or_path: {config.name_or_path}: {reason}")
    return Start(None if family.wraps_last else start)


def is_encoder_decoder(config: PretrainedConfig) -> bool:
    """Whether a model reads its prompt with an encoder, by its config."""
    return bool(getattr(config, "is_encoder_decoder", False)) and type(config) in AutoModelForSeq2SeqLM._model_mapping


def kind_of(config: PretrainedConfig) -> str:
    """decoder | encoder-decoder | vision"""
    if is_encoder_decoder(config):
        return "encoder-decoder"
    return "vision" if vision.is_vision(config) else "decoder"


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that makes a model of such a config."""
    if vision.is_vision(config) and not is_encoder_decoder(config):
        return AutoModelForImageTextToText
    return AutoModelForSeq2SeqLM if is_encoder_decoder(config) else AutoModelForCausalLM


def refuse_other_family(config: PretrainedConfig) -> None:
    """Raise ConfigError for an encoder-decoder or vision-language model whose packs cannot be run."""
    if vision.is_vision(config) and not is_encoder_decoder(config):
        vision.family_of(config)
    if is_encoder_decoder(config) and config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(
            f"model.name_or_path: {config.model_type} is an encoder-decoder model, and of these only {known} can be packed; "
            "use another model"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Modules that are told of a pack


class PackedPositions:
    """Of a module that embeds positions: those of `places`, where it is set, and not its row's."""

    places: Int[Tensor, "T"] | None = None

    def forward(self, *args: Any, **options: Any) -> Tensor:
        own: Any = self
        if self.places is None:
            return super().forward(*args, **options)  # type: ignore[misc]
        if isinstance(own, nn.Embedding):
            return nn.Embedding.forward(own, self.places[None] + getattr(own, "offset", 0))
        # M2M100, whose table grows with what it is asked for, and which does not count padding: from its ids, then.
        ids = (args[0] if args else options["input_ids"])[0]
        counts = ids.ne(own.padding_idx).long()
        before = counts.cumsum(0) - counts
        starts = torch.arange(len(ids), device=ids.device) - self.places
        rows = (before - before[starts] + 1) * counts + own.padding_idx
        if (size := int(self.places.max()) + own.padding_idx + 2) > len(own.weights):
            own.make_weights(size, own.embedding_dim, own.padding_idx)
        return own.weights[rows][None].detach()


class PackedBiasedAttention:
    """Of the T5 family's attention: the bias by distance once, and not for each query and key."""

    def forward(self, hidden_states: Float[Tensor, "1 T d"], *args: Any, **options: Any) -> Any:
        own: Any = self
        segments: Segments | None = options.get("segments")
        if segments is None:
            return super().forward(hidden_states, *args, **options)  # type: ignore[misc]
        read = next((options[name] for name in ("key_value_states", "encoder_hidden_states") if name in options), None)
        heads = [
            linear(states).view(1, states.shape[1], own.n_heads, own.key_value_proj_dim).transpose(1, 2)
            for linear, states in zip((own.q, own.k, own.v), [hidden_states] + [hidden_states if read is None else read] * 2)
        ]
        bias = options.get("position_bias")  # of the first layer, for those that have none of their own
        if own.has_relative_attention_bias:
            bias = self._by_distance(segments.of(own).batch.max_seqlen_k)
        query, key, value = heads
        rate = own.dropout if own.training else 0.0
        output, _ = packed_attention(
            own, query, key, value, None, scaling=1.0, dropout=rate, position_bias=bias, segments=segments
        )
        output = own.o(output.reshape(1, hidden_states.shape[1], -1))
        return (output, None) if _is_umt5(own) else (output, bias, None)

    def _by_distance(self, longest: int) -> Float[Tensor, "H 2L+1"]:
        """The bias at each distance of a key behind its query, from -L to L = longest."""
        own: Any = self
        weight = own.relative_attention_bias.weight
        distances = torch.arange(-longest, longest + 1, device=weight.device)
        told = {} if _is_umt5(own) else {
            "bidirectional": not own.is_decoder,
            "num_buckets": own.relative_attention_num_buckets,
            "max_distance": own.relative_attention_max_distance,
        }  # fmt: skip
        return own.relative_attention_bias(own._relative_position_bucket(distances, **told)).t()


def _is_umt5(attention: nn.Module) -> bool:
    """Its attention knows its buckets by itself, has a bias in every layer, and does not hand it on."""
    return type(attention).__name__ == "UMT5Attention"


# By the name of a module's class, or the end of it.
_TOLD = {"PositionalEmbedding": PackedPositions, "T5Attention": PackedBiasedAttention}


@cache
def _told(kind: type, more: type) -> type:
    return type(kind.__name__, (more, kind), {})


def tell(lm: PreTrainedModel) -> None:
    """Have a model's modules ask about packs; without one they do as before."""
    for module in lm.modules():
        for end, more in _TOLD.items():
            if type(module).__name__.endswith(end) and not isinstance(module, more):
                module.__class__ = _told(type(module), more)


def place(part: nn.Module, places: Int[Tensor, "T"] | None) -> None:
    """Say which positions the tokens of the next forward of an encoder or decoder have; None: the row's."""
    for module in part.children():
        if isinstance(module, PackedPositions):
            module.places = places
