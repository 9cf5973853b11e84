"""A loss of the user's own, from the YAML's `module:function` to a row like any other, and how it is refused."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dspref import config, own_code
from dspref.errors import ConfigError
from dspref.objectives import build_objective, describe, own, own_sources
from dspref.objectives.families import PairLogps, total

NUMBERS = itertools.count()

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a module into the working directory, under a name that no other test has, and the YAML of a run beside it;
    MODULE stands for the name."""
    monkeypatch.chdir(tmp_path)
    name = f"losses_of_test_{next(NUMBERS)}"

    def written(source: str | None, **objective: Any) -> Path:
        if source is not None:
            (tmp_path / f"{name}.py").write_text(source)
        section = {key: json.loads(json.dumps(value).replace("MODULE", name)) for key, value in objective.items()}
        section.setdefault("loss_type", f"{name}:mine")
        values = {"model": {"name_or_path": "m"}, "data": {"train": "pairs.jsonl"}, "output_dir": "out"}
        (tmp_path / "x.yaml").write_text(yaml.safe_dump({"objective": section, **values}, sort_keys=False))
        return tmp_path / "x.yaml"

    return written


SIGMOID = """\
from dspref.objectives.losses import Positive, Ratios, Smoothing, smoothed


def mine(ratios: Ratios, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0):
    return smoothed(beta * ratios.margin, label_smoothing)
"""
SCORES = """\
from typing import Literal

def mine(chosen, rejected, *, shape: Literal["square", "line"] = "square", times: int = 1, upper: bool = False):
    margin = 1 - (rejected - chosen if upper else chosen - rejected)
    return times * (margin**2 if shape == "square" else margin)
"""


def pairs(seed: int = 0, count: int = 5) -> PairLogps:
    torch.manual_seed(seed)
    n = torch.randint(2, 9, (2, count))
    return PairLogps(-n[0] * torch.rand(count), -n[1] * torch.rand(count), *n, -torch.rand(count), -torch.rand(count))


@pytest.mark.parametrize(
    "keys",
    [
        {"beta": 0.3},
        {"label_smoothing": 0.2, "rpo_alpha": 0.5},
        {"ld_alpha": 0.3},
        {"reference_free": True},
        {"f_divergence_type": "forward_kl"},
    ],
)
def test_the_same_formula_is_the_same_loss_under_every_modifier(write: Write, keys: dict[str, Any]) -> None:
    section = config.load(write(SIGMOID, name="dpo", **keys)).objective.model_dump()
    mine, theirs = build_objective(**section), build_objective(**section | {"loss_type": "sigmoid"})
    found, expected = (objective(pairs(), pairs(1)) for objective in (mine, theirs))
    counts = {"pairs": 5, "chosen_tokens": 20}
    assert total(found, counts) == total(expected, counts)
    assert all((found.metrics[name] == expected.metrics[name]).all() for name in expected.metrics)
    assert [*found.terms] == [name.replace("sigmoid", "mine") for name in expected.terms]


def test_it_stands_in_a_list_beside_others(write: Write) -> None:
    path = write(SIGMOID, name="dpo", loss_type=["MODULE:mine", "ipo"], loss_weights=[0.5, 2.0], beta=0.2)
    run = config.load(path)
    objective = build_objective(**run.objective.model_dump())
    assert [(part.component, part.weight) for part in objective.parts] == [("mine", 0.5), ("ipo", 2.0)]
    assert [part.keys["beta"] for part in objective.parts] == [0.2, 0.2]


@pytest.mark.parametrize(("name", "scores"), [("cpo", [-4.0, -6.0]), ("simpo", [-1.0, -2.0])])
def test_of_cpo_and_simpo_it_is_a_function_of_two_scores(write: Write, name: str, scores: list[float]) -> None:
    """Sums in cpo, means per token in simpo."""
    path = write(SCORES, name=name, shape="line", times=3)
    objective = build_objective(**config.load(path).objective.model_dump())
    policy = PairLogps(torch.tensor([-4.0]), torch.tensor([-6.0]), torch.tensor([4]), torch.tensor([3]))
    assert objective(policy, None).terms["mine"].values.tolist() == [3 * (1 - scores[0] + scores[1])]


