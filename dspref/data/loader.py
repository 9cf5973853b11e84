"""Optimizer steps: which packs this rank runs in step k, and the global counts that losses are divided by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from dspref.data.batch import PackedBatch, collate, computed_tokens
from dspref.data.plan import group, order, pack, steps_per_epoch
from dspref.data.store import PairStore

# Sharing pays for its gather of keys and values when it saves more than this share of the tokens.
SHARING_PAYS = 0.03
# A whole data set is planned in parts: packing takes more than linear time.
PAIRS_PER_SWEEP = 20_000


@dataclass(frozen=True)
class Layout:
    """How pairs are laid out for the ranks. Changing it changes speed and memory, never a loss."""

    tokens_per_pack: int
    prefix_sharing: bool
    rank: int = 0
    world_size: int = 1
    score_prompt: bool = False
    """Not a matter of speed: ORPO asks for the log-probs of prompts too."""


@dataclass(frozen=True)
class Step:
    """One optimizer step: this rank's packs, made when asked for, and the step's counts over all ranks."""

    number: int
    """From 1."""
    epoch: float
    """Passes over the data when the step is done."""
    num_packs: int
    packs: Iterator[PackedBatch]
    counts: dict[str, int]
    """`pairs`; `chosen_tokens`, `rejected_tokens` (scored), `chosen_and_prompt_tokens` (without a prompt's first);
    `tokens` (of prompt + answer, both answers)."""
    fill: float
    """Computed tokens over the room in all packs of all ranks."""


@dataclass(frozen=True)
class StepLoader:
    """The training data as steps. Which pairs a step holds depends on neither the layout nor the lengths."""

    store: PairStore
    weights: Sequence[float]
    pairs_per_step: int
    seed: int
    shuffle: bool
    layout: Layout
    together: np.ndarray | None = None
    """Pairs with the same number lie side by side in a shuffled epoch."""

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.store.source_rows, self.weights, self.pairs_per_step)

    def total_steps(self, num_train_epochs: float, max_steps: int | None) -> int:
        return max_steps or ceil(num_train_epochs * self.steps_per_epoch)

    def steps(self, done: int, total: int) -> Iterator[Step]:
        """Steps `done` + 1 to `total`: resuming is an integer."""
        planned_epoch, plan = -1, []
        for number in range(done + 1, total + 1):
            epoch, k = divmod(number - 1, self.steps_per_epoch)
            if epoch != planned_epoch:
                plan = order(
                    self.store.source_rows, self.weights, self.seed, epoch, self.pairs_per_step, self.shuffle, self.together
                )
                planned_epoch = epoch
            num_packs, packs, fill = packs_of(self.store, plan[k], self.layout)
            progress = epoch + (k + 1) / self.steps_per_epoch
            yield Step(number, progress, num_packs, packs, count(self.store, plan[k]), fill)


def count(store: PairStore, ids: np.ndarray) -> dict[str, int]:
    """Global counts of some pairs. Every rank knows all lengths, so no rank asks another."""
    prompt, chosen, rejected = store.lengths[ids].sum(axis=0).tolist()
    return {
        "pairs": len(ids),
        "chosen_tokens": chosen,
        "rejected_tokens": rejected,
        "chosen_and_prompt_tokens": prompt - len(ids) + chosen,
        "tokens": 2 * prompt + chosen + rejected,
    }


def packs_of(store: PairStore, ids: np.ndarray, layout: Layout) -> tuple[int, Iterator[PackedBatch], float]:
    """(number of packs per rank, this rank's packs over some pairs, fill of all packs)."""
    groups, tokens = groups_of(store, ids, layout)
    by_group = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups, minlength=len(tokens)))[:-1])
    packs = pack(tokens, layout.tokens_per_pack, layout.world_size)[layout.rank]
    members = [np.concatenate([ids[:0], *(ids[by_group[g]] for g in pack_groups)]) for pack_groups in packs]
    room = len(members) * layout.world_size * layout.tokens_per_pack
    how = {"prefix_sharing": layout.prefix_sharing, "score_prompt": layout.score_prompt}
    batches = (collate([store[i] for i in m.tolist()], m.tolist(), **how) for m in members)
    return len(members), batches, float(tokens.sum()) / room


def groups_of(store: PairStore, ids: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """(group of each pair, computed tokens of each group): pairs that share a prompt, where sharing is on."""
    if layout.prefix_sharing:
        return group(store.same[ids], store.lengths[ids], layout.tokens_per_pack)
    return np.arange(len(ids)), computed_tokens(store.lengths[ids], False)


def sweep(store: PairStore, layout: Layout) -> Iterator[tuple[float, PackedBatch]]:
    """This rank's packs over every pair of a store, once, each with the share of the store that is then done."""
    for start in range(0, len(store), PAIRS_PER_SWEEP):
        ids = np.arange(start, min(start + PAIRS_PER_SWEEP, len(store)))
        num_packs, packs, _ = packs_of(store, ids, layout)
        for k, batch in enumerate(packs, start=1):
            yield (start + len(ids) * k / num_packs) / len(store), batch


def sharing_pays(store: PairStore) -> bool:
    """Whether computing each prompt once saves enough tokens to be worth it."""
    separate = computed_tokens(store.lengths, prefix_sharing=False).sum()
    return bool(computed_tokens(store.lengths, prefix_sharing=True).sum() < (1 - SHARING_PAYS) * separate)
