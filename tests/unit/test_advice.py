"""Each advice comes when its fact is bad, and only then."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dspref.advice import Facts, kept_per_token, lines

GIB = 2**30
GOOD = Facts(
    device="cuda", zero_stage=3, world_size=8, pairs_per_step=256, packs_per_step=2, fill=0.95, waiting=0.03,
    tokens_per_rank=31_000, largest_pack=16_000, fewer_packs=None, faster_kernel=None, sparsity=1.0, checkpointing=True,
    kept_bytes=4 * 10**6, free_bytes=60 * GIB,
)  # fmt: skip


def test_a_good_run_hears_nothing() -> None:
    assert list(lines(GOOD)) == []


@pytest.mark.parametrize(
    "bad, mended, said",
    [
        ({"faster_kernel": "use X"}, {"faster_kernel": None}, "(sdpa): use X"),
        ({"waiting": 0.2}, {"waiting": 0.1}, "raise train.pairs_per_step"),
        ({"fill": 0.55, "fewer_packs": (18_944, 1.0)}, {"fewer_packs": None}, "data.tokens_per_pack=18944 needs 1 a step"),
        ({"tokens_per_rank": 900, "packs_per_step": 1}, {"world_size": 1}, "serves 900 tokens"),
        ({"sparsity": 20}, {"zero_stage": 2}, "from about 22,000 on"),
        ({"kept_bytes": 10**6}, {"checkpointing": False}, "model.gradient_checkpointing=false"),
        ({"kept_bytes": 10**6}, {"largest_pack": 40_000}, "model.gradient_checkpointing=false"),
    ],
)
def test_each_advice_names_its_setting_and_comes_alone(bad, mended, said) -> None:
    (line,) = lines(replace(GOOD, **bad))
    assert said in line and len(line) < 220 and "\n" not in line
    assert list(lines(replace(GOOD, **{**bad, **mended}))) == []


def test_activations_of_a_layer_are_near_the_papers() -> None:
    """34 bytes x hidden size for each token of a layer in 16 bits, an MLP of 4 x hidden and no scores kept; here without the
    dropout masks and with a gated MLP of 8/3."""
    per_token = kept_per_token(hidden=4096, mlp=4096 * 8 // 3, layers=1, bytes_per_value=2)
    assert per_token / 4096 == pytest.approx(34, rel=0.05)
    assert kept_per_token(4096, 11008, 32, 4) == 64 * kept_per_token(4096, 11008, 1, 2)
