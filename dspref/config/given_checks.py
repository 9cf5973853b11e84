"""What must hold between the numbers that rows give of their pairs (weights, margins, scores) and the losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dspref.config.data_section import SCORES, DataSection, SourceSection
from dspref.config.sound import KeyPath
from dspref.objectives import OBJECTIVES, as_list
from dspref.objectives.families import Loss

Complaint = tuple[KeyPath, str]

NAMES = ("weight", "margin", *SCORES)
RANKS = "rank answers, and what reads their scores asks how far they are apart; name columns.scores"


def check_given(data: DataSection, objective: Any) -> Iterator[Complaint]:
    names = as_list(objective.loss_type)
    found = {name: OBJECTIVES[objective.name].loss(name) for name in names}
    of_lists = OBJECTIVES[objective.name].takes == "list"
    for own, source in data.placed():
        yield from _of_weights(source, own, found)
        yield from _of_margins(source, own, found)
        if not of_lists:  # which read scores of any kind
            yield from _of_scores(source, own, [name for name, loss in found.items() if loss.scores])


def _of_weights(source: SourceSection, own: KeyPath, found: Mapping[str, Loss]) -> Iterator[Complaint]:
    keys = [(*own, "columns", "weight")] if source.columns.weight else []
    keys += [(*own, "pair_weights")] if source.pair_weights else []
    ordered = next((name for name, loss in found.items() if loss.ordered), None)
    if len(keys) > 1:
        yield keys[1], "makes the weights that columns.weight names; give one of them"
    elif keys and ordered:
        yield (
            keys[0],
            f"does not go with loss_type {ordered}, which sorts its values: none belongs to a pair with a weight",
        )
    elif keys and all(loss.normaliser == "tokens" for loss in found.values()):
        yield keys[0], f"has no effect on loss_type {', '.join(found)}, a mean over tokens; weights are those of comparisons"


def _of_margins(source: SourceSection, own: KeyPath, found: Mapping[str, Loss]) -> Iterator[Complaint]:
    if source.columns.margin and not any(loss.targeted for loss in found.values()):
        takers = {kind for family in OBJECTIVES.values() for kind, loss in family.losses.items() if loss.targeted}
        reason = f"has no effect on loss_type {', '.join(found)}; a target margin is for {', '.join(sorted(takers))}"
        yield (*own, "columns", "margin"), reason


def _of_scores(source: SourceSection, own: KeyPath, readers: Sequence[str]) -> Iterator[Complaint]:
    """`readers`: the losses that read scores."""
    columns = source.columns
    named = [name for name in SCORES if getattr(columns, name)]
    several = [name for name in ("completions", "scores") if getattr(columns, name)]
    if named and not readers and source.pair_weights is None:
        uses = "a loss of rpo_sq, rpo_bwd_kl and rpo_fwd_kl, listwise and pair_weights: score_gap read scores"
        yield (*own, "columns", named[0]), f"has no effect here: {uses}"
    elif named and several:
        yield (
            (*own, "columns", named[0]),
            f"is for pairs of two answers; columns.{several[0]} has several and their scores",
        )
    if columns.ranks and source.pair_weights:
        yield (*own, "pair_weights"), f"cannot be had of columns.ranks, which {RANKS}"
    elif columns.ranks and readers:
        yield (*own, "columns", "ranks"), f"does not go with loss_type {readers[0]}: they {RANKS}"
