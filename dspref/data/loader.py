"""Optimizer steps: which packs this rank runs in step k, and the global counts that losses are divided by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil

import numpy as np

from dspref.data.ahead import ahead
from dspref.data.batch import PackedBatch, collate
from dspref.data.mismatched import Mismatched, Pairs
from dspref.data.plan import Groups, alone, group, order, pack, rows_per_epoch, steps_per_epoch
from dspref.data.store import PairStore
from dspref.data.whole_rows import examples_of, joined, numbered, rows_of_sources, starts

# Sharing pays for its gather of keys and values when it saves more than this share of the tokens.
SHARING_PAYS = 0.03
# A whole data set is planned in parts: packing takes more than linear time.
PAIRS_PER_SWEEP = 20_000


@dataclass(frozen=True)
class Packing:
    """How pairs are laid out for the ranks. Changing it changes speed and memory, never a loss."""

    tokens_per_pack: int
    prefix_sharing: bool
    rank: int = 0
    world_size: int = 1
    score_prompt: bool = False
    """Not a matter of speed: ORPO asks for the log-probs of prompts too."""
    takes: str = "pairs"
    """Nor is this: what a row becomes for the objective, as in `Family`."""
    part: int = 0
    parts: int = 1
    """Which this is of the ranks that hold a pack between them, and how many do: a `rank` is such a group then."""

    @property
    def by_rows(self) -> bool:
        return self.takes in ("list", "gold")

    def shared_by(self, parts: int) -> Packing:
        """Packs that `parts` ranks, one behind the other, hold between them, with room for so many times the tokens."""
        group, part = divmod(self.rank, parts)
        tokens, groups = parts * self.tokens_per_pack, self.world_size // parts
        return replace(self, tokens_per_pack=tokens, rank=group, world_size=groups, part=part, parts=parts)

    def own(self, batch: PackedBatch) -> PackedBatch:
        """A pack with this rank's part of it, where several hold it between them."""
        return batch if self.parts == 1 else replace(batch, own=batch.computed.cut(self.part, self.parts))


@dataclass(frozen=True)
class Step:
    """One optimizer step: this rank's packs, made when asked for, and the step's counts over all ranks."""

    number: int
    """From 1."""
    epoch: float
    """Passes over the data when the step is done."""
    num_packs: int
    packs: Iterable[PackedBatch]
    counts: dict[str, int]
    """`pairs`; `answers`; `chosen_tokens`, `rejected_tokens` (scored), `chosen_and_prompt_tokens` (no prompt's first);
    `tokens` (of prompt + answer, of each answer); where there are such, `mismatched_answers`, `lists` and `gold_tokens`,
    which are no `chosen_tokens`, nor are gold answers `pairs`."""
    fill: float
    """Computed tokens over the room in all packs of all ranks."""
    computed_tokens: int = 0
    """Of all ranks; tokens that pairs share count once."""
    attention_pairs: int = 0
    """(query, key) pairs of causal attention, of all ranks."""
    scored_tokens: int = 0
    """Tokens that meet the head, of all ranks; those that pairs share count once."""
    more: Mapping[str, float] = field(default_factory=dict)
    """As in `StepPacks`."""
    mismatched: Iterable[PackedBatch] = ()
    """This rank's packs of mismatched pairs, where they are asked for."""
    splits_lists: bool = False
    """Whether answers of one list run in several packs."""


