"""Vision-language models in shards: a rank whose pack has no image runs the tower all the same, or others wait for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_vision import tiny_vision_config, tiny_vision_model
from vision_oracle import gradients_of_sum, packed_rows, plain_logps, some_rows
from workers import Workers

from dspref.model import vision


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", vision.FAMILIES)
def test_ranks_with_and_without_images(
    kind: str, stage: int, checkpointing: bool, tmp_path: Path, all_workers: dict[int, Workers]
) -> None:
    """Every gradient is that of one plain forward per sequence."""
    lm = tiny_vision_model(tiny_vision_config(kind), seed=1)
    lm.save_pretrained(tmp_path)
    strategy: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if stage == 3:
        strategy["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    rows = some_rows(lm)
    packs = [packed_rows(lm, [row for row in rows if (row.images is None) == without], True) for without in (False, True)]
    assert [len(pack.images.feature_index) > 0 for pack in packs if pack.images] == [True, False]
    options = {"folder": str(tmp_path), "strategy": strategy, "checkpointing": checkpointing, "packs": packs}
    ranks = all_workers[2].run("vision_cases:gradients_of_packs", **options)
    lm = lm.double()
    expected = gradients_of_sum(lm, plain_logps(lm, rows))
    scale = max(float(g.abs().max()) for g in expected.values())
    for found in ranks:
        assert found.keys() >= expected.keys()
        for name, gradient in found.items():
            if name not in expected:  # the end of CLIP's tower, of which nothing is read
                assert not gradient.any(), name
                continue
            exact = expected[name].numpy()
            assert abs(gradient - exact).max() <= 1e-4 * max(abs(exact).max(), 1e-3 * scale), name
