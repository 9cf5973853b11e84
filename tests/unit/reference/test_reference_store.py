"""Stored reference log-probs: found by content, whole or absent, whoever else writes and wherever a job is killed."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import resource
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save
from test_store import load, write

from dspref.data.store import PairStore
from dspref.errors import NumericFault
from dspref.reference import store as reference_store
from dspref.reference.store import BLOCK_PAIRS, KEY_BYTES, ReferenceStore, blocks_of, identity_of, sequence_keys

MODEL = {"weights": "abc", "dtype": "bf16"}
Keys = np.ndarray


def some_keys(*shape: int, seed: int = 0) -> Keys:
    return np.random.default_rng(seed).integers(0, 256, (*shape, KEY_BYTES), dtype=np.uint8)


def values_of(keys: Keys, *, shift: float = 0.0) -> np.ndarray:
    """Values that a key alone decides: fp32 [..., 2]."""
    return -keys[..., :2].astype(np.float32) - keys[..., 2:4].astype(np.float32) / 256 + np.float32(shift)


def put(store: ReferenceStore, keys: Keys, *, shift: float = 0.0) -> Path | None:
    flat = keys.reshape(-1, KEY_BYTES)
    return store.append(flat, values_of(flat, shift=shift), flat[:, 4].astype(np.int32))


def put_new(store: ReferenceStore, keys: Keys, *, shift: float = 0.0) -> Path:
    path = put(store, keys, shift=shift)
    assert path is not None
    return path


def known(store: ReferenceStore, keys: Keys) -> np.ndarray:
    """Which keys a store knows; the values of those are right."""
    values, found = store.look_up(keys)
    assert np.array_equal(values[found], values_of(keys)[found])
    assert np.isnan(values[~found]).all()
    return found


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


# ------------------------------------------------------------------------------------------------------- keys


def keys_of(folder: Path, *rows: tuple[str, str, str]) -> list[list[bytes]]:
    folder.mkdir()
    named: list[dict[str, Any]] = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in rows]
    keys = sequence_keys(load([write(folder / "a.jsonl", named)], folder / "cache"))
    assert keys.shape == (len(rows), 2, KEY_BYTES)
    assert keys.dtype == np.uint8
    return [[side.tobytes() for side in pair] for pair in keys]


def test_equal_sequences_have_equal_keys_wherever_they_lie(tmp_path: Path) -> None:
    (first,) = keys_of(tmp_path / "1", ("p1", " a b", " c c"))
    other = keys_of(tmp_path / "2", ("p2", " c", " a b c"), ("p1", " c c", " a b"), ("p1", " a b", " a c"))
    assert other[1] == first[::-1]  # the side does not matter
    assert other[2][0] == first[0]  # nor the other answer, if it is as long
    assert len({key for pair in other for key in pair}) == 5


def test_keys_tell_apart_all_that_decides_the_values(tmp_path: Path) -> None:
    rows = [
        ("p1", " a b c", " c b a"),
        ("p2", " a b c", " c b a"),  # prompt
        ("p1", " a b b", " c b b"),  # answer
        ("p1", " a b c", " c c"),  # m: chosen is that of row 0
        ("p1 a", " b c", " c c c"),  # the boundary: the ids of chosen are those of row 3, and so is m
    ]
    pairs = keys_of(tmp_path / "1", *rows)
    assert len({key for pair in pairs for key in pair}) == 2 * len(rows)


def test_ids_that_look_like_lengths_do_not_confuse(tmp_path: Path) -> None:
    """Ids of these rows are small numbers, as lengths are: no two different sequences of up to three ids collide."""
    words = ["p0", "p1", "a", "b", "c", "</s>"]
    rows = [(p, f" {a}", f" {b} {c}") for p in words for a in words for b in words for c in words if a != b]
    named: list[dict[str, Any]] = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in rows]
    store = load([write(tmp_path / "a.jsonl", named)], tmp_path, on_bad_row="drop")
    contents = {}
    for pair, sides in zip((store[i] for i in range(len(store))), sequence_keys(store)):
        m = min(len(pair.chosen), len(pair.rejected))
        for answer, key in zip((pair.chosen, pair.rejected), sides):
            content = (tuple(pair.prompt.tolist()), tuple(answer.tolist()), m)
            assert contents.setdefault(content, key.tobytes()) == key.tobytes()
    assert len(set(contents.values())) == len(contents) > 200


def test_keys_of_some_rows_are_those_of_all(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": " a" * (i + 1), "rejected": " b" * (9 - i)} for i in range(8)]
    store = load([write(tmp_path / "a.jsonl", rows)], tmp_path / "cache")
    every = sequence_keys(store)
    picked = np.array([5, 0, 7])
    assert np.array_equal(sequence_keys(store, picked), every[picked])
    assert sequence_keys(store, np.array([], dtype=np.int64)).shape == (0, 2, KEY_BYTES)
    assert len(np.unique(every.reshape(-1, KEY_BYTES), axis=0)) == 16


def test_keys_are_those_of_the_stores_that_people_have(tmp_path: Path) -> None:
    """Word by word, for pairs that are scored whole; a mask that says so changes nothing."""
    rows = [{"prompt": f"p{i}", "chosen": " a" * (i + 1), "rejected": " b" * (9 - i)} for i in range(8)]
    store = load([write(tmp_path / "a.jsonl", rows)], tmp_path / "cache")
    expected = []
    for pair in (store[i] for i in range(len(store))):
        m = min(len(pair.chosen), len(pair.rejected))
        for answer in (pair.chosen, pair.rejected):
            tail = np.array([len(pair.prompt), len(answer), m], dtype="<i4")
            content = b"".join(part.astype("<i4").tobytes() for part in (pair.prompt, answer, tail))
            expected.append(hashlib.sha256(content).digest()[:KEY_BYTES])
    keys = sequence_keys(store)
    assert [key.tobytes() for key in keys.reshape(-1, KEY_BYTES)] == expected
    assert np.array_equal(sequence_keys(masked(store, np.ones(len(store.flat()[0]), dtype=bool))), keys)
    with pytest.raises(ValueError):
        keys[0, 0, 0] = 0


def masked(store: PairStore, mask: np.ndarray) -> PairStore:
    """The store with these of all its tokens scored."""
    offsets = store.flat()[1]
    parts = pairwise(offsets)
    store._mask = mask
    store.scored = np.array([mask[start:end].sum() for start, end in parts]).reshape(-1, 3)[:, 1:]
    return store


def test_keys_know_which_tokens_are_scored(tmp_path: Path) -> None:
    """Every mask of an answer is another sequence; what a prompt's mask says is not read; a mask of one answer reaches the
    other by its number of scored tokens alone."""
    row = {"prompt": "p1 a b", "chosen": " a b c", "rejected": " c b a"}
    store = load([write(tmp_path / "a.jsonl", [row])], tmp_path / "cache")
    _, (_, first, second, end) = store.flat()
    whole, seen, others = sequence_keys(store)[0], set[bytes](), set[bytes]()
    for bits in range(1, 2 ** (second - first)):
        mask = np.ones(end, dtype=bool)
        mask[first:second] = [bits >> k & 1 for k in range(second - first)]
        chosen, rejected = sequence_keys(masked(store, mask))[0]
        mask[:first] = False
        assert np.array_equal(sequence_keys(masked(store, mask))[0], [chosen, rejected])
        assert np.array_equal(chosen, whole[0]) == np.array_equal(rejected, whole[1]) == bool(mask[first:].all())
        seen.add(chosen.tobytes())
        others.add(rejected.tobytes())
    assert len(seen) == 2 ** (second - first) - 1 and len(others) == second - first


def test_identity_follows_every_word_and_not_their_order() -> None:
    assert identity_of({"b": 1, "a": {"d": 2, "c": 3}}) == identity_of({"a": {"c": 3, "d": 2}, "b": 1})
    assert len({identity_of(x) for x in (MODEL, MODEL | {"dtype": "fp32"}, MODEL | {"adapter": None}, {})}) == 4
    assert len(identity_of(MODEL)) == 32


def test_identity_follows_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity_of(MODEL)
    monkeypatch.setattr(reference_store, "FORMAT_VERSION", 2)
    assert identity_of(MODEL) != before


# ------------------------------------------------------------------------------------------------ put and find


def test_what_goes_in_comes_out_here_and_at_the_next_opening(tmp_path: Path) -> None:
    store, keys = ReferenceStore(tmp_path, MODEL), some_keys(50, 2)
    assert len(store) == 0
    assert not known(store, keys).any()
    assert list(tmp_path.iterdir()) == []  # looking leaves nothing behind
    for part in (keys[:20], keys[20:30]):
        path = put_new(store, part)
        assert path.parent == store.folder == tmp_path / identity_of(MODEL)
    for opened in (store, ReferenceStore(tmp_path, MODEL)):
        assert len(opened) == 60
        assert known(opened, keys).tolist() == [[True, True]] * 30 + [[False, False]] * 20
        assert known(opened, keys[3, 1]).shape == ()
        assert known(opened, keys[:0]).shape == (0, 2)
        assert opened.look_up(keys)[0].dtype == np.float32
        assert opened.damaged == []
    assert {path.suffix for path in store.folder.iterdir()} == {".json", ".safetensors"}
    assert '"weights": "abc"' in (store.folder / "identity.json").read_text()


def test_a_shard_holds_sorted_rows_whatever_their_order(tmp_path: Path) -> None:
    keys = some_keys(100)
    paths = [put_new(ReferenceStore(tmp_path / name, MODEL), part) for name, part in (("a", keys), ("b", keys[::-1]))]
    assert paths[0].name == paths[1].name
    shard = load_file(paths[0])
    assert [row.tobytes() for row in shard["keys"]] == sorted(row.tobytes() for row in keys)
    assert np.array_equal(shard["values"], values_of(shard["keys"]))
    assert np.array_equal(shard["tokens"], shard["keys"][:, 4].astype(np.int32))
    assert shard["tokens"].dtype == np.int32


def test_a_sequence_is_stored_once_and_keeps_its_first_value(tmp_path: Path) -> None:
    store, keys = ReferenceStore(tmp_path, MODEL), some_keys(6)
    twice = np.concatenate([keys[:4], keys[:2]])
    values = np.concatenate([values_of(keys[:4]), values_of(keys[:2], shift=1.0)])
    store.append(twice, values, np.ones(6, dtype=np.int32))
    assert len(store) == 4
    assert put(store, keys[1:3], shift=1.0) is None
    assert put(store, keys[:0]) is None
    path = put_new(store, np.concatenate([keys[2:4], keys[4:]]))
    assert len(load_file(path)["keys"]) == 2
    for opened in (store, ReferenceStore(tmp_path, MODEL)):
        assert known(opened, keys).all()


def test_two_jobs_share_a_folder_and_not_with_another_model(tmp_path: Path) -> None:
    keys = some_keys(30)
    one, other = ReferenceStore(tmp_path, MODEL), ReferenceStore(tmp_path, MODEL)
    stranger = ReferenceStore(tmp_path, MODEL | {"dtype": "fp32"})
    paths = [put(one, keys[:10]), put(other, keys[10:20]), put(other, keys[:10])]
    assert paths[0] == paths[2]  # the same content is the same file
    assert len(shards(one.folder)) == 2
    assert known(ReferenceStore(tmp_path, MODEL), keys).tolist() == [True] * 20 + [False] * 10
    put(stranger, keys[20:])
    assert not known(ReferenceStore(tmp_path, stranger._described), keys[:20]).any()
    assert not known(ReferenceStore(tmp_path, MODEL), keys[20:]).any()


@pytest.mark.parametrize("seed", range(4))
def test_of_two_values_that_of_the_first_name_wins(tmp_path: Path, seed: int) -> None:
    keys = some_keys(20, seed=seed)
    stores = [ReferenceStore(tmp_path, MODEL) for _ in range(2)]
    shifts = {put_new(store, keys, shift=shift).name: shift for store, shift in zip(stores, (0.0, 0.5))}
    values, found = ReferenceStore(tmp_path, MODEL).look_up(keys)
    assert len(shifts) == 2 and found.all()
    assert np.array_equal(values, values_of(keys, shift=shifts[min(shifts)]))


def test_keys_that_share_half_their_bytes_are_told_apart(tmp_path: Path) -> None:
    store, keys = ReferenceStore(tmp_path, MODEL), some_keys(300)
    keys[:200, :8] = keys[0, :8]
    keys[200:, 8:] = keys[0, 8:]
    put(store, keys[::3])
    for opened in (store, ReferenceStore(tmp_path, MODEL)):
        assert known(opened, keys).tolist() == [i % 3 == 0 for i in range(300)]


few_keys = st.builds(
    lambda high, low: np.frombuffer(high + low, dtype=np.uint8),
    st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\0" * 7 + b"\1", b"\x80" + b"\0" * 7]),
    st.sampled_from([b"\0" * 8, b"\0" * 7 + b"\1", b"\1" + b"\0" * 7, b"\xff" * 8, b"a" * 8]),
)


@settings(deadline=None)
@given(st.lists(st.lists(few_keys, min_size=1, max_size=8), max_size=4), st.lists(few_keys, max_size=8))
def test_look_up_is_that_of_a_dict(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[Keys]], asked: list[Keys]
) -> None:
    root = tmp_path_factory.mktemp("store")
    store, oracle = ReferenceStore(root, MODEL), dict[bytes, tuple[float, float]]()
    for i, part in enumerate(parts):
        values = np.array([(i + j / 16, -i) for j in range(len(part))], dtype=np.float32)
        store.append(np.stack(part), values, np.ones(len(part), dtype=np.int32))
        for key, value in zip(part, values):
            oracle.setdefault(key.tobytes(), tuple(value))
    for opened in (store, ReferenceStore(root, MODEL)):
        values, found = opened.look_up(np.array(asked, dtype=np.uint8).reshape(-1, KEY_BYTES))
        assert len(opened) == len(oracle)
        assert found.tolist() == [key.tobytes() in oracle for key in asked]
        assert [tuple(v) for v in values[found]] == [oracle[k.tobytes()] for k in asked if k.tobytes() in oracle]
        assert np.isnan(values[~found]).all()


# ---------------------------------------------------------------------------------------------- damage, faults


def damages(data: bytes) -> list[bytes]:
    """A shard with one bit turned over in every part of the file, cut anywhere, empty, or grown."""
    draw = random.Random(0)
    header = 8 + int.from_bytes(data[:8], "little")
    bounds = [0, 8, header, *(header + (len(data) - header) * i // 4 for i in range(1, 5))]
    places = [place for low, high in pairwise(bounds) for place in (low, high - 1, *draw.choices(range(low, high), k=5))]
    flipped = [data[:p] + bytes([data[p] ^ 1 << draw.randrange(8)]) + data[p + 1 :] for p in places]
    return [*flipped, *(data[:cut] for cut in (0, 1, 7, 8, header, len(data) // 2, len(data) - 1)), data + b"\0"]


def test_every_damage_is_found_and_set_aside_and_mended(tmp_path: Path) -> None:
    store, keys = ReferenceStore(tmp_path, MODEL), some_keys(60)
    bad, good = put_new(store, keys[:30]), put_new(store, keys[30:])
    data = bad.read_bytes()
    cases = damages(data)
    assert len(cases) > 40
    for damaged in cases:
        assert damaged != data
        bad.write_bytes(damaged)
        store = ReferenceStore(tmp_path, MODEL)
        assert store.damaged == [bad.name]
        assert known(store, keys).tolist() == [False] * 30 + [True] * 30
        assert (store.folder / f"damaged-{bad.name}").read_bytes() == damaged
        assert list(shards(store.folder)) and not bad.exists()
        assert ReferenceStore(tmp_path, MODEL).damaged == []  # told once
        assert put(store, keys) == bad
        assert bad.read_bytes() == data
    assert good.exists()


@pytest.mark.parametrize("fault", ["no columns", "keys are int32", "values are fp64", "a value is missing", "more", "text"])
def test_a_shard_of_another_layout_is_damaged_though_its_name_is_right(tmp_path: Path, fault: str) -> None:
    store, keys = ReferenceStore(tmp_path, MODEL), some_keys(3)
    put(store, keys[:1])
    right = {"keys": keys, "values": values_of(keys), "tokens": np.ones(3, dtype=np.int32)}
    changes = {
        "no columns": dict.fromkeys(right),
        "keys are int32": {"keys": keys.astype(np.int32)},
        "values are fp64": {"values": right["values"].astype(np.float64)},
        "a value is missing": {"values": right["values"][:2]},
        "more": {"more": keys},
        "text": {},
    }[fault]
    columns = {name: column for name, column in (right | changes).items() if column is not None}
    data = b"x" * 100 if fault == "text" else save(columns)
    name = reference_store._name_of(data)
    (store.folder / name).write_bytes(data)
    opened = ReferenceStore(tmp_path, MODEL)
    assert opened.damaged == [name]
    assert known(opened, keys).tolist() == [True, False, False]


def test_a_damaged_shard_that_cannot_be_renamed_is_left_out(tmp_path: Path) -> None:
    store, keys = ReferenceStore(tmp_path, MODEL), some_keys(2)
    paths = [put_new(store, keys[i : i + 1]) for i in range(2)]
    paths[0].write_bytes(b"")
    (store.folder / f"damaged-{paths[0].name}" / "x").mkdir(parents=True)  # nothing can be renamed to this
    for _ in range(2):
        store = ReferenceStore(tmp_path, MODEL)
        assert store.damaged == [paths[0].name]
        assert known(store, keys).tolist() == [False, True]
    assert put(store, keys) == paths[0]
    assert known(ReferenceStore(tmp_path, MODEL), keys).all()


def test_a_shard_that_cannot_be_read_is_left_where_it_is(tmp_path: Path) -> None:
    store, keys = ReferenceStore(tmp_path, MODEL), some_keys(2)
    put(store, keys)
    unreadable = store.folder / f"{'0' * 64}.safetensors"
    unreadable.mkdir()
    store = ReferenceStore(tmp_path, MODEL)
    assert store.damaged == [unreadable.name]
    assert unreadable.exists() and known(store, keys).all()


def test_old_drafts_are_removed_and_young_ones_are_not(tmp_path: Path) -> None:
    path = put_new(ReferenceStore(tmp_path, MODEL), some_keys(2))
    drafts = [path.with_name(f".draft-{i}-0") for i in range(2)]
    for draft, days in zip(drafts, (0.9, 1.1)):
        draft.write_bytes(path.read_bytes())
        written = time.time() - days * 86400
        os.utime(draft, (written, written))
    assert ReferenceStore(tmp_path, MODEL).damaged == []
    assert [draft.exists() for draft in drafts] == [True, False]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e39])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    store, keys = ReferenceStore(tmp_path, MODEL), some_keys(5)
    values = np.zeros((5, 2))
    values[3, 1] = value
    with np.errstate(over="ignore"), pytest.raises(NumericFault, match="1 of 5 sequences"):
        store.append(keys, values, np.ones(5, dtype=np.int32))
    assert len(store) == 0 and not store.folder.exists()


def test_columns_of_different_length_are_refused(tmp_path: Path) -> None:
    store, keys = ReferenceStore(tmp_path, MODEL), some_keys(5)
    for values, tokens in ((np.zeros((5, 3)), np.ones(5)), (np.zeros((4, 2)), np.ones(5)), (np.zeros((5, 2)), np.ones(4))):
        with pytest.raises(ValueError, match="do not belong together"):
            store.append(keys, values, tokens)


def test_an_unusable_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path / "root", MODEL)
    (tmp_path / "root").write_text("a file")
    with pytest.raises(OSError) as caught:
        put(store, some_keys(2))
    assert str(caught.value.filename).startswith(str(tmp_path / "root"))
    with pytest.raises(OSError) as caught:
        ReferenceStore(tmp_path / "root", MODEL)
    assert str(caught.value.filename).startswith(str(tmp_path / "root"))


def test_a_disk_that_takes_no_more_is_an_error_with_a_name_and_leaves_nothing(tmp_path: Path) -> None:
    store, keys = ReferenceStore(tmp_path, MODEL), some_keys(2000)
    put(store, keys[:10])
    before = set(store.folder.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError) as caught:
            put(store, keys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value.filename).startswith(str(store.folder))
    assert set(store.folder.iterdir()) == before
    assert known(store, keys).sum() == 10
    assert put(store, keys) is not None
    assert known(store, keys).all()


# ------------------------------------------------------------------------------------------------------ blocks


def score(root: Path, sets: list[Keys], only: slice = slice(None)) -> list[Path]:
    """A job: score what is left (some of its blocks), and say which shards it wrote."""
    store = ReferenceStore(root, MODEL)
    left = blocks_of(sets, lambda keys: known(store, keys))
    blocks = [(keys, block) for keys, of_set in zip(sets, left) for block in of_set if block.asked.any()]
    return [put_new(store, keys[block.pairs[block.asked]][block.own[block.asked]]) for keys, block in blocks[only]]


def overlapping_sets(pairs: int = 60, sequences: int = 70) -> list[Keys]:
    """Three data sets that share many sequences within and among them, the middle one of no pair."""
    draw = np.random.default_rng(1)
    every = some_keys(sequences)
    return [every[draw.integers(0, sequences, (n, 2))] for n in (pairs, 0, pairs)]


def expected_blocks(
    sets: list[Keys], have: set[bytes], size: int, needed: list[list[int]] | None = None
) -> list[list[list[int]]]:
    """The rule, word by word."""
    seen, result = set[bytes](), []
    rows = needed or [list(range(len(of_set))) for of_set in sets]
    asked = {key.tobytes() for of_set, chosen in zip(sets, rows) for key in of_set[chosen].reshape(-1, KEY_BYTES)}
    for of_set in sets:
        pairs = [(one.tobytes(), other.tobytes()) for one, other in of_set]
        new = {}
        for row, pair in enumerate(pairs):
            if set(pair) - seen:
                new[row] = set(pair) - seen
            seen.update(pair)
        rows = list(new)
        blocks = [rows[i : i + size] for i in range(0, len(rows), size)]
        result.append([[row for row in block if (new[row] & asked) - have] for block in blocks])
    return result


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 1.0])
def test_blocks_are_those_of_the_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: float) -> None:
    monkeypatch.setattr(reference_store, "BLOCK_PAIRS", 7)
    sets = overlapping_sets()
    have = np.unique(np.concatenate(sets).reshape(-1, KEY_BYTES), axis=0)
    have = have[np.random.default_rng(2).random(len(have)) < part]
    store = ReferenceStore(tmp_path, MODEL)
    put(store, have)
    draw = np.random.default_rng(3)
    for needed in (None, [sorted(draw.choice(len(of_set), len(of_set) // 5, replace=False)) for of_set in sets]):
        masks = [np.isin(np.arange(len(of_set)), rows) for of_set, rows in zip(sets, needed)] if needed else None
        blocks = blocks_of(sets, lambda keys: known(store, keys), masks)
        expected = expected_blocks(sets, {key.tobytes() for key in have}, 7, needed)
        assert [[block.pairs[block.asked].tolist() for block in of_set] for of_set in blocks] == expected
        assert any(expected[0]) == (part < 1.0)
        every = expected_blocks(sets, set(), 7)
        assert [[block.pairs.tolist() for block in of_set] for of_set in blocks] == every, "whatever is known or needed"


def test_every_sequence_is_the_business_of_one_pair() -> None:
    sets = overlapping_sets()
    blocks = blocks_of(sets, lambda keys: np.zeros(keys.shape[:-1], dtype=bool))
    own = [key.tobytes() for keys, of_set in zip(sets, blocks) for b in of_set for key in keys[b.pairs][b.own]]
    assert sorted(own) == sorted({key.tobytes() for key in np.concatenate(sets).reshape(-1, KEY_BYTES)})


def test_pairs_are_cut_into_blocks_of_a_thousand() -> None:
    keys = some_keys(2 * BLOCK_PAIRS + 5, 2)
    (blocks,) = blocks_of([keys], lambda keys: np.zeros(keys.shape[:-1], dtype=bool))
    assert [len(block.pairs) for block in blocks] == [1000, 1000, 5]
    assert np.array_equal(np.concatenate([block.pairs for block in blocks]), np.arange(len(keys)))
    assert blocks_of([], lambda keys: keys) == []


def test_rows_added_at_the_end_are_all_that_is_scored(tmp_path: Path) -> None:
    keys = some_keys(BLOCK_PAIRS + 300, 2)
    score(tmp_path, [keys[:-100]])
    store = ReferenceStore(tmp_path, MODEL)
    (blocks,) = blocks_of([keys], lambda keys: known(store, keys))
    assert [block.pairs[block.asked].tolist() for block in blocks] == [[], list(range(BLOCK_PAIRS + 200, BLOCK_PAIRS + 300))]
    score(tmp_path, [keys])
    assert known(ReferenceStore(tmp_path, MODEL), keys).all()


def test_a_job_that_is_continued_writes_the_same_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reference_store, "BLOCK_PAIRS", 7)
    sets = overlapping_sets()
    written = score(tmp_path / "whole", sets)
    whole = shards(written[0].parent)
    assert len(whole) == len(written) > 6
    for k in range(len(written) + 1):
        root = tmp_path / str(k)
        first, second = score(root, sets, slice(k)), score(root, sets)
        assert [path.name for path in first + second] == [path.name for path in written]
        assert shards(second[-1].parent if second else first[-1].parent) == whole
        assert score(root, sets) == []


def test_shards_that_were_lost_are_written_again_as_they_were(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reference_store, "BLOCK_PAIRS", 7)
    sets, draw = overlapping_sets(), random.Random(0)
    written = score(tmp_path, sets)
    whole = shards(written[0].parent)
    for _ in range(10):
        lost = [path for path in written if draw.random() < 0.4]
        for path in lost:
            path.write_bytes(b"")
        assert score(tmp_path, sets) == lost
        assert shards(written[0].parent).items() >= whole.items()


def _work(root: Path, sets: list[Keys]) -> None:
    """Score twenty blocks, then wait to be killed: it never finishes, however late the other process comes."""
    score(root, sets, slice(20))
    time.sleep(60)


def test_a_job_that_is_killed_again_and_again_writes_the_same_shards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reference_store, "BLOCK_PAIRS", 7)
    sets = overlapping_sets(pairs=1500, sequences=3000)
    whole = shards(score(tmp_path / "whole", sets)[0].parent)
    draw, context = random.Random(0), multiprocessing.get_context("fork")
    folder, count = tmp_path / "killed" / identity_of(MODEL), 0
    for _ in range(10):
        job = context.Process(target=_work, args=(tmp_path / "killed", sets))
        job.start()
        while len(list(folder.glob("*.safetensors"))) <= count:
            assert job.is_alive()
        time.sleep(draw.uniform(0, 0.01))
        job.kill()
        job.join()
        count = len(shards(folder))
        assert shards(folder).items() <= whole.items()
    assert 10 <= count <= 200 < len(whole)
    score(tmp_path / "killed", sets)
    assert shards(folder) == whole
