"""The stages around the loop: what a first step must show before the second is made."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_store import load, write
from tiny import tiny_config

from dspref import config
from dspref.data.loader import Packing, place, sharing_pays
from dspref.data.sources import Source, find
from dspref.errors import ConfigError, DataError, NumericFault
from dspref.objectives import build_objective
from dspref.reference import spec
from dspref.report import advice
from dspref.training import demand, numbers, preparation, stages, survey

QUICKSTART = "launch/configs/quickstart.yaml"


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 5e-5), ("float16", 5e-3), ("bfloat16", 2e-2)])
def test_policy_and_reference_must_agree_at_the_first_step_where_they_are_one(dtype, allowed):
    run = config.load(QUICKSTART, [f"model.dtype={dtype}"])
    means = {"gap": allowed, "loss": 0.6931}
    tolerance = spec.first_step_tolerance(stages.reference_spec(run))
    numbers.check_first_step(means, tolerance)
    assert means == {"loss": 0.6931}, "the gap is no metric"
    for gap in (10 * allowed, float("nan")):
        with pytest.raises(NumericFault, match=r"step 1: policy and reference .* nats per token"):
            numbers.check_first_step({"gap": gap}, tolerance)


@pytest.mark.parametrize(
    "other", ["reference.name_or_path=elsewhere", "reference.dtype=bfloat16", "model.disable_dropout=false"]
)
def test_a_reference_that_is_another_model_may_differ(other):
    run = config.load(QUICKSTART, ["model.dtype=float32", other])
    numbers.check_first_step({"gap": 3.0}, spec.first_step_tolerance(stages.reference_spec(run)))


ROWS = [
    {"prompt": "p1", "completions": [word * 40 for word in (" a", " b", " c", " a b")], "scores": [4, 3, 2, 1]},
    *({"prompt": prompt, "chosen": " a b" * 20, "rejected": " b a" * 20} for prompt in ("p2", "p1", "p3")),
]


def test_keep_together_names_what_is_shuffled_as_one(tmp_path):
    pairs = load([write(tmp_path / "rows.jsonl", ROWS)], tmp_path / "cache")
    found = {}
    for word in ("row", "prompt", "none"):
        run = config.load(QUICKSTART, [f"data.keep_together={word}", "data.prefix_sharing=auto"])
        layout, loader = demand.plan(build_objective(**run.objective.model_dump()), run.data, run.train, pairs, {})
        found[word] = None if loader.together is None else loader.together.tolist()
        assert layout.prefix_sharing == (word != "none"), "prompts of one token alone are not worth it, common answers are"
    assert found["row"] == [0] * 6 + [1, 2, 3]
    assert found["none"] is None
    same = found["prompt"]
    assert len(set(same[:6])) == 1 and same[7] == same[0] != same[6] != same[8]


def test_sharing_pays_by_what_is_surely_computed_once(tmp_path):
    """Ten tokens of prompt, answers of one: 22 of 24 tokens are the prompt's; none where prompts are short."""
    long = [{"prompt": "p1" + " a" * 9, "chosen": " b", "rejected": " c"}]
    short = [{"prompt": "p1", "chosen": " b" * 40, "rejected": " c" * 40}]
    for rows, worth in ((long, True), (short, False)):
        pairs = load([write(tmp_path / "rows.jsonl", rows)], tmp_path / "cache")
        assert sharing_pays(pairs, None) is sharing_pays(pairs, pairs.rows) is worth


@pytest.mark.parametrize("sharing", [False, True])
def test_every_rank_knows_how_many_sequences_the_fullest_has(sharing, tmp_path):
    """Packs that run at the same time: rows of two answers and of one, of unequal lengths, over three ranks."""
    single = [{"prompt": f"p{k}", "completion": " a" * (2 + k), "label": True} for k in range(5)]
    double = [{"prompt": f"p{k}", "chosen": " a" * (1 + k), "rejected": " b" * 9} for k in range(4)]
    pairs = load([write(tmp_path / "rows.jsonl", [*single, *double])], tmp_path / "cache")
    laid = []
    for rank in range(3):
        packing = Packing(24, sharing, rank, 3)
        laid.append(list(place(pairs, np.arange(len(pairs)), packing).packs(pairs, packing)))
    told = [[pack.sequences for pack in packs] for packs in laid]
    assert told[0] == told[1] == told[2]
    held = [[len(pack.cu_seqlens_q) - 1 for pack in packs] for packs in laid]
    most = [max(own) for own in zip(*held, strict=True)]
    assert told[0] == most if not sharing else all(n >= own for n, own in zip(told[0], most))
    assert len(set(map(tuple, held))) > 1, "ranks that hold alike show nothing"


