"""Each advice comes when its fact is bad, and only then."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from dspref.data.batch import collate
from dspref.data.truncate import TokenizedPair
from dspref.model.attention import PACKED
from dspref.model.packed import PackedCausalLM
from dspref.report.advice import Facts, kept_per_token, lines

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("family", "mlp"), [("llama", 1792), ("qwen2", 2816)])
def test_activations_are_those_that_a_layer_keeps(family: str, mlp: int, dtype: torch.dtype) -> None:
    """Counted in real layers, with the proportions of Llama-3.1-8B and Qwen2.5-1.5B: the second and third of three."""
    kept = {layers: kept_by(family, dtype, layers, 512, mlp) for layers in (1, 3)}
    expected = kept_per_token(512, mlp, 2, torch.finfo(dtype).bits // 8)
    assert kept[3] - kept[1] == pytest.approx(expected, rel=0.1)


def kept_by(family: str, dtype: torch.dtype, layers: int, hidden: int, mlp: int) -> float:
    """Bytes for each token that a forward keeps for the backward pass."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": layers}
    config = tiny_config(family, 256, hidden_size=hidden, intermediate_size=mlp, **heads)
    lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=PACKED).train()
    batch = collate([TokenizedPair(*[np.arange(n, dtype=np.int32) for n in (40, 80, 80)])], [0], prefix_sharing=False)
    weights, seen = {p.untyped_storage().data_ptr() for p in lm.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage  # which holds its address, so that no other gets it
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        PackedCausalLM(lm, "sdpa")(batch)
    return sum(storage.nbytes() for storage in seen.values()) / len(batch.input_ids)
