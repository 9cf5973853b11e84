"""Runs on rows that a format of the user's own reads: the numbers of plain rows, resume, an edit, a row that it fails on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_own_losses import launched
from test_resume import forget_everything_after, training_records
from tiny import write_run

from dspref.errors import ConfigError
from dspref.own_code import FORMAT, Source, Used
from dspref.run.folder import RunFolder, content_key
from dspref.run.settings import refuse_other_code

ROOT = Path(__file__).resolve().parents[2]
SWAPPED = """\
def mine(row):
    if row["better"] is None:
        return None
    return {"prompt": row["asked"], "chosen": row["better"], "rejected": row["worse"]}
"""
NAMES = {"prompt": "asked", "chosen": "better", "rejected": "worse"}


def write_raw(folder: Path, module: str, **sections: Any) -> Path:
    """A run whose rows have other names, and one too many, with the format that reads them; `plain_...` are as they were."""
    path = write_run(folder, **sections)
    values = yaml.safe_load(path.read_text())
    for source in (values["data"]["train"], values["data"]["eval"]):
        file = Path(source["path"])
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.with_name(f"plain_{file.name}").write_bytes(file.read_bytes())
        renamed = [{NAMES[name]: value for name, value in row.items()} for row in rows]
        renamed.insert(2, dict.fromkeys(NAMES.values()))
        file.write_text("".join(json.dumps(row) + "\n" for row in renamed))
        source["format"] = f"{module}:mine"
    path.write_text(yaml.safe_dump(values))
    (folder / f"{module}.py").write_text(SWAPPED)
    return path


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_its_rows_train_to_the_same_bits_and_a_run_goes_on(world, all_workers, tmp_path):
    module = f"own_format_{world}"
    path = write_raw(tmp_path, module)

    def train(to: str, *overrides: str) -> list[int]:
        given = [f"output_dir={tmp_path / to}", *overrides]
        return all_workers[world].run("cases:run_training_in", folder=str(tmp_path), config_path=str(path), overrides=given)

    plain = [f"data.{of}={{path: {tmp_path}/plain_{file}.jsonl}}" for of, file in (("train", "pairs"), ("eval", "held_out"))]
    assert train("plain", *plain) == [0] * world
    assert train("mine") == [0] * world
    records = training_records(tmp_path / "mine")
    assert records and records == training_records(tmp_path / "plain")
    assert (tmp_path / "mine" / "formats" / f"{module}.py").read_text() == SWAPPED
    forget_everything_after(tmp_path / "mine", 2)
    assert train("mine") == [0] * world
    assert training_records(tmp_path / "mine") == records


def test_a_run_goes_on_with_the_format_that_it_began_with(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    was, now = (Used("data.eval.hard.format", FORMAT, "a:f", Source("a.py", 1, "", digit * 64)) for digit in "12")
    content = {content_key(was): "1" * 64}
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "x", "state": "running", "content": content}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    refuse_other_code(RunFolder(tmp_path), [was])
    with pytest.raises(ConfigError) as caught:
        refuse_other_code(RunFolder(tmp_path), [was, now])
    assert str(caught.value) == (
        f"data.eval.hard.format: a:f: a.py has sha256 {'2' * 12}, but the run in {tmp_path} began with {'1' * 12}; restore "
        f"it from {tmp_path}/formats/a.py, or start anew with another output_dir= or checkpoint.resume=never"
    )


@pytest.mark.slow
def test_through_the_launcher_an_edit_is_refused_and_a_bad_row_is_named(tmp_path):
    """Two steps, an interruption, and the rest; and what other commands do with the run where the format is not."""
    write_raw(tmp_path, "mine", train={"eval_at_start": False})
    assert launched(tmp_path, "train.max_steps=2")[0] == 0
    (tmp_path / "mine.py").write_text(SWAPPED + "\n# an edit\n")
    code, said = launched(tmp_path)
    assert code == 2 and said.count("data.train.format: mine:mine: ") == 1 and "Traceback" not in said
    assert f"restore it from {tmp_path}/run/formats/mine.py" in said
    (tmp_path / "mine.py").write_text((tmp_path / "run" / "formats" / "mine.py").read_text())
    assert launched(tmp_path)[0] == 0
    assert [record["step"] for record in training_records(tmp_path / "run") if "loss" in record] == [1, 2, 3, 4]

    (tmp_path / "failing.py").write_text(SWAPPED.replace("return None", "raise ValueError('no more')"))
    code, said = launched(tmp_path, "data.train.format=failing:mine", "output_dir=failed")
    line = f"{tmp_path}/pairs.jsonl:3: failing:mine: {tmp_path}/failing.py:3: ValueError: no more; fix: mend the row or the "
    assert code == 3 and said.count(line) == 1 and "Traceback" not in said and not (tmp_path / "failed").exists()
    code, said = launched(tmp_path, "data.train.format=nowhere:mine", "output_dir=failed")
    assert code == 2 and said.count("data.train.format: no module nowhere, ") == 1 and "Traceback" not in said

    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    dspref = [sys.executable, "-m", "dspref"]
    looked = [subprocess.run([*dspref, "inspect", "run.yaml", "--row", row], cwd=tmp_path, env=environment,
                             capture_output=True, text=True) for row in ("2", "3")]  # fmt: skip
    assert looked[0].returncode == 0 and "columns   asked: " in looked[0].stdout
    left_out = f"{tmp_path}/pairs.jsonl:3: left out: mine:mine: left the row out; fix: mend {tmp_path}/mine.py:1"
    assert looked[1].returncode == 3 and left_out in looked[1].stderr
    judged = subprocess.run([*dspref, "evaluate", "run.yaml", "--model", "run"], cwd=tmp_path, env=environment)
    assert judged.returncode == 0
    elsewhere = [*dspref, "evaluate", str(tmp_path / "run" / "config.resolved.yaml")]
    done = subprocess.run(elsewhere, cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"the run has it in {tmp_path}/run/formats/mine.py: copy it here if you trust it" in done.stderr
    saved = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    export = [*dspref, "export", str(saved), "--to", str(tmp_path / "exported")]
    assert subprocess.run(export, cwd="/", env=environment).returncode == 0
    assert (tmp_path / "exported" / "model.safetensors").is_file()
