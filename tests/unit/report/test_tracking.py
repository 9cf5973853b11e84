"""Each tracker as its own library has it, where that is installed: what it is sent it keeps, and a resumed run goes on."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, get_args

import pytest

from dspref import config
from dspref.config import Tracker
from dspref.machine.context import TRACKERS as PACKAGES
from dspref.report import tracking

RUN = config.load("launch/configs/quickstart.yaml")
SETTINGS = {"train": {"seed": 3}, "data": {"train": [{"path": "x"}]}}
ROWS = [{"step": 2, "prompt": "p", "policy": "`a`\n<b>", "reference": None}]


def test_every_tracker_has_an_opener_a_package_and_an_extra() -> None:
    extras = Path("pyproject.toml").read_text()
    assert set(tracking.TRACKERS) == set(get_args(Tracker)) == set(PACKAGES)
    assert all(f"\n{name} = [" in extras for name in PACKAGES if name != "wandb")


def test_settings_are_told_one_by_one() -> None:
    found = list(tracking.flat({"a": {"b": 1, "c": {}}, "d": [{"e": 2}]}))
    assert found == [("a.b", 1), ("a.c", {}), ("d", [{"e": 2}])]


def told(name: str, folder: Path, settings: dict[str, Any] = SETTINGS) -> str | None:
    """A run of two steps, one more after a resume; its name there."""
    pytest.importorskip(PACKAGES[name])
    run_id, send = tracking.TRACKERS[name](folder, RUN.log, settings, None)
    send({"step": 1, "loss": 0.5, "source/odd: name!/loss": 0.25})
    send({"step": 2, "loss": float("nan"), "phase": "train", "samples": ROWS})
    send(None)
    again, send = tracking.TRACKERS[name](folder, RUN.log, settings | {"train": {"seed": 4}}, run_id)
    assert again == run_id
    send({"step": 3, "loss": 0.125})
    send(None)
    return run_id


@pytest.mark.slow
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    pytest.importorskip("mlflow.store.tracking.sqlalchemy_store")
    run_id = told("mlflow", tmp_path)
    from mlflow import MlflowClient

    assert run_id is not None
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    run, history = client.get_run(run_id), client.get_metric_history(run_id, "loss")
    assert [(one.step, one.value) for one in history][::2] == [(1, 0.5), (3, 0.125)] and history[1].step == 2
    assert run.data.params == {"train.seed": "3", "data.train": "[{'path': 'x'}]"}
    assert run.data.metrics["source/odd_ name_/loss"] == 0.25 and run.info.status == "FINISHED"
    (table,) = tmp_path.rglob("samples.json")
    assert "<b>" in json.loads(table.read_text())["data"][0][2]


@pytest.mark.slow
def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    import trackio.utils

    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")  # it reads the variable when it is imported
    name = told("trackio", tmp_path)
    from trackio.sqlite_storage import SQLiteStorage

    first, second, third = SQLiteStorage.get_logs(RUN.log.project, name)
    assert (first["step"], second["step"], third["step"]) == (1, 2, 3) and third["loss"] == 0.125
    assert first["source/odd: name!/loss"] == 0.25 and "<b>" in str(second["samples"])
    assert "dashboard" not in capfd.readouterr().out


@pytest.mark.slow
def test_comet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("comet_ml")
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COMET_START_ONLINE", "1")
    with pytest.raises(RuntimeError, match="has no key; export COMET_API_KEY, or COMET_START_ONLINE=0"):
        told("comet", tmp_path)
    monkeypatch.setenv("COMET_START_ONLINE", "0")
    run_id = told("comet", tmp_path)
    kept = sorted((tmp_path / "comet").glob("*.zip"))
    assert len(kept) == 2 and all(run_id is not None and path.name.startswith(run_id) for path in kept)
    texts = [zipfile.ZipFile(path).read("messages.json").decode() for path in kept]
    assert sum('"metricName":"loss"' in text for text in texts) == 2
    assert not any(__file__ in text or "os_packages" in text for text in texts)


@pytest.mark.slow
def test_swanlab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    run_id = told("swanlab", tmp_path)
    kept = [path.read_bytes() for path in sorted((tmp_path / "swanlab").rglob("*.swanlab"))]
    assert kept and run_id is not None
    assert any(b"source/odd" in one for one in kept)
    told_of = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"pytest" in told_of and Path(__file__).name.encode() not in told_of  # packages, and no command line
