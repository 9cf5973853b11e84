"""The policy and the reference as transformers models, wrapped so that a forward takes a pack and gives log-probs.

A training step sees no transformers model; DeepSpeed wraps `PackedCausalLM`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
)

from dspref.config import ModelSection
from dspref.data.batch import PackedBatch
from dspref.errors import ConfigError
from dspref.model import families, freezing, router, vision
from dspref.model.adapters import Adapters
from dspref.model.admission import NOT_PACKED, refuse_layers_before_head, router_coefficient
from dspref.model.attention import Segments
from dspref.model.generation import Passage
from dspref.model.logps import HeadTransform, TokenLogps, counted, scored_logps
from dspref.model.router import Routing


class PackedCausalLM(nn.Module):
    """A causal LM whose forward maps a `PackedBatch` to the log-probs of its C scored tokens."""

    def __init__(
        self,
        lm: PreTrainedModel,
        kernel: str,
        published_config: PretrainedConfig | None = None,
        attached: Adapters | None = None,
    ) -> None:
        super().__init__()
        self._check(lm)
        self.lm = lm
        self.kernel = kernel
        self.adapters = attached
        self.transform = head_transform(lm.config)
        # As the model's authors wrote it, before dropout was turned off: what an export writes.
        self.published_config = published_config or lm.config
        # What costs more and only some runs ask for; see `prepare_for_training`.
        self.with_collision = False
        self.router_aux_loss_coef = 0.0

    def forward(self, batch: PackedBatch | Passage, only_logps: bool = False, with_statistics: bool = False) -> Any:
        """log p of each scored token, and what the routers did, where their loss is trained.

        `only_logps`: as a reference, which is asked for nothing else; `with_statistics`: entropies and hits too, which are
        for people to look at. Of a passage: logits [B, V] behind it, and the cache.
        It comes through the same door as packs, since ZeRO-3 follows the forwards of the outermost module.
        """
        if isinstance(batch, Passage):
            return self._read_on(batch)
        return self._logps(batch, only_logps, with_statistics)

    def _logps(self, batch: PackedBatch, only_logps: bool, with_statistics: bool) -> tuple[TokenLogps, Routing | None]:
        routed = bool(self.router_aux_loss_coef) and not only_logps
        segments = Segments(batch, self.kernel)
        outputs = self._read(batch, segments, routed)
        if not segments.seen:
            raise ConfigError(f"model.name_or_path: {self.lm.config.model_type} {NOT_PACKED}")
        # ZeRO-3 gathers a parameter for the module whose forward reads it: read the head here, once, on every rank.
        head: Any = self.lm.get_output_embeddings()
        scored = scored_logps(
            outputs.last_hidden_state[0][batch.predictor_index],
            head.weight,
            self._head_bias(),
            batch.targets,
            self.transform,
            self.with_collision and not only_logps,
            with_statistics,
        )
        return counted(scored, batch), self._routing(outputs, batch) if routed else None

    def _check(self, lm: PreTrainedModel) -> None:
        """Raise ConfigError for a model that the forward here would not run as its authors do."""
        refuse_layers_before_head(lm)

    def _read(self, batch: PackedBatch, segments: Segments, routed: bool) -> Any:
        """What the backbone makes of a pack: `last_hidden_state` [1, T, d], and what its routers did where asked for."""
        if batch.images is not None:
            vision.family_of(self.lm.config)  # says why not
        return self.lm.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            segments=segments,
            **({"output_router_logits": True} if routed else {}),
        )

    def _head_bias(self) -> torch.Tensor | None:
        return getattr(self.lm.get_output_embeddings(), "bias", None)

    def _read_on(self, passage: Passage) -> tuple[torch.Tensor, Any]:
        outputs = self.lm.base_model(
            input_ids=passage.input_ids,
            attention_mask=passage.attention_mask,
            position_ids=passage.position_ids,
            past_key_values=passage.cache,
            use_cache=True,
        )
        return self._logits(outputs), outputs.past_key_values

    def _logits(self, outputs: Any) -> torch.Tensor:
        """[B, V] behind the last token that was read."""
        head: Any = self.lm.get_output_embeddings()
        logits = torch.nn.functional.linear(outputs.last_hidden_state[:, -1], head.weight, self._head_bias())
        return self.transform(logits.float())

    def _routing(self, outputs: Any, batch: PackedBatch) -> Routing:
        if not outputs.router_logits:
            untold = f"transformers {transformers.__version__} does not tell what they did"
            raise ConfigError(f"model.router_aux_loss_coef: no layer of this model has experts, or {untold}; set 0")
        top_k: Any = self.lm.num_experts_per_tok
        return router.routing(outputs.router_logits, top_k, batch.multiplicity.float())


class PackedSeq2SeqLM(PackedCausalLM):
    """An encoder-decoder model: its encoder reads the prompts of a pack, each once, and its decoder the answers."""

    def __init__(self, lm: PreTrainedModel, *args: Any) -> None:
        super().__init__(lm, *args)
        families.tell(lm)

    def _check(self, lm: PreTrainedModel) -> None:
        families.refuse_other_family(lm.config)

    def _read(self, batch: PackedBatch, segments: Segments, routed: bool) -> Any:
        lm: Any = self.lm
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

    def _read_on(self, passage: Passage) -> tuple[torch.Tensor, Any]:
        lm: Any = self.lm
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
        return self._logits(outputs), (states, mask, outputs.past_key_values)

    def _head_bias(self) -> torch.Tensor | None:
        bias = getattr(self.lm, "final_logits_bias", None)
        return None if bias is None else bias[0]


class PackedVisionLM(PackedCausalLM):
    """A vision-language model: its tower reads the images of a pack, each once, and its language model all sequences."""

    def __init__(self, lm: PreTrainedModel, *args: Any) -> None:
        super().__init__(lm, *args)
        vision.tell(lm)

    def _check(self, lm: PreTrainedModel) -> None:
        vision.family_of(lm.config)
        super()._check(lm)

    def _read(self, batch: PackedBatch, segments: Segments, routed: bool) -> Any:
        base: Any = self.lm.base_model
        several_axes, images = batch.position_ids.ndim == 2, batch.images
        try:
            base.of_pack = images
            return base(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[:, None] if several_axes else batch.position_ids[None],
                use_cache=False,
                segments=segments,
                **(vision.read(images, self.lm.config) if images else {}),
                **({"output_router_logits": True} if routed else {}),
            )
        finally:
            base.of_pack = None


def wrapped(
    lm: PreTrainedModel,
    kernel: str,
    published_config: PretrainedConfig | None = None,
    attached: Adapters | None = None,
) -> PackedCausalLM:
    """A model ready to be run over packs, by its kind."""
    kind = PackedCausalLM
    if families.is_encoder_decoder(lm.config):
        kind = PackedSeq2SeqLM
    elif vision.is_vision(lm.config):
        kind = PackedVisionLM
    return kind(lm, kernel, published_config, attached)


def head_transform(config: PretrainedConfig) -> HeadTransform:
    """Scaling and soft cap of the logits, under the names that families give them."""
    text = config.get_text_config()
    family = families.FAMILIES.get(config.model_type) if families.is_encoder_decoder(config) else None
    if family is not None:
        scaled = family.scaled_by is not None and getattr(config, family.scaled_by, False)
        return HeadTransform(text.d_model**-0.5 if scaled else 1.0)
    scale = getattr(text, "logit_scale", None) or 1.0  # Cohere
    if (divisor := getattr(text, "logits_scaling", None)) is not None:  # Granite
        scale /= divisor
    return HeadTransform(scale, getattr(text, "final_logit_softcapping", None))


# ---------------------------------------------------------------------------------------------------------------------
# Ready to be trained, or asked


def prepare_for_training(model: PackedCausalLM, section: ModelSection, with_collision: bool) -> PackedCausalLM:
    """Set the policy up; `with_collision`: its forward gives the collision entropy of every scored token too."""
    model.train()
    if model.adapters is None:
        _freeze_again(model.lm)
        _freeze(model.lm, section.freeze)
    model.with_collision = with_collision
    model.router_aux_loss_coef = router_coefficient(section, model.lm)
    if section.gradient_checkpointing:
        _recompute_activations(model.lm)
    return model


def _recompute_activations(lm: PreTrainedModel) -> None:
    # transformers 5.23 warns of the second name, and 5.17 has no other.
    enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _freeze_again(lm: PreTrainedModel) -> None:
    """Some parameters are made frozen, such as the bias of a router's choice; transformers forgets that on loading."""
    with torch.device("meta"):
        skeleton = type(lm)(copy.deepcopy(lm.config))
    for name, parameter in skeleton.named_parameters():
        if not parameter.requires_grad:
            lm.get_parameter(name).requires_grad_(False)


def _freeze(lm: PreTrainedModel, patterns: Sequence[str]) -> None:
    named = dict(lm.named_parameters(remove_duplicate=False))
    for name in freezing.frozen(named, patterns):
        named[name].requires_grad_(False)


def frozen_with(lm: PreTrainedModel, patterns: Sequence[str]) -> list[str]:
    """Names of parameters that no pattern means, and that are frozen as they are the same as one that is meant."""
    named = dict(lm.named_parameters(remove_duplicate=False))
    meant = freezing.chosen(named, patterns)
    same = {id(named[name]) for name in meant}
    return [name for name, parameter in named.items() if name not in meant and id(parameter) in same]


def prepare_for_evaluation(model: PackedCausalLM, section: ModelSection, with_collision: bool) -> PackedCausalLM:
    """Set a model up that is evaluated as a policy is, and not trained."""
    model.with_collision = with_collision
    model.router_aux_loss_coef = router_coefficient(section, model.lm)
    return model.requires_grad_(False).eval()


def prepare_as_reference(model: PackedCausalLM) -> PackedCausalLM:
    return model.requires_grad_(False).eval()
