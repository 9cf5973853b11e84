"""The policy and the reference as transformers models, wrapped so that a forward takes a pack and gives log-probs.

A training step sees no transformers model; DeepSpeed wraps `PackedCausalLM`.
"""

from __future__ import annotations

import contextlib
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
from dspref.data.slices import Part
from dspref.errors import ConfigError
from dspref.model import exchange, families, freezing, host_inputs, readers, router
from dspref.model.adapters import Adapters
from dspref.model.admission import BEFORE_HEAD, NOT_PACKED, router_coefficient
from dspref.model.attention import Segments
from dspref.model.exchange import Group
from dspref.model.generation import Passage
from dspref.model.logps import HeadTransform, TokenLogps, counted, scored_logps
from dspref.model.router import Routing


class PackedCausalLM(nn.Module):
    """A language model whose forward maps a `PackedBatch` to the log-probs of its C scored tokens; by its `reader`, also one
    with an encoder, or with a tower for images."""

    def __init__(
        self,
        lm: PreTrainedModel,
        kernel: str,
        published_config: PretrainedConfig | None = None,
        attached: Adapters | None = None,
    ) -> None:
        super().__init__()
        self.reader = readers.reader_of(lm.config, kernel)
        self.reader.check(lm)
        self.reader.tell(lm)
        self.lm = lm
        self.kernel = kernel
        self.adapters = attached
        self.transform = head_transform(lm.config)
        # As the model's authors wrote it, before dropout was turned off: what an export writes.
        self.published_config = published_config or lm.config
        # What costs more and only some runs ask for; see `prepare_for_training`.
        self.with_collision = False
        self.router_aux_loss_coef = 0.0
        # On routers that transformers does not know, where there are such.
        self.ears: router.Ears | None = None
        # Ranks that hold packs between them, where there are such.
        self.group: Group | None = None

    def forward(self, batch: PackedBatch | Passage, only_logps: bool = False, with_statistics: bool = False) -> Any:
        """log p of each scored token, and what the routers did, where their loss is trained.

        `only_logps`: as a reference, which is asked for nothing else; `with_statistics`: entropies and hits too, which are
        for people to look at. Of a passage: logits [B, V] behind it, and the cache.
        It comes through the same door as packs, since ZeRO-3 follows the forwards of the outermost module.
        """
        if isinstance(batch, Passage):
            outputs, cache = self.reader.read_on(self.lm, batch)
            return self._logits(outputs), cache
        return self._logps(batch, only_logps, with_statistics)

    def _logps(self, batch: PackedBatch, only_logps: bool, with_statistics: bool) -> tuple[TokenLogps, Routing | None]:
        routed = bool(self.router_aux_loss_coef) and not only_logps
        own, group = batch.computed, self.group if batch.own else None
        assert group or not batch.own, "a pack that several ranks hold is for a model that knows them"
        segments = Segments(batch, self.kernel, group=group)
        with self.ears.open() if self.ears else contextlib.nullcontext() as heard:
            outputs = self.reader.read(self.lm, batch, segments, routed)
        if not segments.seen:
            raise ConfigError(f"model.name_or_path: {self.lm.config.model_type} {NOT_PACKED}")
        # ZeRO-3 gathers a parameter for the module whose forward reads it: read the head here, once, on every rank.
        scored = scored_logps(
            self._before_head(outputs.last_hidden_state[0][own.predictor_index]),
            *self._head(),
            own.targets,
            self.transform,
            self.with_collision and not only_logps,
            with_statistics,
        )
        if group:
            scored = exchange.of_all(scored, own.scored, len(batch.targets), group)  # type: ignore[arg-type]
        return counted(scored, batch), self._routing(heard or outputs.router_logits, own) if routed else None

    def _logits(self, outputs: Any) -> torch.Tensor:
        """[B, V] behind the last token that was read."""
        hidden = self._before_head(outputs.last_hidden_state[:, -1])
        return self.transform(torch.nn.functional.linear(hidden, *self._head()).float())

    def _before_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., d] as the head reads it."""
        layer = BEFORE_HEAD.get(self.lm.config.model_type)
        return hidden if layer is None else self.lm.get_submodule(layer)(hidden)

    def _head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [V, d] and bias [V] of the words that there are: some have more rows, for the sake of round numbers."""
        head: Any = self.lm.get_output_embeddings()
        weight, bias = head.weight, self.reader.head_bias(self.lm)
        words = getattr(self.lm.config.get_text_config(), "unpadded_vocab_size", None)
        return (weight, bias) if words is None else (weight[:words], None if bias is None else bias[:words])

    def _routing(self, logits: Sequence[torch.Tensor], own: Part) -> Routing:
        if not logits:
            untold = f"transformers {transformers.__version__} does not tell what they did"
            raise ConfigError(f"model.router_aux_loss_coef: no layer of this model has experts, or {untold}; set 0")
        top_k: Any = self.lm.num_experts_per_tok
        return router.routing(logits, top_k, own.multiplicity.float())


def head_transform(config: PretrainedConfig) -> HeadTransform:
    """Scaling and soft cap of the logits, under the names that families give them."""
    text = config.get_text_config()
    family = families.FAMILIES.get(config.model_type) if families.is_encoder_decoder(config) else None
    if family is not None:
        scaled = family.scaled_by is not None and getattr(config, family.scaled_by, False)
        return HeadTransform(text.d_model**-0.5 if scaled else 1.0)
    scale = getattr(text, "logit_scale", None) or 1.0  # Cohere
    scale *= getattr(text, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    scale /= getattr(text, "logits_mup_width_multiplier", None) or 1.0  # Inkling
    if (given := getattr(text, "logits_scaling", None)) is not None:  # Granite and others; HyperCLOVA X multiplies by it
        scale = scale * given if text.model_type == "hyperclovax" else scale / given
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM
    return HeadTransform(scale, next((cap for name in caps if (cap := getattr(text, name, None))), None))


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
    if section.gradient_checkpointing == "offload":
        host_inputs.move_out(model.lm)
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