@dataclass(frozen=True)
class StepLoader:
    """The training data as steps. Which pairs a step holds depends on neither the packing nor the lengths."""

    store: PairStore
    weights: Sequence[float]
    pairs_per_step: int
    seed: int
    shuffle: bool
    packing: Packing
    together: np.ndarray | None = None
    """Pairs with the same number lie side by side in a shuffled epoch."""
    again: bool = False
    """Every step holds the pairs of the first one."""
    mismatched: Mismatched | None = None
    """Of all steps of a run, one behind the other, where each step has a reference point made of them."""

    @cached_property
    def counted(self) -> Sequence[int]:
        """What steps are measured in, of each source: pairs, or rows where all that a row gives is in one step."""
        rows, of_sources = self.store.rows, self.store.source_rows
        return rows_of_sources(rows, of_sources) if self.packing.by_rows else of_sources

    @property
    def steps_per_epoch(self) -> int:
        return 1 if self.again else steps_per_epoch(self.counted, self.weights, self.pairs_per_step)

    def total_steps(self, num_train_epochs: float, max_steps: int | None) -> int:
        return max_steps or ceil(num_train_epochs * self.steps_per_epoch)

    def steps(self, done: int, total: int) -> Iterator[Step]:
        """Steps `done` + 1 to `total`, made while the one before is in use: resuming is an integer."""
        return ahead(self._steps(done, total))

    def _steps(self, done: int, total: int) -> Iterator[Step]:
        planned_epoch, plan = -1, []
        for number in range(done + 1, total + 1):
            epoch, k = divmod(number - 1, self.steps_per_epoch)
            if epoch != planned_epoch:
                plan, planned_epoch = self.epoch(epoch), epoch
            placed = place(self.store, plan[k], self.packing)
            packs = [batch.pinned() for batch in placed.packs(self.store, self.packing)]
            progress, counts = epoch + (k + 1) / self.steps_per_epoch, count(self.store, plan[k], self.packing.takes)
            others = self._mismatched(self.pairs_before(number - 1), len(plan[k]), counts)
            yield Step(
                number, progress, len(packs), packs, counts, placed.fill, placed.tokens, placed.attention, placed.scored,
                placed.more, others, placed.splits_lists,
            )  # fmt: skip

    def _mismatched(self, start: int, size: int, counts: dict[str, int]) -> list[PackedBatch]:
        """The packs of the mismatched pairs of a step, which are counted as `mismatched_answers`."""
        pairs = self.mismatched
        if pairs is None:
            return []
        counts["mismatched_answers"] = pairs.num_answers(slice(start, start + size))
        placed = place(pairs, np.arange(start, start + size), self.packing)
        return [batch.pinned() for batch in placed.packs(pairs, self.packing)]

    def pairs_before(self, done: int) -> int:
        """How many pairs steps 1 to `done` hold, counted each time."""
        pairs, (whole, rest) = rows_per_epoch(self.counted, self.weights), divmod(done, self.steps_per_epoch)
        return whole * (min(pairs, self.pairs_per_step) if self.again else pairs) + rest * self.pairs_per_step

    def with_mismatched(self, total: int) -> StepLoader:
        """The same, with the mismatched pairs of steps 1 to `total`."""
        epochs = [self.epoch(epoch) for epoch in range(ceil(total / self.steps_per_epoch))]
        steps = [step for epoch in epochs for step in epoch]
        return replace(self, mismatched=Mismatched.of_steps(self.store, steps[:total]))

    def pairs_of(self, done: int, total: int) -> np.ndarray:
        """The pairs that steps `done` + 1 to `total` hold, each once, in the order in which they first come: int64 [n]."""
        seen, found, per_epoch = np.zeros(len(self.store), dtype=bool), [np.arange(0)], self.steps_per_epoch
        for epoch in range(done // per_epoch, ceil(total / per_epoch)):
            if seen.all():
                break
            first = epoch * per_epoch
            held = np.concatenate([np.arange(0), *self.epoch(epoch)[max(done - first, 0) : total - first]])
            held = held[~seen[held]]
            found.append(held[np.sort(np.unique(held, return_index=True)[1])])  # a source of weight 2 comes twice
            seen[held] = True
        return np.concatenate(found)

    def tokens_of(self, done: int) -> int:
        """Tokens of prompt + chosen and of prompt + rejected answers in steps 1 to `done`."""
        whole, rest = divmod(done, self.steps_per_epoch)
        steps = [step for epoch in range(whole) for step in self.epoch(epoch)] + self.epoch(whole)[:rest]
        return sum(count(self.store, step)["tokens"] for step in steps)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The pairs of every step of an epoch."""
        number, together, by_rows = 0 if self.again else epoch, self.together, self.packing.by_rows
        if by_rows and together is not None:
            together = together[starts(self.store.rows)]
        steps = order(self.counted, self.weights, self.seed, number, self.pairs_per_step, self.shuffle, together)
        steps = steps[:1] if self.again else steps
        return [examples_of(self.store.rows, step) for step in steps] if by_rows else steps


def longest_pair(store: PairStore, prefix_sharing: bool) -> int:
    """Tokens of the longest pair, below which no pack gets."""
    lengths = store.lengths
    return int(((1 if prefix_sharing else 2) * lengths[:, 0] + lengths[:, 1] + lengths[:, 2]).max())


def count(store: PairStore, ids: np.ndarray, takes: str = "pairs") -> dict[str, int]:
    """Global counts of some examples. Every rank knows all lengths, so no rank asks another."""
    lengths, scored = store.computed[ids], store.scored[ids]
    prompt, *answers = lengths.sum(axis=0).tolist()
    chosen, rejected = scored.sum(axis=0).tolist()
    of_prompt, golds, more = (scored > 0).sum(axis=1), 0, {}
    if takes == "list":
        more["lists"] = int(starts(store.rows)[ids].sum())
    elif takes == "gold":
        gold = scored[:, 1] == 0
        more["gold_tokens"] = int(scored[gold, 0].sum())
        chosen, golds = chosen - more["gold_tokens"], int(gold.sum())
    return {
        "pairs": len(ids) - golds,
        "answers": int(of_prompt.sum()) - golds,
        "chosen_tokens": chosen,
        "rejected_tokens": rejected,
        "chosen_and_prompt_tokens": prompt - len(ids) + chosen,
        "tokens": int(of_prompt @ lengths[:, 0]) + sum(answers),
        **more,
    }


@dataclass(frozen=True)
class StepPacks:
    """Where some pairs run: `ids[rank][micro_step]`, and what all ranks compute together."""

    ids: list[list[np.ndarray]]
    tokens: int
    attention: int
    scored: int
    largest: int
    """Computed tokens of the largest pack."""
    fill: float
    """Computed tokens over the room in all packs."""
    waiting: float
    """Share of the time in which ranks wait for the slowest, were cost all."""
    more: Mapping[str, float] = field(default_factory=dict)
    """Of tokens and attention, what an encoder computes (`prompts`, `prompt_attention`, `cross_attention`); and beside them
    what a tower does, by names of its model."""
    most: Mapping[str, float] = field(default_factory=dict)
    """Of these, those of the largest pack; what a tower reads, of the pack that has most of it."""
    lists: list[list[np.ndarray]] | None = None
    """As `ids`, the number of the list that each example is of, where lists are trained on."""

    @property
    def splits_lists(self) -> bool:
        """Whether answers of one list are in several packs."""
        parts = [np.unique(own) for rank in self.lists or () for own in rank]
        return len(parts) > 0 and len(np.unique(np.concatenate(parts))) < sum(map(len, parts))

    def packs(self, store: Pairs, packing: Packing) -> Iterator[PackedBatch]:
        """The packs of this rank."""
        sharing, score_prompt = packing.prefix_sharing, packing.score_prompt
        # Of prompt + answer; all ranks know of all, so that none has to ask.
        answers = [[int((store.computed[ids][:, 1:] > 0).sum()) for ids in rank] for rank in self.ids]
        return (
            packing.own(collate(
                [store[i] for i in ids.tolist()], ids.tolist(), prefix_sharing=sharing, score_prompt=score_prompt,
                encoder_decoder=store.apart, pictures=store.pictures(ids.tolist()),
                given=store.given.of(ids.tolist()) | self._marks(store, packing, k), sequences=max(counts),
            ))
            for k, (ids, *counts) in enumerate(zip(self.ids[packing.rank], *answers))
        )  # fmt: skip

    def _marks(self, store: Pairs, packing: Packing, k: int) -> dict[str, np.ndarray]:
        """What says of the examples of a pack which of a row they are, by the fields of `PairLogps`."""
        ids = self.ids[packing.rank][k]
        if self.lists is not None:
            return {"list": self.lists[packing.rank][k], "opens": starts(store.rows)[ids].astype(np.int64)}
        return {"gold": (store.scored[ids, 1] == 0).astype(np.int64)} if packing.takes == "gold" else {}


def place(store: Pairs, ids: np.ndarray, packing: Packing) -> StepPacks:
    """Pairs -> packs on all ranks; pairs of one prompt as a group, where sharing is on."""
    lengths, scored, budget, world = store.computed[ids], store.scored[ids], packing.tokens_per_pack, packing.world_size
    shared = packing.prefix_sharing
    numbers = numbered(store.rows, ids) if packing.takes == "list" else None
    if shared:
        groups = group(store.same[ids], lengths, budget, scored, store.apart, numbers)
    else:
        groups = alone(lengths, scored, store.apart)
        groups = groups if numbers is None else joined(groups, numbers, budget)
    packs = pack(groups.tokens, budget, world, groups.cost)
    members = np.split(np.argsort(groups.of_pair, kind="stable"), np.cumsum(np.bincount(groups.of_pair))[:-1])
    load = np.array([[groups.cost[chosen].sum() for chosen in rank] for rank in packs])
    largest = max(int(groups.tokens[chosen].sum()) for rank in packs for chosen in rank)
    tokens, room = int(groups.tokens.sum()), load.size * budget
    prompts = (tokens - int(groups.answers.sum())) // (1 if packing.prefix_sharing else 2) - len(groups.tokens)
    at = [[np.concatenate([np.arange(0), *(members[g] for g in chosen)]) for chosen in rank] for rank in packs]
    placed = [[ids[own] for own in rank] for rank in at]
    reads = _encoded(groups, packs) if store.apart else store.tower_work(own.tolist() for rank in placed for own in rank)
    most = reads if not store.apart else [max(reads, key=lambda own: own["tokens"])]
    return StepPacks(
        placed,
        tokens,
        int(groups.attention.sum()),
        int(groups.scored.sum()) + prompts * packing.score_prompt,
        largest,
        tokens / room,
        1 - float(load.sum() / max(world * load.max(axis=0).sum(), 1)),
        {name: sum(own[name] for own in reads) for name in reads[0] if name != "tokens"} if reads else {},
        {name: max(own[name] for own in most) for name in reads[0] if name != "tokens"} if reads else {},
        None if numbers is None else [[numbers[own] for own in rank] for rank in at],
    )


def _encoded(groups: Groups, packs: Sequence[Sequence[np.ndarray]]) -> list[dict[str, float]]:
    """What an encoder computes in each pack."""
    parts = {
        "tokens": groups.tokens, "prompts": groups.tokens - groups.answers,
        "prompt_attention": groups.within, "cross_attention": groups.across,
        "attention": groups.attention - groups.within - groups.across,
    }  # fmt: skip
    return [{name: float(x[chosen].sum()) for name, x in parts.items()} for rank in packs for chosen in rank]


def sweep(store: Pairs, packing: Packing) -> Iterator[tuple[float, PackedBatch]]:
    """This rank's packs over every pair of a store, once, each with the share of the store that is then done."""
    for ids in swept(store):
        placed = place(store, ids, packing)
        for k, batch in enumerate(placed.packs(store, packing), start=1):
            yield (int(ids[0]) + len(ids) * k / len(placed.ids[0])) / len(store), batch


def swept(store: Pairs) -> list[np.ndarray]:
    """Every pair of a store, in the parts that a sweep plans one after another."""
    starts = range(0, len(store), PAIRS_PER_SWEEP)
    return [np.arange(start, min(start + PAIRS_PER_SWEEP, len(store))) for start in starts]


def sharing_pays(store: PairStore, together: np.ndarray | None) -> bool:
    """Whether computing prompts once saves enough tokens to be worth it, and with `together`, pairs that surely meet, the
    answers that these share."""
    if store.apart:
        return True  # by the model's own design
    company = np.arange(len(store)) if together is None else together
    same = store.same.copy()
    same[:, 0] += company * (int(same.max(initial=0)) + 1)
    shared, separate = group(same, store.lengths, tokens_per_pack=2**62), alone(store.lengths)
    return bool(shared.tokens.sum() < (1 - SHARING_PAYS) * separate.tokens.sum())
