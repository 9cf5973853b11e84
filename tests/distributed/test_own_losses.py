"""Runs with a loss of the user's own: the numbers of the built-in one, resume, an edit, a fault in a step."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file
from test_resume import forget_everything_after, training_records
from tiny import write_run

from dspref.errors import ConfigError
from dspref.own_code import LOSS, Source, Used
from dspref.run.folder import RunFolder, content_key
from dspref.run.settings import refuse_other_code

ROOT = Path(__file__).resolve().parents[2]
SIGMOID = """\
from dspref.objectives.losses import Positive, Ratios, Smoothing, smoothed


def mine(ratios: Ratios, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0):
    return smoothed(beta * ratios.margin, label_smoothing)
"""
# Raises in the third step: each of two ranks has two of a step's four pairs, which it is not tried out with.
FAILING = """\
import torch

calls = []


def mine(ratios, *, after: int = 0):
    if len(calls) > after:
        raise RuntimeError("no more")
    if ratios.margin.requires_grad and len(ratios.margin) == 2:
        calls.append(1)
    return -ratios.margin
"""


def as_built_in(records: list[dict]) -> list[dict]:
    return [{name.replace("loss/mine", "loss/sigmoid"): value for name, value in record.items()} for record in records]


@pytest.mark.parametrize(("world", "stage"), [(1, 3), (2, 1), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_the_same_formula_trains_to_the_same_bits(world, stage, all_workers, tmp_path):
    path, module = write_run(tmp_path), f"own_losses_{world}_{stage}"
    (tmp_path / f"{module}.py").write_text(SIGMOID)
    keys = "beta: 0.3, label_smoothing: 0.1, rpo_alpha: 0.5, ld_alpha: 0.5, use_weighting: true"
    stage = f"deepspeed.zero_optimization.stage={stage}"

    def train(loss_type: str, to: str) -> list[int]:
        overrides = [stage, f"objective={{name: dpo, loss_type: {loss_type}, {keys}}}", f"output_dir={tmp_path / to}"]
        return all_workers[world].run(
            "cases:run_training_in", folder=str(tmp_path), config_path=str(path), overrides=overrides
        )

    assert train("sigmoid", "theirs") == [0] * world
    assert train(f"{module}:mine", "mine") == [0] * world
    records = training_records(tmp_path / "mine")
    assert any("loss/mine" in record for record in records) and any("eval_loss/mine" in record for record in records)
    assert as_built_in(records) == training_records(tmp_path / "theirs")
    weights = [load_file(tmp_path / run / "final" / "model.safetensors") for run in ("mine", "theirs")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[1])
    assert (tmp_path / "mine" / "losses" / f"{module}.py").read_text() == SIGMOID
    forget_everything_after(tmp_path / "mine", 2)
    assert train(f"{module}:mine", "mine") == [0] * world
    assert training_records(tmp_path / "mine") == records


COUPLED = """\
def mine(ratios, *, beta: float = 0.1):
    return (beta * (ratios.rejected.sort().values - ratios.chosen.sort().values)).exp().log1p()


