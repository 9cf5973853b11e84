"""metrics.jsonl as a table: each step once, whatever befell the file; and what a run folder has for a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs

from dspref.errors import ConfigError
from dspref.run import curves, history
from dspref.run.curves import Column


def write(path: Path, *texts: str) -> Path:
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def test_the_later_word_holds(tmp_path):
    path = write(
        tmp_path / "m", *(json.dumps({"step": n, "loss": 1.0}) for n in (1, 2, 3, 4, 5)), '{"step": 4, "eval_loss": 9}',
        *(json.dumps({"step": n, "loss": 2.0}) for n in (3, 4)),
    )  # fmt: skip
    plain = curves.read(path)
    assert plain.trained("loss") == Column([1, 2, 3, 4, 5], [1, 1, 2, 2, 1]) and plain.repeated == 2
    resumed = curves.read(path, resumes={2})
    assert resumed.trained("loss") == Column([1, 2, 3, 4], [1, 1, 2, 2]), "step 5 was undone"
    assert resumed.repeated == 3 and not resumed.evaluations


def test_bad_lines_are_counted_and_what_is_no_number_is_a_gap(tmp_path):
    path = write(
        tmp_path / "m",
        '{"step": 1, "loss": 0.5, "x": true}', "", "[1]", '{"loss": 1}', '{"step": -1, "loss": 1}', "\x00\xff",
        '{"step": 2, "loss": null}', '{"step": 3, "loss": NaN}', '{"step": 4, "loss": 1e300}', '{"step": 5, "loss": "low"}',
        '{"step": 6, "loss": 2}', '{"step": 6, "note": "neither"}', '{"step": 7, "lo',
    )  # fmt: skip
    found = curves.read(path)
    assert found.bad_lines == 5
    assert found.trained("loss") == Column([1, 2, 3, 4, 5, 6], [0.5, None, None, None, None, 2.0])
    assert found.trained("loss").gaps == 4 and found.training_keys == ["loss"]
    assert curves.read(tmp_path / "none") == curves.Curves()


def test_tail_and_best():
    assert [curves.tail_of(count) for count in (1, 10, 11, 500, 10_000)] == [1, 1, 2, 50, 50]
    assert curves.tail_mean(Column(list(range(20)), [9.0] * 18 + [1.0, None])) == 1.0
    assert curves.tail_mean(Column([1], [None])) is None and curves.tail_mean(Column([], [])) is None
    told = curves.Curves(evaluations={5: {"eval_loss": 2.0}, 9: {"eval_loss": 1.0}, 12: {"eval_loss": 1.0}})
    assert curves.evaluation(told, "eval_loss") == (1.0, 12, 1.0, 9) and curves.evaluation(told, "eval_x") is None
    assert told.prefixes == ["eval_"]


# ---------------------------------------------------------------------------------------------------------------------


def test_all_that_a_run_folder_has(tmp_path):
    (found,) = history.read_all([runs.write(tmp_path / "a", steps=40)])
    assert found.name == "a" and found.faults == [] and found.status["step"] == 40
    assert found.config["objective.beta"] == "0.1" and found.versions["packages.torch"] == "2.13.0"
    assert found.data == ["data       1302 pairs, mean tokens 10 prompt + 6 | 6", "data: left out 3 of 1305 rows: empty"]
    assert found.warnings == ["step 9 skipped, the loss is not finite (1 in a row)"]
    assert [(event.name, event.step) for event in found.events][3:5] == [("resume", 20), ("skip", 30)]
    assert [sample.step for sample in found.samples] == [20, 40] and found.samples[1].reference == "Because of the sea."


def test_samples_of_today_and_tomorrow(tmp_path):
    run = runs.write(tmp_path / "a", steps=4)
    turns = [{"role": "user", "content": "Hi"}]
    rows = [
        {"prompt": "p", "before": "b", "after": "a", "chosen": "c"}, {"step": 3, "prompt": turns, "policy": "x", "extra": 1},
        {"step": "3", "prompt": "p", "reference": "r", "policy": None}, {"step": 4}, {"prompt": 3, "policy": "x"},
    ]  # fmt: skip
    (run / "samples.jsonl").write_text(runs.lines(rows) + '{"cut')
    (found,) = history.read_all([run])
    assert [sample[:5] for sample in found.samples] == [
        (None, "p", "a", "b", "c"),
        (3, "user: Hi", "x", None, None),
        (None, "p", None, "r", None),
    ]
    assert found.faults == ["samples.jsonl: 3 lines passed over, damaged or half-written"]


def test_runs_are_told_apart_and_come_once(tmp_path):
    for name in ("x/run", "y/run", "y/other"):
        runs.write(tmp_path / name, steps=4)
    (tmp_path / "link").symlink_to(tmp_path / "x/run")
    found = history.read_all([tmp_path / "x/run", tmp_path / "link", tmp_path / "y", tmp_path / "y/run/"])
    assert [run.name for run in found] == ["x/run", "y/other", "y/run"]
    (tmp_path / "file").touch()
    for wrong in ("none", "file"):
        with pytest.raises(ConfigError, match=f"{wrong}: (holds no dspref run|is no folder)"):
            history.read_all([tmp_path / "x/run", tmp_path / wrong])


DAMAGE = {
    "run.json": "run.json is missing",
    "metrics.jsonl": "metrics.jsonl is missing",
    "events.jsonl": "events.jsonl is missing",
    "config.resolved.yaml": "config.resolved.yaml is missing",
    "env.json": "env.json is missing",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_is_missing_damaged_or_of_another_kind_is_told(name, tmp_path):
    run = runs.write(tmp_path / "a", steps=8)
    content = (run / name).read_bytes()
    (run / name).unlink()
    assert history.read(run, "a").faults == [DAMAGE[name]]
    (run / name).mkdir()
    assert any(name in fault for fault in history.read(run, "a").faults)
    (run / name).rmdir()
    for keep in (0, 0.3, 0.97):
        (run / name).write_bytes(content[: int(keep * len(content))] + b"\xff{[")
        found = history.read(run, "a")
        assert any(name in fault for fault in found.faults), keep


def test_secrets_stay_hidden(tmp_path, monkeypatch):
    """They are hidden when a run folder is written; one that slipped in, by hand or by an older version, is hidden again."""
    monkeypatch.setenv("MY_TOKEN", "correct-horse-battery")
    run = runs.write(tmp_path / "a", steps=4)
    secret = "hf_" + "a1B2" * 9
    (run / "events.jsonl").write_text(runs.lines([{"time": runs.when(0), "event": "start", "why": secret}]))
    (run / "config.resolved.yaml").write_text(f"model: {{name_or_path: correct-horse-battery/{secret}}}\n")
    (run / "samples.jsonl").write_text(runs.lines([{"prompt": secret, "policy": "correct-horse-battery"}]))
    (run / "logs/rank-0.log").write_text(f"warning: {secret}\n")
    found = repr(history.read(run, "a"))
    assert secret not in found and "correct-horse-battery" not in found and found.count("***") >= 5
