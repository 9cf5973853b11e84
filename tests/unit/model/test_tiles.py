"""MLPs in tiles, and inputs of layers in host memory: of every family that takes them, the same log-probs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import LISTED, gradients, model_of, small_config, small_pairs

from dspref.config import ModelSection
from dspref.data.batch import collate
from dspref.errors import ConfigError
from dspref.model import admission, host_inputs, loading, tiles
from dspref.model.packed import PackedCausalLM, prepare_for_training

# A gate beside; both in one map; none; norms on both sides.
FAST = ["llama", "phi3", "gpt2", "gemma2"]
# Whose layers, or some of them, have experts, states or MLPs of more than one argument.
REFUSED = ["qwen3_moe", "deepseek_v3", "gpt_oss", "jamba", "mamba2", "bloom"]
MANY = 45


def of_family(family: str, **keys: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs and gradients. Raises ConfigError where the family is refused."""
    config, pairs = small_config(family), small_pairs()
    section: Any = ModelSection(**{"name_or_path": family, "dtype": "float32", "gradient_checkpointing": False, **keys})
    kernel = admission.check(section, config, 64, 0, "cpu")
    packed = PackedCausalLM(model_of(config, loading.attention_of(config, kernel)), kernel)
    tiles.put_into(packed.lm, section.tiled_mlp)
    prepare_for_training(packed, section, False)
    (logps, *_), _ = packed(collate(pairs, range(len(pairs)), prefix_sharing=True))
    return logps.detach(), gradients(packed.lm, logps)


def fault(family: str, **keys: Any) -> str:
    """What another way of computing changes; empty where it is nothing."""
    (logps, exact), (found_logps, found) = of_family(family), of_family(family, **keys)
    scale = max(float(gradient.abs().max()) for gradient in exact.values())
    off = [n for n in exact if (found[n] - exact[n]).abs().max() > 1e-6 * max(exact[n].abs().max(), 1e-3 * scale)]
    return ", ".join(off) if off or torch.allclose(found_logps, logps, 0, 1e-6) else "log-probs"


@pytest.mark.parametrize("recompute", [False, True, "offload"])
@pytest.mark.parametrize("family", FAST)
def test_mlps_in_tiles_give_the_same(family: str, recompute: Any) -> None:
    """Of 7 tokens at most, and of one."""
    for tokens in (7, 1):
        assert not fault(family, tiled_mlp=tokens, gradient_checkpointing=recompute)


@pytest.mark.slow
def test_of_every_family() -> None:
    refused, off = [], {}
    for family in LISTED:
        try:
            if found := fault(family, tiled_mlp=5):
                off[family] = found
        except ConfigError as error:
            refused.append(family)
            assert "\n" not in str(error)
    assert not off
    assert len(LISTED) - len(refused) >= MANY and {*REFUSED} <= {*refused}


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_without_such_mlps_is_refused_in_one_line(family: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.tiled_mlp: not every layer of {family} has .*; drop the key$"):
        of_family(family, tiled_mlp=True)


@pytest.mark.parametrize("family", ["codegen", "stablelm"])
def test_a_family_that_is_run_one_sequence_at_a_time_is_refused_too(family: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^model\.tiled_mlp: {family} is run one sequence at a time, as .*; drop the key$"
    ):
        of_family(family, tiled_mlp=True)


def test_an_encoder_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model\.tiled_mlp: t5 has an encoder.*; drop the key$"):
        section: Any = ModelSection(name_or_path="t5", dtype="float32", tiled_mlp=True)
        config = small_config("t5")
        config.decoder_start_token_id = 0
        admission.check(section, config, 64, 0, "cpu")


@pytest.mark.parametrize("tokens, sizes", [(4, [4, 4, 2]), (9, [5, 5]), (10, [10]), (1, [1] * 10)])
def test_tiles_are_even_and_none_is_too_large(tokens: int, sizes: list[int]) -> None:
    seen = []

    def whole(tile: torch.Tensor) -> torch.Tensor:
        seen.append(tile.shape[1])
        return tile * 2

    hidden = torch.arange(20.0).view(1, 10, 2)
    with torch.no_grad():
        assert torch.equal(tiles.Tiled(whole, tokens)(hidden), hidden * 2)
    assert seen == sizes


def test_dropout_is_drawn_again_as_it_was() -> None:
    """Else a tile's gradient would be that of another."""
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 4))
    hidden = torch.randn(1, 9, 4, requires_grad=True)
    output = tiles.Tiled(mlp.forward, 4)(hidden)
    weight: Any = mlp[2].weight
    (found,) = torch.autograd.grad((output - mlp[2].bias).square().sum() / 2, weight)
    # d/dW of |W x|^2 / 2 is (W x) x', and <W, that> is |W x|^2: only if x is the same in both passes.
    torch.testing.assert_close((found * weight).sum(), (output - mlp[2].bias).square().sum())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_input_of_each_layer_is_moved_and_nothing_else(family: str) -> None:
    config, pairs = small_config(family), small_pairs()
    packed = PackedCausalLM(model_of(config, loading.attention_of(config, "sdpa")), "sdpa")
    prepare_for_training(packed, ModelSection(name_or_path="m", dtype="float32"), False)
    moved = host_inputs.move_out(packed.lm)
    (logps, *_), _ = packed(collate(pairs, range(len(pairs)), prefix_sharing=True))
    assert moved.count == config.num_hidden_layers == 2
    logps.sum().backward()
    assert moved.count == 2


def test_host_memory_changes_nothing_to_the_bit() -> None:
    for family in ("llama", "phi3"):
        plain, out = (of_family(family, gradient_checkpointing=how) for how in (True, "offload"))
        assert torch.equal(plain[0], out[0])
        assert all(torch.equal(out[1][name], gradient) for name, gradient in plain[1].items())
