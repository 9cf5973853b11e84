"""The token store: what goes in comes out, once per content, whoever builds it and in whatever state."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from dspref.data import formats, parts, rowfiles, sameness, tokenize
from dspref.data import store as store_module
from dspref.data.cache import scratch_folder
from dspref.data.converting import Converter
from dspref.data.formats import Preference, to_preference
from dspref.data.sources import Row, Source, find, read
from dspref.data.store import PairStore, load_pairs
from dspref.data.tokenize import Limits, TokenizedPair, encode, load_tokenizer
from dspref.errors import DataError, EnvironmentFault
from dspref.reference.store import sequence_keys

SHARED = Path(__file__).parents[3] / ".." / "shared"
ROWS = [{"prompt": f"p{i}", "chosen": " a" * (i + 1), "rejected": " b" * (5 - i)} for i in range(5)]


def words() -> PreTrainedTokenizerFast:
    names = ["</s>", "<unk>", "a", "b", "c", *(f"p{i}" for i in range(100))]
    backend = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def write(path: Path, rows: list[dict[str, Any]]) -> Source:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path))


def load(sources: list[Source], cache: Path, limits: Limits | None = None, **settings: Any) -> PairStore:
    settings = {"on_bad_row": "error", "log": lambda line: None} | settings
    return load_pairs(sources, words(), limits or Limits(), cache_dir=cache, **settings)


def contents(store: PairStore) -> list[list[list[int]]]:
    return [[ids.tolist() for ids in store[i][:3]] for i in range(len(store))]


def test_store_holds_what_encode_gives_in_the_order_of_the_sources(tmp_path: Path) -> None:
    sources = [write(tmp_path / "a.jsonl", ROWS[:2]), write(tmp_path / "b.jsonl", ROWS[2:])]
    store = load(sources, tmp_path / "cache")
    expected = encode([to_preference(row) for row in ROWS], words(), Limits())
    assert contents(store) == [[ids.tolist() for ids in pair[:3]] for pair in expected if isinstance(pair, TokenizedPair)]
    assert store.source_rows == (2, 3)
    assert store.where(3) == f"{tmp_path}/b.jsonl:2"
    assert store.lengths.tolist() == [[len(ids) for ids in store[i][:3]] for i in range(5)]
    assert store[0].prompt.dtype == np.int32
    assert store.report["rows"] == store.report["kept"] == 5


def test_iteration_ends(tmp_path: Path) -> None:
    store = load([write(tmp_path / "a.jsonl", ROWS)], tmp_path / "cache")
    with pytest.raises(IndexError):
        store[5]


def test_second_load_finds_the_first_even_after_a_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load([write(tmp_path / "a.jsonl", ROWS)], tmp_path / "cache")
    monkeypatch.setattr(rowfiles, "rows_of", None)
    monkeypatch.setattr(parts, "rows_of", None)
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    second = load([Source(str(tmp_path / "b.jsonl"))], tmp_path / "cache")
    assert second.address == first.address
    assert contents(second) == contents(first)
    assert second.where(1) == f"{tmp_path}/b.jsonl:2"


def test_key_follows_everything_that_decides_tokens(tmp_path: Path) -> None:
    source, cache = write(tmp_path / "a.jsonl", ROWS), tmp_path / "cache"
    path = source.path
    stores = [
        load([source], cache),
        load([source], cache, Limits(max_length=3)),
        load([source], cache, Limits(max_length=3, truncation_mode="keep_start")),
        load([source], cache, on_bad_row="drop"),
        load([Source(path, max_samples=4)], cache),
        load([Source(path, columns={"chosen": "rejected", "rejected": "chosen"})], cache),
        load([Source(path, template={"prompt": "c", "chosen": "{chosen}", "rejected": "{rejected}"})], cache),
        load([source, source], cache),
        load([write(tmp_path / "b.jsonl", [ROWS[0] | {"chosen": " c"}, *ROWS[1:]])], cache),
    ]
    assert len({store.address for store in stores}) == len(stores)
    assert load([Source(path, weight=3.0)], cache).address == stores[0].address


def test_truncation_and_equal_pairs_are_counted_and_logged(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "p9", "chosen": " a a b", "rejected": " a a c"}]
    lines: list[str] = []
    source = write(tmp_path / "a.jsonl", rows)
    for _ in range(2):
        store = load([source], tmp_path / "cache", Limits(max_length=3), log=lines.append)
    assert store.source_rows == (5,)
    assert store.report["dropped"] == {"rejected: identical to chosen after truncation": 1}
    assert store.report["truncated"] == {"prompt": [0, 0, 0], "chosen": [4, 10, 18], "rejected": [4, 10, 18]}
    left_out = "data: left out 1 of 6 rows: 1 x rejected: identical to chosen after truncation"
    cut = [f"4 {side} answers lost 56% of their tokens (2 of 4 each)" for side in ("chosen", "rejected")]
    assert lines == [left_out, f"data: beyond max_length 3, of 5 pairs: {'; '.join(cut)}"] * 2


def test_bad_rows_are_an_error_or_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, [ROWS[0], *[{"prompt": "p1", "chosen": "", "rejected": "b"}] * 25, ROWS[1]])
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(DataError) as caught:
        load([Source(str(path))], tmp_path / "cache")
    lines = str(caught.value).splitlines()
    places = f"also {path}:3, {path}:4 and 22 more"
    assert lines[0].startswith(f"{path}:2: chosen: empty answer ({places}); fix: ")
    assert lines[1].startswith(f"{path}:28: json: broken JSON at column 2: ") and len(lines) == 2
    store = load([Source(str(path))], tmp_path / "cache", on_bad_row="drop")
    assert len(store) == 2
    assert store.where(1) == f"{path}:27"
    assert sum(store.report["dropped"].values()) == 26


def test_nothing_left_says_why(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p1", "chosen": " a a", "rejected": " a b"},
        {"prompt": "p1", "chosen": "", "rejected": "b"},
    ]
    with pytest.raises(DataError) as caught:
        load([write(tmp_path / "a.jsonl", rows)], tmp_path / "cache", Limits(max_length=2), on_bad_row="drop")
    message = str(caught.value)
    assert "none of 2 rows is left" in message
    assert "identical to chosen after truncation" in message
    assert "4 (min), 4 (median), 4 (max)" in message


def test_many_reasons_are_told_in_twenty_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "p1", "chosen": [k], "rejected": "b"} for k in range(5)]
    rows += [{"prompt": "p1", "chosen": [{"role": f"r{k}"}], "rejected": []} for k in range(60)]
    with pytest.raises(DataError) as caught:
        load([write(tmp_path / "a.jsonl", rows)], tmp_path / "cache")
    lines = str(caught.value).splitlines()
    assert len(lines) <= 21 and all(line.startswith(f"{tmp_path}/a.jsonl:") or line.startswith("... ") for line in lines)


def test_the_fix_follows_from_the_reasons(tmp_path: Path) -> None:
    """Where nothing is left, because all rows lack a column or because all are cut, that is what is to be mended."""
    lacking = write(tmp_path / "a.jsonl", [{"prompt": "p1", "chosen": " a", "worse": " b"}] * 9)
    with pytest.raises(DataError, match=r"none of 9 rows is left \(9 x rejected: no column.*; fix: .*columns\.rejected"):
        load([lacking], tmp_path / "cache", on_bad_row="drop")
    empty = write(tmp_path / "b.jsonl", [{"prompt": "p1", "chosen": "", "rejected": " b"}] * 9)
    with pytest.raises(DataError, match=r"9 x chosen: empty answer\); fix: mend the rows$"):
        load([empty], tmp_path / "cache", on_bad_row="drop")
    cut = write(tmp_path / "c.jsonl", [{"prompt": "p1", "chosen": " a a", "rejected": " a b"}])
    with pytest.raises(DataError, match=r"; fix: raise data\.max_length$"):
        load([cut], tmp_path / "cache", Limits(max_length=2))


def test_a_text_beyond_any_model_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizing 40 MB of one text takes half a minute, and it would be cut to max_length."""
    monkeypatch.setattr(formats, "MAX_CHARACTERS", 1000)
    source = write(
        tmp_path / "a.jsonl", [ROWS[0], {"prompt": "p1", "chosen": " a", "rejected": " b" * 501, "more": "x" * 9999}]
    )
    with pytest.raises(DataError, match=r"a\.jsonl:2: rejected: 1,002 characters, more than the 1,000 that are read; fix: "):
        load([source], tmp_path / "cache")
    source = write(tmp_path / "a.jsonl", [ROWS[0] | {"more": "x" * 9999}])
    assert len(load([source], tmp_path / "cache")) == 1


