"""`dspref inspect`: what is asked for is found or refused in a line, and shown as it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tokenizer, tiny_config
from typer.testing import CliRunner

from dspref.cli import app

TRAIN = [
    {"prompt": "Say it.", "chosen": " yes yes", "rejected": " no", "score": 0.5, "tags": ["a", "b"]},
    {"prompt": "Say it.", "chosen": " yes yes", "rejected": " never"},
    {"prompt": "A much longer question than the others have, is it not?", "chosen": " a", "rejected": " b"},
    {"prompt": "q", "chosen": " short", "rejected": " one answer that goes on and on and on"},
    {"prompt": "q", "chosen": "", "rejected": " no"},
    {"prompt": "h\x1b[31m\u202e", "chosen": " \x1b]0;x\x07 ⟦⟧ ⏎", "rejected": " x\r", "\x1b[2Jname": "\x1b[2Jvalue"},
    {"prompt": "r", "completions": [" good", " fair", " bad"], "scores": [3, 2, 1]},
]
EVAL = [{"prompt": "Say it.", "chosen": " yes yes", "rejected": " no"}, {"prompt": "new", "chosen": " a", "rejected": " b"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    size = save_tokenizer(folder / "model")
    tiny_config("qwen2", size).save_pretrained(folder / "model")
    write(folder / "a.jsonl", TRAIN)
    write(folder / "b.jsonl", [{"prompt": "other", "chosen": " x", "rejected": " y"}] * 2)
    write(folder / "e.jsonl", EVAL)
    data = {"train": "a.jsonl", "eval": "e.jsonl", "on_bad_row": "drop", "tokens_per_pack": 128}
    run = {"model": {"name_or_path": "model", "init": "random"}, "data": data, "train": {"pairs_per_step": 4}}
    (folder / "x.yaml").write_text(json.dumps(run | {"output_dir": "out"}))
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def call(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["inspect", "x.yaml", *words], prog_name="dspref")
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def found(*words: str) -> dict[str, Any]:
    code, out, err = call(*words, "--format", "json")
    assert code == 0, err
    return json.loads(out)


MIXTURE = 'data.train=["a.jsonl", "b.jsonl"]'


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--ranks", "3", "parallel.sequence=2"], 2, "parallel.sequence: 2 does not divide the 3 ranks; use 1"),
        (["--row", "99"], 2, "--row 99: a.jsonl:99: there is no such row in data.train"),
        (["--row", "5"], 3, "a.jsonl:5: left out: chosen: empty answer; fix: "),
        (["--row", "0"], 2, "--row 0: must be a row's number"),
        (["--row", "\x1b[31m"], 2, "must be a row's number"),
        (["--row", "zzz.jsonl:1"], 2, "--row zzz.jsonl:1: no source here reads zzz.jsonl; there are a.jsonl"),
        (["--row", "1", MIXTURE], 2, "--row 1: in which of several sources? add --source with one of 0, 1"),
        (["--row", "4", "data.train.max_samples=2"], 2, "does not read this row (split, max_samples)"),
        (["--row", "1", "--worst", "length"], 2, "--row and --worst: each names other pairs"),
        (["--random", "1", "--worst", "length"], 2, "--worst and --random: each names other pairs"),
        (["--seed", "1"], 2, "--seed: has no effect without --random"),
        (["--worst", "width"], 2, "'width' is not one of 'length', 'prompt', 'margin'"),
        (["--random", "0"], 2, "'--random'"),
        (["--ranks", "0"], 2, "'--ranks'"),
        (["--source", "1"], 2, "--source 1: data.train is a single source"),
        (["--source", "2", MIXTURE], 2, "--source 2: no such source; use one of 0, 1"),
        (["--eval", "data.eval=null"], 2, "--eval: the run has no held-out pairs"),
        (["--format", "xml"], 2, "'xml' is not one of 'text', 'json'"),
        (["--nope"], 2, "--nope: no such option"),
        (["data.train=none.jsonl"], 2, "none.jsonl"),
        (["data.eval=a.jsonl"], 3, "data.eval: a.jsonl is trained on too"),
        (["data.on_bad_row=error"], 3, "a.jsonl:5: chosen: empty answer"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_refused_in_one_line(words: list[str], code: int, said: str) -> None:
    for form in ([], ["--format", "json"]) if "--format" not in words else ([],):
        got, out, err = call(*words, *form)
        assert (got, out, err.count("\n")) == (code, "", 1), (out, err)
        assert said in err and err[:-1].isprintable()


def test_a_row_is_shown_with_its_place_columns_tokens_and_pack() -> None:
    (pair,) = found("--row", "1", "--ids")["pairs"]
    assert (pair["where"], pair["source"], pair["more_of_row"]) == ("a.jsonl:1", "data.train", 0)
    assert pair["columns"] == {"score": 0.5, "tags": '["a", "b"]'} and pair["turns"] is None
    texts = {name: "".join(run["text"] for run in section["runs"]) for name, section in pair["sections"].items()}
    assert texts["prompt"] == "Say it." and texts["chosen"].startswith(" yes yes") and texts["rejected"].startswith(" no")
    for section in pair["sections"].values():
        assert sum(len(run["ids"]) for run in section["runs"]) == section["tokens"]
        assert all(len(run["ids"]) == len(run["texts"]) for run in section["runs"])
    pack = pair["pack"]
    own = [piece for piece in pack["pieces"] if piece["own"]]
    assert {piece["kind"] for piece in own} == {"prompt", "chosen", "rejected"}
    assert pack["tokens"] == sum(piece["tokens"] for piece in pack["pieces"]) <= pack["room"] == 128
    code, out, _ = call("--row", "a.jsonl:1")
    assert code == 0 and "a.jsonl:1  data.train" in out and "score: 0.5" in out
    assert "⟦␣yes yes" in out and "Say it." in out and f"step {pack['step']} of {pack['steps']}" in out


def test_all_pairs_of_a_row_are_shown() -> None:
    pairs = found("--row", "7")["pairs"]
    assert [pair["where"] for pair in pairs] == ["a.jsonl:7"] * 3
    chosen = ["".join(run["text"] for run in pair["sections"]["chosen"]["runs"]) for pair in pairs]
    assert [text.split("<")[0] for text in chosen] == [" good", " good", " fair"]
    assert all(pair["columns"] == {"scores": "[3, 2, 1]"} and not pair["more_of_row"] for pair in pairs)


def test_of_a_row_that_makes_many_pairs_some_are_shown_and_the_rest_counted() -> None:
    row = {"prompt": "p", "completions": [f" answer {k}" for k in range(6)], "scores": [*range(6)]}
    write(Path("many.jsonl"), [row, {"prompt": "q", "chosen": " a", "rejected": " b"}])
    words = ["data.train=many.jsonl", "--row", "1", "--row", "2", "--row", "many.jsonl:1"]
    pairs = found(*words)["pairs"]
    assert [pair["where"] for pair in pairs] == ["many.jsonl:1"] * 8 + ["many.jsonl:2"], "15 pairs, of which 8 are shown"
    assert [pair["more_of_row"] for pair in pairs] == [0] * 7 + [7, 0]
    assert "7 more pairs of this row not shown" in call(*words)[1]


def test_turns_and_tools_are_told(shared: Path) -> None:
    """And a prompt that is too long loses what comes behind its first header."""
    tokenizer = f"model.tokenizer_name_or_path={shared}/tokenizer/gpt2-chatml"
    turns = [
        {"role": "user", "content": "one " * 40},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "x"},
    ]
    said = [{"role": "assistant", "content": word} for word in ("yes", "no")]
    write(Path("turns.jsonl"), [{"prompt": turns, "chosen": said[:1], "rejected": said[1:], "lang": "en"}])
    words = ["data.train=turns.jsonl", tokenizer, "data.max_length=30", "--row", "1"]
    tiny_config("qwen2", 50304).save_pretrained("large")
    (pair,) = found(*words, "model.name_or_path=large")["pairs"]
    assert pair["turns"] == {"prompt": ["user", "assistant", "user"], "chosen": ["assistant"], "rejected": ["assistant"]}
    prompt = pair["sections"]["prompt"]
    assert prompt["gap"] == 3 and prompt["lost"] > 20 and pair["columns"] == {"lang": "en"}
    out = call(*words, "model.name_or_path=large")[1]
    assert "turns     user assistant user > assistant | assistant\n" in out and "⟦yes<|im_end|>⟧" in out
    assert re.search(r"^  <\|im_start\|>user⏎\n  ✂ \d+ tokens ✂", out, re.M)


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["--worst", "length"], ["a.jsonl:3"]),
        (["--worst", "prompt"], ["a.jsonl:3"]),
        (["--worst", "prompt", "data.max_length=12"], ["a.jsonl:3"]),
        (["--worst", "margin"], ["a.jsonl:4"]),
        (["--worst", "length", "--eval"], ["e.jsonl:1"]),
        (["--worst", "length", "--source", "1", MIXTURE], ["b.jsonl:1"]),
        (["--row", "b.jsonl:2", MIXTURE], ["b.jsonl:2"]),
        (["--row", "2", "--source", "0", MIXTURE], ["a.jsonl:2"]),
        (["--row", "2", "--eval"], ["e.jsonl:2"]),
        (["--random", "9", "--eval"], ["e.jsonl:1", "e.jsonl:2"]),
        ([], ["a.jsonl:1", "a.jsonl:2"]),
        (["--eval"], ["e.jsonl:1", "e.jsonl:2"]),
        (["--source", "1", MIXTURE], ["b.jsonl:1", "b.jsonl:2"]),
        (["--eval", "--source", "two", 'data.eval={"one": {"path": "e.jsonl"}, "two": {"path": "b.jsonl"}}'],
         ["b.jsonl:1", "b.jsonl:2"]),
    ],
)  # fmt: skip
def test_the_pairs_that_are_meant_are_shown(words: list[str], where: list[str]) -> None:
    said = found(*words)
    assert [pair["where"] for pair in said["pairs"]] == where
    assert ("sets" in said) is not any(word in words for word in ("--worst", "--row", "--random"))
    code, out, _ = call(*words)
    assert code == 0 and re.findall(r"^(\S+:\d+)  data", out, re.M) == where


def test_pairs_drawn_at_random_are_the_seed_s() -> None:
    def places(*words: str) -> list[str]:
        return [pair["where"] for pair in found("--random", "3", *words)["pairs"]]

    assert places() == places("--seed", "0") and len(places()) == 3
    assert len({tuple(places("--seed", str(seed))) for seed in range(4)}) > 1


def test_what_truncation_cut_is_marked_where_it_was() -> None:
    (pair,) = found("--row", "3", "data.max_length=16")["pairs"]
    prompt = pair["sections"]["prompt"]
    whole = found("--row", "3")["pairs"][0]["sections"]["prompt"]["tokens"]
    assert prompt["lost"] == whole - prompt["tokens"] > 0 and prompt["gap"] == 0
    code, out, _ = call("--row", "3", "data.max_length=16")
    assert code == 0 and f"✂ {prompt['lost']} tokens ✂" in out
    assert f"{prompt['tokens']} tokens, {prompt['lost']} of {whole} cut off, for max_length 16" in out
    at_end = call("--row", "3", "data.max_length=16", "data.truncation_mode=keep_start")[1]
    assert re.search(r"A .*✂ \d+ tokens ✂$", at_end, re.M)


def test_nothing_in_the_data_drives_a_terminal_or_passes_for_a_mark() -> None:
    for words in ([], ["--ids"]):
        code, out, err = call("--row", "6", *words)
        assert code == 0 and not err
        assert all(line.isprintable() for line in out.split("\n"))
        assert "\\x1b" in out and "\\u202e" in out and (words or "\\u27e6\\u27e7" in out)
    body = out.split("a.jsonl:6")[1]
    assert body.count("⟦") == body.count("⟧") == 2, "one run of each answer is scored"
    code, out, _ = call("--row", "6", "--format", "json")
    assert out[:-1].isascii() and out[:-1].isprintable() and out.count("\n") == 1
    assert "\x1b]0;x\x07" in "".join(run["text"] for run in json.loads(out)["pairs"][0]["sections"]["chosen"]["runs"])


def test_the_numbers_are_those_of_the_rows() -> None:
    said = found()
    assert [(s["key"], s["rows"], s["pairs"], s["kept"]) for s in said["sources"]] == [
        ("data.train", 7, 9, 8), ("data.eval", 2, 2, 2),
    ]  # fmt: skip
    assert said["sources"][0]["dropped"] == {"chosen: empty answer": 1}
    train = said["sets"]["data.train"]
    assert train["pairs"] == train["packing"]["pairs"] == 8 and train["repeated"]["prompts"] == 5
    assert train["repeated"]["prompts_of_several_pairs"] == 2 and train["repeated"]["prompts_of_several_rows"] == 1
    assert said["overlap"] == {"data.eval": {"prompts": 1, "pairs_of_these": 1, "pairs": 1}}
    packing = train["packing"]
    assert packing["packed"] <= packing["unpadded"] <= packing["padded"] and packing["steps"] == 2
    code, out, _ = call()
    assert code == 0
    for text in (f"{packing['packed']:,}", f"{packing['saved']:.1%}", "1 x chosen: empty answer  (data.train)"):
        assert text in out
    assert "data.eval: 1 of its prompts (1 pair) is in the training set too, 1 of these pairs with" in out
    held_out = found("--eval")["sets"]
    assert list(held_out) == ["data.eval"] and held_out["data.eval"]["pairs"] == 2
    mixed = found(MIXTURE)
    assert [s["kept"] for s in mixed["sources"][:2]] == [8, 2] and mixed["sets"]["data.train"]["pairs"] == 10
    assert mixed["sets"]["data.train"]["repeated"]["pairs"] == 1
    assert found(MIXTURE, "--source", "1")["sets"]["data.train.1"]["pairs"] == 2


def test_the_pack_is_that_of_the_plan() -> None:
    """For more ranks, another seed, another order; and for held-out pairs that of an evaluation."""
    for words in ([], ["--ranks", "2"], ["train.seed=7"], ["data.prefix_sharing=false"], ["data.shuffle=false"]):
        pack = found("--row", "1", *words)["pairs"][0]["pack"]
        assert pack["ranks"] == (2 if "--ranks" in words else 1) and pack["rank"] < pack["ranks"]
        assert pack["evaluation"] is False and pack["last_step"] == 2
    assert pack["step"] == 1
    shared = found("--row", "1", "parallel.sequence=2", "data.tokens_per_pack=64")["pairs"][0]["pack"]
    whole = found("--row", "1")["pairs"][0]["pack"]
    assert shared == whole | {"held_by": 2} and whole["held_by"] == 1
    assert "group (of 2 ranks) 0 of 1" in call("--row", "1", "parallel.sequence=2")[1]
    late = ["data.shuffle=false", "train.max_steps=1", "--row", "7"]
    assert found(*late)["pairs"][0]["pack"]["step"] == 2 and "(the run ends with step 1)" in call(*late)[1]
    held_out = found("--row", "1", "--eval")["pairs"][0]["pack"]
    assert held_out["evaluation"] and held_out["pairs"] == 2
    seldom = ['data.train={"path": "a.jsonl", "weight": 0.5}']
    packs = [found("--row", str(row), *seldom)["pairs"][0]["pack"] for row in (1, 2, 3, 4, 6)]
    assert None in packs and any(packs)
    missing = (1, 2, 3, 4, 6)[packs.index(None)]
    assert "in none of the first epoch" in call("--row", str(missing), *seldom)[1]


def test_a_run_finds_what_inspect_has_tokenized(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dspref import config
    from dspref.data import store
    from dspref.training import preparation

    monkeypatch.setenv("DSPREF_CACHE", str(tmp_path))
    found(MIXTURE)
    monkeypatch.setattr(store, "build", lambda *given: pytest.fail("tokenized again"))
    run = config.load("x.yaml", [MIXTURE])
    for of in ("train", "eval"):
        listings = [preparation.listing_of(section, key) for key, section in run.data.source_keys(of).items()]
        assert preparation.load_sources(run.data, preparation.tokenizer_of(run.model), listings)


def test_what_a_run_would_refuse_of_lengths_is_shown_and_then_refused() -> None:
    most = tiny_config("qwen2", 256).max_position_embeddings
    write(Path("long.jsonl"), [{"prompt": "q", "chosen": "yes " * most, "rejected": "no"}])
    code, out, err = call("--worst", "length", "data.train=long.jsonl", "data.max_length=null")
    assert code == 2 and "long.jsonl:1  data.train" in out and f"beyond the model's {most} positions" in err


ALONE = [
    {"prompt": "Say it.", "completion": " yes yes", "label": True, "stars": 5},
    {"prompt": "Say it.", "completion": " no, not that", "label": False},
    {"prompt": "Ask.", "completion": " why", "label": False},
    {"prompt": "Ask.", "completion": " why", "label": True},
]
KTO = ["data.train=alone.jsonl", "data.eval=null", "objective={name: kto}"]


@pytest.fixture
def alone() -> None:
    write(Path("alone.jsonl"), ALONE)


def test_of_a_single_answer_nothing_is_shown_that_is_not_there(alone: None) -> None:
    pairs = found(*KTO, "--row", "1", "--row", "2")["pairs"]
    assert [pair["label"] for pair in pairs] == [True, False]
    assert [[*pair["sections"]] for pair in pairs] == [["prompt", "chosen"], ["prompt", "rejected"]]
    assert [pair["columns"] for pair in pairs] == [{"label": True, "stars": 5}, {"label": False}]
    said = call(*KTO)[1]
    assert "2 desirable and 2 undesirable answers" in said and "all scored, desirable" in said
    assert "pairs" not in said and " 0 tokens" not in said and "identical" not in said


def test_numbers_of_single_answers_are_of_those_that_there_are(alone: None) -> None:
    figures = found(*KTO)["sets"]["data.train"]
    assert figures["answers"] == {"chosen": 2, "rejected": 2, "single": 4}
    for side in ("chosen", "rejected"):
        spread = figures["tokens"][side]
        assert spread["percentiles"]["0"] > 0 and spread["total"] == 2 * spread["mean"] == figures["scored"][side]
        assert sum(figures["histogram"]["counts"][side]) == 2
    assert figures["repeated"]["contradicted"] == 2 and figures["repeated"]["pairs"] == 0
    packing = figures["packing"]
    longest = figures["tokens"]["pair"]["percentiles"]["100"]
    assert packing["padded"] == 4 * longest and packing["unpadded"] == figures["tokens"]["pair"]["total"]


def test_of_pairs_and_single_answers_together_both_are_counted(alone: None) -> None:
    write(Path("both.jsonl"), [{"prompt": "q", "chosen": " a b", "rejected": " c"}])
    words = ['data.train=["alone.jsonl", "both.jsonl"]', *KTO[1:]]
    assert "3 desirable and 3 undesirable answers (4 of them alone)" in call(*words)[1]
    (pair,) = found(*words, "--worst", "margin")["pairs"]
    assert pair["label"] is None and pair["where"] == "both.jsonl:1"


def test_answers_that_stand_alone_have_no_margin(alone: None) -> None:
    code, _, err = call(*KTO, "--worst", "margin")
    assert code == 2 and "--worst margin: compares two answers, and here each stands alone; use --worst length" in err


def test_answers_of_lists_are_the_best_or_not() -> None:
    write(Path("lists.jsonl"), [{"prompt": "q", "completions": [" yes", " no no", " why not"], "scores": [3, 1, 2]}])
    words = ["data.train=lists.jsonl", "data.eval=null", "objective={name: listwise}"]
    said = call(*words)[1]
    assert "3 answers in 1 list\n" in said and "chosen: the best of a list, rejected: the others" in said
    assert "length    the best answers have" in said and "desirable" not in said
    assert [pair["label"] for pair in found(*words, "--row", "1")["pairs"]] == [True, False, False]
    shown = call(*words, "--row", "1")[1]
    assert shown.count("the best of its list, score 3") == 1 and shown.count("3 examples\n") == 3 and " pairs" not in shown
    assert [pair["given"]["score_chosen"] for pair in found(*words, "--row", "1")["pairs"]] == [3, 2, 1]


def test_a_gold_answer_is_no_pair_and_is_called_what_it_is() -> None:
    write(Path("gold.jsonl"), [{"prompt": "q", "reference": " yes please", "chosen": " yes", "rejected": " no, never"}])
    words = ["data.train=gold.jsonl", "data.eval=null", "objective={name: tpo}"]
    said = call(*words)[1]
    assert "1 pair and 1 gold answer\n" in said and "desirable" not in said
    assert "longer in 0.0% of pairs, equal in 0.0%" in said, "a gold answer has no part in how the two of a pair compare"
    pair, gold = found(*words, "--row", "1")["pairs"]
    assert [pair["label"], gold["label"]] == [None, True]
    assert pair["columns"] == gold["columns"] == {}, "the gold answer is no column beside the texts"
    shown = call(*words, "--row", "1")[1]
    assert shown.count("the reference (gold) answer of its row") == 1 and shown.count("2 examples\n") == 2
