"""Mismatched pairs: whose answer an example gets; to lengths, masks, packs and keys they are pairs like any other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_store import write
from tiny import rows_of_turns, save_tokenizer
from transformers import AutoTokenizer

from dspref.data.batch import computed_tokens
from dspref.data.loader import Packing, StepLoader, count, place
from dspref.data.mismatched import Mismatched, partners
from dspref.data.store import PairStore, load_pairs
from dspref.data.tokenize import Limits
from dspref.reference.store import sequence_keys


def by_loop(prompts: Sequence[int]) -> list[int]:
    """Examples stand in line by their prompts, and look back over as many as the most frequent prompt has."""
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    line = [i for group in groups.values() for i in group]
    back = max(map(len, groups.values())) if len(groups) > 1 else 1
    found = {i: line[place - back] for place, i in enumerate(line)}
    return [found[i] for i in range(len(prompts))]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([], []),
        ([7], [0]),  # nothing else is there
        ([7, 7], [1, 0]),
        ([3, 3, 3], [2, 0, 1]),  # no other prompt is there
        ([0, 1], [1, 0]),
        ([0, 1, 2, 3], [3, 0, 1, 2]),
        ([0, 0, 1, 1, 1, 2], [3, 4, 5, 0, 1, 2]),
        ([0, 1, 1, 0], [1, 0, 3, 2]),  # in line: 0, 3, 1, 2
        ([0, 0, 1, 0], [1, 3, 0, 2]),  # in line 0, 1, 3, 2; more than half of the step has one prompt
        ([5, 0, 0, 0], [1, 2, 3, 0]),
        ([0, 1, 0, 1], [1, 0, 3, 2]),
        ([4, 4, 5, 6, 6, 7], [4, 5, 0, 1, 2, 3]),
    ],
)
def test_partners_written_out(prompts: list[int], expected: list[int]) -> None:
    assert partners(np.array(prompts, dtype=np.int64)).tolist() == expected == by_loop(prompts)


@pytest.mark.parametrize("seed", range(100))
def test_partners_are_those_of_a_loop(seed: int) -> None:
    draws = np.random.default_rng(seed)
    prompts = draws.integers(0, draws.integers(1, 6), draws.integers(0, 30))
    found = partners(prompts)
    assert found.tolist() == by_loop(prompts.tolist())
    assert sorted(found.tolist()) == [*range(len(prompts))], "each answer is used once"
    if len(prompts) >= 2 * np.bincount(prompts).max(initial=1):
        assert (prompts[found] != prompts).all(), "an answer met its own prompt"


# ------------------------------------------------------------------------------------------------------------- entries


def rows() -> list[dict[str, Any]]:
    """Pairs and single answers, several of one prompt, several turns of which the user's are not scored; one long prompt."""
    pairs = rows_of_turns(8, seed=3)
    alone = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row, side in zip(pairs, ("chosen", "rejected") * 4)
    ]
    long = {"prompt": [{"role": "user", "content": "fade " * 40}], "completion": "ebb", "label": True}
    return [row for both in zip(pairs, alone) for row in both] + [long]


@pytest.fixture(scope="module", params=[None, 226])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    """Without a limit, and with one at which no example is cut and mismatched pairs may be."""
    folder = tmp_path_factory.mktemp("mismatched")
    save_tokenizer(folder / "tokenizer")
    return stored(folder, rows(), Limits(request.param))


def stored(folder: Path, rows: list[dict[str, Any]], limits: Limits | None = None) -> PairStore:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    source = write(folder / "rows.jsonl", rows)
    return load_pairs(
        [source], tokenizer, limits or Limits(), cache_dir=folder / "cache", on_bad_row="error", log=lambda line: None
    )


def steps_of(pairs: int, seed: int) -> list[np.ndarray]:
    """Three steps of a shuffled epoch and one of the next, the last of an epoch short."""
    draws = np.random.default_rng(seed)
    first, second = draws.permutation(pairs), draws.permutation(pairs)
    return [first[:7], first[7:14], first[14:], second[:7]]


def room_of(store: PairStore) -> int:
    """The tokens that prompt and answer may have: the limit, or as many as the longest has."""
    return store.report["max_length"] or max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in store)


Entry = tuple[list[int], list[int], list[int], list[bool], list[bool]]


