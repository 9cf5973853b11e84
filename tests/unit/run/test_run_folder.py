"""A run folder, whatever became of its files: what dspref may leave there, damaged records, changed settings, logs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dspref import config as configuration
from dspref import distributed
from dspref.config import Config
from dspref.errors import ConfigError, EnvironmentFault, IOFault
from dspref.machine import preflight
from dspref.machine.context import CheckContext
from dspref.machine.machine import FAIL
from dspref.report import metrics
from dspref.run import curves, export, finding, manifest, record, saving, status
from dspref.run.checkpoint import Progress, find, prune, resume
from dspref.run.folder import RunFolder, mend_tail
from dspref.run.manifest import signed
from dspref.run.settings import digest_of, facts_of, refuse_changes
from dspref.training import outcome, stages
from dspref.watch import lock

QUICK = "launch/configs/quickstart.yaml"


def load(folder: Path, *overrides: str) -> Config:
    return configuration.load(QUICK, [f"output_dir={folder}", *overrides])


def changes(run: RunFolder, config: Config) -> list[str]:
    return refuse_changes(run, configuration.resolved(config), configuration.given(config))


def opened(folder: Path, *overrides: str) -> RunFolder:
    """A run that has begun, by this process."""
    config, run = load(folder, *overrides), RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    run.open(configuration.resolved(config), None, {}, 8, config.checkpoint.resume == "never")
    run.update(content={"train": "abc"})
    return run


def commit(run: RunFolder, step: int, config: Config, **changes: Any) -> Path:
    """A checkpoint as `dspref.run.saving` leaves it, without weights."""
    folder = manifest.folder_of(run.checkpoints, step)
    folder.mkdir(parents=True)
    state = json.dumps({"step": step, "metrics_offset": 0})
    (folder / "state.json").write_text(state)
    said = facts_of(run, configuration.resolved(config)) | {"step": step, "world_size": 1, "metrics": {}} | changes
    import hashlib

    said["files"] = {"state.json": (len(state), hashlib.sha256(state.encode()).hexdigest())}
    (folder / "manifest.json").write_text(json.dumps(signed(said)))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Whose folder it is


LEFT = [
    [".lock"],
    [".lock-0123"],
    [".draft-1-abc"],
    [".lock", ".draft-1-abc", "config.resolved.yaml"],
    ["config.source.yaml", "config.resolved.yaml", "ds_config.json", "env.json", "logs/", "checkpoints/"],
    ["previous-20260101-000000/", "previous-20260101-000000-2/"],
    ["STOP", "SAVE"],
    ["events.jsonl"],
]


@pytest.mark.parametrize("names", LEFT, ids=lambda names: names[0])
def test_what_a_kill_leaves_before_run_json_is_not_foreign(names, tmp_path):
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    RunFolder(tmp_path).refuse_foreign()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds no dspref run"):
        RunFolder(tmp_path).refuse_foreign()


@pytest.mark.parametrize("names", [["previous-year/"], [".locked"], ["checkpoints/model/"], [".drafts"]])
def test_names_that_only_look_alike_are_foreign(names, tmp_path):
    for name in names:
        (tmp_path / name).mkdir(parents=True) if name.endswith("/") else (tmp_path / name).touch()
    assert finding.is_foreign(tmp_path)


STRAYS = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "dangling": lambda path: path.symlink_to("nowhere"),
    "file": Path.touch,
    "linked": lambda path: path.symlink_to(path.parent.parent),
}
# (name, what lies there, what is said of it)
IN_THE_WAY = [
    *((name, "folder", "is a folder, not a file") for name in (record.NAME, *record.WHOLE, *record.APPENDED)),
    *((name, "linked", "is a folder, not a file") for name in ("samples.jsonl", "metrics.jsonl")),
    *((name, "pipe", "is a pipe, not a file") for name in record.APPENDED),
    *((name, "dangling", "is a link that leads nowhere") for name in (*record.APPENDED, *record.FOLDERS)),
    *((name, kind, "is no folder") for name in record.FOLDERS for kind in ("file", "pipe")),
    ("logs/rank-0.log", "folder", "is a folder, not a file"),
    ("logs/rank-11.log", "pipe", "is a pipe, not a file"),
    ("logs/rank-1.stacks.txt", "dangling", "is a link that leads nowhere"),
    *((name, kind, "is none of the run's models") for name in record.MODELS for kind in ("file", "folder")),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("name", "kind", "said"), IN_THE_WAY)
def test_what_lies_in_the_way_of_a_run_is_said_at_its_start(name, kind, said, tmp_path):
    """And to `dspref check`, `doctor` and `submit`; with resume=never all but run.json is set aside."""
    run = opened(tmp_path / "run")
    (run.path / name).unlink() if (run.path / name).is_file() else shutil.rmtree(run.path / name, ignore_errors=True)
    STRAYS[kind](run.path / name)
    line = f"{run.path / name} {said}, where the run keeps its {Path(name).name}; move it away"
    with pytest.raises(EnvironmentFault) as refusal:
        RunFolder(run.path).refuse_foreign()
    assert str(refusal.value) == f"output_dir: {line}"
    verdict = preflight.check_folders(CheckContext(load(run.path)))
    assert (verdict.level, verdict.text) == (FAIL, f"output_dir: {line}")
    assert (("output_dir",), line) in CheckContext(load(run.path)).look().faults
    anew = load(run.path, "checkpoint.resume=never")
    assert (preflight.check_folders(CheckContext(anew)).level == FAIL) is (name == record.NAME)
    if name != record.NAME:
        RunFolder(run.path).refuse_foreign(anew=True)
        RunFolder(run.path).open(configuration.resolved(anew), None, {}, 8, anew=True)
        RunFolder(run.path).refuse_foreign()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["folder", "file", "pipe", "dangling"])
@pytest.mark.parametrize("name", [".draft-x", ".final", ".adapter", ".old-final", ".old-adapter"])
def test_whatever_bears_the_name_of_a_draft_goes_as_a_run_is_opened(name, kind, tmp_path):
    tmp_path.joinpath("run").mkdir()
    STRAYS[kind](tmp_path / "run" / name)
    if kind == "folder":
        (tmp_path / "run" / name / "inner").touch()
    run = opened(tmp_path / "run")
    assert not os.path.lexists(run.path / name)


def test_what_is_not_a_draft_stays(tmp_path):
    (tmp_path / "run/.drafts").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/kept").touch()
    (tmp_path / "run/.final").symlink_to(tmp_path / "elsewhere")
    opened(tmp_path / "run")
    assert (tmp_path / "elsewhere/kept").exists(), "a link goes, not what it leads to"
    assert (tmp_path / "run/.drafts").exists()


def test_a_run_folder_that_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name, kind in (("file", "a file"), ("link", "a link that leads nowhere")):
        with pytest.raises(ConfigError, match=f"{name} is {kind}; choose another folder"):
            RunFolder(tmp_path / name).refuse_foreign()


def strays(*paths: Path) -> None:
    """At each path something that nobody expects there: a folder with a file, a file, a pipe, a link to nothing, and one to
    a folder of somebody's."""
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        list(STRAYS.values())[number % len(STRAYS)](path)
        if path.is_dir() and not path.is_symlink():
            (path / "inner").touch()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("first", range(len(STRAYS)), ids=list(STRAYS))
