"""A commit is whole or absent: killed at every file operation of a save, on either rank, with a full disk, with a slow rank.
And every way to damage one is found before a step is made from it."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Forked, until
from test_preemption import arguments, committed, events, steps_of
from test_resume import training_records
from tiny import write_run

SLOW = pytest.mark.slow
# ZeRO-1 with tensors that no other file operation orders: what DeepSpeed's own `latest` gets wrong.
STAGE = "deepspeed={zero_optimization: {stage: 1}}"
BELOW = "/checkpoints/"


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("commits"), checkpoint={"keep_last": 1}, train={"max_steps": 6})


@pytest.fixture(scope="module")
def whole(run_file, forked: Forked, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert forked.wait(forked.start(2, arguments(run_file, folder, STAGE))) == [0, 0]
    return folder


@pytest.fixture(scope="module")
def operations(run_file, forked: Forked, tmp_path_factory) -> dict[int, list[str]]:
    """What each rank does to files below checkpoints/ in a run with three saves."""
    folder = tmp_path_factory.mktemp("count")
    run = forked.start(
        2, arguments(run_file, folder / "run", STAGE), "hooks:count_operations", below=BELOW, into=str(folder)
    )
    assert forked.wait(run) == [0, 0]
    return {rank: (folder / str(rank)).read_text().splitlines() for rank in (0, 1)}


def crash_and_go_on(what: str, victim: int, point: int, run_file: Path, whole: Path, forked: Forked, run: Path) -> None:
    """Kill, then start the same command again: nothing committed is lost, nothing else is used, and the end is the same."""
    given = {"below": BELOW, "victim": victim, "point": point, "what": what}
    ranks = forked.start(2, arguments(run_file, run, STAGE), "hooks:at_operation", **given)
    codes = forked.wait(ranks)
    assert codes[victim] == -9 and codes[1 - victim] != 0, ranks.said()
    before = [event["step"] for event in events(run, "commit")]
    found = committed(run)
    # A kill after the rename and before the event leaves a commit that no event tells of.
    assert found and found[-1] >= max(before, default=0) if before else True
    assert forked.wait(forked.start(2, arguments(run_file, run, STAGE))) == [0, 0]
    resumed = [event["step"] for event in events(run, "resume")]
    assert resumed == found[-1:], "the newest commit, and only a commit"
    assert (run / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()
    assert training_records(run) == training_records(whole)
    assert not list(run.glob("checkpoints/.saving-*")) and not list(run.glob("checkpoints/.trash-*"))


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=SLOW)])
def test_killed_at_some_operations_of_a_save(victim, operations, run_file, whole, forked, tmp_path):
    total = len(operations[victim])
    crash_and_go_on("kill", victim, total * 2 // 3, run_file, whole, forked, tmp_path / "run")


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_at_every_operation_of_a_save(victim, operations, run_file, whole, forked, tmp_path):
    """Every one of the second save, which prunes the first."""
    lines = operations[victim]
    points = [int(line.split()[0]) for line in lines if "saving-step-000004" in line or "step-000002" in line]
    first = next(int(line.split()[0]) for line in lines if "saving-step-000004" in line)
    points = [point for point in points if point >= first]
    assert len(points) >= (12 if victim == 0 else 3), lines
    for point in points:
        crash_and_go_on("kill", victim, point, run_file, whole, forked, tmp_path / f"run-{point}")


@pytest.mark.slow
def test_a_kill_while_a_step_is_committed_again_keeps_the_commit(run_file, forked, tmp_path):
    """Between the two renames: the old one is out of the way, and the new one not yet in its place."""
    run = tmp_path / "run"
    assert forked.wait(forked.start(2, arguments(run_file, run, STAGE, "train.max_steps=4"))) == [0, 0]
    shutil.rmtree(run / "final")
    (run / "checkpoints/step-000004").rename(run / "checkpoints/.trash-step-000004")
    shutil.copytree(run / "checkpoints/.trash-step-000004", run / "checkpoints/.saving-step-000004")
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({k: v for k, v in state.items() if k != "summary"} | {"state": "running"}))
    assert forked.wait(forked.start(2, arguments(run_file, run, STAGE, "train.max_steps=4"))) == [0, 0]
    assert [event["step"] for event in events(run, "resume")] == [4]


def test_a_slow_rank_is_waited_for(operations, run_file, whole, forked, tmp_path):
    """Rank 1 is still writing when rank 0 is done; DeepSpeed's own marker would be there already. Both are killed."""
    run = tmp_path / "run"
    point = next(int(line.split()[0]) for line in operations[1] if "step-000004" in line and "optim_states" in line)
    given = {"below": BELOW, "victim": 1, "point": point, "what": "slow"}
    ranks = forked.start(2, arguments(run_file, run, STAGE), "hooks:at_operation", **given)
    until(lambda: list(run.glob("checkpoints/.saving-step-000004/*/*rank_0*optim_states.pt")))
    time.sleep(0.5)
    ranks.signal(9)
    forked.wait(ranks)
    assert committed(run) == [2]
    assert forked.wait(forked.start(2, arguments(run_file, run, STAGE))) == [0, 0]
    assert (run / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()


def of_the_manifest(operations: dict[int, list[str]], step: str) -> int:
    """The operation of rank 0 that begins to write the manifest of a save: the last file of a draft."""
    return [int(line.split()[0]) for line in operations[0] if f".saving-{step}/.draft-" in line and " open " in line][-1]


def test_steps_are_made_while_a_save_is_brought_to_disk(operations, run_file, whole, forked, tmp_path):
    run, gate = tmp_path / "run", tmp_path / "gate"
    held = {"victim": 0, "point": of_the_manifest(operations, "step-000002"), "what": "held", "gate": str(gate)}
    ranks = forked.start(2, arguments(run_file, run, STAGE), "hooks:at_operation", below=BELOW, **held)
    until(lambda: [step for step in steps_of(run) if step == 4])
    assert committed(run) == [], "the next save waits for the first"
    gate.touch()
    assert forked.wait(ranks) == [0, 0]
    assert [event["step"] for event in events(run, "commit")] == [2, 4, 6]
    assert (run / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()


@pytest.mark.parametrize(("what", "victim"), [("manifest", 0), ("flush", 1)])
def test_a_commit_that_fails_is_made_up_for_at_the_next_step(what, victim, operations, run_file, whole, forked, tmp_path):
    run = tmp_path / "run"
    full = {"point": of_the_manifest(operations, "step-000002"), "what": "full"} if what == "manifest" else {"step": 2}
    hook = "hooks:at_operation" if what == "manifest" else "hooks:fail_to_flush"
    ranks = forked.start(2, arguments(run_file, run, STAGE), hook, below=BELOW, victim=victim, **full)
    assert forked.wait(ranks) == [0, 0], ranks.said()
    (warning,) = [line for line in ranks.said(0).splitlines() if "checkpoint not written" in line]
    assert "warning: step 2: " in warning and "step-000002" in warning and "No space left on device" in warning
    assert [event["step"] for event in events(run, "commit")] in ([3, 4, 6], [4, 6]), "when it was heard of in time"
    assert not list(run.glob("checkpoints/.saving-*"))
    assert (run / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()


def test_a_folder_that_ranks_do_not_share_holds_no_commit(run_file, forked, tmp_path):
    """What rank 1 wrote is not there for rank 0."""
    run = tmp_path / "run"
    apart = {"victim": 1, "below": "/checkpoints/.saving-"}
    ranks = forked.start(2, arguments(run_file, run, STAGE), "hooks:write_elsewhere", into=str(tmp_path / "other"), **apart)
    assert forked.wait(ranks) == [7, 7], ranks.said()
    assert "output_dir must be shared by all machines" in ranks.said() and committed(run) == []


@pytest.mark.parametrize("victim", [pytest.param(0, marks=SLOW), 1])
def test_a_disk_that_is_full_once_costs_nothing(victim, operations, run_file, whole, forked, tmp_path):
    run = tmp_path / "run"
    points = [int(line.split()[0]) for line in operations[victim] if "step-000004" in line and " open " in line]
    given = {"below": BELOW, "victim": victim, "point": points[len(points) // 2], "what": "full"}
    ranks = forked.start(2, arguments(run_file, run, STAGE), "hooks:at_operation", **given)
    assert forked.wait(ranks) == [0, 0], ranks.said()
    assert "checkpoint not written" in ranks.said(0) and "No space left on device" in ranks.said(0)
    assert (run / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.soak), pytest.param(1, marks=SLOW)])
def test_a_disk_that_stays_full_ends_the_run_with_the_last_commit(victim, operations, run_file, whole, forked, tmp_path):
    lines = [line for line in operations[victim] if ".saving-step-000004" in line]
    for line in lines:
        run = tmp_path / f"run-{line.split()[0]}"
        given = {"below": BELOW, "victim": victim, "point": int(line.split()[0]), "what": "full", "times": 1000}
        ranks = forked.start(2, arguments(run_file, run, STAGE), "hooks:at_operation", **given)
        codes = forked.wait(ranks)
        assert codes == [7, 7], (line, ranks.said())
        assert ranks.said().count("cannot be written") == 1
        assert "Traceback" not in ranks.said() and "frame #" not in ranks.said()
        assert 2 in committed(run) or 4 in committed(run)
    assert forked.wait(forked.start(2, arguments(run_file, run, STAGE))) == [0, 0]
    assert (run / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_random_kills_over_a_whole_run(run_file, whole, forked, tmp_path):
    """Fifty kills of everything at random times, from the first moment to the export; the command is only ever repeated."""
    seconds, dice, kills, runs = _duration(run_file, forked, tmp_path), random.Random(0), 0, 0
    while kills < 50:
        run, caches = tmp_path / f"run-{runs}", {"DSPREF_CACHE": str(tmp_path / f"cache-{runs}")}
        for _ in range(9):
            ranks = forked.start(2, arguments(run_file, run, STAGE, f"reference.store={run}-store"), environment=caches)
            until_killed = dice.uniform(0, 1.1 * seconds)
            deadline = time.monotonic() + until_killed
            while time.monotonic() < deadline and len(ranks.codes) < 2:
                ranks.codes |= forked._ask("reap", [pid for pid in ranks.pids if pid not in ranks.codes])
                time.sleep(0.01)
            if len(ranks.codes) == 2:
                assert set(ranks.codes.values()) == {0}, ranks.said()
                break
            forked.end(ranks)
            forked.wait(ranks)
            kills += 1
        else:
            assert forked.wait(forked.start(2, arguments(run_file, run, STAGE), environment=caches)) == [0, 0]
        runs += 1
        assert (run / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()
        assert training_records(run) == training_records(whole)


def _duration(run_file: Path, forked: Forked, folder: Path) -> float:
    started = time.monotonic()
    caches = {"DSPREF_CACHE": str(folder / "cache")}
    assert forked.wait(forked.start(2, arguments(run_file, folder / "timed", STAGE), environment=caches)) == [0, 0]
    return time.monotonic() - started


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def _truncate(path: Path, folder: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _flip_a_bit(path: Path, folder: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _delete(path: Path, folder: Path) -> None:
    path.unlink()


def _empty(path: Path, folder: Path) -> None:
    path.write_bytes(b"")


def _take_from_another_step(path: Path, folder: Path) -> None:
    shutil.copy(folder.with_name("step-000002") / path.relative_to(folder), path)


DAMAGES: list[Callable[[Path, Path], None]] = [_truncate, _flip_a_bit, _delete, _empty, _take_from_another_step]


@pytest.fixture(scope="module")
def three_commits(run_file, forked: Forked, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three") / "run"
    stop_here = ("checkpoint.keep_last=9", "train.max_steps=7")
    assert forked.wait(forked.start(2, arguments(run_file, folder, STAGE, *stop_here))) == [0, 0]
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoints/step-000007")
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({k: v for k, v in state.items() if k != "summary"} | {"state": "running"}))
    return folder


def resumes_from(run: Path, run_file: Path, workers) -> int:
    """The step that a run of this folder goes on from; one warning line stands for each checkpoint that it passes over."""
    overrides = [f"output_dir={run}", STAGE, "checkpoint.keep_last=9", "train.max_steps=7"]
    assert workers.run("cases:run_training", config_path=str(run_file), overrides=overrides) == [0, 0]
    return events(run, "resume")[-1]["step"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_way_to_damage_every_file_is_found(three_commits, run_file, all_workers, tmp_path):
    files = sorted(p.relative_to(three_commits) for p in three_commits.glob("checkpoints/step-000006/**/*") if p.is_file())
    assert len(files) >= 7
    for file in files:
        for number, damage in enumerate(DAMAGES):
            run = tmp_path / f"{file.name}-{number}"
            shutil.copytree(three_commits, run)
            damage(run / file, run / "checkpoints/step-000006")
            if (run / file).exists() and (run / file).read_bytes() == (three_commits / file).read_bytes():
                continue  # the same in both steps
            assert resumes_from(run, run_file, all_workers[2]) == 4, (file, damage.__name__)
            log = (run / "logs/rank-0.log").read_text()
            assert log.count("warning: step-000006 is damaged") == 1, (file, damage.__name__)
            shutil.rmtree(run)


def _edit_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"world_size": 1}))


def _swap_shards(folder: Path) -> None:
    one, two = sorted(folder.glob("engine/*optim_states.pt"))[:2]
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


def _leave_an_empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _take_the_whole_of_another_step(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-000002"), folder)


def _take_the_whole_of_another_run(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    from dspref.run.manifest import signed

    (folder / "manifest.json").write_text(json.dumps(signed(manifest | {"run_id": "000000000000"})))


WHOLE = [
    _edit_manifest,
    _swap_shards,
    _leave_an_empty_folder,
    _take_the_whole_of_another_step,
    _take_the_whole_of_another_run,
]


@pytest.mark.parametrize("damage", WHOLE)
def test_a_folder_that_is_not_the_checkpoint_it_should_be(damage, three_commits, run_file, all_workers, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(three_commits, run)
    damage(run / "checkpoints/step-000006")
    assert resumes_from(run, run_file, all_workers[2]) == 4
    assert (run / "logs/rank-0.log").read_text().count("warning: step-000006 is damaged") == 1
    assert (run / "checkpoints/damaged-step-000006").exists(), "set aside, for whoever wants to look"
    assert committed(run)[-1] == 7


@pytest.mark.parametrize(("mode", "codes"), [("required", [2, 2]), ("auto", [0, 0])])
def test_nothing_sound_is_left(mode, codes, three_commits, run_file, all_workers, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(three_commits, run)
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    overrides = [f"output_dir={run}", STAGE, "checkpoint.keep_last=9", "train.max_steps=7", f"checkpoint.resume={mode}"]
    assert all_workers[2].run("cases:run_training", config_path=str(run_file), overrides=overrides) == codes
    assert ("starting from step 0" in (run / "logs/rank-0.log").read_text()) == (mode == "auto")