def test_of_uneven_labels_a_weight_is_advised_and_of_pairs_none(tmp_path):
    alone = [{"prompt": f"p{k}", "completion": " a", "label": k < 2} for k in range(20)]
    pairs = [{"prompt": f"p{k}", "chosen": " a", "rejected": " b"} for k in range(4)]
    for rows, words, said in (
        (
            alone,
            ["objective={name: kto}"],
            "(2 x 1 to 18 x 1), where KTO's paper has 1 to 4/3: objective.desirable_weight=10.5",
        ),
        (alone, ["objective={name: kto, desirable_weight: 10.5}"], None),
        (alone, ["objective={name: bco}"], None),
        (pairs, ["objective={name: kto}"], None),
        (pairs, [], None),
    ):
        run, stored = config.load(QUICKSTART, words), load([write(tmp_path / "rows.jsonl", rows)], tmp_path / "cache")
        _, loader = demand.plan(build_objective(**run.objective.model_dump()), run.data, run.train, stored, {})
        found = list(advice.of_labels(run.objective.model_dump(), loader))
        assert len(found) == (said is not None) and (said is None or said in found[0]), (words, found)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"prompt": "p1", "completion": " a" * n, "label": n > 2} for n in (1, 2, 5)],
            "1 desirable, 2 undesirable answers",
        ),
        ([{"prompt": "p1", "chosen": " a", "rejected": " b"}], "1 pairs"),
        ([{"prompt": "p1", "completion": " a", "label": False}], "0 desirable, 1 undesirable answers"),
    ],
)
def test_the_banner_counts_answers_that_there_are(tmp_path, rows, said):
    pairs = load([write(tmp_path / "rows.jsonl", rows)], tmp_path / "cache")
    found = re.fullmatch(r"(.*), mean tokens (\d+) prompt \+ (\d+) \| (\d+)", survey.in_numbers(pairs, "answers"))
    assert found and found[1] == said
    for side in (1, 2):
        there = [int(n) for n in pairs.lengths[:, side] if n]
        assert int(found[2 + side]) == round(sum(there) / max(len(there), 1))


@pytest.mark.parametrize(
    ("takes", "row", "said"),
    [
        ("list", {"prompt": "p1", "completions": [" a", " b", " c"], "scores": [3, 1, 2]}, "3 answers in 1 lists"),
        ("gold", {"prompt": "p1", "reference": " c", "chosen": " a", "rejected": " b"}, "1 pairs, 1 gold answers"),
    ],
)
def test_the_banner_tells_lists_and_gold_answers(tmp_path, takes, row, said):
    reading = {"list": {"pairs": "list"}, "gold": {"columns": {"reference": "reference"}}}[takes]
    pairs = load([replace(write(tmp_path / "rows.jsonl", [row]), **reading)], tmp_path / "cache")
    assert survey.in_numbers(pairs, takes).startswith(f"{said}, mean tokens ")


def check_tokens(run, model_config, stores):
    preparation.check_tokens(stages.reference_spec(run), model_config, stores, "cpu")


