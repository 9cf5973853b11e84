"""Which checkpoints are deleted: never the last good one, whatever is saved, damaged or killed in between."""

from __future__ import annotations

import random

from dspref.run.checkpoint import to_delete


def test_the_rules() -> None:
    scored = [(step, score) for step, score in zip(range(100, 700, 100), (0.5, 0.9, 0.7, None, 0.6, 0.4))]
    assert to_delete(scored, keep_last=2, keep_every=None) == {100, 300, 400}, "the best, and the last two, stay"
    assert to_delete(scored, keep_last=1, keep_every=300, lower_is_better=True) == {100, 200, 400, 500}
    assert to_delete([(step, None) for step, _ in scored], keep_last=3, keep_every=None) == {100, 200, 300}
    assert to_delete([], keep_last=1, keep_every=None) == set()


def test_there_is_always_one_to_go_on_from() -> None:
    """Saves, kills within a prune, and a newest checkpoint that is found damaged, in a thousand random orders."""
    for seed in range(1000):
        live_through(random.Random(seed))


def live_through(dice: random.Random) -> None:
    keep_last, keep_every = dice.randint(1, 3), dice.choice([None, 4])
    there: dict[int, float | None] = {}
    step, saved = 0, 0
    for _ in range(30):
        if len(there) > 1 and dice.random() < 0.2:
            del there[max(there)]  # set aside; the run goes on from the one before
            step, saved = max(there), 0
            continue
        step, saved = step + dice.randint(1, 3), saved + 1
        there[step] = dice.choice([None, dice.random()])
        gone = sorted(to_delete([*there.items()], keep_last, keep_every))
        scores = {s: score for s, score in there.items() if score is not None}
        for old in gone[: dice.randint(0, len(gone))]:  # killed before it deleted the rest
            del there[old]
        assert step in there, "the newest"
        assert len(there) >= min(keep_last, saved)
        assert not scores or max(scores, key=lambda s: (scores[s], s)) in there
        assert not keep_every or not any(old % keep_every == 0 for old in gone)
