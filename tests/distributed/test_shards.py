"""What a checkpoint's files name is not run: neither on resume, nor in a conversion, nor in an export."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from test_elastic import SLOW, refusal, run_file, stage, train  # noqa: F401  (the fixture)
from test_resume import forget_everything_after

from dspref.engine import shards
from dspref.errors import IOFault
from dspref.run.manifest import signed
from dspref.training import consolidate


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


# File of the checkpoint (rank 1's where there are two), and the path of keys below which the payload is put.
PLACES = {
    "weights": ("mp_rank_00_model_states.pt", ("module",)),
    "client state": ("mp_rank_00_model_states.pt", ()),
    "schedule": ("mp_rank_00_model_states.pt", ("lr_scheduler",)),
    "optimizer": ("zero_pp_rank_1_mp_rank_00_optim_states.pt", ("optimizer_state_dict",)),
    "loss scaler": ("zero_pp_rank_0_mp_rank_00_optim_states.pt", ("optimizer_state_dict", "loss_scaler", "__dict__")),
}


@pytest.fixture(scope="module")
def trained(run_file, all_workers, tmp_path_factory) -> Path:  # noqa: F811
    run = tmp_path_factory.mktemp("shards") / "run"
    assert train(all_workers[2], run_file, run, stage(2), "train.max_steps=2") == [0, 0]
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def poison(run: Path, place: str, canary: Path) -> Path:
    """Put a payload into a checkpoint, and make its manifest say that all is well; the file."""
    name, keys = PLACES[place]
    folder = run / "checkpoints/step-000002"
    file = folder / "engine" / name
    state = torch.load(file, weights_only=False)
    inner = state
    for key in keys:
        inner = inner.__dict__ if key == "__dict__" else inner[key]
    inner["payload"] = Payload(canary)
    torch.save(state, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][f"engine/{name}"] = [file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()]
    (folder / "manifest.json").write_text(json.dumps(signed(manifest)))
    return file


def assert_it_would_have_run(file: Path, canary: Path) -> None:
    assert not canary.exists()
    torch.load(file, weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize(
    ("place", "ranks"),
    [
        *[("optimizer", 2), ("client state", 1)],
        *[pytest.param(*case, marks=SLOW) for case in (("weights", 2), ("schedule", 1), ("loss scaler", 2))],
    ],
)
def test_a_resume_runs_nothing(place, ranks, run, run_file, all_workers, tmp_path):  # noqa: F811
    """On one rank the checkpoint of two would be converted."""
    canary = tmp_path / "canary"
    file = poison(run, place, canary)
    forget_everything_after(run, 2)
    code, said = refusal(all_workers[ranks], run_file, run, stage(2), "train.max_steps=2")
    assert code == 7 and said.count("\n") == 1 and said.startswith(f"{file}: names posix.mkdir"), said
    assert_it_would_have_run(file, canary)


@pytest.mark.parametrize("place", PLACES)
def test_an_export_runs_nothing(place, run, tmp_path):
    canary = tmp_path / "canary"
    file = poison(run, place, canary)
    with pytest.raises(IOFault, match=r"names posix\.mkdir"):
        consolidate.consolidate(run / "checkpoints/step-000002", tmp_path / "to")
    assert not (tmp_path / "to").exists()
    assert_it_would_have_run(file, canary)


@pytest.mark.parametrize("place", PLACES)
def test_the_conversion_itself_runs_nothing(place, run, tmp_path):
    """Even of files that nobody looked at before."""
    canary = tmp_path / "canary"
    file = poison(run, place, canary)
    folder = run / "checkpoints/step-000002"
    with shards.as_data(), pytest.raises(IOFault, match="cannot be converted") as caught:
        shards._convert(folder, shards._universal(folder))
    assert "\n" not in str(caught.value) and not shards._universal(folder).exists()
    assert_it_would_have_run(file, canary)


def test_what_deepspeed_loads_is_data_whatever_it_asks_for(run, tmp_path):
    """The universal format's own files, which DeepSpeed reads with weights_only=False."""
    folder, canary = run / "checkpoints/step-000002", tmp_path / "canary"
    universal = shards._universal(folder)
    with shards.as_data():
        shards._convert(folder, universal)
    files = [*universal.glob("engine/zero/*/fp32.pt"), universal / "engine/zero/optimizer_state.pt"]
    assert len(files) > 10
    for file in files:
        with shards.as_data():
            state = torch.load(file, weights_only=False)
        torch.save(state | {"payload": Payload(canary)}, file)
        with shards.as_data(), pytest.raises(pickle.UnpicklingError):
            torch.load(file, weights_only=False)
        with pytest.raises(pickle.UnpicklingError):
            shards.SafeCheckpointEngine().load(str(file))
        with pytest.raises(IOFault, match=r"names posix\.mkdir"):
            shards.refuse_foreign(file.parent)
    assert_it_would_have_run(files[0], canary)


@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=SLOW)])
def test_files_that_the_manifest_does_not_name_are_never_loaded(ranks, run, run_file, all_workers, tmp_path):  # noqa: F811
    """DeepSpeed takes what has a name of the right form; on one rank the checkpoint of two is converted."""
    checkpoint = run / "checkpoints/step-000002"
    consolidate.consolidate(checkpoint, tmp_path / "before")
    more = {"mp_rank_01_model_states.pt": "mp_rank_00", "zero_pp_rank_2_mp_rank_00_optim_states.pt": "zero_pp_rank_0"}
    for name, beginning in more.items():
        (like,) = (checkpoint / "engine").glob(f"{beginning}*")
        shutil.copy(like, checkpoint / "engine" / name)
    (checkpoint / "engine/zero_pp_rank_3_mp_rank_00_optim_states.pt").write_bytes(b"cposix\nsystem\n")
    consolidate.consolidate(checkpoint, tmp_path / "after")
    weights = "model.safetensors"
    assert (tmp_path / "after" / weights).read_bytes() == (tmp_path / "before" / weights).read_bytes()
    forget_everything_after(run, 2)
    assert train(all_workers[ranks], run_file, run, stage(2), "train.max_steps=2") == [0] * ranks
    assert (run / "final" / weights).read_bytes() == (tmp_path / "before" / weights).read_bytes()
    assert (run / "logs/rank-0.log").read_text().count("is not in the manifest of step-000002; it is not read") == 1
    assert not list(run.glob("checkpoints/.*"))


def test_a_file_that_is_no_checkpoint(tmp_path):
    (tmp_path / "x_model_states.pt").write_bytes(b"cposix\nsystem\n")
    with pytest.raises(IOFault, match="not in torch's format"):
        shards.refuse_foreign(tmp_path)


def test_the_scale_of_fp16_is_among_what_is_loaded(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 2, False, torch.float16)
    shards.SafeCheckpointEngine().save({"loss_scaler": scaler}, str(tmp_path / "x.pt"))
    shards.refuse_foreign(tmp_path)
    assert shards.read(tmp_path / "x.pt")["loss_scaler"].cur_scale == 2.0**16
