"""The section of a run's reference: where its log-probs come from, and how it may follow the policy."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dspref.config.paths import FilePath
from dspref.config.section import Section


class BemaSection(Section):
    """BEMA: names, meaning and defaults of the keys are those of TRL's BEMACallback."""

    update_freq: Annotated[int, Field(gt=0)] = 400
    """Optimizer steps between two updates of the average."""
    ema_power: Annotated[float, Field(ge=0)] = 0.5
    """Step t has the share beta_t = (lag + multiplier t)^-ema_power in the average; 0: all of it, so nothing is averaged."""
    bias_power: Annotated[float, Field(ge=0)] = 0.2
    """The average lags behind, so alpha_t = (lag + multiplier t)^-bias_power times what the policy has moved since the
    beginning is added to it; with a large bias_power nothing is."""
    lag: Annotated[int, Field(ge=1)] = 10
    """The age at step 0, which makes early updates smoother."""
    update_after: Annotated[int, Field(ge=0)] = 0
    """The beginning is the policy after this step; 0: the initial policy."""
    multiplier: Annotated[float, Field(ge=0)] = 1.0
    """Of the step in the age; 0: beta and alpha do not change."""
    min_ema_multiplier: Annotated[float, Field(ge=0, le=1)] = 0.0
    """beta_t is no less than this."""
    ref_model_update_freq: Annotated[int, Field(gt=0)] | None = None
    """Optimizer steps between two moves of the reference to the average, a multiple of update_freq; default: update_freq."""

    @property
    def moves_every(self) -> int:
        """Optimizer steps between two moves of the reference."""
        return self.ref_model_update_freq or self.update_freq


def bema_in_full(value: Any) -> Any:
    """`true`: BEMA with every default; `false`: none."""
    return ({} if value else None) if isinstance(value, bool) else value


OneBema = Annotated[BemaSection | None, BeforeValidator(bema_in_full, json_schema_input_type=BemaSection | bool | None)]


class ReferenceSection(Section):
    mode: Literal["auto", "stored", "engine", "adapter", "none"] = "auto"
    """Where reference log-probs come from. `stored`: computed once before training; `engine`: a second model, live;
    `adapter`: the policy's model with its adapter off, or with another adapter on."""
    name_or_path: FilePath | None = None
    """The reference: a model, or a LoRA adapter of the policy's model (one on the hub needs adapter_name or
    `mode: adapter` to be taken as such); default: the policy's initial weights."""
    adapter_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] | None = None
    """Which saved adapter the reference has, of those in reference.name_or_path or model.lora.path; `base`: none."""
    offload: Literal["none", "cpu"] = "none"
    """`cpu`: a live reference keeps its weights in host memory."""
    zero_stage: Literal[0, 3] | None = None
    """Stage of a live reference: 3 shards it, 0 keeps a whole copy on each rank. Default: 3 if the policy is at 3."""
    dtype: Literal["bfloat16", "float32", "float16"] | None = None
    """Type of the reference's weights; default: the policy's."""
    store: FilePath | None = None
    """Folder of the stored log-probs, which runs share; default: in the cache ($DSPREF_CACHE/reference)."""
    tokens_per_pack: Annotated[int, Field(ge=1)] | None = None
    """Computed tokens per rank and pack while log-probs are scored for the store; default: twice data.tokens_per_pack, as
    nothing is kept for a backward pass; on a CPU once."""
    sync_ref_model: bool = False
    """TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656): every ref_model_sync_steps the reference moves to the policy."""
    ref_model_mixup_alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """TR-DPO: share of the policy in the new reference."""
    ref_model_sync_steps: Annotated[int, Field(gt=0)] = 512
    """TR-DPO: optimizer steps between two syncs."""
    bema: OneBema = None
    """BEMA (Block and Zhang 2025, arXiv:2508.00180): the reference follows as the bias-corrected moving average of the
    policy; true: with every default."""

    @property
    def moved_by(self) -> Literal["sync_ref_model", "bema"] | None:
        """The key that lets the reference follow the policy; None where it stays as it is."""
        return "bema" if self.bema is not None else "sync_ref_model" if self.sync_ref_model else None

    def mode_where(self, needed: bool) -> str:
        """none, stored, engine or adapter, where the objective has a use for a reference or not. `auto` is the cheapest that
        is exact: none where none is needed, else stored."""
        if self.mode != "auto":
            return self.mode
        if not needed:
            return "none"
        # Offloading is for a model that stays, and what moves cannot be stored.
        return "engine" if self.offload == "cpu" or self.moved_by else "stored"
