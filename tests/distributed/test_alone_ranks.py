"""Models that read one sequence per forward, in shards: all ranks make as many forwards, whatever their packs hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_tiny
from tiny_families import plain_logps, small_config, small_pairs
from workers import Workers

from dspref.data.batch import PackedBatch, collate


def packs_of_ranks() -> tuple[list[list[PackedBatch]], list[Any]]:
    """Two packs of each rank, and all pairs: 4 sequences beside 2, and then 2 beside none."""
    pairs = small_pairs(4)
    parts = [[pairs[:2], pairs[3:]], [pairs[2:3], []]]
    laid = [[collate(part, range(len(part)), prefix_sharing=False) for part in rank] for rank in parts]
    most = [max(len(rank[k].cu_seqlens_q) - 1 for rank in laid) for k in range(2)]
    assert most == [4, 2]
    return [[replace(pack, sequences=count) for pack, count in zip(rank, most)] for rank in laid], pairs


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("family", ["stablelm", "qwen3_next"])
def test_ranks_with_unequal_numbers_of_sequences(
    family: str, stage: int, checkpointing: bool, tmp_path: Path, all_workers: dict[int, Workers]
) -> None:
    """Log-probs and gradients are those of one plain forward per sequence. Under ZeRO-3 ranks that made other numbers of
    forwards would wait for each other for ever."""
    lm = save_tiny(tmp_path, small_config(family), seed=1)
    strategy: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if stage == 3:
        strategy["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    packs, pairs = packs_of_ranks()
    options = {"folder": str(tmp_path), "strategy": strategy, "checkpointing": checkpointing, "packs": packs}
    ranks = all_workers[2].run("alone_cases:steps_of_packs", **options)
    lm = lm.double()
    lm.set_experts_implementation("eager")  # the other has no kernel for doubles
    expected = plain_logps(lm, pairs)
    lm.zero_grad()
    expected.sum().backward()
    said = [logp for k, rank in ((0, 0), (0, 1), (1, 0), (1, 1)) for logp in ranks[rank][0][k]]
    torch.testing.assert_close(torch.tensor(said).double(), expected.detach(), rtol=0, atol=1e-5)
    exact = {name: p.grad.numpy() for name, p in lm.named_parameters() if p.grad is not None}
    scale = max(abs(gradient).max() for gradient in exact.values())
    for _, found in ranks:
        assert found.keys() >= exact.keys()
        for name, gradient in exact.items():
            assert np.abs(found[name] - gradient).max() <= 1e-4 * max(abs(gradient).max(), 1e-3 * scale), name