def _cut_tokens(folder: Path) -> None:
    data = (folder / "tokens.npy").read_bytes()
    (folder / "tokens.npy").write_bytes(data[:-4])


def _damage(name: str, change: Callable[[bytearray], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        change(data)
        (folder / name).write_bytes(data)

    return damage


def _flip(place: int) -> Callable[[bytearray], object]:
    def flip(data: bytearray) -> None:
        data[place] ^= 0x40

    return flip


ARRAYS = ("tokens.npy", "offsets.npy", "rows.npy", "same.npy", "scored.npy", "places.npy")
DAMAGES: dict[str, Callable[[Path], object]] = {
    **{f"a bit of {name} is flipped": _damage(name, _flip(-1)) for name in (*ARRAYS, "report.json")},
    **{f"a bit of the header of {name} is flipped": _damage(name, _flip(20)) for name in (*ARRAYS, "report.json")},
    **{f"{name} is zeroes": _damage(name, lambda data: data.__setitem__(slice(None), bytes(len(data)))) for name in ARRAYS},
    "report is another's": _damage("report.json", lambda data: data.__setitem__(slice(None), data.replace(b": 5", b": 6"))),
    "report is a list": lambda folder: (folder / "report.json").write_text("[1]"),
    "report is half": _damage("report.json", lambda data: data.__delitem__(slice(100, None))),
    "report is gone": lambda folder: (folder / "report.json").unlink(),
    "report is empty": lambda folder: (folder / "report.json").write_text(""),
    "tokens are cut": _cut_tokens,
    "offsets are of another store": lambda folder: np.save(folder / "offsets.npy", np.zeros(4, dtype=np.int64)),
    "rows are text": lambda folder: (folder / "rows.npy").write_text("x"),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_built_again(tmp_path: Path, damage: str) -> None:
    source, cache = write(tmp_path / "a.jsonl", ROWS), tmp_path / "cache"
    before = load([source], cache)
    expected = contents(before)
    DAMAGES[damage](cache / before.address)
    lines: list[str] = []
    assert contents(load([source], cache, log=lines.append)) == expected
    assert len(lines) == 1 and "is damaged" in lines[0] and lines[0].endswith("; tokenizing again")
    assert [path.name for path in cache.iterdir()] == [before.address]
    lines.clear()
    assert contents(load([source], cache, log=lines.append)) == expected and not lines


def test_a_cut_store_is_found_without_reading_it(tmp_path: Path) -> None:
    """The later ranks of a machine trust the first to have read the bytes, and look at sizes and the report."""
    source, cache = write(tmp_path / "a.jsonl", ROWS), tmp_path / "cache"
    before = load([source], cache)
    _cut_tokens(cache / before.address)
    lines: list[str] = []
    assert len(load([source], cache, log=lines.append, verify=False)) == 5 and "tokens.npy" in lines[0]


def test_a_store_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def flush(descriptor: int) -> None:
        done.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def place(path: Path, target: Path) -> Path:
        done.append(("rename", str(target)))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "rename", place)
    store = load([write(tmp_path / "a.jsonl", ROWS)], tmp_path / "cache")
    at = done.index(("rename", str(tmp_path / "cache" / store.address)))
    flushed = {Path(path).name for what, path in done[:at] if what == "flush"}
    assert flushed >= {*store.report["files"], "report.json", store.address}
    assert ("flush", str(tmp_path / "cache")) in done[at:]


def test_what_killed_builders_left_is_swept_and_the_living_ones_stay(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    child = multiprocessing.get_context("fork").Process(target=_die_building, args=(cache,))
    child.start()
    child.join(timeout=20)
    (left,) = cache.iterdir()
    old, strange = cache / ".building-old", cache / ".building-strange"
    for folder in (old, strange):
        folder.mkdir()
    os.utime(old, (0, 0))
    with scratch_folder(cache) as living:
        load([write(tmp_path / "a.jsonl", ROWS)], cache)
        assert living.exists() and strange.exists() and not left.exists() and not old.exists()


def _die_building(cache: Path) -> None:
    with scratch_folder(cache):
        os._exit(9)


def test_an_unusable_cache_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(EnvironmentFault, match=r"^.*cache: cannot write the token cache: .*; fix: .*$"):
        load([write(tmp_path / "a.jsonl", ROWS)], tmp_path / "cache")


def _build(barrier: Any, results: Any, path: str, cache: Path) -> None:
    barrier.wait()
    store = load([Source(path)], cache)
    results.put((store.address, contents(store)))


def test_two_processes_build_the_same_store_at_once(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ROWS * 100)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (barrier, results, source.path, tmp_path / "cache")
    processes = [context.Process(target=_build, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = results.get(timeout=20), results.get(timeout=20)
    for process in processes:
        process.join()
    assert first == second
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first[0]]


def test_the_loser_of_a_race_uses_the_winners_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = write(tmp_path / "a.jsonl", ROWS), tmp_path / "cache"
    winner = load([source], tmp_path / "elsewhere")
    build = store_module.build

    def overtaken(*arguments: Any) -> Any:
        shutil.copytree(tmp_path / "elsewhere" / winner.address, cache / winner.address)
        (cache / winner.address / "mark").write_text("the winner's")
        return build(*arguments)

    monkeypatch.setattr(store_module, "build", overtaken)
    assert contents(load([source], cache)) == contents(winner)
    assert (cache / winner.address / "mark").exists()


@pytest.mark.parametrize("name", ["alpacaeval_train.jsonl", "multiturn_train.jsonl"])
def test_every_real_row_loads(tmp_path: Path, name: str) -> None:
    path = SHARED / "data" / name
    if not path.is_file():
        pytest.skip("shared/data is not beside the repository")
    tokenizer = load_tokenizer(str(SHARED / "tokenizer" / "gpt2-chatml"))
    lines: list[str] = []
    cache, limits = tmp_path / "cache", Limits(max_length=2048)
    store = load_pairs([Source(str(path))], tokenizer, limits, on_bad_row="error", cache_dir=cache, log=lines.append)
    rows = read(Source(str(path)))
    assert len(store) == len(rows)
    for i in range(0, len(rows), 97):
        row = rows[i]
        assert isinstance(row, Row)
        if store.lengths[i].sum() < 2048:
            assert str(tokenizer.decode(store[i].chosen)).startswith(row.values["chosen"][0]["content"])
    assert (store.lengths[:, 0] + store.lengths[:, 1:].max(axis=1)).max() <= 2048
    assert store.lengths.min() >= 1


def test_rows_of_scored_answers_keep_their_place_and_share_their_tokens(tmp_path: Path) -> None:
    """Pairs know the row that they come from, and which prompts and answers are the same, across rows and sources."""
    scored = {"prompt": "p1", "completions": [" a", " b", " c"], "scores": [3, 2, 1]}
    plain = {"prompt": "p1", "chosen": " a", "rejected": " a b"}
    source = write(tmp_path / "a.jsonl", [plain, scored, {"prompt": "p2", "chosen": " a", "rejected": " b"}])
    store = load([source], tmp_path / "cache")
    assert store.source_rows == (5,) and store.rows.tolist() == [0, 1, 1, 1, 2]
    assert [store.where(i) for i in (0, 1, 3, 4)] == [f"{source.path}:{line}" for line in (1, 2, 2, 3)]
    assert contents(store)[1:4] == [[[6], [2, 0], [3, 0]], [[6], [2, 0], [4, 0]], [[6], [3, 0], [4, 0]]]
    same = store.same
    assert len(set(same[:4, 0])) == 1 != len(set(same[:, 0]))
    assert same[0, 1] == same[1, 1] == same[2, 1] != same[4, 1], "an answer to another prompt is another sequence"
    assert same[1, 2] == same[3, 1] and same[2, 2] == same[3, 2]
    best = load([Source(source.path, pairs="best_against_worst")], tmp_path / "cache")
    assert best.source_rows == (3,) and best.address != store.address


def test_pairs_that_no_row_can_make_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match=r"data\.train\.pairs: has no effect: no row holds several answers; fix: "):
        load([Source(source.path, pairs="best_against_rest")], tmp_path / "cache")


def test_errors_of_a_row_name_the_keys_of_its_source(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "p1", "choosen": " a", "rejected": " b"}])
    for key in ("data.train", "data.train.1", "data.eval.held_out"):
        with pytest.raises(DataError, match=f"set {key}.columns.chosen: choosen".replace(".", "[.]")):
            load([Source(source.path, key=key)], tmp_path / "cache")


def test_a_template_makes_conversations_for_a_tokenizer_that_has_one(tmp_path: Path) -> None:
    """`as` decides, and else whether the tokenizer has a chat template."""
    path = write(tmp_path / "a.jsonl", [{"q": "p1", "good": "a", "bad": "b", "system": "c"}]).path
    template = {"prompt": "{q} ", "chosen": "{good}", "rejected": "{bad}"}
    as_text, as_chat, with_system = [[6], [2, 0], [3, 0]], [[6, 1], [2, 1], [3, 1]], [[4, 1, 6, 1], [2, 1], [3, 1]]
    for has_template, as_, system, expected in (
        (False, None, None, as_text),
        (True, None, None, as_chat),
        (True, "text", None, as_text),
        (True, "chat", None, as_chat),
        (True, None, "{system}", with_system),
        (True, None, "no system", None),
    ):
        tokenizer = words()
        if has_template:
            refuse = "{% if m.content == 'no system' %}{{ raise_exception('System role not supported') }}{% endif %}"
            tokenizer.chat_template = f"{{% for m in messages %}}{refuse}{{{{ m.content + ' . ' }}}}{{% endfor %}}"
        source = Source(path, template=template | ({"system": system} if system else {}), as_=as_)
        cache = tmp_path / "cache"
        how: Any = {"on_bad_row": "error", "cache_dir": cache, "log": lambda line: None, "scored": "all"}
        if expected is None:
            with pytest.raises(DataError, match="System role not supported; fix: write it into the first user message"):
                load_pairs([source], tokenizer, Limits(), **how)
            continue
        store = load_pairs([source], tokenizer, Limits(), **how)
        assert contents(store) == [expected], (has_template, as_, system)


def test_what_is_scored_is_kept_and_is_part_of_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pair i, the answers' first i tokens are scored not; equal tokens with other masks are other content."""
    rows = [{"prompt": "p1", "chosen": " a a a a a", "rejected": " b b b b b"}] * 3
    source, cut = write(tmp_path / "a.jsonl", rows), tokenize.truncate
    whole = load([source], tmp_path / "cache")
    assert whole[0].chosen_scored is None and whole.flat_mask() is None
    assert np.array_equal(whole.scored, whole.lengths[:, 1:]) and len(set(whole.same[:, 1])) == 1
    unscored = iter(range(3))

    def masked(pair: TokenizedPair, *how: Any) -> TokenizedPair:
        pair, k = cut(pair, *how), next(unscored)
        return pair._replace(chosen_scored=np.arange(len(pair.chosen)) >= k, rejected_scored=None)

    monkeypatch.setattr(tokenize, "truncate", masked)
    store = load([source], tmp_path / "other")
    assert store.key != whole.key and store.address == whole.address
    assert contents(store) == contents(whole) and store.scored.tolist() == [[6, 6], [5, 6], [4, 6]]
    masks = [pair.chosen_scored for pair in (store[i] for i in range(3))]
    assert masks[0] is None and [mask.tolist() for mask in masks[1:] if mask is not None] == [
        [False] + [True] * 5,
        [False] * 2 + [True] * 4,
    ]
    assert all(store[i].rejected_scored is None for i in range(3))
    assert len(set(store.same[:, 1])) == 3 and len(set(store.same[:, 0])) == len(set(store.same[:, 2])) == 1
    assert len({key.tobytes() for key in sequence_keys(store)[:, 0]}) == 3, "other sums of log-probs"
    assert np.array_equal(sequence_keys(store)[0, 1], sequence_keys(whole)[0, 1])
    mask = store.flat_mask()
    assert mask is not None and mask.sum() == store.scored.sum() and len(mask) == store.flat()[1][-1]


def test_the_content_key_knows_tokens_and_not_where_they_come_from(tmp_path: Path) -> None:
    rows = [{"a": "p1", "chosen": " a", "rejected": " b"}, {"a": "p2", "chosen": " c", "rejected": " b"}]
    plain = load([write(tmp_path / "a.jsonl", [{**row, "prompt": row["a"]} for row in rows])], tmp_path / "cache")
    named = load([Source(write(tmp_path / "b.json", rows).path, columns={"prompt": "a"})], tmp_path / "cache")
    assert plain.key == named.key and plain.address != named.address
    parts = [
        write(tmp_path / "c.jsonl", [{**rows[0], "prompt": "p1"}]),
        write(tmp_path / "d.jsonl", [{**rows[1], "prompt": "p2"}]),
    ]
    assert load(parts, tmp_path / "cache").key != plain.key, "a mixture is another data set than its parts in a row"
    assert load(parts[::-1], tmp_path / "cache").key != load(parts, tmp_path / "cache").key


def test_a_template_with_a_clock_gives_other_content_another_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache keeps what was rendered; without it, another day's tokens have another key."""
    from transformers.utils import chat_template_utils

    class Day(datetime):
        day_ = "p1"

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2026, 1, 1)

        def strftime(self, format: str) -> str:
            return self.day_

    monkeypatch.setattr(chat_template_utils, "datetime", Day)
    tokenizer = words()
    tokenizer.chat_template = "{{ strftime_now('%d') }} {% for m in messages %}{{ m.content + ' </s> ' }}{% endfor %}"
    turn = lambda role, content: [{"role": role, "content": content}]  # noqa: E731
    row = {"prompt": turn("user", "p3"), "chosen": turn("assistant", "a"), "rejected": turn("assistant", "b")}
    source, cache = write(tmp_path / "a.jsonl", [row]), tmp_path / "cache"
    settings: Any = {"on_bad_row": "error", "cache_dir": cache, "log": lambda line: None}
    first = load_pairs([source], tokenizer, Limits(), **settings)
    assert first.reads_clock and not load([write(tmp_path / "b.jsonl", ROWS)], cache).reads_clock
    Day.day_ = "p2"
    assert load_pairs([source], tokenizer, Limits(), **settings).key == first.key
    shutil.rmtree(cache)
    later = load_pairs([source], tokenizer, Limits(), **settings)
    assert later.address == first.address and later.key != first.key


