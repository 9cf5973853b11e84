"""Mismatched pairs: the prompts of some examples with the answers of others, from which KTO estimates how far the policy has
moved. They are pairs like any other to packing and to the reference; nothing is stored for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np

from dspref.data.given_store import Given
from dspref.data.images import Pictures
from dspref.data.plan import numbered_by_sight
from dspref.data.store import PairStore
from dspref.data.truncate import TokenizedPair


def partners(prompts: np.ndarray) -> np.ndarray:
    """Whose answer each example of a step gets, int64 [P]: that of the one before it, the first that of the last. Where
    prompts come more than once, examples are ordered by prompts, those that come first first, and the answers move on by as
    many as the most frequent prompt has: each is used once, and unless that has more than half of the step, none meets its
    own prompt. `prompts` [P]: equal numbers for equal prompts."""
    count = len(prompts)
    numbers = numbered_by_sight(prompts)
    most = int(np.bincount(numbers).max(initial=1))
    shift = most if most < count else 1  # of one prompt alone the answers go round
    ordered = np.argsort(numbers, kind="stable")
    found = np.empty(count, dtype=np.int64)
    found[ordered] = np.roll(ordered, shift)
    return found


class Mismatched:
    """Prompts of pairs of a store with answers of others: entry k is prompt `prompts[k]` with all answers of
    `answers[k]`. An answer loses its end where both are longer than the store's max_length, or where that has none, than
    any example."""

    def __init__(self, pairs: PairStore, prompts: np.ndarray, answers: np.ndarray) -> None:
        self.pairs, self.prompts, self.answers = pairs, prompts, answers
        self.apart, self.reads_images, self.given = pairs.apart, pairs.reads_images, Given(None, len(prompts))
        self.lengths = pairs.lengths[answers].copy()
        self.lengths[:, 0] = pairs.lengths[prompts, 0]
        if not self.apart:
            room = (pairs.report["max_length"] or pairs.report["longest"]) - self.lengths[:, :1]
            self.lengths[:, 1:] = np.minimum(self.lengths[:, 1:], room)

    @classmethod
    def of_steps(cls, pairs: PairStore, steps: Sequence[np.ndarray]) -> Mismatched:
        """Of the pairs of each step, one step behind the other."""
        prompts = np.concatenate([np.arange(0), *steps])
        others = [step[partners(pairs.same[step, 0])] for step in steps]
        return cls(pairs, prompts, np.concatenate([np.arange(0), *others]))

    @classmethod
    def of_all(cls, pairs: PairStore) -> Mismatched:
        """Of a held-out set, all of which is looked at together."""
        return cls.of_steps(pairs, [np.arange(len(pairs))])

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> TokenizedPair:
        prompt, own = self.pairs[int(self.prompts[index])].prompt, self.pairs[int(self.answers[index])]
        chosen, rejected = self.lengths[index, 1:].tolist()
        masks = (None if mask is None else mask[:n] for mask, n in zip(own[3:], (chosen, rejected)))
        return TokenizedPair(prompt, own.chosen[:chosen], own.rejected[:rejected], *masks)

    @property
    def rows(self) -> np.ndarray:
        """The row that each prompt comes from."""
        return self.pairs.rows[self.prompts]

    @property
    def computed(self) -> np.ndarray:
        return np.maximum(self.lengths - np.array([0, 1, 1]), 0) if self.apart else self.lengths

    @cached_property
    def scored(self) -> np.ndarray:
        """Scored tokens of both answers, int64 [n, 2]."""
        found = self.pairs.scored[self.answers].copy()
        if not self.apart and self.pairs.flat_mask() is None:
            return self.lengths[:, 1:]
        for k in np.flatnonzero((self.lengths[:, 1:] < self.pairs.lengths[self.answers, 1:]).any(axis=1)).tolist():
            pair = self[k]
            masks = zip(self.lengths[k, 1:].tolist(), pair[3:])
            found[k] = [n if mask is None else np.count_nonzero(mask) for n, mask in masks]
        return found

    @cached_property
    def same(self) -> np.ndarray:
        """Numbers [n, 3] as in `PairStore`: equal only where content is."""
        of_prompt, of_answers = self.pairs.same[self.prompts, 0], self.pairs.same[self.answers, 1:]
        both = of_prompt[:, None] * (int(self.pairs.same.max(initial=0)) + 1) + of_answers
        return np.column_stack([of_prompt, np.unique(both, return_inverse=True)[1].reshape(both.shape)])

    def num_answers(self, entries: slice = slice(None)) -> int:
        """How many answers with a scored token some entries have."""
        return int((self.scored[entries] > 0).sum())

    def bounds(self, rows: np.ndarray) -> np.ndarray:
        """Where prompt, chosen and rejected of some entries lie among all ids of the store, int64 [n, 3, 2]."""
        found = self.pairs.bounds(self.answers[rows])
        found[:, 0] = self.pairs.bounds(self.prompts[rows])[:, 0]
        found[:, :, 1] = found[:, :, 0] + self.lengths[rows]
        return found

    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        return self.pairs.flat()

    def flat_mask(self) -> np.ndarray | None:
        return self.pairs.flat_mask()

    def pictures(self, pairs: Sequence[int]) -> Pictures | None:
        return self.pairs.pictures(self.prompts[list(pairs)].tolist())

    def image_digests(self, pairs: Sequence[int]) -> list[bytes]:
        return self.pairs.image_digests(self.prompts[list(pairs)].tolist())

    def tower_work(self, packs: Iterable[Sequence[int]]) -> list[Mapping[str, float]]:
        return self.pairs.tower_work(self.prompts[list(pairs)].tolist() for pairs in packs)

    def where(self, index: int) -> str:
        return self.pairs.where(int(self.prompts[index]))


Pairs = PairStore | Mismatched
"""What packs are made of, and a reference is asked about."""
