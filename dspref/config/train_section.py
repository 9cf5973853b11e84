"""The `train` section: steps, optimizer, schedule, and when to evaluate and to stop."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dspref.config.section import Section


class StopWhenSection(Section):
    """Early stopping, by the evaluations of a run."""

    metric: str
    """A metric of an evaluation, such as eval_loss."""
    patience: Annotated[int, Field(gt=0)] = 3
    """So many evaluations in a row without progress end the run."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """What is no more than this is no progress."""
    direction: Literal["min", "max"] | None = None
    """Which way is progress; default: by the metric's name, losses down, accuracies, margins and rewards/chosen up."""


class ProfileSection(Section):
    """A profile of some steps, in RUN/profile."""

    steps: list[Annotated[int, Field(ge=1)]]
    """The first and the last optimizer step to profile, both included; the first of a run is 1."""


def profile_in_full(value: Any) -> Any:
    """`[5, 8]` and `5` may stand for the section."""
    if isinstance(value, dict) and is_step(value.get("steps")):
        return {**value, "steps": [value["steps"]] * 2}
    value = [value, value] if is_step(value) else value
    return {"steps": value} if isinstance(value, list) else value


def is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class TrainSection(Section):
    pairs_per_step: Annotated[int, Field(gt=0)] = 128
    """Pairs per optimizer step over all ranks: the global batch. Of answers that stand alone, lists and gold answers
    (objectives kto, bco, listwise, tpo) it counts rows."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training data; a fraction ends within an epoch."""
    max_steps: Annotated[int, Field(gt=0)] | None = None
    """Optimizer steps; overrides num_train_epochs."""
    overfit: Annotated[int, Field(gt=1)] | None = None
    """A check of settings and data: take the pairs of the first step so many times, and nothing else. Where the loss does
    not fall, the run ends with exit code 5."""
    dry_run: bool | None = None
    """Compute the largest pack, forward and backward, before the first step, so that memory that does not suffice is told
    then; nothing else changes. Default: on GPUs."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-7
    """Peak learning rate."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
        "cosine_with_min_lr",
    ] = "linear"  # fmt: skip
    """Schedule after warm-up, by its name in transformers."""
    lr_scheduler_kwargs: dict[str, Any] = {}
    """Further arguments of the schedule, such as min_lr_rate."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps in which the learning rate rises from 0, which is that of the first step, as in transformers."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """The same as a number of steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay, on matrices only."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's second moment."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this global L2 norm; 0 turns it off."""
    optim: Literal["adamw", "adamw_8bit", "cpu_adam"] = "adamw"
    """`adamw`: torch's; `adamw_8bit`: bitsandbytes', states in 8 bits, needs CUDA; `cpu_adam`: DeepSpeed's, for offloaded
    states (built with a C++ compiler on first use)."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Seed of data order, sampling, dropout and random weights."""
    eval_every: Annotated[int, Field(gt=0)] | None = None
    """Evaluate every so many steps; null: at the end only."""
    eval_at_start: bool | Literal["auto"] = "auto"
    """Evaluate the initial policy too, as step 0; auto: where held-out pairs are at most a tenth of those trained on."""
    stop_when: StopWhenSection | None = None
    """End the run early, as a finished one, when a held-out metric no longer improves. Step 0 does not count."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 3
    """A step whose loss or gradient is not finite changes nothing; so many in a row, and the next ends the run."""
    spike_sigmas: Annotated[float, Field(gt=0)] | None = None
    """Warn of a logged loss so many standard deviations above the 128 before it, such as 6; null: no watch."""
    profile: Annotated[
        ProfileSection | None,
        BeforeValidator(profile_in_full, json_schema_input_type=ProfileSection | list[int] | int | None),
    ] = None
    """Profile some steps with torch's profiler, `[5, 8]` or `5` for short: a trace of every rank, a table of operators, and
    on GPUs a memory snapshot, in RUN/profile. Weights stay the same to the bit."""
    hang_timeout: Annotated[float, Field(ge=0)] = 1800.0
    """Seconds without progress within a step or an evaluation after which the run is taken for hung; 0: never."""

    @property
    def asked_steps(self) -> int | None:
        """Optimizer steps of the run, where a number is asked for: epochs tell them else."""
        return self.overfit or self.max_steps
