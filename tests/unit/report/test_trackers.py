"""Trackers are carried by threads: one that stands still holds nobody up, one that fails is left out."""

from __future__ import annotations

from threading import Event

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
