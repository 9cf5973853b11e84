"""What does not go together with experts that ranks hold between them (deepspeed.expert_parallel).

Which models they are for is told by `model.expert_parallel`, and by `engine.misfits` which ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dspref.config import strategy
from dspref.config.ds_keys import EXPERTS
from dspref.config.objective_checks import Complaint
from dspref.config.reference_section import ReferenceSection
from dspref.config.sections import ModelSection, ParallelSection

WITHOUT = f"or drop deepspeed.{EXPERTS}"


def check_experts(
    settings: Mapping[str, Any], model: ModelSection, parallel: ParallelSection, reference: ReferenceSection, optim: str
) -> Iterator[Complaint]:
    """`settings`: those of DeepSpeed."""
    if not strategy.spreads_experts(settings):
        return
    if model.lora:
        yield ("model", "lora"), f"no adapter can be put on experts that ranks share; drop it, {WITHOUT}"
    if model.freeze:
        reason = "DeepSpeed's checkpoints lack frozen weights beside experts that ranks share"
        yield ("model", "freeze"), f"{reason}; drop it, {WITHOUT}"
    if parallel.sequence > 1:
        yield ("parallel", "sequence"), f"has not been tried with experts that ranks share; use 1, {WITHOUT}"
    if moved_by := reference.moved_by:
        reason = "mixes weights that must lie alike in policy and reference, and experts that ranks share do not"
        yield ("reference", moved_by), f"{reason}; drop it, {WITHOUT}"
    if optim != "adamw":
        yield ("train", "optim"), f"has not been tried with experts that ranks share; use adamw, {WITHOUT}"