def test_only_ids_that_occur_must_fit_the_model(tmp_path):
    """The tokenizer has 105 tokens, of which the data has seven; padding and images' tokens are often added and unused."""
    pairs, run = load([write(tmp_path / "rows.jsonl", ROWS)], tmp_path / "cache"), config.load(QUICKSTART)
    largest = pairs.report["largest_id"]
    assert largest < 20
    check_tokens(run, tiny_config("qwen2", largest + 1), [pairs])
    with pytest.raises(ConfigError, match=f"model.tokenizer_name_or_path: token id {largest} does not fit"):
        check_tokens(run, tiny_config("qwen2", largest), [pairs])


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_without_max_length_the_longest_pair_must_fit_the_positions(tmp_path, family):
    short = load([write(tmp_path / "a.jsonl", [{"prompt": "p1", "chosen": " a", "rejected": " b"}])], tmp_path / "cache")
    held_out = load([write(tmp_path / "b.jsonl", ROWS)], tmp_path / "cache")
    longest = held_out.report["longest"]
    assert longest == 1 + 80 + 1
    run = config.load(QUICKSTART, ["data.max_length=null"])
    preparation.check_tokens(
        stages.reference_spec(run), tiny_config(family, 256, max_position_embeddings=longest), [short, held_out], "cpu"
    )
    few = tiny_config(family, 256, max_position_embeddings=longest - 1)
    with pytest.raises(
        ConfigError, match=rf"data.max_length: null, and the longest pair has {longest} tokens.*{longest - 1} pos"
    ):
        check_tokens(run, few, [short, held_out])
    check_tokens(config.load(QUICKSTART, ["data.max_length=81"]), few, [short])


def test_rows_that_are_trained_on_are_no_held_out_set_unless_that_is_said(tmp_path):
    for name in ("train", "test"):
        write(tmp_path / f"{name}.jsonl", [{"name": name}, {"name": name}])
    folder = str(tmp_path)
    train: Any = [find(Source(folder))]
    key = "data.eval.own"
    for path, most in ((folder, None), (f"{folder}/train.jsonl", None), (f"{folder}/tr*", None), (folder, 1)):
        with pytest.raises(DataError, match=r"^data\.eval\.own: .*train\.jsonl is trained on too; fix: name other rows"):
            preparation.refuse_training_rows(find(Source(path, max_samples=most, key=key)), train)
    for source in (Source(folder, split="train"), Source(folder, split="test")):
        preparation.refuse_training_rows(find(source), train)
    with pytest.raises(
        DataError, match=r"rows 'train\[:1\]' of .* trained on too; fix: set data\.train\.split: train\[1:\]"
    ):
        preparation.refuse_training_rows(find(Source(folder, split="train[:1]", key="data.eval")), train)
    preparation.refuse_training_rows(find(Source(folder, split="train[:1]")), [find(Source(folder, split="train[1:]"))])
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "test.jsonl", [{"name": "train"}, {"name": "train"}])
    with pytest.raises(DataError, match=r"other/test\.jsonl is trained on too"):  # a copy by the name of a test set
        preparation.refuse_training_rows(find(Source(f"{folder}/other", split="test")), train)
    preparation.refuse_training_rows(find(Source(f"{folder}/test.jsonl")), train)


def test_ranks_must_have_the_same_pairs():
    preparation.refuse_other_pairs([("a", ["x", "y"]), ("b", ["x", "y"])])
    with pytest.raises(DataError, match="rank 1 on b has other pairs than rank 0 on a"):
        preparation.refuse_other_pairs([("a", ["x", "y"]), ("b", ["x", "z"])])


def test_a_template_with_a_clock_is_named_where_pairs_have_changed(tmp_path):
    pairs = load([write(tmp_path / "rows.jsonl", ROWS)], tmp_path / "cache")
    assert stages.changed("eval_", {"eval_": pairs}) == "the pairs of eval have changed since this run began"
    pairs.report["clock"] = True
    assert "strftime_now" in stages.changed("eval_", {"eval_": pairs})


def test_every_key_of_a_source_reaches_its_reading():
    keys = {"split": "test", "name": "a", "data_dir": "b", "revision": "c", "max_samples": 3, "weight": 2.0}
    run = config.load(QUICKSTART, [f"data.train.{key}={value}" for key, value in keys.items()])
    source = preparation.source_of(run.data.train_sources[0], "data.train")
    assert {key: getattr(source, key) for key in keys} == keys


def test_what_the_card_says_needs_no_file_of_the_config(tmp_path):
    """A file of DeepSpeed settings that is gone by the end of a run costs no export."""
    strategy = tmp_path / "zero.json"
    strategy.write_text('{"zero_optimization": {"stage": 2}}')
    run = config.load(QUICKSTART, [f"deepspeed={strategy}"])
    asked = stages.reference_spec(run)
    strategy.unlink()
    assert stages.recipe(run, asked).reference.startswith("stored")
