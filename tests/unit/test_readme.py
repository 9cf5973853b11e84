"""The README says what is so: its tree is the tree, its commands and its YAML are good."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dspref import config

README = Path("README.md")


def blocks(language: str) -> list[str]:
    fenced = README.read_text(encoding="utf-8").split("```")[1::2]
    return [text.partition("\n")[2] for text in fenced if text.partition("\n")[0] == language]


def commands() -> list[str]:
    indented = re.findall(r"^    (\S.*)$", README.read_text(encoding="utf-8"), flags=re.M)
    return [part.split("  #")[0].strip() for line in indented for part in line.split("&&")]


def test_every_module_is_in_the_tree():
    tree = next(block for block in blocks("") if block.startswith("dspref/"))
    rooms = {door.parent.name for door in Path("dspref").glob("*/__init__.py")}
    assert rooms <= set(re.findall(r"^  (\w+)/", tree, flags=re.M))
    beside = {path.name for path in Path("dspref").glob("[a-z]*.py")}
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    assert beside <= named, beside - named
    present = {path.name for path in [*Path("dspref").rglob("*.py"), *Path("launch").rglob("*.py")]}
    assert named <= present, named - present
    for folder in re.findall(r"^(\w+)/", tree, flags=re.M):
        assert Path(folder).is_dir(), folder


def test_the_example_is_a_config(tmp_path):
    (example,) = blocks("yaml")
    (tmp_path / "run.yaml").write_text(example)
    assert config.load(tmp_path / "run.yaml").objective.name == "dpo"


@pytest.mark.parametrize("line", [line for block in blocks("") for line in block.splitlines() if "objective: {" in line])
def test_the_objectives_are_sections(line, tmp_path):
    text = "model: {name_or_path: m}\ndata: {train: {path: p.jsonl}}\noutput_dir: out\n" + line
    (tmp_path / "run.yaml").write_text(text)
    config.load(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    "command", [c for c in commands() if c.startswith(("deepspeed", "sbatch", "dspref", "pip", "torchrun"))]
)
def test_files_that_commands_name_exist(command):
    for word in shlex.split(command)[1:]:
        if word.endswith((".py", ".txt", ".sbatch")) or word.startswith("launch/configs"):
            assert Path(word).exists(), word


def test_recipes_open_with_their_command():
    recipes = sorted(Path("launch/configs").glob("*.yaml"))
    assert len(recipes) >= 4
    for recipe in recipes:
        assert f"deepspeed launch/train.py --config launch/configs/{recipe.name}" in recipe.read_text(), recipe
        config.load(recipe)
