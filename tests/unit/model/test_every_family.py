"""Every decoder-only family of transformers, shrunken: packed or one by one, a step is that of plain forwards."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version
from tiny_families import LISTED, gradients, model_of, plain_logps, small_config, small_pairs

from dspref.config import ModelSection
from dspref.data.batch import collate
from dspref.model import admission, alone, loading
from dspref.model.packed import PackedCausalLM

TABLE = runpy.run_path(str(Path(__file__).parents[3] / "docs" / "make_families.py"))
# One of each way in which families are read; the others take a minute.
FAST = ["gemma2", "gpt_oss", "stablelm", "bloom", "mamba2", "jamba", "qwen3_5_text", "lfm3", "hyperclovax", "granite_swa"]
EVERY = [pytest.param(family, marks=pytest.mark.slow) if family not in FAST else family for family in LISTED]


@pytest.mark.parametrize("family", EVERY)
def test_a_step_is_that_of_plain_forwards(family: str) -> None:
    """In float64, but for what happens to logits, which is done in float32."""
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("families differ by version; those of 5.23 are held")
    config, pairs = small_config(family), small_pairs()
    section: Any = ModelSection(name_or_path=family, dtype="float32", gradient_checkpointing=False)
    kernel = admission.check(section, config, 64, 0, "cpu")
    lm = model_of(config, "eager")
    expected = plain_logps(lm, pairs)
    assert expected.std() > 1e-3, "a model that gives all words one probability shows nothing"
    exact = gradients(lm, expected)
    scale = max(float(gradient.abs().max()) for gradient in exact.values())
    for sharing in (False,) if kernel == alone.ALONE else (False, True):
        packed = PackedCausalLM(model_of(config, loading.attention_of(config, kernel)), kernel)
        (logps, *_), _ = packed(collate(pairs, range(len(pairs)), prefix_sharing=sharing))
        assert (logps - expected).abs().max() <= 2e-6
        found = gradients(packed.lm, logps)
        assert found.keys() == exact.keys()
        for name, gradient in exact.items():
            tolerance = 3e-5 * max(float(gradient.abs().max()), 1e-3 * scale)
            assert (found[name] - gradient).abs().max() <= tolerance, (name, sharing)


@pytest.mark.slow
def test_the_table_in_the_docs_is_that_of_the_families_here() -> None:
    if not transformers.__version__.startswith("5.23"):
        pytest.skip("the table is of transformers 5.23")
    written = (Path(TABLE["__file__"]).parent / "families.md").read_text(encoding="utf-8")
    assert written == TABLE["document"](), "run: python docs/make_families.py"
    assert written.count("| packed") + written.count("| one at a time") >= 120


def test_no_family_is_missing_from_the_table() -> None:
    known = set(transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if transformers.__version__.startswith("5.23"):
        assert known == {*LISTED, *TABLE["ENCODERS"], *TABLE["OTHERS"], *TABLE["REFUSED"]}