def test_its_keys_are_those_of_the_section(write: Write) -> None:
    run = config.load(write(SCORES, name="cpo", times=2))
    resolved = config.resolved(run)["objective"]
    assert {"shape": "square", "times": 2, "upper": False, "cpo_alpha": 1.0}.items() <= resolved.items()
    assert config.given(run)["objective"].keys() == {"name", "loss_type", "times"}
    assert config.resolved_anew(config.resolved(run)) == config.resolved(run)
    assert describe(**run.objective.model_dump()).endswith(":mine  shape square, times 2, cpo_alpha 1.0, alpha 0.0")
    Path("again.yaml").write_text(config.dump(run))
    assert config.resolved(config.load("again.yaml")) == config.resolved(run)


def test_the_working_directory_is_on_the_path_for_the_import_alone(write: Write, tmp_path: Path) -> None:
    before = list(sys.path)
    run = config.load(write(SIGMOID, name="dpo"))
    assert sys.path == before and not list(tmp_path.glob("__pycache__"))
    (source,) = own_sources(**run.objective.model_dump()).values()
    assert source.path == str(tmp_path / Path(source.path).name) and source.text == SIGMOID


def test_an_installed_package_has_one_too(write: Write) -> None:
    run = config.load(write(None, name="dpo", loss_type="dspref.objectives.losses:hinge", beta=0.5))
    assert build_objective(**run.objective.model_dump()).parts[0].component == "hinge"


