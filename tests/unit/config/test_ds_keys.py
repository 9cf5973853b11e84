"""What the table of DeepSpeed's keys says of tests: that they are there, and train with each key at each stage."""

from __future__ import annotations

import ast
from pathlib import Path

import ds_settings
import pytest

from dspref.config import strategy
from dspref.config.ds_keys import KEYS, REFUSED, Key

DISTRIBUTED = Path(__file__).parents[2] / "distributed"
PROVEN = [key for key in KEYS if key.test]
SETTINGS = [(test, name) for test, settings in ds_settings.TRAINED.items() for name in settings]


def trains_with(key: Key, stage: int) -> bool:
    """Whether its test has settings of this stage in which the key has a value of its own, that DeepSpeed reads."""
    found = [settings for settings in ds_settings.TRAINED[key.test].values() if settings.stage == stage]
    if key.path.endswith(".stage"):
        return bool(found)
    return any(key.path in strategy.asked(settings.strategy) for settings in found)


@pytest.mark.parametrize("key", PROVEN, ids=lambda key: key.path)
def test_each_key_is_trained_with_at_each_of_its_stages(key: Key) -> None:
    assert [stage for stage in map(int, key.stages) if not trains_with(key, stage)] == []


@pytest.mark.parametrize(("test", "name"), SETTINGS)
def test_what_is_trained_with_is_let_through(test: str, name: str) -> None:
    settings = ds_settings.TRAINED[test][name]
    assert strategy.problems(settings.strategy, settings.dtype) == []
    others = [path for path in strategy.asked(settings.strategy) if path not in strategy.asked(settings.without)]
    assert others or name == "0", "trains with no key at all"


@pytest.mark.parametrize("test", sorted({key.test for key in PROVEN}))
def test_the_tests_that_the_table_names_exist(test: str) -> None:
    file, name = test.split("::")
    tree = ast.parse((DISTRIBUTED / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_refusal_says_what_to_do() -> None:
    for path, reason in REFUSED.items():
        assert "remove it" in reason or "; use " in reason or "; set " in reason, path
