"""The token store: what goes in comes out, once per content, whoever builds it and in whatever state."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from dspref.data import store as store_module
from dspref.data.formats import to_preference
from dspref.data.sources import Row, Source, read
from dspref.data.store import PairStore, load_pairs
from dspref.data.tokenize import Limits, TokenizedPair, encode, load_tokenizer
from dspref.errors import DataError, EnvironmentFault

SHARED = Path(__file__).parents[2] / ".." / "shared"
ROWS = [{"prompt": f"p{i}", "chosen": " a" * (i + 1), "rejected": " b" * (5 - i)} for i in range(5)]


def words() -> PreTrainedTokenizerFast:
    names = ["</s>", "<unk>", "a", "b", "c", *(f"p{i}" for i in range(100))]
    backend = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def write(path: Path, rows: list[dict[str, Any]]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path))


def load(sources: list[Source], cache: Path, limits: Limits | None = None, **settings: Any) -> PairStore:
    settings = {"on_bad_row": "error", "log": lambda line: None} | settings
    return load_pairs(sources, words(), limits or Limits(), cache_dir=cache, **settings)


def contents(store: PairStore) -> list[list[list[int]]]:
    return [[ids.tolist() for ids in store[i]] for i in range(len(store))]


def test_store_holds_what_encode_gives_in_the_order_of_the_sources(tmp_path: Path) -> None:
    sources = [write(tmp_path / "a.jsonl", ROWS[:2]), write(tmp_path / "b.jsonl", ROWS[2:])]
    store = load(sources, tmp_path / "cache")
    expected = encode([to_preference(row) for row in ROWS], words(), Limits())
    assert contents(store) == [[ids.tolist() for ids in pair] for pair in expected if isinstance(pair, TokenizedPair)]
    assert store.source_rows == (2, 3)
    assert store.where(3) == f"{tmp_path}/b.jsonl:2"
    assert store.lengths.tolist() == [[len(ids) for ids in store[i]] for i in range(5)]
    assert store[0].prompt.dtype == np.int32
    assert store.report["rows"] == store.report["kept"] == 5


def test_iteration_ends(tmp_path: Path) -> None:
    store = load([write(tmp_path / "a.jsonl", ROWS)], tmp_path / "cache")
    with pytest.raises(IndexError):
        store[5]


def test_second_load_finds_the_first_even_after_a_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load([write(tmp_path / "a.jsonl", ROWS)], tmp_path / "cache")
    monkeypatch.setattr(store_module, "split", None)
    (tmp_path / "b.jsonl").write_text("\n" + (tmp_path / "a.jsonl").read_text())
    second = load([Source(str(tmp_path / "b.jsonl"))], tmp_path / "cache")
    assert second.key == first.key
    assert contents(second) == contents(first)
    assert second.where(0) == f"{tmp_path}/b.jsonl:2"


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
    assert len({store.key for store in stores}) == len(stores)
    assert load([Source(path, weight=3.0)], cache).key == stores[0].key


def test_truncation_and_equal_pairs_are_counted_and_logged(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "p9", "chosen": " a a b", "rejected": " a a c"}]
    lines: list[str] = []
    source = write(tmp_path / "a.jsonl", rows)
    for _ in range(2):
        store = load([source], tmp_path / "cache", Limits(max_length=3), log=lines.append)
    assert store.source_rows == (5,)
    assert store.report["dropped"] == {"rejected: identical to chosen after truncation": 1}
    assert store.report["truncated"] == {"prompt": 0, "chosen": 4, "rejected": 4}
    left_out = "data: left out 1 of 6 rows: 1 x rejected: identical to chosen after truncation"
    assert lines == [left_out, "data: truncated, of 5 pairs: 4 x chosen, 4 x rejected"] * 2


def test_bad_rows_are_an_error_or_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, [ROWS[0], *[{"prompt": "p1", "chosen": "", "rejected": "b"}] * 25, ROWS[1]])
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(DataError) as caught:
        load([Source(str(path))], tmp_path / "cache")
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[0].startswith(f"{path}:2: chosen: empty answer; fix: ")
    assert lines[-1] == "... 6 more bad rows"
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


def _cut_tokens(folder: Path) -> None:
    data = (folder / "tokens.npy").read_bytes()
    (folder / "tokens.npy").write_bytes(data[:-4])


DAMAGES: dict[str, Callable[[Path], object]] = {
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
    DAMAGES[damage](cache / before.key)
    assert contents(load([source], cache)) == expected
    assert [path.name for path in cache.iterdir()] == [before.key]


def test_an_unusable_cache_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(EnvironmentFault, match=r"^.*cache: cannot write the token cache: .*; fix: .*$"):
        load([write(tmp_path / "a.jsonl", ROWS)], tmp_path / "cache")


def _build(barrier: Any, results: Any, path: str, cache: Path) -> None:
    barrier.wait()
    store = load([Source(path)], cache)
    results.put((store.key, contents(store)))


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
    build = store_module._build

    def overtaken(*arguments: Any) -> Any:
        shutil.copytree(tmp_path / "elsewhere" / winner.key, cache / winner.key)
        (cache / winner.key / "mark").write_text("the winner's")
        return build(*arguments)

    monkeypatch.setattr(store_module, "_build", overtaken)
    assert contents(load([source], cache)) == contents(winner)
    assert (cache / winner.key / "mark").exists()


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
    assert best.source_rows == (3,) and best.key != store.key


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
        how: Any = {"on_bad_row": "error", "cache_dir": cache, "log": lambda line: None}
        if expected is None:
            with pytest.raises(DataError, match="System role not supported; fix: write it into the first user message"):
                load_pairs([source], tokenizer, Limits(), **how)
            continue
        store = load_pairs([source], tokenizer, Limits(), **how)
        assert contents(store) == [expected], (has_template, as_, system)


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
        tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' . ' }}{% endfor %}" if has_template else None
        lines: list[str] = []
        how: Any = {"on_bad_row": "error", "cache_dir": tmp_path / f"{has_template}{as_}", "log": lines.append}
        for _ in range(2):  # a store that is found again tells it too
            load_pairs([Source(path, as_=as_)], tokenizer, Limits(), **how)
        assert ["5 x pair of plain text" in line for line in lines] == [True, True] * told