def test_what_lies_in_a_run_folder_is_not_run_and_pointed_to(write: Write, tmp_path: Path) -> None:
    """Such a folder may come from anywhere."""
    path = write(None, name="dpo")
    name = yaml.safe_load(path.read_text())["objective"]["loss_type"]
    kept = own_code.kept_at(tmp_path, own_code.LOSS, name)
    kept.parent.mkdir()
    kept.write_text(f"open({str(tmp_path / 'has run')!r}, 'w')\n{SIGMOID}")
    with pytest.raises(ConfigError, match=f"no module .*; the run has it in {kept}: copy it here if you trust it$"):
        config.load(path)
    assert not (tmp_path / "has run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Refused


def of(parameters: str, returned: str = "1") -> str:
    return f"def mine({parameters}):\n    return {returned}\n"


# Each: (source or None, the section's keys, how the line ends behind the key). HERE is the path of the user's file.
FAULTS: dict[str, tuple[str | None, dict[str, Any], str]] = {
    "no module": (
        None,
        {},
        "no module MODULE, neither in the working directory (FOLDER) nor installed",
    ),
    "no function": ("def mien(ratios):\n    return ratios.margin\n", {}, "HERE: has no function mine; did you mean 'mien'?"),
    "no function of Python": ("mine = 3\n", {}, "HERE: mine is no function of Python (def)"),
    "a class": ("class mine:\n    pass\n", {}, "HERE: mine is no function of Python (def)"),
    "a file": (SIGMOID, {"loss_type": "./MODULE.py:mine"}, "must be written module:function, such as MODULE:mine, not "),
    "syntax": ("def mine(ratios)\n    return 1\n", {}, "HERE:1: SyntaxError: expected ':'"),
    "import": ("import torch\nimport no_such_thing\n", {}, "HERE:2: ModuleNotFoundError: No module named 'no_such_thing'"),
    "raises": ("import sys\n\nsys.exit('no')\n", {}, "HERE:3: SystemExit: no"),
    "beside": (of("ratios, weights"), {}, "HERE:1: is a function of ratios, weights, and must be "),
    "key before the star": (
        of("ratios, tau=1.0"),
        {},
        "and must be (ratios, *, key: float = 1.0, ...); a * before tau makes",
    ),
    "none": (of(""), {}, "HERE:1: is a function of nothing, and must be (ratios, *, key: float"),
    "scores": (SCORES, {"name": "dpo"}, "HERE:3: is a function of chosen, rejected, and must be (ratios, *, key"),
    "var args": (of("ratios, *args"), {}, "HERE:1: takes *args, and must be (ratios, *, key"),
    "var keys": (of("ratios, **keys"), {}, "HERE:1: takes **keys, and must be (ratios, *, key"),
    "no type": (of("ratios, *, a=1.0"), {}, "HERE:1: the key a has no type; write a: float = 1.0"),
    "no default": (of("ratios, *, a: float"), {}, "HERE:1: the key a has no default; write a: float"),
    "a list": (
        of("ratios, *, a: list = []"),
        {},
        "HERE:1: the key a is of type list; give it float,",
    ),
    "unknown type": (of("ratios, *, a: 'Far' = 1"), {}, "HERE:1: the key a: Far is no type; give it"),
    "default of another type": (
        of("ratios, *, a: int = 0.5"),
        {},
        "HERE:1: the key a has the default 0.5, which its type does not allow",
    ),
    "default out of range": (
        "from dspref.objectives.losses import Positive\n\ndef mine(ratios, *, a: Positive = 0.0):\n    return 1\n",
        {},
        "HERE:3: the key a has the default 0.0, which its type does not allow",
    ),
    "a key of the family": (
        of("ratios, *, ld_alpha: float = 0.0"),
        {},
        "HERE:1: ld_alpha is no name for a key of it, as the section has one; give it another",
    ),
    "a key of pydantic's": (of("ratios, *, copy: int = 1"), {}, "HERE:1: copy is no name that a key"),
    "beta of another type": (
        of("ratios, *, beta: bool = True"),
        {},
        "HERE:1: the key beta is of anoth",
    ),
    "a metric": (
        "def nll(ratios):\n    return 1\n",
        {"loss_type": "MODULE:nll"},
        "HERE:1: loss/nll is a metric of dspref's",
    ),
    "orpo": (SIGMOID, {"name": "orpo"}, "a loss of your own goes with name: dpo, cpo, simpo"),
    "raises when called": (
        "def mine(ratios):\n    a = 1\n    return ratios.none\n",
        {},
        "HERE:3: AttributeError: 'Ratios' obj",
    ),
    "no tensor": (
        of("ratios", "1.0"),
        {},
        "HERE:1: must return a tensor of shape [3], a value for each pair",
    ),
    "a mean": (of("ratios", "ratios.margin.mean()"), {}, "of shape [3]; it returns a single number"),
    "a shape": (of("ratios", "ratios.margin[None]"), {}, "of shape [3]; it returns shape [1, 3]"),
    "no gradient": (
        of("ratios", "ratios.margin.detach()"),
        {},
        "HERE:1: what it returns has no gradient;",
    ),
    "of nothing": (
        "import torch\n\nw = torch.ones(9, requires_grad=True)\n\ndef mine(ratios):\n    return w[: len(ratios.chosen)]\n",
        {},
        "HERE:5: what it returns does not depend on what it is given, so nothing would be trained",
    ),
    "NaN": (
        of("ratios", "ratios.chosen.log()"),
        {},
        "HERE:1: its value is not finite for log-ratios of -1.2",
    ),
    "NaN at 0": (
        of("ratios", "ratios.margin / ratios.margin.abs()"),
        {},
        "HERE:1: its value is not finite for log-ratios of 0, which all pairs have before the first step",
    ),
    "gradient at 0": (
        of("ratios", "ratios.margin.abs().sqrt()"),
        {},
        "HERE:1: its gradient is not finite for log-ratios of 0, which all pairs have before the first step",
    ),
    "dice": (
        "import torch\n\ndef mine(ratios):\n    return ratios.margin * torch.rand(())\n",
        {},
        "HERE:3: it returns other values the second time; a loss is a function of its arguments alone",
    ),
    "couples": (
        of("ratios", "ratios.margin - ratios.margin.mean()"),
        {},
        "HERE:1: the value of a pair depends on the pairs beside it, which are whoever shares its pack; if all pairs of the "
        "step are meant, write mine.couples = True behind the function",
    ),
    "in place": (of("ratios", "ratios.chosen.mul_(2)"), {}, "HERE:2: RuntimeError: a leaf Variable that"),
    "another file": (
        "import math\n\ndef helper(x):\n    return math.log(x)\n\n" + of("ratios", "ratios.margin * helper(-1)"),
        {},
        "HERE:4: ValueError: math domain error",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_it_is_one_line(write: Write, tmp_path: Path, fault: str) -> None:
    source, keys, words = FAULTS[fault]
    path = write(source, **{"name": "dpo", **keys})
    written = yaml.safe_load(path.read_text())["objective"]["loss_type"]
    module = written.removeprefix("./").partition(":")[0].removesuffix(".py")
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    line = str(caught.value)
    words = words.replace("HERE", f"{tmp_path / module}.py").replace("FOLDER", str(tmp_path)).replace("MODULE", module)
    assert words in line and "\n" not in line
    assert line.startswith(f"{path}:3:3: objective.loss_type: ")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"shap": "line"}, "objective.shap: unknown key; did you mean 'shape'?"),
        ({"zeta": 1}, "unknown key; known here: name, loss_type, shape, times, upper, cpo_alpha, alpha"),
        ({"times": 1.5}, "objective.times: must be an integer, not 1.5"),
        ({"shape": "round"}, "objective.shape: must be 'square' or 'line', not 'round'"),
        ({"upper": "yes"}, "objective.upper: must be true or false, not 'yes'; write true"),
        ({"repo_gamma": 1.0}, "objective.repo_gamma: unknown key; known here: name, loss_type, shape, times, upper"),
        ({"loss": "x"}, "objective.loss: unknown key; in dspref this is objective.loss_type"),
    ],
)
def test_its_keys_are_checked_as_all_are(write: Write, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(write(SCORES, name="cpo", **keys))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "keys", "words"),
    [
        (SIGMOID, {"beta": -1}, "objective.beta: must be greater than 0, not -1"),
        (SIGMOID, {"label_smoothing": 0.7}, "objective.label_smoothing: must be less than 0.5, not 0.7"),
        (SIGMOID, {"loss_type": ["MODULE:mine", "MODULE:mine"]}, ":mine is there twice"),
        (SIGMOID.replace("mine", "ipo"), {"loss_type": ["ipo", "MODULE:ipo"]}, "two losses are called ipo, and so are"),
        (SIGMOID, {"loss_type": ["sigmoid", "MODULE:mien"]}, "objective.loss_type.1: "),
        (SIGMOID, {"loss_type": "MODULE.mine"}, "; a loss of your own is written losses_of_test_"),
        (SIGMOID, {"loss_weights": [1, 2]}, "objective.loss_weights: 2 given, 1 needed"),
    ],
)
def test_what_goes_together_is_checked_as_of_all_losses(write: Write, source: str, keys: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(write(source, name="dpo", **keys))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_module_that_is_loaded_from_elsewhere_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "statistics.py").write_text(SIGMOID)
    import statistics

    with pytest.raises(ConfigError) as caught:
        own.source("statistics:mine")
    assert str(caught.value).startswith(f"{tmp_path}/statistics.py: a module statistics is loaded already")
    assert statistics.__file__ in str(caught.value)