mine.couples = True
"""


@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_that_couples_pairs_sees_the_whole_step(world, all_workers, tmp_path):
    """Written out, `aot_pair`: several packs of a step, on one rank and on two, train as with ours."""
    path, module = write_run(tmp_path, data={"tokens_per_pack": 64}), f"own_coupled_{world}"
    (tmp_path / f"{module}.py").write_text(COUPLED)
    records = {}
    for run, loss_type in (("theirs", "aot_pair"), ("mine", f"{module}:mine")):
        overrides = [f"objective={{name: dpo, loss_type: {loss_type}, beta: 0.3}}", f"output_dir={tmp_path / run}"]
        assert (
            all_workers[world].run("cases:run_training_in", folder=str(tmp_path), config_path=str(path), overrides=overrides)
            == [0] * world
        )
        records[run] = [record for record in training_records(tmp_path / run) if "loss" in record]
    lines = map(json.loads, (tmp_path / "mine" / "metrics.jsonl").read_text().splitlines())
    assert max(line.get("perf/packs", 0) for line in lines) > 1
    for mine, theirs in zip(records["mine"], records["theirs"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def test_a_run_goes_on_with_the_loss_that_it_began_with(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    was, now = (Used("objective.loss_type", LOSS, "a:f", Source("a.py", 1, "", digit * 64)) for digit in "12")
    content = {content_key(was): "1" * 64}
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "x", "state": "running", "content": content}))
    refuse_other_code(RunFolder(tmp_path), [now])  # no step was made with the other
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    refuse_other_code(RunFolder(tmp_path), [was])
    with pytest.raises(ConfigError) as caught:
        refuse_other_code(RunFolder(tmp_path), [now])
    assert str(caught.value) == (
        f"objective.loss_type: a:f: a.py has sha256 {'2' * 12}, but the run in {tmp_path} began with {'1' * 12}; restore "
        f"it from {tmp_path}/losses/a.py, or start anew with another output_dir= or checkpoint.resume=never"
    )


def test_the_example_of_the_docs_trains(all_workers, tmp_path):
    text = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8").partition("## Your own loss")[2]
    module, section = (re.findall(rf"^```{kind}\n(.*?)^```$", text, re.M | re.S) for kind in ("python", "yaml"))
    name = re.match(r"# (\w+\.py)\n", module[0])
    assert name and len(module) == len(section) == 1
    (tmp_path / name[1]).write_text(module[0])
    path = write_run(tmp_path, train={"max_steps": 2}, model={"disable_dropout": True})
    values = yaml.safe_load(path.read_text()) | yaml.safe_load(section[0])
    path.write_text(yaml.safe_dump(values))
    assert all_workers[1].run("cases:run_training_in", folder=str(tmp_path), config_path=str(path), overrides=[]) == [0]
    assert all("loss/with_target" in record for record in training_records(tmp_path / "run") if "loss" in record)
    first = training_records(tmp_path / "run")[0]["loss/with_target"]
    assert first == pytest.approx(math.log(1 + math.exp(0.3)), abs=1e-4), "at log-ratios of 0"


def launched(folder: Path, *overrides: str) -> tuple[int, str]:
    """Through DeepSpeed's launcher on two ranks, in a folder of the user's."""
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", str(ROOT / "launch" / "train.py")]
    done = subprocess.run(
        [*command, "--config", "run.yaml", *overrides], cwd=folder, capture_output=True, text=True, timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_through_the_launcher_an_edit_is_refused_and_a_fault_is_the_users(tmp_path):
    write_run(tmp_path, objective={"loss_type": "mine:mine"}, train={"eval_at_start": False})
    (tmp_path / "mine.py").write_text(SIGMOID)
    assert launched(tmp_path, "train.max_steps=2")[0] == 0
    (tmp_path / "mine.py").write_text(SIGMOID + "\n# an edit\n")
    code, said = launched(tmp_path)
    assert code == 2 and said.count("objective.loss_type: mine:mine: ") == 1 and "Traceback" not in said
    assert f"restore it from {tmp_path}/run/losses/mine.py" in said
    (tmp_path / "mine.py").write_text((tmp_path / "run" / "losses" / "mine.py").read_text())
    assert launched(tmp_path)[0] == 0
    assert [record["step"] for record in training_records(tmp_path / "run") if "loss" in record] == [1, 2, 3, 4]

    (tmp_path / "failing.py").write_text(FAILING)
    wrong = ["objective.loss_type=failing:mine", "output_dir=failed", "checkpoint.save_every=1", "data.tokens_per_pack=2000"]
    code, said = launched(tmp_path, *wrong, "objective.after=1")
    assert code == 2 and "Traceback" not in said
    assert said.count(f"objective.loss_type: failing:mine: {tmp_path}/failing.py:8: RuntimeError: no more") == 1
    state = json.loads((tmp_path / "failed" / "run.json").read_text())
    assert (state["state"], state["exit_code"]) == ("failed", 2)
    saved = sorted((tmp_path / "failed" / "checkpoints").glob("step-*"))
    assert saved
    export = [sys.executable, "-m", "dspref", "export", str(saved[-1]), "--to", str(tmp_path / "exported")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    elsewhere = subprocess.run(export, cwd="/", env=environment, capture_output=True, text=True)
    assert elsewhere.returncode == 2 and "Traceback" not in elsewhere.stderr
    assert f"the run has it in {tmp_path}/failed/losses/failing.py: copy it here if you trust it" in elsewhere.stderr
    assert subprocess.run(export, cwd=tmp_path, env=environment).returncode == 0
    assert (tmp_path / "exported" / "model.safetensors").is_file()