def test_whatever_bears_the_name_of_a_save_goes_before_a_run_goes_on(first, tmp_path):
    run = opened(tmp_path / "run")
    commit(run, 4, load(run.path))
    prefixes = (".saving-", ".trash-", ".universal-", ".loading-", ".loading-.saving-")
    strays(*(run.checkpoints / f"{prefix}step-{number:06d}" for number in range(first + 1, 6) for prefix in prefixes))
    found = find(run, "auto")
    assert found and found.folder.name == "step-000004"
    assert os.listdir(run.checkpoints) == ["step-000004"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", STRAYS)
def test_a_save_takes_the_place_of_whatever_lies_there(kind, tmp_path):
    """Of its draft, and of a step that is to be saved again: that is moved, and nothing is lost that somebody put there."""
    run = opened(tmp_path / "run")
    draft = saving.Draft(run, 4, facts_of(run, configuration.resolved(load(run.path))) | {"metrics": {}}, 0.0, True)
    for path in (draft.folder, draft.committed):
        STRAYS[kind](path)
    draft.begin()
    assert draft.folder.is_dir() and not draft.folder.is_symlink() and not os.listdir(draft.folder)
    (draft.folder / "state.json").write_text("{}")
    draft.files.append(draft.folder / "state.json")
    draft.publish(draft.hashes())
    assert manifest.committed(run.checkpoints) == [draft.committed] and manifest.read(draft.committed)
    assert not os.path.lexists(draft.folder)
    draft.discard()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", STRAYS)
def test_what_is_loaded_past_strays_is_linked_anew(kind, tmp_path):
    run = opened(tmp_path / "run")
    folder, clean = commit(run, 4, load(run.path)), run.checkpoints / ".loading-step-000004"
    said = manifest.read(folder)
    assert said
    STRAYS[kind](clean)
    manifest.link(folder, said, clean)
    assert os.listdir(clean) == ["state.json"] and not clean.is_symlink()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", STRAYS)
def test_an_export_takes_the_place_of_whatever_lies_there(kind, tmp_path):
    for name in ("final", ".final", ".old-final"):
        STRAYS[kind](tmp_path / name)
    written: dict[Path, Any] = {}
    with export._replacing(tmp_path / "final", written) as draft:
        draft.mkdir()
        (draft / "model").write_text("x")
    assert os.listdir(tmp_path) == ["final"] and os.listdir(tmp_path / "final") == ["model"]
    assert list(written[tmp_path / "final"]) == ["model"]


def test_run_json_is_the_first_file_and_drafts_are_swept(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in (".draft-7-a", "logs"):
        (run / name).touch()
    with pytest.raises(OSError):
        opened(run)  # `logs` is a file
    assert json.loads((run / "run.json").read_text())["state"] == "running"
    assert not (run / ".draft-7-a").exists() and not (run / "config.resolved.yaml").exists()
    (run / "logs").unlink()
    first = RunFolder(run).run["run_id"]
    assert opened(run).run["run_id"] == first


# ---------------------------------------------------------------------------------------------------------------------
# Setting aside


def test_an_old_run_is_set_aside_whole_and_a_kill_within_goes_on(tmp_path):
    """Killed before each of its renames."""
    whole = tmp_path / "whole"
    config = load(whole)
    run = opened(whole)
    commit(run, 4, config)
    (whole / "metrics.jsonl").write_text("{}\n")
    (whole / "final").mkdir()
    (whole / "final/model.safetensors").write_text("weights")
    names = sorted(entry.name for entry in whole.iterdir())
    for kills in range(len(names) - 1):  # run.json stays
        folder = Path(shutil.copytree(whole, tmp_path / f"run-{kills}"))
        before = (folder / "run.json").read_bytes()
        _die_at_rename(kills, lambda folder=folder: opened(folder, "checkpoint.resume=never"))
        RunFolder(folder).refuse_foreign()
        assert changes(RunFolder(folder), load(folder, "train.learning_rate=1e-3")) == []
        new = opened(folder, f"checkpoint.resume={'auto' if kills % 2 else 'never'}")
        asides = [aside for aside in folder.glob("previous-*") if (aside / "final/model.safetensors").exists()]
        assert len(asides) == 1 and sorted(entry.name for entry in asides[0].iterdir()) == names, kills
        assert (asides[0] / "run.json").read_bytes() == before
        assert new.run["run_id"] != run.run["run_id"] and "aside" not in new.run and not manifest.committed(new.checkpoints)


class Killed(BaseException):
    pass


def _die_at_rename(number: int, work: Any) -> None:
    plain, count = Path.rename, iter(range(1000))

    def rename(self: Path, target: Any) -> Any:
        if next(count) == number:
            raise Killed
        return plain(self, target)

    Path.rename = rename  # type: ignore[method-assign]
    try:
        work()
    except Killed:
        pass
    finally:
        Path.rename = plain  # type: ignore[method-assign]


def test_a_start_anew_within_a_second_takes_another_name(tmp_path):
    for _ in range(3):
        opened(tmp_path / "run", "checkpoint.resume=never")
        (tmp_path / "run/metrics.jsonl").touch()
    assert len(list((tmp_path / "run").glob("previous-*"))) == 2


@pytest.mark.parametrize("content", ["{", "{}", "null"])
def test_a_damaged_run_is_set_aside_too(content, tmp_path):
    opened(tmp_path / "run")
    (tmp_path / "run/run.json").write_text(content)
    opened(tmp_path / "run", "checkpoint.resume=never")
    (aside,) = (tmp_path / "run").glob("previous-*")
    assert (aside / "run.json").read_text() == content


def test_what_ran_meanwhile_is_not_overwritten(tmp_path):
    run, config = RunFolder(tmp_path), load(tmp_path)
    run.look()
    opened(tmp_path)
    with pytest.raises(EnvironmentFault, match="give the same command again"):
        run.open(configuration.resolved(config), None, {}, 8, config.checkpoint.resume == "never")


# ---------------------------------------------------------------------------------------------------------------------
# run.json


SUMMARY = {"step": 8, "seconds": 1.0, "learned": {"loss": [1.0, 0.5]}, "speed": {}}
DAMAGED = [
    "", "{", "{}", "[1]", "null", "7", '"x"', "[" * 100_000, '{"run_id": 7}', '{"run_id": ""}', '{"state": "finished"}',
    *[json.dumps({"run_id": "0123456789ab", **wrong}) for wrong in (
        {"content": None}, {"content": [1]}, {"content": {"train": 7}}, {"state": 1}, {"summary": None},
        {"summary": {"step": 1}}, {"summary": SUMMARY | {"seconds": 10**400}}, {"summary": SUMMARY | {"warnings": [1]}},
        {"summary": SUMMARY | {"learned": {"loss": "x"}}}, {"exported": {"../x": [1, "a"]}},
        {"exported": {"final/x": 1}}, {"steps": "many"}, {"pid": [1]}, {"aside": 7},
    )],
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED, ids=lambda text: text[:40])
def test_a_damaged_run_json_never_loses_a_checkpoint(content, tmp_path, capsys):
    """The newest manifest tells what the run is; without one, a line says so and nothing is trained."""
    folder = tmp_path / "run"
    run = opened(folder)
    own, config = run.run, load(folder)
    (folder / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=r"run\.json: .*checkpoint\.resume=never") as refusal:
        stages.already_finished(RunFolder(folder), config)
    assert "\n" not in str(refusal.value)
    commit(run, 4, config)
    again = RunFolder(folder)
    assert not stages.already_finished(again, config)
    assert capsys.readouterr().out.count(f"run {own['run_id']} goes on") == 1
    again.open(configuration.resolved(config), None, {}, 8)
    assert again.run["run_id"] == own["run_id"] and again.run["content"] == {"train": "abc"}
    assert resume_step(again) == 4
    assert status.show(status.read(folder))


def resume_step(run: RunFolder) -> int:
    """Of a checkpoint without weights: the generators are missing in it."""
    import numpy as np
    import torch

    from dspref.run import checkpoint

    plain, checkpoint._load_rng = checkpoint._load_rng, lambda path: None
    try:
        return resume(run, find(run, "auto"), (), 0).step
    finally:
        checkpoint._load_rng = plain
        torch.manual_seed(0), np.random.seed(0)


def test_a_run_json_that_is_missing_beside_checkpoints(tmp_path):
    run = opened(tmp_path / "run")
    commit(run, 4, load(tmp_path / "run"))
    (tmp_path / "run/run.json").unlink()
    again = RunFolder(tmp_path / "run")
    again.refuse_foreign()
    assert again.run["run_id"] == run.run["run_id"] and again.look()


def test_the_run_json_of_another_run_throws_nothing_away(tmp_path):
    run, config = opened(tmp_path / "run"), load(tmp_path / "run")
    commit(run, 4, config)
    run.update(run_id="another")
    with pytest.raises(ConfigError, match="is not the record of the checkpoints"):
        resume(run, find(run, "auto"), (), 0)
    assert (tmp_path / "run/checkpoints/step-000004").exists()
    commit(run, 2, config)  # of the run that it says
    assert resume_step(run) == 2 and (tmp_path / "run/checkpoints/damaged-step-000004").exists()


def test_a_run_whose_record_is_damaged_meanwhile_ends_as_it_should(tmp_path):
    run = opened(tmp_path / "run")
    (tmp_path / "run/run.json").write_text("null")
    run.update(state="finished", summary=SUMMARY)
    assert RunFolder(tmp_path / "run").run["content"] == {"train": "abc"}


# ---------------------------------------------------------------------------------------------------------------------
# Settings


CHANGED = ["train.learning_rate=1e-3", "objective.beta=0.7", "train.seed=9"]


@pytest.mark.parametrize("damage", ["none", "missing", "half", "empty", "edited"])
@pytest.mark.parametrize("old", [False, True], ids=["settings", "digest alone"])
def test_changed_settings_are_refused_whatever_became_of_the_file(old, damage, tmp_path):
    folder = tmp_path / "run"
    config, path = load(folder), folder / "config.resolved.yaml"
    run = opened(folder)
    commit(run, 4, config)
    if old:
        said = manifest.read(folder / "checkpoints/step-000004") or {}
        assert said.pop("settings") and said["config"] == digest_of(configuration.resolved(config))
        (folder / "checkpoints/step-000004/manifest.json").write_text(json.dumps(signed(said)))
    text = path.read_text()
    if damage == "missing":
        path.unlink()
    elif damage == "edited":
        path.write_text(configuration.dump(load(folder, *CHANGED)))
    elif damage != "none":
        path.write_text(text[: len(text) // 2] if damage == "half" else "")
    if old and damage == "edited":
        return  # nothing could tell
    assert changes(RunFolder(folder), config) == []
    for change in CHANGED:
        with pytest.raises(ConfigError) as refusal:
            changes(RunFolder(folder), load(folder, change))
        assert "restore it" in str(refusal.value) and "\n" not in str(refusal.value)
    if not old:
        (line,) = changes(RunFolder(folder), load(folder, "train.max_steps=99"))
        assert line.startswith("train.max_steps: ") and line.endswith("-> 99")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["objective.loss_type=hinge"], "objective.loss_type: 'hinge', but the run in {} has 'sigmoid'; restore it"),
        (["train.warmup_steps=1"], "train.warmup_steps: 1, but the run in {} has null; leave it out"),
        (["model.lora.r=4"], "model.lora: one with settings, but the run in {} has null; leave it out"),
        (
            ["objective.beta=0.7", "train.seed=9"],
            "objective.beta: 0.7, but the run in {} has 0.1; restore it (train.seed too)",
        ),
    ],
)
def test_of_changed_settings_the_one_that_the_user_has_set_is_named(change, said, tmp_path):
    folder = tmp_path / "run"
    commit(opened(folder), 4, load(folder))
    with pytest.raises(ConfigError) as refusal:
        changes(RunFolder(folder), load(folder, *change))
    assert str(refusal.value).startswith(said.format(folder)), refusal.value


def test_a_new_key_with_its_default_is_no_change(tmp_path):
    """A manifest of an older dspref lacks it."""
    run, config = opened(tmp_path / "run"), load(tmp_path / "run")
    settings = facts_of(run, configuration.resolved(config))["settings"]
    del settings["train"]["seed"]
    commit(run, 4, config, settings=settings)
    assert changes(RunFolder(run.path), config) == []


def test_a_run_goes_on_without_the_deepspeed_keys_that_are_refused_by_now(tmp_path):
    """Which an older dspref let through; of others that are gone it is not."""
    run, config = opened(tmp_path / "run"), load(tmp_path / "run")
    strategy = configuration.resolved(config)["deepspeed"]
    strategy |= {"comms_logger": {"enabled": True}, "prescale_gradients": True}
    strategy["zero_optimization"] |= {"stage": 2, "sub_group_size": 5, "parameter_alignment": True}
    settings = facts_of(run, configuration.resolved(config))["settings"] | {"deepspeed": strategy}
    commit(run, 4, config, settings=settings, zero_stage=2)
    kept = "deepspeed={zero_optimization: {stage: 2, parameter_alignment: true}}"
    told = changes(RunFolder(run.path), load(run.path, kept))
    assert {line.split(":")[0] for line in told} >= {
        "deepspeed.comms_logger.enabled", "deepspeed.prescale_gradients",
        "deepspeed.zero_optimization.sub_group_size",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="parameter_alignment"):
        changes(RunFolder(run.path), load(run.path, "deepspeed={zero_optimization: {stage: 2}}"))


def test_an_unfinished_run_without_a_checkpoint_needs_no_settings(tmp_path):
    run = opened(tmp_path / "run")
    (run.path / "config.resolved.yaml").write_text("half: [")
    assert changes(RunFolder(run.path), load(run.path, *CHANGED)) == []


def test_a_metric_that_is_not_finite_makes_no_checkpoint_unreadable(tmp_path):
    run, config = opened(tmp_path / "run"), load(tmp_path / "run")
    commit(run, 4, config, metrics={"eval_loss": float("nan"), "eval_rewards/margins": None})
    assert resume_step(run) == 4


# ---------------------------------------------------------------------------------------------------------------------
# metrics.jsonl and events.jsonl


def lines_of(steps: range) -> bytes:
    return b"".join(json.dumps({"step": n, "loss": 1 / n, "perf/seconds": 0.5}).encode() + b"\n" for n in steps)


TAILS = {
    "short": (lambda whole: whole[:-30], 3, True),
    "half a line behind": (lambda whole: whole + b'{"step": 5, "lo', 4, False),
    "later steps behind": (lambda whole: whole + lines_of(range(5, 8)), 4, False),
    "zeroed": (lambda whole: whole[:-20] + b"\0" * 20, 3, True),
    "an invalid byte": (lambda whole: whole[:-10] + b"\xff" + whole[-9:], 3, True),
    "no object": (lambda whole: whole[:-4] + b"]]]\n", 3, True),
    "its last end": (lambda whole: whole[:-1], 4, False),
    "empty": (lambda whole: b"", 0, True),
    "gone": (lambda whole: None, 0, True),
}


@pytest.mark.parametrize("name", TAILS)
def test_a_damaged_tail_is_cut_to_whole_lines_and_told(name, tmp_path, capsys):
    damage, left, told = TAILS[name]
    path, whole = tmp_path / "metrics.jsonl", lines_of(range(1, 5))
    if (content := damage(whole)) is not None:
        path.write_bytes(content)
    recorder = metrics.Recorder(tmp_path, load(tmp_path).log, {}, {}, len(whole))
    recorder.write({"step": 5, "loss": 0.1})
    recorder.close()
    assert [line["step"] for line in metrics.training_lines(path)] == [*range(1, left + 1), 5]
    assert path.read_bytes().endswith(b"\n")
    assert capsys.readouterr().out.count("warning: ") == told
    assert status.training(curves.read(path))[0] == 5


@pytest.mark.parametrize("what", ["removed", "cut", "replaced"])
def test_metrics_that_are_lost_under_a_run_are_begun_anew_and_told(what, tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    path = tmp_path / "metrics.jsonl"
    recorder = metrics.Recorder(tmp_path, load(tmp_path).log, {}, {}, None)
    for step in (1, 2):
        recorder.write({"step": step, "loss": 0.1})
    if what == "cut":
        os.truncate(path, path.stat().st_size - 7)
    else:
        path.unlink()
        path.write_bytes(lines_of(range(1, 2))) if what == "replaced" else None
    for step in (3, 4):
        recorder.write({"step": step, "loss": 0.1})
    recorder.close()
    left = {"removed": [], "cut": [1], "replaced": [1]}[what]
    assert [line["step"] for line in metrics.training_lines(path)] == [*left, 3, 4] and path.read_bytes().endswith(b"\n")
    assert capsys.readouterr().out.count("was removed or cut while the run wrote it") == 1


def test_a_folder_that_was_emptied_under_a_run_stays_empty(tmp_path, capsys):
    """With no more than metrics in it, it would be nobody's run, and the same command would be refused."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    recorder = metrics.Recorder(folder, load(tmp_path).log, {}, {}, None)
    recorder.write({"step": 1, "loss": 0.1})
    for path in folder.iterdir():
        path.unlink()
    recorder.write({"step": 2, "loss": 0.1})
    recorder.close()
    assert not list(folder.iterdir()) and "removed or cut" not in capsys.readouterr().out


def test_damage_in_the_middle_is_passed_over_by_every_reader(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = lines_of(range(1, 6)).splitlines(keepends=True)
    rows[1] = b"\xff" + rows[1][1:]
    rows[2] = b'{"step": 3, "loss": "x", "nll_loss": []}\n'
    path.write_bytes(b"".join(rows) + b'[1]\nnull\n\n{"step": 5, "eval_loss": "x"}\n{"step": 5, "eval_loss": 0.25}\n')
    assert [line["step"] for line in metrics.training_lines(path)] == [1, 4, 5]
    assert outcome.learned(path)[0] == {"loss": (1.0, 0.2), "eval_loss": (None, 0.25)}
    mend_tail(path)
    assert outcome.learned(tmp_path / "missing.jsonl")[0] == {}


def test_an_event_after_half_a_line_has_a_line_of_its_own(tmp_path, capsys):
    run = opened(tmp_path / "run")
    run.event("start")
    with open(run.path / "events.jsonl", "a") as file:
        file.write('{"time": "2026')
    run.event("commit", step=4)
    kinds = [event["event"] for event in status.read_lines(run.path / "events.jsonl")]
    assert kinds == ["start", "commit"]
    with open(run.path / "events.jsonl", "a") as file:
        file.write('{"time": "2026')
    opened(run.path)
    assert capsys.readouterr().out.count("events.jsonl: its end is damaged") == 1
    assert (run.path / "events.jsonl").read_text().endswith("}\n")


def test_logs_are_on_disk_before_a_checkpoint_counts_on_them(tmp_path, monkeypatch):
    from dspref.run.saving import Draft

    run, config, seen = opened(tmp_path / "run"), load(tmp_path / "run"), []
    (run.path / "metrics.jsonl").write_bytes(lines_of(range(1, 3)))
    run.event("start")
    plain = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), plain(fd)))
    draft = Draft(run, 2, facts_of(run, configuration.resolved(config)) | {"metrics": {}}, 0.0, True)
    draft.begin()
    draft.write_progress(Progress(2))
    draft.publish(draft.hashes())
    assert {"metrics.jsonl", "events.jsonl"} <= set(seen)
    assert seen.index("metrics.jsonl") < len(seen) - 1 - seen[::-1].index("checkpoints")
    shutil.rmtree(run.path)
    with pytest.raises(OSError, match="was deleted or moved while the run was in it"):
        Draft(run, 3, {}, 0.0, True).begin()
    assert not run.path.exists(), "nothing is put where the folder was"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints by their names


def test_only_names_that_dspref_gives_are_checkpoints(tmp_path):
    run, config = opened(tmp_path / "run"), load(tmp_path / "run")
    for step in (999_999, 1_000_001, 4):
        commit(run, step, config)
    strange = ["step-000004.bak", "step-4", "step-0000004", "step-x", "step-000005 (copy)", "step-00000٤", ".trash-notes"]
    for name in (*strange, ".trash-step-000003", ".saving-step-000009", ".universal-step-000004"):
        (run.checkpoints / name).mkdir()
    assert [folder.name for folder in manifest.committed(run.checkpoints)] == [
        "step-000004", "step-999999", "step-1000001"
    ]  # fmt: skip
    assert resume_step(run) == 1_000_001
    assert status.read(run.path)["commit_step"] == 1_000_001
    assert prune(run, load(run.path, "checkpoint.keep_last=1").checkpoint) == []
    assert sorted(entry.name for entry in run.checkpoints.iterdir()) == sorted([*strange, "step-1000001"])


def test_every_damaged_checkpoint_is_kept(tmp_path, capsys):
    run, config = opened(tmp_path / "run"), load(tmp_path / "run")
    for _ in range(3):
        (commit(run, 4, config) / "state.json").write_text("damaged")
        assert resume(run, find(run, "auto"), (), 0).step == 0
    kept = sorted(entry.name for entry in run.checkpoints.iterdir())
    assert kept == ["damaged-step-000004", "damaged-step-000004-2", "damaged-step-000004-3"]


def test_files_that_the_manifest_does_not_name_are_not_read(tmp_path, capsys):
    run, config = opened(tmp_path / "run"), load(tmp_path / "run")
    folder = commit(run, 4, config)
    (folder / "engine").mkdir()
    (folder / "engine/mp_rank_01_model_states.pt").write_bytes(b"anything")
    (folder / ".DS_Store").touch()
    seen = []

    class Part:
        def save(self, folder):
            return []

        def load(self, folder):
            seen.extend(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))

    from dspref.run import checkpoint

    plain, checkpoint._load_rng = checkpoint._load_rng, lambda path: None
    try:
        assert resume(run, find(run, "auto"), (Part(),), 0).step == 4
    finally:
        checkpoint._load_rng = plain
    assert seen == ["state.json"]
    assert capsys.readouterr().out.count("mp_rank_01_model_states.pt is not in the manifest") == 1
    assert sorted(entry.name for entry in run.checkpoints.iterdir()) == ["step-000004"]


# ---------------------------------------------------------------------------------------------------------------------
# The model that was exported


def finished(folder: Path) -> RunFolder:
    run = opened(folder)
    (folder / "final").mkdir()
    (folder / "final/model.safetensors").write_bytes(b"weights")
    from dspref.files import flushed_tree

    exported = {f"final/{name}": entry for name, entry in flushed_tree(run.final).items()}
    run.update(state="finished", summary=SUMMARY, exported=exported)
    return RunFolder(folder)


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damage_of_the_exported_model_is_noticed(damage, tmp_path, capsys):
    folder = tmp_path / "run"
    run, config, file = finished(folder), load(folder), folder / "final/model.safetensors"
    assert stages.already_finished(run, config)
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(b"weighte" if damage == "flip" else b"weigh")
    with pytest.raises(IOFault, match="is not what the run wrote, and no checkpoint has the model") as refusal:
        stages.already_finished(RunFolder(folder), config)
    assert "\n" not in str(refusal.value)
    commit(run, 8, config)
    assert not stages.already_finished(RunFolder(folder), config), "it is exported again"
    assert "exported again from a checkpoint" in capsys.readouterr().out


def test_the_lock_that_a_kill_after_the_last_word_left_goes(tmp_path, capsys):
    run = finished(tmp_path / "run")
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = {"token": "x", "place": lock.place(), "process": [gone.pid, "1"]}
    for name in (".lock", ".lock-x"):
        (run.path / name).write_text(json.dumps(left))
    assert stages.already_finished(run, load(run.path))
    assert not [path for path in run.path.iterdir() if path.name.startswith(".lock")]


@pytest.mark.parametrize("content", [b"\xff", b"{}\n", b'{"prompt": 1}\n', b"[1]\nnull\n", b'{"prompt": "x"'])
def test_damaged_samples_are_left_out_of_the_summary(content, tmp_path, capsys):
    run = finished(tmp_path / "run")
    (run.path / "samples.jsonl").write_bytes(content)
    assert stages.already_finished(run, load(run.path))
    assert "8 steps in 1 s" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# The lock


ODD = [
    "", "{", "[1]", "null", "7", "[" * 100_000, '{"process": 5}', '{"process": ["x", 3]}', '{"process": [1]}',
    '{"attempt": null}', '{"attempt": 7}', '{"place": 7}', '{"place": ""}', '{"place": " "}',
    '{"place": null, "process": [1, "2"]}',
    json.dumps({"place": lock.place(), "process": [True, "1"]}), json.dumps({"place": lock.place(), "process": [-1, "1"]}),
]  # fmt: skip


@pytest.mark.parametrize("content", [*ODD, "\xff"], ids=lambda text: repr(text[:30]))
def test_a_lock_with_anything_in_it(content, tmp_path):
    """Whoever wrote it just now may live; what is old is nobody's."""
    path = tmp_path / ".lock"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(EnvironmentFault) as refusal:
        lock.Lock.claim(tmp_path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value), "what to delete is named"
    os.utime(path, (1e9, 1e9))
    claimed = lock.Lock.claim(tmp_path)
    assert claimed.keep() and [entry.name for entry in tmp_path.iterdir()] == [".lock"]
    claimed.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_another_machine_whose_clock_is_ahead(tmp_path):
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"place": "elsewhere x y", "process": [7, "1"]}))
    import time

    os.utime(path, (time.time() + 7200, time.time() + 7200))
    with pytest.raises(EnvironmentFault, match=r"process 7 on elsewhere, by .*\.lock, of a time .* ahead.*delete it"):
        lock.refuse_held(tmp_path)


