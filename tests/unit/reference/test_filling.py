"""Scoring what a run needs: which pairs, in which packs, and when it is kept; by a forward whose values depend on who shares
a pack, as those of kernels do."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_store import load, write

from dspref.data.batch import PackedBatch
from dspref.data.loader import Packing, StepLoader
from dspref.data.store import PairStore
from dspref.model.logps import TokenLogps
from dspref.reference import filling, modes
from dspref.reference.filling import Need
from dspref.reference.store import ReferenceStore
from dspref.report import console
from dspref.run import status
from dspref.run.folder import RunFolder

CPU = torch.device("cpu")
PACKING = Packing(tokens_per_pack=40, prefix_sharing=False)
PAIRS = 60


@pytest.fixture
def pairs(tmp_path: Path) -> PairStore:
    draw = np.random.default_rng(0)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choice(list("abc"), int(draw.integers(least, most))))

    rows = [
        {"prompt": f"p{k} {words(1, 5)}", "chosen": f" a {words(1, 9)}", "rejected": f" b {words(1, 9)}"}
        for k in range(PAIRS)
    ]
    return load([write(tmp_path / "rows.jsonl", rows)], tmp_path / "cache")


class Scorer:
    """Log-probs by the target and the size of the pack; ends at a pack, if asked to."""

    def __init__(self, ends_at: int | None = None) -> None:
        self.packs: list[list[int]] = []
        self._ends_at = ends_at

    def __call__(self, batch: PackedBatch) -> tuple[TokenLogps, None]:
        if len(self.packs) == self._ends_at:
            raise KeyboardInterrupt
        self.packs.append(sorted(batch.pair_ids.tolist()))
        logps = -0.01 * batch.targets.float() - 1e-5 * len(batch.input_ids)
        logps = logps if batch.scored_index is None else logps[batch.scored_index]
        return TokenLogps(logps, torch.zeros_like(logps)), None

    @property
    def rows(self) -> list[int]:
        return sorted(row for pack in self.packs for row in pack)


def fill(
    root: Path,
    sets: dict[str, PairStore],
    needs: dict[str, Need] | None = None,
    scorer: Scorer | None = None,
    view: Callable[[int, int, float | None], None] = lambda done, total, left: None,
    packing: Packing = PACKING,
) -> tuple[Scorer, int, dict[str, torch.Tensor]]:
    """A job: what it ran, how many pairs it scored, and the tables it has."""
    scorer, store = scorer or Scorer(), ReferenceStore(root, {})
    wanted = filling.wanted_of(store, sets, needs)
    count = filling.fill(store, wanted, sets, lambda: nullcontext(scorer), packing, CPU, view=view)
    return scorer, count, filling.tables(store, wanted, sets, CPU)


def some(rows: list[int], now: list[int] | None = None) -> Need:
    return Need(np.array(rows), np.isin(rows, rows if now is None else now))


def test_only_what_is_needed_is_scored_and_nothing_else_can_be_read(pairs: PairStore, tmp_path: Path) -> None:
    rows = [41, 3, 17, 58]
    scorer, count, tables = fill(tmp_path / "store", {"train": pairs}, {"train": some(rows)})
    assert scorer.rows == sorted(rows) and count == 4
    known = ~tables["train"].isnan().any(dim=1)
    assert np.flatnonzero(known).tolist() == sorted(rows)
    ask: Any = type("Batch", (), {"pair_ids": torch.tensor([3, 4])})
    with pytest.raises(RuntimeError, match="plan did not name"):
        modes._read(tables, "train", ask)
    again, count, more = fill(tmp_path / "store", {"train": pairs}, {"train": some([*rows, 9])})
    assert again.rows == [9] and count == 1
    assert torch.equal(more["train"][known], tables["train"][known])


def test_each_set_has_needs_of_its_own(pairs: PairStore, tmp_path: Path) -> None:
    other = load([write(tmp_path / "o.jsonl", [{"prompt": "p1", "chosen": " a", "rejected": " b c"}] * 3)], tmp_path)
    scorer, count, tables = fill(tmp_path / "store", {"train": pairs, "eval_": other}, {"train": some([5])})
    assert scorer.packs == [[5], [0]] and count == 2, "equal pairs are one"
    assert not tables["eval_"].isnan().any()


@pytest.mark.parametrize("sharing", [False, True])
def test_a_job_that_was_ended_at_any_pack_loses_nothing_and_changes_no_bit(
    sharing: bool, pairs: PairStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "FIRST_COMMIT_SECONDS", -1.0)
    monkeypatch.setattr(filling, "COMMIT_SECONDS", -1.0)
    monkeypatch.setattr("dspref.reference.store.BLOCK_PAIRS", 25)
    needs, packing = {"train": some(list(range(50, 5, -1)))}, Packing(100, sharing)
    whole, count, expected = fill(tmp_path / "whole", {"train": pairs}, needs, packing=packing)
    assert count == 45 and len(whole.packs) > 6
    for ends_at in range(len(whole.packs)):
        store = tmp_path / str(ends_at)
        with pytest.raises(KeyboardInterrupt):
            fill(store, {"train": pairs}, needs, first := Scorer(ends_at), packing=packing)
        second, _, found = fill(store, {"train": pairs}, needs, packing=packing)
        assert first.packs + second.packs == whole.packs, "every pack once"
        assert np.array_equal(found["train"], expected["train"], equal_nan=True)


def test_steps_that_are_done_need_no_pair_and_those_that_are_left_the_same_values(pairs: PairStore, tmp_path: Path) -> None:
    """A run that goes on where its store is lost: of the blocks that are left, the packs are the same."""
    rows = list(np.random.default_rng(1).permutation(PAIRS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspref.reference.store.BLOCK_PAIRS", 20)
        _, _, expected = fill(tmp_path / "whole", {"train": pairs}, {"train": some(rows)})
        scorer, count, found = fill(tmp_path / "lost", {"train": pairs}, {"train": some(rows, now=rows[45:])})
    assert count == 15 and set(rows[45:]) <= set(scorer.rows) <= set(rows[40:])
    assert torch.equal(found["train"][rows[45:]], expected["train"][rows[45:]])


def test_a_sequence_of_a_pair_that_is_done_is_scored_for_one_that_is_not(tmp_path: Path) -> None:
    rows = [{"prompt": "p1", "chosen": " a b", "rejected": " c a"}, {"prompt": "p1", "chosen": " c a", "rejected": " a b"}]
    pairs = load([write(tmp_path / "rows.jsonl", rows)], tmp_path)
    _, _, tables = fill(tmp_path / "store", {"train": pairs}, {"train": some([0, 1], now=[1])})
    assert not tables["train"][1].isnan().any()


def test_what_other_jobs_know_is_not_scored_again(pairs: PairStore, tmp_path: Path) -> None:
    fill(tmp_path / "store", {"train": pairs}, {"train": some(list(range(0, PAIRS, 3)))})
    scorer, count, tables = fill(tmp_path / "store", {"train": pairs})
    assert scorer.rows == [row for row in range(PAIRS) if row % 3] and count == len(scorer.rows)
    assert not tables["train"].isnan().any()


@pytest.mark.parametrize(("seconds", "shards"), [(1e9, 3), (-1.0, None)])
def test_what_is_scored_is_kept_by_the_clock_and_by_the_block(
    seconds: float, shards: int | None, pairs: PairStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "FIRST_COMMIT_SECONDS", seconds)
    monkeypatch.setattr(filling, "COMMIT_SECONDS", seconds)
    monkeypatch.setattr("dspref.reference.store.BLOCK_PAIRS", 25)
    scorer, _, _ = fill(tmp_path / "store", {"train": pairs})
    assert len(list((tmp_path / "store").rglob("*.safetensors"))) == (shards or len(scorer.packs))


def test_the_view_is_told_from_the_first_pair_to_the_last(pairs: PairStore, tmp_path: Path) -> None:
    told: list[tuple[int, int, float | None]] = []
    fill(tmp_path / "store", {"train": pairs}, view=lambda *seen: told.append(seen))
    assert told[0] == (0, PAIRS, None)
    assert told[-1][:2] == (PAIRS, PAIRS) and told[-1][2] == 0.0
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert len(told) > 20
    told.clear()
    fill(tmp_path / "store", {"train": pairs}, view=lambda *seen: told.append(seen))
    assert told == [], "nothing is left to say"


# ---------------------------------------------------------------------------------------------------------------------
# What a person sees


def test_a_scoring_says_how_far_it_is_in_lines_and_in_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text('{"state": "running", "host": "elsewhere", "steps": 9}')
    (tmp_path / status.SCORING).write_text("left by a run that was killed")
    with console.scoring(RunFolder(tmp_path)) as view:
        assert not (tmp_path / status.SCORING).exists() and capsys.readouterr().out == ""
        view(0, 2304, None)
        assert status.read(tmp_path)["scoring"] == {"done": 0, "total": 2304, "seconds_left": None}
        view(10, 2304, 100.0)
        assert capsys.readouterr().out == "", "most are over before anybody asks"
        monkeypatch.setattr(console, "TELL_EVERY_SECONDS", -1.0)
        monkeypatch.setattr(console, "WRITE_EVERY_SECONDS", -1.0)
        view(120, 2304, 600.0)
        assert "reference: scored 120 of 2,304 pairs so far, about 10 min left" in capsys.readouterr().out
        found = status.read(tmp_path)
        assert found["state"] == "scoring"
        shown = status.show(found)
        assert "state     scoring, on elsewhere" in shown
        assert "scoring   120 of 2,304 pairs (5%), about 10 min left" in shown
    assert not (tmp_path / status.SCORING).exists()
    assert status.read(tmp_path)["state"] == "running"
    (event,) = (json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["pairs"]) == ("scored", 120), "progress, for the job that is queued again"


def test_on_a_terminal_a_scoring_is_one_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with pytest.raises(KeyboardInterrupt), console.scoring(RunFolder(tmp_path)) as view:
        view(0, 50, None)
        view(30, 50, 90.0)
        raise KeyboardInterrupt
    shown = capsys.readouterr().out
    assert "reference: scoring" in shown and "30/50" in shown and "about 1 min 30 s left" in shown
    assert not (tmp_path / status.SCORING).exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"done": 3}', '{"done": 5, "total": 4}', '{"done": "a", "total": 4}', '{"done": 0, "total": 0}']
)
def test_a_damaged_word_of_a_scoring_is_not_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"state": "running", "host": "elsewhere"}')
    (tmp_path / status.SCORING).write_text(text)
    assert status.read(tmp_path)["state"] == "running"
    (tmp_path / status.SCORING).write_text('{"done": 1, "total": 4, "seconds_left": NaN}')
    assert "1 of 4 pairs (25%), by the reference" in status.show(status.read(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# What a run's steps need


@pytest.mark.parametrize("weight", [1.0, 0.5, 2.5])
@pytest.mark.parametrize(("done", "total"), [(0, 1), (0, 8), (3, 9), (8, 8), (0, 40), (7, 40)])
def test_the_pairs_of_some_steps_are_those_that_the_steps_hold(
    done: int, total: int, weight: float, pairs: PairStore
) -> None:
    loader = StepLoader(pairs, [weight], 8, seed=3, shuffle=True, packing=PACKING)
    expected = [row for step in loader.steps(done, total) for batch in step.packs for row in batch.pair_ids.tolist()]
    found = loader.pairs_of(done, total).tolist()
    assert sorted(found) == sorted(set(expected))
    if done == 0:
        first = [row for step in loader.steps(0, 1) for batch in step.packs for row in batch.pair_ids.tolist()]
        assert set(found[: len(set(first))]) == set(first), "in the order of the steps"
