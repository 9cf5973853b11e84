"""Liger's kernels: which runs may ask for them, and that they reach one model alone. A stand-in takes the place of the
package, whose kernels need a GPU: it exchanges classes, functions and instances as Liger's own code does."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from test_attention import check
from test_mistakes import MINIMAL, load, with_
from tiny import save_tiny, tiny_config

from dspref.config import ModelSection
from dspref.errors import ConfigError, EnvironmentFault
from dspref.machine.context import CheckContext
from dspref.model import liger, loading

LIKE_LIGER = """
from types import MethodType
from transformers.models.llama import modeling_llama

class LigerRMSNorm(modeling_llama.LlamaRMSNorm):
    def forward(self, x):
        return 2 * modeling_llama.LlamaRMSNorm.forward(self, x)

def rotary(query, key, cos, sin, unsqueeze_dim=1):
    raise RuntimeError("a kernel of CUDA's on a CPU")

def apply_liger_kernel_to_llama(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, model=None):
    assert not cross_entropy and not fused_linear_cross_entropy
    forward = LigerRMSNorm.forward
    modeling_llama.LlamaRMSNorm, modeling_llama.apply_rotary_pos_emb = LigerRMSNorm, rotary
    model.model.norm.forward = MethodType(lambda norm, x: 2 * type(norm).forward(norm, x), model.model.norm)

MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_liger_kernel_to_llama}
"""


@pytest.fixture
def like_liger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "packages" / "liger_kernel" / "transformers"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").touch()
    (folder / "monkey_patch.py").write_text(LIKE_LIGER)
    for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
        sys.modules.pop(name)


def test_a_family_that_liger_does_not_know_is_refused_by_name() -> None:
    for family in ("gpt2", "cohere"):
        with pytest.raises(ConfigError, match=rf"model\.liger: {family} is not known to it; drop the key, .*llama"):
            check(tiny_config(family), liger=True, device="cuda")


def test_liger_needs_a_gpu_and_its_package(like_liger: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentFault, match=r"model\.liger: its kernels run on CUDA, and this device is cpu"):
        check(tiny_config("llama"), liger=True)
    assert check(tiny_config("llama"), liger=True, device="cuda") == "sdpa"
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=r"liger-kernel is not installed; pip install 'dspref\[liger\]'"):
        check(tiny_config("llama"), liger=True, device="cuda")


def test_the_key_and_its_names_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(with_("model.liger", True))
    assert config.model.liger and not load(MINIMAL).model.liger
    assert CheckContext(config).packages == {"liger_kernel": "model.liger"}
    with pytest.raises(ConfigError, match=r"model\.liger"):
        load(with_("train.use_liger_kernel", True))


def test_one_model_has_ligers_kernels_and_no_other(like_liger: None, tmp_path: Path) -> None:
    """On a CPU what remains plain is used: the rotary positions, and the norms of models that are made later."""
    from transformers.models.llama import modeling_llama

    save_tiny(tmp_path / "m", tiny_config("llama"), seed=1)
    norm, ids = modeling_llama.LlamaRMSNorm, torch.arange(3, 30)[None]
    exchanged, plain = (
        loading.load(ModelSection(name_or_path="m", liger=asked), str(tmp_path / "m"), "sdpa", "float32", None).lm
        for asked in (True, False)
    )
    assert modeling_llama.LlamaRMSNorm is norm
    for lm in (exchanged, plain):
        lm.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.allclose(exchanged(ids).logits, 2 * plain(ids).logits, atol=1e-5)
    assert "forward" in vars(exchanged.model.norm) and "forward" not in vars(plain.model.norm)
