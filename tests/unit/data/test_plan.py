"""`order` and `pack` as properties over random steps, seeded."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from math import ceil

import numpy as np
import pytest

from dspref.data.batch import computed_tokens
from dspref.data.plan import QUADRATIC_TOKENS, alone, group, order, pack, rows_per_epoch, steps_per_epoch

# ------------------------------------------------------------------------------------------------------------ order


def ids(steps: list[np.ndarray]) -> list[int]:
    return np.concatenate(steps).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_every_pair_comes_once_per_epoch(seed: int) -> None:
    draws = np.random.default_rng(seed)
    rows = draws.integers(1, 40, draws.integers(1, 4)).tolist()
    pairs_per_step = int(draws.integers(1, 20))
    for shuffle in (True, False):
        steps = order(rows, [1.0] * len(rows), seed, int(draws.integers(5)), pairs_per_step, shuffle)
        assert sorted(ids(steps)) == list(range(sum(rows)))
        assert [len(step) for step in steps[:-1]] == [pairs_per_step] * (len(steps) - 1)
        assert 1 <= len(steps[-1]) <= pairs_per_step


def test_without_shuffle_step_k_holds_the_next_pairs_of_the_files() -> None:
    steps = order([5, 6], [1.0, 1.0], seed=3, epoch=2, pairs_per_step=4, shuffle=False)
    assert [step.tolist() for step in steps] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


@pytest.mark.parametrize("seed", range(30))
def test_the_number_of_steps_is_known_beforehand(seed: int) -> None:
    draws = np.random.default_rng(seed)
    sources = int(draws.integers(1, 4))
    rows, weights = draws.integers(1, 60, sources).tolist(), draws.choice([0.3, 0.5, 1, 1.7, 2, 2.5], sources).tolist()
    pairs_per_step = int(draws.integers(1, 33))
    steps = order(rows, weights, seed, 0, pairs_per_step)
    assert len(ids(steps)) == rows_per_epoch(rows, weights)
    assert len(steps) == steps_per_epoch(rows, weights, pairs_per_step) == ceil(len(ids(steps)) / pairs_per_step)


@pytest.mark.parametrize(("rows", "pairs_per_step", "steps"), [(128, 128, 1), (129, 128, 2), (127, 128, 1), (256, 128, 2)])
def test_steps_per_epoch_rounds_up(rows: int, pairs_per_step: int, steps: int) -> None:
    assert steps_per_epoch([rows], [1.0], pairs_per_step) == steps


@pytest.mark.parametrize("shuffle", [True, False])
def test_weight_two_and_a_half_is_twice_whole_and_half_once_more(shuffle: bool) -> None:
    """And a source of weight 1 beside it is left alone."""

    def sampled(seed: int, epoch: int) -> set[int]:
        counts = Counter(ids(order([20, 10], [2.5, 1.0], seed, epoch, 8, shuffle)))
        assert {i: counts[i] for i in range(20, 30)} == dict.fromkeys(range(20, 30), 1)
        assert sorted(counts[i] for i in range(20)) == [2] * 10 + [3] * 10
        return {i for i in range(20) if counts[i] == 3}

    assert sampled(1, 0) == sampled(1, 0)
    assert sampled(1, 0) != sampled(2, 0)
    assert sampled(1, 0) != sampled(1, 1)


def test_weight_below_one_samples_without_repeats() -> None:
    drawn = ids(order([100], [0.25], seed=0, epoch=0, pairs_per_step=7))
    assert len(drawn) == len(set(drawn)) == 25


def test_without_shuffle_a_sample_keeps_the_order_of_the_file() -> None:
    drawn = ids(order([50], [0.5], seed=9, epoch=0, pairs_per_step=50, shuffle=False))
    assert drawn == sorted(drawn)
    assert drawn != list(range(25))


def test_order_depends_on_seed_and_epoch() -> None:
    orders = [tuple(ids(order([40], [1.0], seed, epoch, 8))) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert tuple(range(40)) not in orders


def test_order_depends_on_nothing_else() -> None:
    """Not on the size of the steps, and not on numpy's global random state, which it leaves alone."""
    first = ids(order([30, 7], [1.5, 1.0], 5, 1, pairs_per_step=4))
    np.random.seed(123)
    before = np.random.get_state()[1].tolist()
    assert ids(order([30, 7], [1.5, 1.0], 5, 1, pairs_per_step=11)) == first
    assert np.random.get_state()[1].tolist() == before


def test_shuffle_mixes_the_sources() -> None:
    first_step = order([500, 500], [1.0, 1.0], seed=0, epoch=0, pairs_per_step=100)[0]
    assert 30 < (first_step < 500).sum() < 70


