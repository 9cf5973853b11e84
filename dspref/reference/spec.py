"""Which reference a run's sections ask for, in words and in files. Nothing of it is loaded here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from dspref.config import ModelSection, ReferenceSection
from dspref.model import adapters, loading
from dspref.model.adapters import Saved

# How far two passes of one model over a sequence may be apart, in nats per token: what other packs and kernels round.
ROUNDING = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class ReferenceSpec:
    """The reference that a run's sections ask for, and what decides how it is loaded."""

    section: ReferenceSection
    policy: ModelSection
    needed: bool
    """Whether the objective has a use for one."""
    strategy: Mapping[str, Any]
    """The run's DeepSpeed settings."""
    max_length: int | None = None
    """Tokens of the longest pair; None where the data decide."""

    @property
    def mode(self) -> str:
        """none, stored, engine or adapter."""
        return self.section.mode_where(self.needed)

    @property
    def is_another(self) -> bool:
        """Another model, or another adapter, than the policy began with."""
        return bool(self.section.name_or_path) or self.section.adapter_name not in (None, "base")


def in_words(spec: ReferenceSpec) -> str:
    """The mode, why, and the model, for the banner."""
    own, mode = spec.section, spec.mode
    if mode == "none":
        return "none needed"
    how = {
        "stored": "scored once, then no model in memory",
        "engine": "a live second model",
        "adapter": "the policy's model, live",
    }[mode]
    if own.sync_ref_model:
        how += f"; TR-DPO, alpha {own.ref_model_mixup_alpha:g} every {own.ref_model_sync_steps} steps"
    elif own.bema is not None:
        after = f" after step {own.bema.update_after}" if own.bema.update_after else ""
        how += f"; BEMA every {own.bema.moves_every} steps{after}"
    elif own.mode == "auto":
        how = "auto: " + (how if mode == "stored" else f"{how}, as reference.offload asks")
    return f"{mode} ({how}): {_who(spec)}"


def _who(spec: ReferenceSpec) -> str:
    own, adapter = spec.section, described(spec, "").adapter
    if own.name_or_path and (adapter is None or adapter.path != own.name_or_path):
        return own.name_or_path
    if adapter is None:
        return "the model without its adapter" if spec.policy.lora else "the initial policy"
    return "the initial policy" if adapter == adapters.own(spec.policy) else f"adapter {adapter.name} of {adapter.path}"


class Described(NamedTuple):
    """A reference: a model, and the adapter on it, if any."""

    section: ModelSection
    adapter: Saved | None


def described(spec: ReferenceSpec, weights: str) -> Described:
    """The model, and the adapter on it; `weights`: where the policy began."""
    own, policy = spec.section, spec.policy
    path, name = own.name_or_path, own.adapter_name or policy.adapter_name
    # What is trained of the policy is nothing to the reference, which may be of another family.
    changes: dict[str, Any] = {"router_aux_loss_coef": None, "router_aux_scope": "micro", "gradient_checkpointing": False}
    changes |= {"init": "pretrained", "lora": None, "adapter_name": "default", "dtype": own.dtype or policy.dtype}
    if own.dtype not in (None, policy.dtype):
        changes["attn_implementation"] = "auto"  # the policy's kernel may not know the other type
    if path and (own.mode == "adapter" or own.adapter_name or adapters.is_saved(path, name)):
        adapter = Saved(path, name)
    elif path:
        changes |= {"revision": None, "load_in_4bit": False}
        changes["liger"] = False  # which may not know its family
        return Described(policy.model_copy(update=changes | {"name_or_path": path}), None)
    elif own.adapter_name == "base" or policy.lora is None or policy.lora.path is None:
        adapter = None
    else:
        adapter = Saved(policy.lora.path, name)
    return Described(policy.model_copy(update=changes | {"name_or_path": weights or policy.name_or_path}), adapter)


def begins_as_policy(spec: ReferenceSpec) -> bool:
    """Whether the reference is made of the weights that the policy began with, alone or below an adapter."""
    beginning = "/the beginning"
    return described(spec, beginning).section.name_or_path == beginning


def first_step_tolerance(spec: ReferenceSpec) -> float | None:
    """How far reference and policy may differ at the first step, in nats per token, where they are one model in one type, so
    that the first loss is known; None where they are not."""
    lora, off = spec.policy.lora, spec.policy.disable_dropout
    if not policy_can_score(spec) or described(spec, "").adapter != adapters.own(spec.policy) or not off:
        return None
    # A fresh adapter adds nothing yet, whatever its dropout; a trained one does.
    silent = lora is None or (lora.init_lora_weights if lora.path is None else off == "all" or lora.lora_dropout == 0)
    return ROUNDING[spec.policy.dtype] if silent else None


def policy_can_score(spec: ReferenceSpec) -> bool:
    """Whether the policy, before its first step, can stand for the reference: as it is, or with its adapter off."""
    reference = described(spec, "")
    same_model = spec.section.name_or_path is None or reference.adapter is not None
    same_type = spec.section.dtype in (None, spec.policy.dtype)
    return same_model and same_type and reference.adapter in (None, adapters.own(spec.policy))


def digest(spec: ReferenceSpec, weights: str) -> str:
    """The content of the reference, wherever it lies; empty where none is needed."""
    if spec.mode == "none":
        return ""
    section, adapter = described(spec, weights)
    found = loading.content_digest(section)
    return found if adapter is None else hashlib.sha256((found + adapters.digest(adapter)).encode()).hexdigest()


def attach(spec: ReferenceSpec, seed: int) -> Callable[[Any], adapters.Adapters] | None:
    """What puts adapters into the policy's model: the one that is trained, and the reference's where that stays."""
    if spec.policy.lora is None:
        return None
    live = spec.mode == "adapter"
    adapter = described(spec, "").adapter
    return partial(adapters.for_training, section=spec.policy, seed=seed, reference=adapter, live=live)


def source_in_policy(spec: ReferenceSpec, weights: str, tensor: str) -> tuple[str, str]:
    """(key of the config, folder) that a tensor of the policy comes from; `weights`: where the policy began."""
    held, lora = adapters.name_in(tensor), spec.policy.lora
    if held is None or lora is None:
        return "model.name_or_path", weights
    if held != spec.policy.adapter_name:
        return source_in_reference(spec, weights, tensor)
    return ("model.lora.path", lora.path) if lora.path else ("model.lora", "a fresh adapter")


def source_in_reference(spec: ReferenceSpec, weights: str, tensor: str) -> tuple[str, str]:
    """The same of a tensor of the reference."""
    own, (section, adapter) = spec.section, described(spec, weights)
    if adapter and adapters.name_in(tensor):
        key = "reference.name_or_path" if own.name_or_path else "reference.adapter_name" if own.adapter_name else ""
        return key or "model.lora.path", adapter.path
    return ("model.name_or_path" if own.name_or_path is None or adapter else "reference.name_or_path"), section.name_or_path
