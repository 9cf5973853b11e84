"""What saves memory for long pairs changes no loss and no gradient: MLPs in tiles, inputs of layers in host memory.

`test_sequence_parallel` has the third, packs that ranks hold between them; `test_layout_invariance` holds what these are
compared with to the oracle.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from long_runs import long_run, needed
from test_sequence_parallel import compare, write_run
from tiny import save_tiny, save_tokenizer, tiny_config

SLOW = pytest.mark.slow
TILED, OFFLOAD, PLAIN = "model.tiled_mlp=13", "model.gradient_checkpointing=offload", "model.gradient_checkpointing=false"


@pytest.fixture(scope="module")
def run_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long-pairs")
    config = tiny_config("qwen2", save_tokenizer(folder / "tokenizer"))
    for name, seed in (("policy", 1), ("reference", 2)):
        save_tiny(folder / name, config, seed)
    return write_run(folder)


def at(stage: int, *overrides: str, tokens: int = 300) -> list[str]:
    return [f"deepspeed.zero_optimization.stage={stage}", f"data.tokens_per_pack={tokens}", *overrides]


# Tiles with and without recomputation of layers, at every stage; several packs, and one pair in a pack.
FIRST = at(1, PLAIN, "parallel.sequence=1")
FEW = [FIRST, at(3, TILED, OFFLOAD)]
MORE = [
    FIRST,
    at(2, TILED, PLAIN, tokens=1),
    at(3, TILED, PLAIN, tokens=1),
    at(1, TILED, OFFLOAD),
    at(0, TILED, PLAIN),
    at(2, OFFLOAD, tokens=1),
    at(3, "model.tiled_mlp=1", "parallel.sequence=2"),
    at(3, TILED, OFFLOAD, "parallel.sequence=2"),
]


@pytest.mark.parametrize("layouts", [FEW, pytest.param(MORE, marks=SLOW)], ids=["few", "more"])
def test_a_step_is_the_same_at_every_stage(layouts, run_files, all_workers):
    compare(all_workers[2], run_files, [], layouts)


@SLOW
def test_one_with_an_adapter_is_too(run_files, all_workers):
    """Whose inputs need a gradient though the layers below are frozen."""
    common = ["model.lora={r: 4, lora_alpha: 8, init_lora_weights: false}", "reference={mode: adapter}"]
    compare(all_workers[2], run_files, common, [FIRST, at(3, TILED, OFFLOAD), at(1, TILED, PLAIN), at(3, OFFLOAD)])


@SLOW
@pytest.mark.parametrize("recompute", [False, True])
def test_a_long_pair_takes_less_memory_in_tiles(recompute, tmp_path):
    """Beyond what stays between steps: a pair of 16k tokens, and MLPs four times as wide as the layers."""
    parts = {"prompt": 1620, "chosen": 60, "rejected": 50}  # few tokens are scored: layers have the peak, and not the head
    run = long_run(tmp_path, parts, recompute, pairs_per_step=1, tokens_per_pack=16_384, prefix_sharing=False)
    whole, found = needed(tmp_path, run, ranks=1, name="whole")
    assert found["tokens"] > 16_000
    tiled, _ = needed(tmp_path, run | {"model": run["model"] | {"tiled_mlp": True}}, ranks=1, name="tiled")
    assert tiled < 0.8 * whole