def test_golden_order() -> None:
    """A resumed run must meet the pairs that the interrupted one would have met, whatever version started it."""
    steps = order([6, 4], [1.5, 1.0], seed=42, epoch=1, pairs_per_step=5)
    assert [step.tolist() for step in steps] == [[4, 3, 9, 3, 5], [8, 0, 2, 2, 1], [6, 7, 5]]


@pytest.mark.parametrize("weight", [1.0, 2.5])
@pytest.mark.parametrize("seed", range(10))
def test_what_belongs_together_lies_side_by_side(seed: int, weight: float) -> None:
    """Each pass over a group is one run of the epoch, in the order of the file; nothing is lost, and the seed decides."""
    draws = np.random.default_rng(seed)
    together = draws.integers(0, 8, 30)
    drawn = ids(order([30], [weight], seed, 0, 7, together=together))
    assert Counter(drawn).keys() == set(range(30)) and len(drawn) == rows_per_epoch([30], [weight])
    for number in range(8):
        places = [place for place, pair in enumerate(drawn) if together[pair] == number]
        runs = 1 + sum(b != a + 1 for a, b in pairwise(places))
        assert runs <= ceil(weight)
    if weight == 1.0:
        assert drawn == [i for n in dict.fromkeys(together[drawn].tolist()) for i in np.flatnonzero(together == n).tolist()]
    assert drawn != ids(order([30], [weight], seed + 1, 0, 7, together=together))