def slowly(store: PairStore, steps: Sequence[np.ndarray]) -> list[Entry]:
    """(prompt, chosen, rejected, which of chosen is scored, which of rejected) of each entry, pair by pair."""
    longest = room_of(store)
    found = []
    for step in steps:
        prompts = [store[int(i)].prompt.tolist() for i in step]
        numbers = [prompts.index(prompt) for prompt in prompts]
        for prompt, partner in zip(prompts, by_loop(numbers)):
            other, room = store[int(step[partner])], longest - len(prompt)
            answers = [ids.tolist()[:room] for ids in (other.chosen, other.rejected)]
            masks = [
                [True] * len(ids) if mask is None else mask.tolist()[:room]
                for ids, mask in zip(answers, (other.chosen_scored, other.rejected_scored))
            ]
            found.append((prompt, *answers, *masks))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_entries_are_those_of_a_loop(seed: int, store: PairStore) -> None:
    """Ids, masks, lengths, counts; some answers are cut, some steps meet one prompt again and again."""
    steps = steps_of(len(store), seed) if seed else [np.arange(len(store))]
    found, expected = Mismatched.of_steps(store, steps), slowly(store, steps)
    assert len(found) == len(expected) == sum(map(len, steps))
    uncut = {tuple(ids.tolist()) for pair in store for ids in pair[1:3]}
    assert any(tuple(answer) not in uncut for entry in expected for answer in entry[1:3]) or seed
    assert store.flat_mask() is not None, "some tokens are not scored"
    tokens = store.flat()[0]
    bounds = found.bounds(np.arange(len(found)))
    for k, (prompt, chosen, rejected, *masks) in enumerate(expected):
        pair = found[k]
        assert [ids.tolist() for ids in pair[:3]] == [prompt, chosen, rejected]
        assert [tokens[start:stop].tolist() for start, stop in bounds[k]] == [prompt, chosen, rejected]
        told = [[True] * len(ids) if mask is None else mask.tolist() for ids, mask in zip(pair[1:3], pair[3:])]
        assert told == masks
        assert found.lengths[k].tolist() == [len(prompt), len(chosen), len(rejected)] == found.computed[k].tolist()
        assert found.scored[k].tolist() == [sum(mask) for mask in masks]
    answers = [sum(map(bool, entry[1:3])) for entry in expected]
    assert found.num_answers() == sum(answers)
    assert found.num_answers(slice(3, 9)) == sum(answers[3:9])
    longest = found.lengths[:, 0] + found.lengths[:, 1:].max(axis=1)
    assert longest.max() <= room_of(store)


def test_of_a_held_out_set_all_examples_are_one_step(store: PairStore) -> None:
    found = Mismatched.of_all(store)
    assert found.prompts.tolist() == list(range(len(store)))
    prompts = store.same[:, 0].tolist()
    assert found.answers.tolist() == by_loop(prompts)


def test_equal_numbers_and_equal_keys_are_of_equal_content(store: PairStore) -> None:
    """Of steps of two epochs, in which some pairs come again."""
    steps = [*steps_of(len(store), 1), *steps_of(len(store), 2)]
    found, expected = Mismatched.of_steps(store, steps), slowly(store, steps)
    for column in range(3):
        parts = [(entry[0], entry[column], entry[column + 2]) if column else entry[0] for entry in expected]
        contents = list(map(str, parts))
        by_number: dict[int, set[str]] = {}
        for number, content in zip(found.same[:, column].tolist(), contents):
            by_number.setdefault(number, set()).add(content)
        assert all(len(of_number) == 1 for of_number in by_number.values())
        assert len(by_number) < len(expected), "the same prompts come again in another epoch"
    contents_of_key: dict[bytes, set[str]] = {}
    keys = sequence_keys(found)
    for of_entry, (prompt, *answers, own, other) in zip(keys, expected):
        shorter = min(sum(own), sum(other))  # what LD-DPO reads is another value
        for key, answer, mask in zip(of_entry, answers, (own, other)):
            contents_of_key.setdefault(key.tobytes(), set()).add(str((prompt, answer, mask, shorter)))
    assert all(len(of_key) == 1 for of_key in contents_of_key.values())
    assert len(contents_of_key) == len(set().union(*contents_of_key.values()))