def test_a_lock_that_cannot_be_removed(tmp_path, monkeypatch):
    (tmp_path / ".lock").write_text(json.dumps({"place": lock.place(), "process": [2**22, "1"]}))

    def refuse(path, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(
        EnvironmentFault, match=r"\.lock is left from a run that is gone, and cannot be removed \(Operation not"
    ):
        lock.Lock.claim(tmp_path)


def test_a_lock_that_is_a_folder(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(EnvironmentFault, match="is a folder"):
        lock.Lock.claim(tmp_path)


def test_what_killed_claims_left_is_swept(tmp_path):
    gone = {"place": lock.place(), "process": [2**22 + 1, "1"], "attempt": [None, None]}
    (tmp_path / ".lock-0123").write_text(json.dumps(gone))
    (tmp_path / ".lock-4567").write_text("")  # being written
    lock.Lock.claim(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", ".lock-4567"]


def test_a_folder_that_is_gone_is_told_from_one_that_is_taken(tmp_path):
    folder = tmp_path / "run"
    claimed = lock.Lock.claim(folder)
    assert not claimed.has_gone
    (folder / "run.json").touch()
    (folder / ".lock").unlink()
    assert not claimed.has_gone, "only the lock was deleted"
    folder.rename(tmp_path / "elsewhere")
    assert claimed.has_gone


def test_a_held_folder_is_refused_before_anything_slow(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps({"place": "elsewhere", "process": [7, "1"]}))
    with pytest.raises(EnvironmentFault, match="is in use by process 7 on elsewhere"):
        stages.already_finished(RunFolder(tmp_path), load(tmp_path))


assert distributed.world().size == 1 and record.NAME == "run.json"
