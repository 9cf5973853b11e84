"""What the steps of a run work with, made once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dspref.config import ModelSection, TrainSection
from dspref.data.loader import Packing
from dspref.data.store import PairStore
from dspref.engine.engine import Engine
from dspref.reference.modes import Reference
from dspref.report import console
from dspref.report.metrics import Recorder
from dspref.report.profiling import Profile
from dspref.run.best import Rule
from dspref.run.folder import RunFolder
from dspref.run.saving import Saver
from dspref.training.answers import Asking
from dspref.training.gradient import StepLoss
from dspref.watch.watch import Watch


@dataclass(frozen=True)
class Session:
    """What the steps of a run work with, made once."""

    model: ModelSection
    train: TrainSection
    log_every: int
    save_every: int | None
    first_step_tolerance: float | None
    """How far policy and reference may differ at step 1 (`spec.first_step_tolerance`)."""
    run: RunFolder
    policy: Engine
    reference: Reference
    loss: StepLoss
    pairs: PairStore
    sources: Sequence[str]
    """What the sources of `pairs` are called."""
    held_out: Mapping[str, PairStore]
    packing: Packing
    recorder: Recorder
    view: console.ProgressView
    watch: Watch
    saver: Saver
    profile: Profile
    rule: Rule | None = None
    """By which evaluations are judged."""
    asking: Asking | None = None
    """The prompts that are answered on the way."""
