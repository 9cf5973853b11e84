"""The stages around the loop: what a first step must show before the second is made."""

from __future__ import annotations

import pytest

from dspref import config, stages
from dspref.errors import NumericFault

QUICKSTART = "launch/configs/quickstart.yaml"


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 5e-5), ("float16", 5e-3), ("bfloat16", 2e-2)])
def test_policy_and_reference_must_agree_at_the_first_step_where_they_are_one(dtype, allowed):
    run = config.load(QUICKSTART, [f"model.dtype={dtype}"])
    means = {"gap": allowed, "loss": 0.6931}
    stages.check_first_step(run, means)
    assert means == {"loss": 0.6931}, "the gap is no metric"
    for gap in (10 * allowed, float("nan")):
        with pytest.raises(NumericFault, match=r"step 1: policy and reference .* nats per token"):
            stages.check_first_step(run, {"gap": gap})


@pytest.mark.parametrize(
    "other", ["reference.name_or_path=elsewhere", "reference.dtype=bfloat16", "model.disable_dropout=false"]
)
def test_a_reference_that_is_another_model_may_differ(other):
    stages.check_first_step(config.load(QUICKSTART, ["model.dtype=float32", other]), {"gap": 3.0})
