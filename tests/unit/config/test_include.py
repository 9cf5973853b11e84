"""A run's file that includes others: whose keys are on top, where faults are, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspref import config
from dspref.errors import ConfigError

BASE = """\
model: {name_or_path: m, lora: true}
data:
  train: a.jsonl
  max_length: 1k
objective: {name: dpo, beta: 0.3}
train: {seed: 1, learning_rate: 1e-6}
output_dir: base
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "base.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def fault(name: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        config.load(name, overrides)
    assert error.value.exit_code == 2
    return str(error.value)


def test_keys_of_the_including_file_are_on_top() -> None:
    loaded = config.load(write("x.yaml", "include: base.yaml\ntrain: {seed: 2}\nobjective: {beta: 0.5}\noutput_dir: top\n"))
    assert (loaded.train.seed, loaded.train.learning_rate, loaded.output_dir) == (2, 1e-6, "top")
    assert loaded.objective.beta == 0.5 and loaded.data.max_length == 1024
    assert config.load("x.yaml", ["train.seed=3"]).train.seed == 3


def test_short_forms_are_merged_as_what_they_stand_for() -> None:
    loaded = config.load(write("x.yaml", "include: base.yaml\nmodel: {lora: {r: 8}}\ndata: {train: {split: test}}\n"))
    assert loaded.model.lora and loaded.model.lora.r == 8
    assert [(source.path, source.split) for source in loaded.data.train_sources] == [("a.jsonl", "test")]
    loaded = config.load(write("x.yaml", "include: base.yaml\nmodel: {lora: null}\ndata: {train: [b, c]}\n"))
    assert loaded.model.lora is None and [source.path for source in loaded.data.train_sources] == ["b", "c"]


def test_paths_are_relative_to_the_file_that_names_them() -> None:
    write("runs/middle.yaml", "include: ../base.yaml\ntrain: {seed: 5, weight_decay: 0.1}\n")
    loaded = config.load(write("x.yaml", "include: runs/middle.yaml\ntrain: {weight_decay: 0.2}\n"))
    assert (loaded.train.seed, loaded.train.weight_decay, loaded.train.learning_rate) == (5, 0.2, 1e-6)
    write("x.yaml", f"include: {Path('base.yaml').resolve()}\n")
    assert config.load("x.yaml").train.seed == 1


def test_of_several_files_a_later_one_is_on_top() -> None:
    write("more.yaml", "train: {seed: 7}\n")
    assert config.load(write("x.yaml", "include: [base.yaml, more.yaml]\n")).train.seed == 7
    assert config.load(write("x.yaml", "include: [more.yaml, base.yaml]\n")).train.seed == 1
    assert config.load(write("x.yaml", "include: [base.yaml, base.yaml]\n")).train.seed == 1, "twice is no circle"


def test_recipes_that_are_shipped_can_be_included() -> None:
    loaded = config.load(write("x.yaml", "include: launch/configs/dpo_zephyr_7b.yaml\noutput_dir: mine\n"))
    assert loaded.output_dir == "mine" and "zephyr" in loaded.model.name_or_path


def test_faults_are_where_the_key_was_written() -> None:
    write("base.yaml", BASE.replace("seed: 1", "sed: 1"))
    said = fault(write("x.yaml", "include: base.yaml\ntrain: {lerning_rate: 1}\n"))
    assert "base.yaml:6:9: train.sed: unknown key; did you mean 'seed'?" in said
    assert "x.yaml:2:9: train.lerning_rate: unknown key" in said
    said = fault(write("x.yaml", "include: base.yaml\n\ntrain: {sed: 2}\n"))
    assert said.startswith("x.yaml:3:9: train.sed: unknown key") and said.count("\n") == 0
    assert fault(write("x.yaml", "include: base.yaml\ntrain: {seed: x}\n"), "train.sed=4").count("\n") == 1
    write("base.yaml", "train: {seed: 1\n")
    assert "base.yaml:2:1: not valid YAML" in fault(write("x.yaml", "include: base.yaml\n"))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"x": "include: x.yaml\n"}, "x.yaml:1:1: include: goes in a circle: x.yaml -> x.yaml; drop one of them"),
        (
            {"x": "include: y.yaml\n", "y": "a: 1\ninclude: ./x.yaml\n"},
            "y.yaml:2:1: include: goes in a circle: x.yaml -> y.yaml",
        ),
        ({"x": "include: no.yaml\n"}, "x.yaml:1:1: include: no.yaml: no such file; a path is relative to the file"),
        ({"x": "include: 3\n"}, "include: must be the path of a YAML file, or a list of paths"),
        ({"x": "include: []\n"}, "include: must be the path"),
        ({"x": "include:\n"}, "include: must be the path"),
        ({"x": "include: {path: base.yaml}\n"}, "include: must be the path"),
        ({"x": "include: $HOME/base.yaml\n"}, "variables are not expanded"),
        ({"x": "include: ''\n"}, "include: is empty"),
        ({"x": "include: runs\n"}, "x.yaml:1:1: include: runs: is a folder; give the path of a YAML file in it"),
        ({"x": "include: base.yaml\ninclude: base.yaml\n"}, "include: duplicate key; first at x.yaml:1:1"),
        ({"x": "include: base.yaml\nmodel: {include: base.yaml}\n"}, "model.include: unknown key; drop it"),
        ({"x": "include: y.yaml\n", "y": "- a\n"}, "y.yaml:1:1: a config is a mapping"),
        ({"x": "include: base.yaml\ntrain: 3\n"}, "x.yaml:2:1: train: must be a mapping of keys, not 3"),
        (
            {"x": "include: 0.yaml\n"} | {str(k): f"include: {k + 1}.yaml\n" for k in range(30)},
            "include: more than 20 files deep",
        ),
    ],
)
def test_what_cannot_be_included_is_one_line(files: dict[str, str], said: str) -> None:
    for name, text in files.items():
        write(f"{name}.yaml", text)
    message = fault("x.yaml")
    assert said in message and message.count("\n") == 0, message


def test_an_include_is_no_override() -> None:
    assert "include: unknown key; drop it: it belongs to the top of the file" in fault("base.yaml", "include=base.yaml")


def test_a_run_keeps_what_it_included() -> None:
    write("x.yaml", "include: base.yaml\noutput_dir: top\n")
    kept = write("kept.yaml", config.source("x.yaml"))
    assert "# included: base.yaml\n# model: {name_or_path: m, lora: true}\n" in Path(kept).read_text()
    assert config.load(kept) == config.load("x.yaml")
    assert config.source("base.yaml") == BASE