def test_prompts_stay_together_over_sources_and_in_samples() -> None:
    for seed in range(10):
        drawn = ids(order([3, 3], [1.0, 1.0], seed, 0, 6, together=np.array([0, 1, 2, 0, 1, 2])))
        assert [drawn[i] % 3 for i in (0, 2, 4)] == [drawn[i] % 3 for i in (1, 3, 5)]
        half = ids(order([600], [0.5], seed, 0, 600, together=np.arange(600) // 6))
        assert len(half) == 300 and len({pair // 6 for pair in half}) == 50


def test_pairs_that_belong_to_nobody_are_shuffled_as_ever() -> None:
    alone = order([50, 20], [1.5, 1.0], seed=3, epoch=1, pairs_per_step=8)
    numbered = order([50, 20], [1.5, 1.0], seed=3, epoch=1, pairs_per_step=8, together=np.arange(70))
    assert ids(alone) == ids(numbered)


# ------------------------------------------------------------------------------------------------------------ group


def some_groups(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(same, lengths) of pairs of few prompts with four answers each."""
    draws = np.random.default_rng(seed)
    count = int(draws.integers(1, 30))
    prompts, answers = draws.integers(0, 5, count), np.array([draws.choice(4, 2, replace=False) for _ in range(count)])
    same = np.concatenate([100 + prompts[:, None], 10 * prompts[:, None] + answers], axis=1)
    sizes = draws.integers(1, 50, 200)
    return same, sizes[same]


@pytest.mark.parametrize("budget", [60, 150, 10**6])
@pytest.mark.parametrize("seed", range(30))
def test_a_group_computes_its_prompt_and_each_answer_once(seed: int, budget: int) -> None:
    """Against a slow count; and no group exceeds the budget but a single pair, nor mixes prompts."""
    same, lengths = some_groups(seed)
    scored = (lengths[:, 1:] + 1) // 2
    groups, tokens, attention, answers, targets, *_ = group(same, lengths, budget, scored)
    assert np.array_equal(group(same, lengths, budget).scored, answers), "without a mask every token is scored"
    assert sorted(set(groups.tolist())) == list(range(len(tokens)))
    for number, counted in enumerate(tokens.tolist()):
        members = np.flatnonzero(groups == number)
        distinct = {int(s): int(n) for i in members for s, n in zip(same[i], lengths[i])}
        assert counted == sum(distinct.values())
        p, *sizes = (size for _, size in sorted(distinct.items(), reverse=True))  # prompts have the largest numbers
        assert attention[number] == p * (p + 1) // 2 + sum(a * p + a * (a + 1) // 2 for a in sizes)
        assert answers[number] == sum(sizes)
        assert targets[number] == sum((size + 1) // 2 for size in sizes)
        assert len(set(same[members, 0].tolist())) == 1
        assert counted <= budget or len(members) == 1
    if budget == 10**6:
        assert len(tokens) == len(set(same[:, 0].tolist()))


def test_pairs_without_common_prompts_stay_as_they_are() -> None:
    same, lengths = np.arange(30).reshape(10, 3), np.full((10, 3), 5)
    groups, tokens, *_ = group(same[::-1], lengths, 100)
    assert groups.tolist() == list(range(10)) and tokens.tolist() == [15] * 10
    assert [len(x) for x in group(same[:0], lengths[:0], 100)] == [0] * 7


def test_a_pair_by_itself_computes_its_prompt_twice() -> None:
    groups = alone(np.array([[3, 2, 4], [1, 1, 1]]), np.array([[2, 1], [1, 1]]))
    assert groups.of_pair.tolist() == [0, 1]
    assert groups.tokens.tolist() == [5 + 7, 4]
    assert groups.attention.tolist() == [15 + 28, 3 + 3]
    assert groups.answers.tolist() == [6, 2]
    assert groups.scored.tolist() == [3, 2]


def some_answers(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(lengths, scored) of examples with one answer or two."""
    draws = np.random.default_rng(seed)
    lengths = draws.integers(1, 40, (int(draws.integers(1, 20)), 3))
    side = draws.integers(0, 3, len(lengths))  # 0: both
    lengths[side == 1, 1] = lengths[side == 2, 2] = 0
    return lengths, (lengths[:, 1:] + 1) // 2


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_an_answer_that_is_not_there_computes_nothing(seed: int, apart: bool) -> None:
    """Against a slow count over the answers: of a prompt by itself once for each of them, and of a group once."""
    lengths, scored = some_answers(seed)
    each = alone(lengths, scored, apart)
    same = np.arange(lengths.size).reshape(lengths.shape)
    shared = group(same, lengths, 10**6, scored, apart)
    for k, (p, *both) in enumerate(lengths.tolist()):
        answers = [size for size in both if size]
        inside = p * p if apart else p * (p + 1) // 2
        triangles = sum(a * (a + 1) // 2 for a in answers)
        for found, prompts in ((each, len(answers)), (shared, 1)):
            assert found.tokens[k] == prompts * p + sum(answers)
            assert found.attention[k] == prompts * inside + sum(a * p for a in answers) + triangles
            assert found.answers[k] == sum(answers)
            assert found.scored[k] == sum((a + 1) // 2 for a in answers)
            assert found.within[k] == prompts * inside
            assert found.across[k] == p * sum(answers)
    assert np.array_equal(computed_tokens(lengths, False), each.tokens)
    assert np.array_equal(computed_tokens(lengths, True), shared.tokens)


def test_what_an_encoder_decoder_does_not_compute_is_the_last_token_of_each_answer() -> None:
    lengths = np.array([[5, 3, 4], [5, 3, 0], [5, 0, 4]])
    assert computed_tokens(lengths, False, True).tolist() == [10 + 2 + 3, 5 + 2, 5 + 3]
    assert computed_tokens(lengths, True, True).tolist() == [5 + 2 + 3, 5 + 2, 5 + 3]


@pytest.mark.parametrize("seed", range(20))
def test_groups_of_single_answers_fit_the_budget(seed: int) -> None:
    """Of one prompt with many answers, each of which stands alone."""
    draws = np.random.default_rng(seed)
    count = int(draws.integers(2, 30))
    lengths = np.stack([np.full(count, 20), draws.integers(1, 40, count), np.zeros(count, dtype=np.int64)], axis=1)
    same = np.stack([np.zeros(count, dtype=np.int64), np.arange(1, count + 1), np.full(count, 999)], axis=1)
    found = group(same, lengths, 100)
    assert found.tokens.sum() == 20 * len(found.tokens) + lengths[:, 1].sum()
    assert all(tokens <= 100 for tokens in found.tokens.tolist())
    assert found.answers.sum() == found.scored.sum() == lengths[:, 1].sum()


# ------------------------------------------------------------------------------------------------------------- pack


def lognormal(count: int, seed: int, longest: int = 4096) -> np.ndarray:
    """Tokens of pairs as chat data has them: median about 800, a long tail, cut at `longest`."""
    return np.clip(np.random.default_rng(seed).lognormal(6.7, 0.7, count), 20, longest).astype(np.int64)


def cost(members: np.ndarray, lengths: np.ndarray) -> float:
    return float((lengths[members] + lengths[members] ** 2 / QUADRATIC_TOKENS).sum())


def flat(packs: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [members for rank in packs for members in rank]


@pytest.mark.parametrize("seed", range(60))
def test_pack_holds_what_it_promises(seed: int) -> None:
    """Every pair once; the same number of packs on every rank; no pack beyond the budget but a single longer pair."""
    draws = np.random.default_rng(seed)
    lengths = draws.integers(1, 200, draws.integers(0, 60))
    budget, world_size = int(draws.integers(50, 800)), int(draws.integers(1, 9))
    packs = pack(lengths, budget, world_size)
    assert len(packs) == world_size
    assert len({len(rank) for rank in packs}) == 1
    assert len(packs[0]) >= 1
    assert sorted(np.concatenate(flat(packs)).tolist()) == list(range(len(lengths)))
    for members in flat(packs):
        assert members.dtype == np.int64
        assert lengths[members].sum() <= budget or len(members) == 1


@pytest.mark.parametrize("seed", range(200))
def test_costs_of_any_kind_break_no_budget(seed: int) -> None:
    """What is dear may be short: groups of many short answers beside one long pair."""
    draws = np.random.default_rng(seed)
    lengths, budget = draws.integers(1, 90, draws.integers(2, 12)), 100
    packs = flat(pack(lengths, budget, int(draws.integers(1, 4)), draws.integers(1, 90, len(lengths))))
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(lengths)))
    assert all(lengths[members].sum() <= budget for members in packs)


def test_a_pair_beyond_the_budget_is_alone_in_its_pack() -> None:
    packs = pack(np.array([10, 500, 10, 10, 300]), tokens_per_pack=100, world_size=1)
    assert sorted(members.tolist() for members in flat(packs)) == [[0, 2, 3], [1], [4]]


@pytest.mark.parametrize("pairs", [0, 1, 3])
def test_ranks_without_pairs_get_a_filler(pairs: int) -> None:
    packs = pack(np.full(pairs, 10), tokens_per_pack=100, world_size=4)
    assert [len(rank) for rank in packs] == [1] * 4
    assert sorted(len(members) for members in flat(packs)) == [0] * (4 - pairs) + [1] * pairs


def test_pack_is_deterministic_and_takes_any_sequence_of_lengths() -> None:
    lengths = lognormal(128, seed=0)
    first, again, from_list = (pack(x, 8192, 4) for x in (lengths, lengths.copy(), lengths.tolist()))
    for left, middle, right in zip(flat(first), flat(again), flat(from_list)):
        assert left.tolist() == middle.tolist() == right.tolist()


def test_one_rank_and_many_have_the_same_pairs_to_run() -> None:
    """World size moves pairs about and never changes which there are."""
    lengths = lognormal(100, seed=1)
    for world_size in (1, 2, 3, 8, 200):
        assert sorted(np.concatenate(flat(pack(lengths, 4096, world_size))).tolist()) == list(range(100))


def next_fit(lengths: np.ndarray, budget: int, world_size: int) -> int:
    """Micro-steps that taking pairs as they come would need: a new pack whenever the next pair does not fit."""
    packs, fill = 1, 0
    for length in lengths.tolist():
        if fill and fill + length > budget:
            packs, fill = packs + 1, 0
        fill += length
    return ceil(packs / world_size)


@pytest.mark.parametrize("world_size", [1, 8])
def test_pack_needs_fewer_packs_than_taking_pairs_as_they_come(world_size: int) -> None:
    ours, naive = [], []
    for seed in range(40):
        lengths = lognormal(256, seed)
        ours.append(len(pack(lengths, 8192, world_size)[0]))
        naive.append(next_fit(lengths, 8192, world_size))
    assert all(a <= b for a, b in zip(ours, naive))
    assert sum(ours) < sum(naive)


@pytest.mark.parametrize("world_size", [1, 4])
def test_packs_are_full(world_size: int) -> None:
    """At most one micro-step more than if pairs could be cut, and 97 % full where there are many."""
    for seed in range(20):
        lengths = lognormal(512, seed)
        micro_steps = len(pack(lengths, 16384, world_size)[0])
        assert micro_steps <= ceil(lengths.sum() / (16384 * world_size)) + 1
    many = lognormal(4096, seed=0)
    assert many.sum() / (len(flat(pack(many, 16384, world_size))) * 16384) >= 0.97


@pytest.mark.parametrize("pairs", [64, 128, 512])
def test_eight_ranks_wait_little_for_each_other(pairs: int) -> None:
    """Sum over micro-steps of the dearest rank's cost, over the mean: 1 would be no waiting at all."""
    for seed in range(20):
        lengths = lognormal(pairs, seed)
        costs = np.array([[cost(members, lengths) for members in rank] for rank in pack(lengths, 16384, 8)])
        assert 8 * costs.max(axis=0).sum() / costs.sum() <= 1.05


def test_packs_of_like_cost_run_side_by_side() -> None:
    """Packs of 80, 60, 50 and 50 on two ranks: waiting for the dearest costs 80 + 50, and 60 + 80 out of order."""
    lengths = np.array([60, 50, 50, 40, 40])
    packs = pack(lengths, tokens_per_pack=100, world_size=2)
    loads = [[int(lengths[rank[m]].sum()) for rank in packs] for m in range(2)]
    assert loads == [[80, 60], [50, 50]]


def test_balance_counts_the_quadratic_cost() -> None:
    """One pair of 40k tokens costs as much as 70k tokens of short pairs: its rank gets fewer of them."""
    lengths = np.array([40_000] + [1_000] * 100)
    packs = pack(lengths, tokens_per_pack=10**6, world_size=2)
    long, short = sorted((rank[0] for rank in packs), key=len)
    assert 0 in long
    assert lengths[long].sum() < lengths[short].sum()
    assert cost(long, lengths) == pytest.approx(cost(short, lengths), rel=0.02)
