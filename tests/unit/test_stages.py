"""The stages around the loop: what a first step must show before the second is made."""

from __future__ import annotations

import pytest
from test_store import load, write

from dspref import config, numbers, stages
from dspref.data.loader import sharing_pays
from dspref.errors import NumericFault

QUICKSTART = "launch/configs/quickstart.yaml"


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 5e-5), ("float16", 5e-3), ("bfloat16", 2e-2)])
def test_policy_and_reference_must_agree_at_the_first_step_where_they_are_one(dtype, allowed):
    run = config.load(QUICKSTART, [f"model.dtype={dtype}"])
    means = {"gap": allowed, "loss": 0.6931}
    numbers.check_first_step(run, means)
    assert means == {"loss": 0.6931}, "the gap is no metric"
    for gap in (10 * allowed, float("nan")):
        with pytest.raises(NumericFault, match=r"step 1: policy and reference .* nats per token"):
            numbers.check_first_step(run, {"gap": gap})


@pytest.mark.parametrize(
    "other", ["reference.name_or_path=elsewhere", "reference.dtype=bfloat16", "model.disable_dropout=false"]
)
def test_a_reference_that_is_another_model_may_differ(other):
    numbers.check_first_step(config.load(QUICKSTART, ["model.dtype=float32", other]), {"gap": 3.0})


ROWS = [
    {"prompt": "p1", "completions": [word * 40 for word in (" a", " b", " c", " a b")], "scores": [4, 3, 2, 1]},
    *({"prompt": prompt, "chosen": " a b" * 20, "rejected": " b a" * 20} for prompt in ("p2", "p1", "p3")),
]


def test_keep_together_names_what_is_shuffled_as_one(tmp_path):
    pairs = load([write(tmp_path / "rows.jsonl", ROWS)], tmp_path / "cache")
    found = {}
    for word in ("row", "prompt", "none"):
        run = config.load(QUICKSTART, [f"data.keep_together={word}", "data.prefix_sharing=auto"])
        layout, loader = stages.plan(run, pairs)
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