def test_the_largest_id_and_the_longest_pair_are_known(tmp_path: Path) -> None:
    store = load([write(tmp_path / "a.jsonl", ROWS)], tmp_path / "cache")
    assert store.report["largest_id"] == max(int(ids.max()) for i in range(5) for ids in store[i][:3])
    assert store.report["longest"] == 1 + 5 + 1


def test_contents_are_numbered_alike() -> None:
    digests = np.array([[3, 1], [2, 2], [3, 1], [3, 0], [2**64 - 1, 0], [2, 2]], dtype=np.uint64)
    numbers = sameness.numbered(digests)
    assert numbers[0] == numbers[2] and numbers[1] == numbers[5] and len(set(numbers)) == 4
    assert len(sameness.numbered(digests[:0])) == 0


WITH_CALLS = (
    "{% for t in tools or [] %}<t>{{ t | tojson }}{% endfor %}"
    "{% if thinking is defined %}<thinking={{ thinking }}>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_parquet_and_json_lines_give_the_same_tokens_and_arguments_are_objects(tmp_path: Path, shared: Path) -> None:
    """Two tools with other arguments, one row with a template setting; arguments also as OpenAI writes them, JSON text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def row(name: str, arguments: Any, **kwargs: Any) -> dict[str, Any]:
        asked = arguments if isinstance(arguments, dict) else json.loads(arguments)
        parameters = {"type": "object", "properties": {key: {"type": type(value).__name__} for key, value in asked.items()}}
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return {
            "prompt": [{"role": "user", "content": "Go."}],
            "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}],
            "rejected": [{"role": "assistant", "content": "No."}],
            "tools": [{"type": "function", "function": {"name": name, "parameters": parameters}}],
            "chat_template_kwargs": kwargs,
        }

    rows = [row("weather", {"city": "Bonn"}), row("add", {"x": 1, "y": 2}, thinking=True), row("weather", {"city": "Ulm"})]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    as_text = [json.dumps(one).replace('{"city": "Bonn"}', json.dumps('{"city": "Bonn"}')) for one in rows]
    (tmp_path / "text.jsonl").write_text("\n".join(as_text))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "arrow.parquet")
    tokenizer = load_tokenizer(str(shared / "tokenizer" / "gpt2-chatml"), chat_template=WITH_CALLS)
    how: Any = {"on_bad_row": "error", "cache_dir": tmp_path / "cache", "log": lambda line: None}
    lines, text, arrow = (
        load_pairs([Source(str(tmp_path / name))], tokenizer, Limits(), **how)
        for name in ("lines.jsonl", "text.jsonl", "arrow.parquet")
    )
    assert contents(lines) == contents(text) == contents(arrow)
    assert str(tokenizer.decode(arrow[0].chosen)).startswith('weather {"city": "Bonn"}<|im_end|>')
    assert "null" not in str(tokenizer.decode(arrow[0].prompt)) and "thinking" not in str(tokenizer.decode(arrow[0].prompt))
    assert "<thinking=True>" in str(tokenizer.decode(arrow[1].prompt))


def test_a_turn_that_stands_twice_is_trained_once_and_told(tmp_path: Path, shared: Path) -> None:
    system, user = ({"role": role, "content": text} for role, text in (("system", "Be brief."), ("user", "Who are you? ")))
    one, other = ({"role": "assistant", "content": text} for text in ("Nobody.", "Somebody."))
    plain = {"prompt": [system, user], "chosen": [one], "rejected": [other]}
    again = user | {"content": "Who are you?"}
    twice = {"prompt": [system, user], "chosen": [again, one], "rejected": [again, other]}
    tokenizer = load_tokenizer(str(shared / "tokenizer" / "gpt2-chatml"))
    stores, told = [], []
    for name, row in (("plain", plain), ("twice", twice)):
        source = write(tmp_path / f"{name}.jsonl", [row, row])
        how: Any = {"on_bad_row": "error", "cache_dir": tmp_path / "cache", "log": told.append}
        stores.append(load_pairs([source], tokenizer, Limits(), **how))
    assert contents(stores[0]) == contents(stores[1])
    assert told == ["data: 4 x prompt, or end of it, that an answer repeated and lost"]


def test_text_for_a_tokenizer_with_a_chat_template_is_told_unless_it_is_meant(tmp_path: Path) -> None:
    path, tokenizer = write(tmp_path / "a.jsonl", ROWS).path, words()
    for has_template, as_, told in ((True, None, True), (True, "text", False), (True, "chat", False), (False, None, False)):
        tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' </s> ' }}{% endfor %}" if has_template else None
        lines: list[str] = []
        how: Any = {"on_bad_row": "error", "cache_dir": tmp_path / f"{has_template}{as_}", "log": lines.append}
        for _ in range(2):  # a store that is found again tells it too
            load_pairs([Source(path, as_=as_)], tokenizer, Limits(), **how)
        assert ["5 x pair of plain text" in line for line in lines] == [True, True] * told


HI = {"prompt": "Hi", "chosen": "Hi! How can I help?", "rejected": "Hi there, human."}
CODE = [
    {"prompt": f"def f{i}(x):", "chosen": f"def f{i}(x):\n    return x", "rejected": f"def f{i}(x):  pass"} for i in (1, 2)
]
OTHER = {"prompt": "Who?", "chosen": "I.", "rejected": "You."}


@pytest.mark.parametrize("how", [{"as_": "chat"}, {"template": {key: f"{{{key}}}" for key in OTHER}}, {}])
@pytest.mark.parametrize(
    ("rows", "chosen", "rejected"),
    [
        (CODE, "    return x", "pass"),
        ([*CODE, *[OTHER] * 200], CODE[0]["chosen"], CODE[0]["rejected"]),
        (CODE[:1], "    return x", "pass"),
        ([HI], HI["chosen"], HI["rejected"]),
        ([HI, HI], HI["chosen"], HI["rejected"]),
        ([HI, OTHER], HI["chosen"], HI["rejected"]),
    ],
    ids=["all", "some", "one row", "one row, not apart", "one prompt", "some, of two"],
)
def test_texts_of_a_conversation_lose_a_repeated_prompt_only_where_the_whole_source_repeats_it(
    tmp_path: Path, rows: list[dict[str, Any]], chosen: str, rejected: str, how: dict[str, Any]
) -> None:
    """An answer may begin with the words of a short prompt: whether that is a repeat shows in the other rows."""
    source = write(tmp_path / "a.jsonl", rows if how else [{**row, "system": "s"} for row in rows])
    listing = find(replace(source, columns=None, **how))
    made = [item for _, item in Converter(listing, chat_model=True)(list(listing.rows()))]
    assert all(isinstance(item, Preference) for item in made)
    first: Any = made[0]
    assert [first.chosen[0]["content"], first.rejected[0]["content"]] == [chosen, rejected]
    assert (first.begins, first.repeats) == (True, 2 if rows in (CODE, CODE[:1]) else 0)


def test_a_prompt_that_answers_begin_with_and_keep_is_told(tmp_path: Path) -> None:
    tokenizer, lines = words(), []
    tokenizer.chat_template = SPOKEN
    source = replace(write(tmp_path / "a.jsonl", [HI | {"chosen": "Hi! a", "rejected": "Hi? b"}]), as_="chat")
    how: Any = {"on_bad_row": "error", "cache_dir": tmp_path / "cache", "log": lines.append, "scored": "all"}
    assert contents(load_pairs([source], tokenizer, Limits(), **how)) == [[[1, 0], [1, 2, 0], [1, 3, 0]]]
    assert lines[0].startswith("data: 1 x pair of text whose answers both begin with the prompt's")


SPOKEN = "{% for m in messages %}{{ m.content + ' </s> ' }}{% endfor %}"
PLAIN = [{"prompt": f"p{i}", "chosen": " a", "rejected": " b"} for i in range(300)]


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> Source:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.Table.from_pylist([dict.fromkeys({key: None for row in rows for key in row}) | row for row in rows]), path
    )
    return Source(str(path))


@pytest.mark.parametrize("name", ["system", "system_prompt", "own"])
@pytest.mark.parametrize("places", [[0], [299], range(0, 300, 2)])
def test_a_source_speaks_one_way_whichever_of_its_rows_have_a_system_message(
    tmp_path: Path, name: str, places: Sequence[int]
) -> None:
    """As in a parquet file, which gives every row the column: all are conversations."""
    rows = [row | ({name: "c"} if i in places else {}) for i, row in enumerate(PLAIN)]
    tokenizer, columns = words(), {"system": "own"} if name == "own" else None
    tokenizer.chat_template = SPOKEN
    sources = [write(tmp_path / "a.jsonl", rows), as_parquet(tmp_path / "a.parquet", rows)]
    lines: list[str] = []
    how: Any = {"on_bad_row": "error", "cache_dir": tmp_path / "cache", "log": lines.append, "scored": "all"}
    stores = [load_pairs([replace(source, columns=columns)], tokenizer, Limits(), **how) for source in sources]
    assert stores[0].key == stores[1].key and not lines
    for i in (0, 1, 299):
        system = [4, 0] if i in places else []
        assert contents(stores[0])[i] == [[*system, 5 + i if i < 100 else 1, 0], [2, 0], [3, 0]]
    as_text = load_pairs([replace(write(tmp_path / "b.jsonl", PLAIN), columns=None)], tokenizer, Limits(), **how)
    assert contents(as_text)[0] == [[5], [2, 0], [3, 0]] and "300 x pair of plain text" in lines[0]


def test_rows_with_a_prompt_and_rows_with_an_implicit_one_may_share_a_file(tmp_path: Path) -> None:
    """Where a row has one that is null, something is wrong with it."""
    rows = [{"prompt": "p1", "chosen": "a b", "rejected": "a c"}, {"chosen": "a b", "rejected": "a c"}]
    for source in (write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[::-1])):
        assert len(load([source], tmp_path / "cache")) == 2
    with pytest.raises(DataError, match=r":2: prompt: null; fix: mend"):
        load([as_parquet(tmp_path / "a.parquet", rows)], tmp_path / "cache")
    assert len(load([write(tmp_path / "c.jsonl", rows[1:])], tmp_path / "cache")) == 1
    turns = [[{"role": "user", "content": "p1"}, {"role": "assistant", "content": text}] for text in "ab"]
    whole = [{"chosen": turns[0], "rejected": turns[1]}, {"prompt": "p1", "chosen": turns[0], "rejected": turns[1]}]
    tokenizer = words()
    tokenizer.chat_template = SPOKEN
    how: Any = {"on_bad_row": "error", "cache_dir": tmp_path / "cache", "log": print, "scored": "all"}
    assert len(load_pairs([write(tmp_path / "d.jsonl", whole)], tokenizer, Limits(), **how)) == 2


def test_a_column_of_a_template_or_of_columns_that_a_row_lacks_is_null_there(tmp_path: Path) -> None:
    rows = [{"q": "p1", "x": "a", "y": "b"}, {"q": "p2", "x": "a", "y": "b", "sys": "c"}]
    template = {"system": "{sys}", "prompt": "{q}", "chosen": "{x}", "rejected": "{y}"}
    tokenizer = words()
    tokenizer.chat_template = SPOKEN
    how: Any = {"on_bad_row": "error", "cache_dir": tmp_path / "cache", "log": print, "scored": "all"}
    for source in (write(tmp_path / "a.jsonl", rows), as_parquet(tmp_path / "a.parquet", rows)):
        store = load_pairs([replace(source, template=template)], tokenizer, Limits(), **how)
        assert contents(store) == [[[6, 0], [2, 0], [3, 0]], [[4, 0, 7, 0], [2, 0], [3, 0]]]
    with pytest.raises(DataError, match="its template's column 'sys' is missing"):
        load_pairs([replace(write(tmp_path / "b.jsonl", rows[:1]), template=template)], tokenizer, Limits(), **how)


def test_of_one_reason_in_two_sources_each_has_the_keys_of_its_own(tmp_path: Path) -> None:
    bad = {"prompt": "p1", "choosen": " a", "rejected": " b"}
    sources = [replace(write(tmp_path / f"{k}.jsonl", [bad, ROWS[0]]), key=f"data.train.{k}") for k in range(2)]
    with pytest.raises(DataError) as error:
        load(sources, tmp_path / "cache")
    first, second = str(error.value).splitlines()
    for k, line in enumerate((first, second)):
        assert f"{k}.jsonl:1: chosen: no column" in line and f"set data.train.{k}.columns.chosen: choosen" in line
    lines: list[str] = []
    load(sources, tmp_path / "cache", on_bad_row="drop", log=lines.append)
    assert "left out 2 of 4 rows: 2 x chosen: no column" in lines[0]


def test_what_rows_hold_besides_is_told(tmp_path: Path) -> None:
    lines: list[str] = []
    row = ROWS[0] | {"tools": [{"name": "f"}], "completions": ["a", "b"], "scores": [1, 2]}
    load([write(tmp_path / "a.jsonl", [row, ROWS[1]])], tmp_path / "cache", log=lines.append)
    assert "1 x pair of text beside tools" in lines[0] and "1 x pair beside scored completions" in lines[0]


def test_files_that_are_in_no_split_are_told_each_time(tmp_path: Path) -> None:
    for name in ("train", "more"):
        write(tmp_path / "set" / f"{name}.jsonl", ROWS)
    for _ in range(2):
        lines: list[str] = []
        load([Source(str(tmp_path / "set"))], tmp_path / "cache", log=lines.append)
        told = "left out, as their names say no split or more than it: more.jsonl (name files in path to read them)"
        assert lines == [f"data: {tmp_path}/set: {told}"]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    """Its rows would be found again under the digest of others."""
    source, cache = write(tmp_path / "a.jsonl", ROWS), tmp_path / "cache"
    digests = iter(["before", "after"])
    with pytest.raises(DataError, match=r"a\.jsonl: this source changed while it was read; fix: "):
        load([source], cache, digest=lambda path: next(digests))
    digests = iter(["same", "before", "same", "after"])
    with pytest.raises(DataError, match=r"b\.jsonl: this source changed while it was read; fix: "):
        load([source, write(tmp_path / "b.jsonl", ROWS)], cache, digest=lambda path: next(digests))
    assert not list(cache.iterdir())
