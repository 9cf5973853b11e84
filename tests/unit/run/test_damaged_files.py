"""Property tests: whatever the small files of a run folder hold, what reads them answers, or refuses in one line."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_run_folder import commit, finished, lines_of, load, resume_step

from dspref import config as configuration
from dspref.errors import UserError
from dspref.report import metrics, page, performance, tables
from dspref.run import finding, history, manifest, status
from dspref.run.checkpoint import Progress
from dspref.run.folder import RunFolder
from dspref.run.settings import refuse_changes
from dspref.training import outcome, stages
from dspref.watch import lock

STEP = "checkpoints/step-000004/"
FILES = (
    "run.json", "metrics.jsonl", "events.jsonl", ".lock", "config.resolved.yaml", "samples.jsonl", "submit/job.json",
    STEP + "manifest.json", STEP + "state.json",
)  # fmt: skip

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400)
WORDS = ("run_id", "step", "steps", "state", "content", "files", "time", "event", "summary", "process", "place", "loss")
KEYS = st.sampled_from(WORDS) | st.text(max_size=4)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    """The small files of a run that is finished."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        run = finished(folder)
        commit(run, 4, load(folder))
        (folder / "metrics.jsonl").write_bytes(lines_of(range(1, 5)) + b'{"step": 4, "eval_loss": 0.5}\n')
        run.event("commit", step=4)
        sample = {"prompt": "a", "before": "b", "after": "c", "chosen": "d"}
        (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
        (folder / ".lock").write_text(
            json.dumps({"token": "x", "place": "elsewhere", "process": [7, "1"], "attempt": [None, None]})
        )
        (folder / "submit").mkdir()
        (folder / "submit/job.json").write_text(json.dumps({"job": "12", "submitted": "2026-05-01T12:00:00", "runs": None}))
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def exchanged(draw: Callable, value: Any) -> Any:
    """A JSON value with something else somewhere within it."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 3)) == 0:
        return draw(VALUES)
    if isinstance(value, list):
        at = draw(st.integers(0, len(value) - 1))
        return [exchanged(draw, inner) if k == at else inner for k, inner in enumerate(value)]
    key = draw(st.sampled_from(sorted(value)))
    if draw(st.integers(0, 5)) == 0:
        return {k: inner for k, inner in value.items() if k != key}
    return value | {key: exchanged(draw, value[key])}


def damaged(draw: Callable, name: str, content: bytes) -> bytes | None:
    how = draw(st.sampled_from(("exchange", "cut", "flip", "insert", "value", "bytes", "delete", "nest")))
    at = draw(st.integers(0, len(content)))
    if how == "exchange" and name.endswith((".json", ".jsonl", ".lock")):
        rows = content.splitlines() if name.endswith(".jsonl") else [content]
        row = draw(st.integers(0, len(rows) - 1))
        value = exchanged(draw, json.loads(rows[row]))
        if name.endswith("manifest.json") and isinstance(value, dict) and draw(st.booleans()):
            value = manifest.signed(value)  # somebody who means it
        rows[row] = json.dumps(value).encode()
        return b"\n".join(rows) + b"\n"
    if how == "cut":
        return content[:at]
    if how == "flip" and at < len(content):
        return content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
    if how == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=6)) + content[at:]
    if how == "value":
        return json.dumps(draw(VALUES)).encode()
    if how == "nest":
        return b'{"run_id": ' + b"[" * draw(st.sampled_from((50, 990, 5000, 200_000)))
    return draw(st.binary(max_size=40)) if how == "bytes" else None


def look_at(folder: Path, config: Any) -> None:
    """All that reads these files before a run has any of its own; each answers or refuses in a line."""
    written = folder / "metrics.jsonl"
    readers: list[Callable[[], Any]] = [
        lambda: status.show(status.read(folder)),
        lambda: json.dumps(status.read(folder)),
        lambda: status.show_sweep([status.read(folder)]),
        lambda: finding.runs_in(folder.parent),
        lambda: page.render([history.read(folder, "run")]).encode(),
        lambda: tables.markdown(history.read_all([folder])) + tables.long_form(history.read_all([folder])),
        lambda: finding.is_foreign(folder),
        lambda: lock.refuse_held(folder),
        lambda: stages.already_finished(RunFolder(folder), config),
        lambda: (folder / ".lock").unlink(missing_ok=True),
        lambda: stages.already_finished(RunFolder(folder), config),
        lambda: refuse_changes(RunFolder(folder), configuration.resolved(config), {}),
        lambda: outcome.learned(written),
        lambda: performance.medians(metrics.training_lines(written)),
        lambda: Progress.read(folder / STEP / "state.json"),
        lambda: metrics.Recorder(folder, config.log, {}, {}, 150).close(),
        lambda: resume_step(RunFolder(folder)),
    ]
    for reader in readers:
        try:
            said = reader()
        except UserError as error:
            assert "\n" not in str(error), error
            said = str(error)
        if isinstance(said, str):
            said.encode()  # it can be printed


def check(whole: dict[str, bytes], cases: int) -> None:
    root = Path(tempfile.mkdtemp())
    config = load(root / "run")

    @settings(max_examples=cases, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def property_of_all(data: Any) -> None:
        files: dict[str, bytes | None] = dict(whole)
        for name in data.draw(st.sets(st.sampled_from(FILES), min_size=1, max_size=3)):
            files[name] = damaged(data.draw, name, whole[name])
        folder = root / "run"
        shutil.rmtree(folder, ignore_errors=True)
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        look_at(folder, config)

    try:
        property_of_all()
    finally:
        shutil.rmtree(root)


def test_what_a_library_says_of_a_damaged_file_is_one_line(tmp_path):
    """It quotes what it found there."""
    (tmp_path / "state.json").write_text('{"\\n": null, "step": 1}')
    with pytest.raises(UserError, match="is not the state of a run") as fault:
        Progress.read(tmp_path / "state.json")
    assert str(fault.value).isprintable()


def test_a_manifest_that_names_no_files_is_no_traceback(whole, tmp_path):
    folder = tmp_path / "run"
    for name, content in whole.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    path = folder / STEP / "manifest.json"
    path.write_text(json.dumps(manifest.signed(json.loads(path.read_text()) | {"files": {}})))
    look_at(folder, load(folder))


def test_no_damage_of_small_files_finds_a_traceback(whole):
    check(whole, 30)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_damage_of_small_files_finds_a_traceback_in_many_cases(whole):
    check(whole, 2000)