def test_an_answer_that_meets_its_own_prompt_is_known_to_the_reference(tmp_path: Path) -> None:
    """Where a step has one prompt alone, a mismatched pair is one of the step's own, under its key."""
    save_tokenizer(tmp_path / "tokenizer")
    rows = [{"prompt": "a cab?", "completion": f" {word}", "label": True} for word in ("bad", "fed", "egg")]
    store = stored(tmp_path, rows)
    found = Mismatched.of_all(store)
    assert found.answers.tolist() == [2, 0, 1]
    assert sequence_keys(found)[:, 0].tolist() == sequence_keys(store)[[2, 0, 1], 0].tolist()


@pytest.mark.parametrize("sharing", [True, False])
def test_their_packs_hold_each_of_them_once(sharing: bool, store: PairStore) -> None:
    found = Mismatched.of_all(store)
    packing = Packing(300, sharing, 0, 1, False)
    placed = place(found, np.arange(len(found)), packing)
    batches = list(placed.packs(found, packing))
    assert len(batches) > 1
    assert sorted(np.concatenate([batch.pair_ids.numpy() for batch in batches]).tolist()) == list(range(len(found)))
    if not sharing:
        assert placed.tokens == computed_tokens(found.computed, False).sum()
        assert placed.scored == found.scored.sum()


# --------------------------------------------------------------------------------------------------------------- steps


def loader_of(store: PairStore, **more: Any) -> StepLoader:
    how: dict[str, Any] = {"weights": [1.0], "pairs_per_step": 5, "seed": 3, "shuffle": True}
    return StepLoader(store, packing=Packing(300, True, 0, 1, False), **how | more)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"weights": [1.7]},
        {"pairs_per_step": 17},
        {"pairs_per_step": 40},
        {"again": True},
        {"again": True, "pairs_per_step": 40},
    ],
    ids=str,
)
def test_the_pairs_before_a_step_are_counted_without_a_plan(more: dict[str, Any], store: PairStore) -> None:
    loader = loader_of(store, **more)
    assert len(store) == 17
    steps = [step for epoch in range(3) for step in loader.epoch(epoch)]
    assert [loader.pairs_before(k) for k in range(len(steps) + 1)] == np.cumsum([0, *map(len, steps)]).tolist()


def test_each_step_has_the_mismatched_pairs_of_its_own_examples(store: PairStore) -> None:
    """Over two shuffled epochs; and one that resumes has what one that never stopped has."""
    loader = loader_of(store)
    total = 2 * loader.steps_per_epoch - 1
    loader = loader.with_mismatched(total)
    plan = [step for epoch in range(2) for step in loader.epoch(epoch)][:total]
    assert any(left.tolist() != right.tolist() for left, right in pairwise(plan[::4]))
    expected = slowly(store, plan)
    assert loader.mismatched is not None and len(loader.mismatched) == len(expected)
    starts = np.cumsum([0, *map(len, plan)]).tolist()
    for done in (0, 5):
        for step in loader.steps(done, total):
            ids = sorted(np.concatenate([batch.pair_ids.numpy() for batch in step.mismatched]).tolist())
            assert ids == list(range(starts[step.number - 1], starts[step.number]))
            own = expected[starts[step.number - 1] : starts[step.number]]
            assert step.counts["mismatched_answers"] == sum(bool(ids) for entry in own for ids in entry[1:3])
    assert not list(next(loader_of(store).steps(0, 1)).mismatched)


def test_counts_of_a_step_with_single_answers(store: PairStore) -> None:
    ids = np.array([0, 1, 3, 16])
    pairs = [store[int(i)] for i in ids]
    answers = [(pair, ids) for pair in pairs for ids in pair[1:3] if len(ids)]
    masks = [[mask.sum() if mask is not None else len(ids) for ids, mask in zip(pair[1:3], pair[3:])] for pair in pairs]
    assert count(store, ids) == {
        "pairs": 4,
        "answers": len(answers),
        "chosen_tokens": sum(chosen for chosen, _ in masks),
        "rejected_tokens": sum(rejected for _, rejected in masks),
        "chosen_and_prompt_tokens": sum(len(pair.prompt) - 1 for pair in pairs) + sum(chosen for chosen, _ in masks),
        "tokens": sum(len(pair.prompt) + len(ids) for pair, ids in answers),
    }
    assert json.dumps(count(store, ids)), "plain integers"
