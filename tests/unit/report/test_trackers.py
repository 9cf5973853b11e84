"""Trackers are carried by threads: one that stands still holds nobody up, one that fails is left out."""

from __future__ import annotations

from threading import Event
from types import SimpleNamespace

import pytest

from dspref import config
from dspref.report import trackers

RUN = config.load("launch/configs/quickstart.yaml")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch):
    """A tracker that lets nothing through until it is opened; what arrived."""
    opened, arrived = Event(), []

    def send(record):
        assert opened.wait(30)
        arrived.append(record and record["step"])

    monkeypatch.setitem(trackers.TRACKERS, "gate", lambda folder, log, settings, run_id: ("its name", send))
    return opened, arrived


def test_a_tracker_that_stands_still_holds_nobody_up(gate, tmp_path):
    opened, arrived = gate
    thread = trackers.TrackerThread("gate", tmp_path, RUN.log, {}, None)
    for step in range(100):
        thread.send({"step": step})
    assert not arrived and thread.run_id == "its name"
    opened.set()
    thread.close()
    assert arrived == [*range(100), None]


def test_what_cannot_wait_any_longer_is_left_out_oldest_first(gate, tmp_path, monkeypatch, capsys):
    opened, arrived = gate
    monkeypatch.setattr(trackers, "WAITING", 5)
    thread = trackers.TrackerThread("gate", tmp_path, RUN.log, {}, None)
    for step in range(100):
        thread.send({"step": step})
    opened.set()
    thread.close()
    assert arrived[-2:] == [99, None] and len(arrived) < 10
    assert "too slow" in capsys.readouterr().out


def test_one_that_never_ends_is_not_waited_for(gate, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 0.1)
    thread = trackers.TrackerThread("gate", tmp_path, RUN.log, {}, None)
    thread.send({"step": 1})
    thread.send({"step": 2})
    thread.close()
    assert "lines were not sent" in capsys.readouterr().out
    gate[0].set()


def test_one_that_fails_is_switched_off(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no network\nand more")

    monkeypatch.setitem(trackers.TRACKERS, "broken", broken)
    thread = trackers.TrackerThread("broken", tmp_path, RUN.log, {}, None)
    thread.send({"step": 1})
    thread.close()
    assert capsys.readouterr().out == "broken: switched off (no network); metrics.jsonl goes on\n"


def test_one_that_is_not_installed_says_how_to(tmp_path, monkeypatch, capsys):
    def lacking(*_):
        import comet_ml_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401

    monkeypatch.setitem(trackers.TRACKERS, "comet", lacking)
    trackers.TrackerThread("comet", tmp_path, RUN.log, {}, None).close()
    assert "is not installed; pip install comet_ml_that_nobody_has); metrics.jsonl goes on" in capsys.readouterr().out


ROWS = [
    {"step": 3, "prompt": f"p{i}", "policy": "`a`\n<b>", "reference": "```x```", "chosen": None, "source": "eval"}
    for i in range(2)
]


def test_answers_are_a_table_in_wandb(tmp_path, monkeypatch):
    wandb, logged = pytest.importorskip("wandb"), []
    run = SimpleNamespace(id="x", log=lambda record, step: logged.append((record, step)), finish=lambda: None)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    thread = trackers.TrackerThread("wandb", tmp_path, RUN.log, {}, None)
    thread.send({"step": 3, "samples": ROWS})
    thread.close()
    ((record, step),) = logged
    assert step == record["step"] == 3 and record["samples"].columns == list(ROWS[0])
    assert record["samples"].data == [list(row.values()) for row in ROWS]


def test_answers_are_texts_in_tensorboard(tmp_path, capsys):
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    thread = trackers.TrackerThread("tensorboard", tmp_path, RUN.log, {}, None)
    thread.send({"step": 3, "samples": ROWS})
    thread.send({"step": 3, "loss": 0.5})
    thread.close()
    assert capsys.readouterr().out == ""
    events = loading.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    (event,) = events.Tensors("samples/1/text_summary")
    assert event.step == 3 and event.tensor_proto.string_val[0].decode() == (
        "**prompt**\n\n```\np1\n```\n\n**policy**\n\n```\n`a`\n<b>\n```\n\n**reference**\n\n````\n```x```\n````\n\n**source**\n\n```\neval\n```"
    )