def test_a_fault_in_a_step_is_told_as_the_users(write: Write, tmp_path: Path) -> None:
    source = "def mine(x):\n    if len(x.chosen) > 4:\n        raise ValueError('too\\nmany')\n    return x.chosen\n"
    objective = build_objective(**config.load(write(source, name="dpo")).objective.model_dump())
    with pytest.raises(ConfigError) as caught:
        objective(pairs(), pairs(1))
    name = objective.parts[0].name
    assert (
        str(caught.value) == f"objective.loss_type: {name}: {tmp_path}/{name.partition(':')[0]}.py:3: ValueError: too many"
    )


def test_the_schema_lets_it_and_its_keys_pass() -> None:
    schema = pytest.importorskip("jsonschema").Draft202012Validator(json.loads(config.schema()))
    run = {"model": {"name_or_path": "m"}, "data": {"train": {"path": "p"}}, "output_dir": "out"}
    for objective, good in [
        ({"name": "dpo", "loss_type": "a.b:c", "my_key": 0.3}, True),
        ({"loss_type": ["sigmoid", "b:c"], "my_key": 0.3, "loss_weights": [1, 2]}, True),
        ({"name": "simpo", "loss_type": "b:c", "beta": "x"}, True),
        ({"name": "dpo", "loss_type": "sigmoid", "beta": 0.2}, True),
        ({"name": "dpo", "loss_type": "sigmoid", "my_key": 0.3}, False),
        ({"name": "dpo", "loss_type": ["sigmoid"], "my_key": 0.3}, False),
        ({"name": "dpo", "loss_type": "a.b:c", "beta": -1}, False),
        ({"name": "orpo", "loss_type": "b:c"}, False),
        ({"name": "dpo", "loss_type": "b:"}, False),
    ]:
        assert schema.is_valid(run | {"objective": objective}) == good, objective
