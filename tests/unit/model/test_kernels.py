"""Which attention kernels are here, what heads they take, how they are called: with stand-ins for what needs a GPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_attention import check, some_pairs
from tiny import tiny_config

from dspref.config import ModelSection
from dspref.data.batch import collate
from dspref.errors import ConfigError
from dspref.model import admission, attention
from dspref.model.attention import Segments, packed_attention

# What FlashAttention's packages hold, as far as it is asked for, and the kernel that it gives.
FLASH = {
    "3": ({"flash_attn_interface": "def flash_attn_varlen_func(): ..."}, "flash_attention_3"),
    "4": ({"flash_attn/cute/__init__": "def flash_attn_varlen_func(): ..."}, "flash_attention_4"),
    "2": ({"flash_attn/__init__": "def flash_attn_varlen_func(): ..."}, "flash_attention_2"),
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], None]]:
    """Writes modules where Python finds them, as pip would; no other of their names is seen."""
    names = {"flash_attn", "flash_attn.cute", "flash_attn_interface", "flash_attn_config"}
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(modules: dict[str, str]) -> None:
        for name, text in modules.items():
            (tmp_path / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("which", FLASH)
def test_each_flash_attention_is_found_by_its_function(which: str, packages: Any) -> None:
    """2 and 4 share a package: 4 alone is not 2, nor is the unrelated package of 3's name."""
    modules, kernel = FLASH[which]
    others = {"flash_attention_2", "flash_attention_3", "flash_attention_4"} - {kernel}
    packages({"flash_attn_interface": "# somebody else's"} | modules)
    assert kernel in attention.available("cuda")
    assert not others & set(attention.available("cuda"))


@pytest.mark.parametrize(
    ("flags", "there"),
    [
        ({}, True),
        ({"BACKWARD": False, "HDIM64": True, "HDIM96": True}, True),
        ({"BACKWARD": True}, False),
        ({"VARLEN": True}, False),
        ({"LOCAL": True}, False),
        ({"SOFTCAP": True}, False),
    ],
)
def test_flash_attention_3_without_what_training_needs_is_not_there(flags: dict, there: bool, packages: Any) -> None:
    """The wheel on PyPI is built without a backward pass: the first one would end the run."""
    flags = {f"FLASHATTENTION_DISABLE_{name}": off for name, off in flags.items()}
    packages({**FLASH["3"][0], "flash_attn_config": f"CONFIG = {{'build_flags': {flags}}}"})
    assert ("flash_attention_3" in attention.available("cuda")) == there


def test_flash_attention_3_may_be_built_for_some_head_sizes(packages: Any) -> None:
    flags = {f"FLASHATTENTION_DISABLE_HDIM{size}": True for size in (192, 256)}
    packages({**FLASH["3"][0], "flash_attn_config": f"CONFIG = {{'build_flags': {flags}}}"})
    assert attention.cannot("flash_attention_3", {128}) is None
    assert "flash_attention_3 takes no heads of size 192" in str(attention.cannot("flash_attention_3", {128, 192}))


@pytest.mark.parametrize("kernel", [name for name in attention.KERNELS if name != "sdpa"])
def test_kernels_take_heads_by_eights(kernel: str) -> None:
    for size in (8, 64, 80, 96, 128, 256):
        assert attention.cannot(kernel, {size}) is None
    for size in (12, 100, 264, 512):
        reason = attention.cannot(kernel, {64, size})
        assert reason == f"attention kernel {kernel} takes no heads of size {size}; kernels that do: sdpa"
    assert attention.cannot("sdpa", {12, 512}) is None


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), {"sdpa"}),
        ((8, 6), {"flash_attention_2", "torch_varlen", "sdpa"}),
        ((9, 0), {"flash_attention_2", "flash_attention_3", "flash_attention_4", "torch_varlen", "sdpa"}),
        ((10, 0), {"flash_attention_2", "flash_attention_4", "torch_varlen", "sdpa"}),
        ((12, 0), {"flash_attention_2", "torch_varlen", "sdpa"}),
    ],
)
def test_each_generation_of_gpus_has_its_kernels(
    capability: tuple[int, int], expected: set[str], packages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages({name: text for modules, _ in FLASH.values() for name, text in modules.items()})
    monkeypatch.setattr(attention, "_capability", lambda: capability)
    assert set(attention.available("cuda")) == expected
    assert attention.KERNELS["flash_attention_4"].takes(192) == (capability < (10, 0))


def test_heads_are_grouped_by_the_kernel_and_its_signature_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11 has it, and 2.12 on: keys and values arrive as they are, four query heads to each."""
    from torch.nn.attention import varlen

    batch, seen, reads = collate(some_pairs(), range(3), prefix_sharing=True), [], []
    tokens = len(batch.input_ids)
    q, k, v = (torch.randn(1, heads, tokens, 8) for heads in (4, 2, 2))
    inspected = attention.inspect.signature
    monkeypatch.setattr(attention.inspect, "signature", lambda function: reads.append(1) or inspected(function))

    def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        seen.append((key.shape[1], window_size, None))
        return query

    def of_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        seen.append((key.shape[1], window_size, enable_gqa))
        return query

    for function, gqa in ((of_2_11, None), (of_2_12, True)):
        monkeypatch.setattr(varlen, "varlen_attn", function)
        for window, expected in ((None, (-1, 0)), (4, (3, 0))):
            segments = Segments(batch, "torch_varlen")
            packed_attention(torch.nn.Identity(), q, k, v, None, sliding_window=window, segments=segments)
            assert seen.pop() == (2, expected, gqa)
    assert len(reads) == 2


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "gpt2"])
def test_a_model_whose_heads_a_kernel_does_not_take(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes another kernel, and a named one is refused before anything is built. Latent attention's heads are as wide
    as its queries."""
    sizes: dict[str, Any] = {
        "llama": {"head_dim": 12},
        "deepseek_v3": {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8,
                        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
        "gpt2": {"n_embd": 48, "n_head": 4},
    }  # fmt: skip
    config = tiny_config(family, **sizes[family])
    assert admission.head_sizes(admission.build_skeleton(ModelSection(name_or_path="m"), config)) == {12}
    cuda: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16"}
    assert check(config, **cuda) == "sdpa"
    assert check(tiny_config("llama", head_dim=16), **cuda) == "torch_varlen"
    with pytest.raises(ConfigError, match=r"model.attn_implementation: .*torch_varlen takes no heads of size 12"):
        check(config, attn_implementation="torch_varlen", **cuda)
