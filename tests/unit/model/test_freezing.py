"""`model.freeze`: which parameters a pattern means, and what is refused."""

from __future__ import annotations

import pytest
from tiny import tiny_config, tiny_model

from dspref.errors import ConfigError
from dspref.model import freezing, packed

NAMES = [
    "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight",
    "model.layers.10.mlp.down_proj.weight", "model.vision_tower.patch.bias", "lm_head.weight",
]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("vision_tower", [4]),
        ("layers.1", [2]),
        ("layers.?", [1, 2]),
        ("layers.[01]", [1, 2]),
        ("layers.1*", [2, 3]),
        ("layers.*.up_proj", [1, 2]),
        ("*_proj", [1, 2, 3]),
        ("weight", [0, 1, 2, 3, 5]),
        ("model.layers", [1, 2, 3]),
        ("lm_head.weight", [5]),
    ],
)
def test_a_pattern_is_found_between_dots(pattern: str, found: list[int]) -> None:
    assert freezing.frozen(NAMES, [pattern]) == {NAMES[k] for k in found}


def test_several_patterns_add_up() -> None:
    assert freezing.frozen(NAMES, ["vision_tower", "lm_head"]) == {NAMES[4], NAMES[5]}
    assert freezing.frozen(NAMES, []) == set()


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["vision_towr"], "no parameter of the model has 'vision_towr' in its name; did you mean vision_tower?"),
        (["lm_head", "layers.2"], "'layers.2' in its name; it has model, "),
        (["up"], "'up' in its name; it has model, embed_tokens, weight, layers, mlp"),
        (["model", "lm_head"], "leaves nothing to be trained"),
    ],
)
def test_what_is_refused(patterns: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        freezing.frozen(NAMES, patterns)
    assert said in str(error.value) and str(error.value).startswith("model.freeze: ") and "\n" not in str(error.value)


def test_what_is_tied_is_frozen_together_and_said() -> None:
    lm = tiny_model(tiny_config("qwen2", tie_word_embeddings=True), seed=1)
    assert packed.frozen_with(lm, ["lm_head"]) == ["model.embed_tokens.weight"]
    assert packed.frozen_with(lm, ["layers.0"]) == packed.frozen_with(lm, ["embed_tokens", "lm_head"]) == []
