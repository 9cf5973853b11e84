"""`dspref export`: the model of any committed checkpoint is, to the bit, the one that the run had, and loads anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_elastic import LORA, SLOW, refusal, run_file, stage, train  # noqa: F401  (the fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dspref.cli import app
from dspref.run.manifest import signed

STEP = "checkpoints/step-000002"
ADAPTER = "adapter_config.json"
BF16 = ("model.dtype=bfloat16",)


def export(checkpoint: Path, to: Path, *options: str) -> tuple[int, str]:
    """(exit code, what it said)."""
    result = CliRunner().invoke(app, ["export", str(checkpoint), "--to", str(to), *options])
    return result.exit_code, result.output


def trained(workers, run_file: Path, run: Path, *overrides: str) -> Path:  # noqa: F811
    assert train(workers, run_file, run, *overrides, "train.max_steps=2") == [0] * workers.size
    return run


@pytest.fixture(scope="module")
def finished(run_file, all_workers, tmp_path_factory) -> Path:  # noqa: F811
    return trained(all_workers[2], run_file, tmp_path_factory.mktemp("export") / "run", stage(3), "model.dtype=bfloat16")


def assert_same_model(folder: Path, final: Path) -> None:
    """All but the card, which has the measurements of its own step."""
    names = sorted(path.name for path in final.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    if (final / ADAPTER).exists():  # whose names are a set's, in any order
        one, other = (json.loads((path / ADAPTER).read_text()) for path in (folder, final))
        one["target_modules"], other["target_modules"] = set(one["target_modules"]), set(other["target_modules"])
        assert one == other
    for name in set(names) - {"README.md", ADAPTER}:
        assert (folder / name).read_bytes() == (final / name).read_bytes(), name


def test_the_exported_model_is_the_run_s(finished, tmp_path):
    code, said = export(finished / STEP, tmp_path / "deep/model")
    assert (code, said.strip()) == (0, f"{finished / STEP} -> {tmp_path}/deep/model")
    assert_same_model(tmp_path / "deep/model", finished / "final")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"], "a draft was left"
    AutoTokenizer.from_pretrained(tmp_path / "deep/model")


def test_the_fp32_masters_are_what_the_weights_were_rounded_from(finished, tmp_path):
    assert export(finished / STEP, tmp_path / "masters", "--dtype", "float32")[0] == 0
    masters, rounded = (load_file(folder / "model.safetensors") for folder in (tmp_path / "masters", finished / "final"))
    assert masters.keys() == rounded.keys()
    assert all(masters[name].bfloat16().equal(tensor) for name, tensor in rounded.items())
    assert not all(masters[name].equal(tensor.float()) for name, tensor in rounded.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "masters").dtype.itemsize == 4


@SLOW
@pytest.mark.parametrize(
    ("ranks", "zero", "more"),
    [
        *[(2, 0, ()), (1, 0, ()), (2, 1, ()), (2, 1, BF16), (2, 2, BF16), (1, 2, ()), (4, 3, ()), (1, 3, BF16)],
        (4, 2, ("deepspeed.zero_optimization.round_robin_gradients=true",)),
        (2, 3, ("deepspeed.zero_optimization.sub_group_size=5000",)),
        *[(2, zero, (LORA, *BF16)) for zero in (1, 2, 3)],
        (2, 0, (LORA,)),
        (2, 2, ("model.lora={r: 4, lora_alpha: 8, use_dora: true, merge_on_export: true}",)),
        (2, 3, ("model.lora={r: 4, lora_alpha: 8, merge_on_export: true}", *BF16)),
    ],
)
def test_every_stage_every_number_of_ranks(ranks, zero, more, run_file, all_workers, tmp_path):  # noqa: F811
    run = trained(all_workers[ranks], run_file, tmp_path / "run", stage(zero), *more)
    code, said = export(run / STEP, tmp_path / "model")
    assert code == 0, said
    assert_same_model(tmp_path / "model", run / "final")


@SLOW
def test_a_model_that_was_drawn_here(run_file, all_workers, tmp_path):  # noqa: F811
    run = trained(all_workers[1], run_file, tmp_path / "run", stage(2), "model.init=random")
    assert export(run / STEP, tmp_path / "model")[0] == 0
    assert_same_model(tmp_path / "model", run / "final")


def test_what_is_refused(finished, tmp_path):
    run, to = Path(shutil.copytree(finished, tmp_path / "run")), tmp_path / "to"
    (run / "checkpoints/.saving-step-000004/engine").mkdir(parents=True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/precious").write_text("kept")

    def refused(checkpoint: Path, folder: Path, code: int, *words: str) -> None:
        found, said = export(checkpoint, folder)
        assert found == code and said.count("\n") == 1 and all(word in said for word in words), (found, said)

    refused(run / "checkpoints/.saving-step-000004", to, 2, "no committed checkpoint")
    refused(tmp_path / "nowhere", to, 2, "no committed checkpoint")
    refused(run / STEP, tmp_path / "taken", 2, "--to", "is there already")
    shard = next((run / STEP / "engine").glob("*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    refused(run / STEP, to, 7, "damaged", shard.name)
    (run / STEP / "manifest.json").write_text('{"step": 2')
    refused(run / STEP, to, 7, "manifest.json cannot be read")
    (run / "config.resolved.yaml").unlink()
    refused(run / STEP, to, 2, "config.resolved.yaml: is missing")
    assert not to.exists() and (tmp_path / "taken/precious").read_text() == "kept"
    assert not list(tmp_path.glob(".export-*"))


def test_numbers_that_are_none_are_not_exported(finished, tmp_path):
    """A checkpoint of a run whose weights were lost: what its files say is not what a model is."""
    import hashlib

    import torch

    run = Path(shutil.copytree(finished, tmp_path / "run"))
    file = next((run / STEP / "engine").glob("*rank_1*optim_states.pt"))
    state = torch.load(file, weights_only=False)
    state["optimizer_state_dict"]["fp32_flat_groups"][0].detach()[7] = float("nan")
    torch.save(state, file)
    manifest = json.loads((run / STEP / "manifest.json").read_text())
    manifest["files"][f"engine/{file.name}"] = [file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()]
    (run / STEP / "manifest.json").write_text(json.dumps(signed(manifest)))
    code, said = export(run / STEP, tmp_path / "to")
    assert code == 5 and "not finite" in said and said.count("\n") == 1, said
    assert not (tmp_path / "to").exists() and not list(tmp_path.glob(".export-*"))


def test_a_run_is_exported_as_its_newest_checkpoint_is(finished, tmp_path):
    assert export(finished, tmp_path / "model") == (0, f"{finished / 'final'} -> {tmp_path}/model\n")
    assert_same_model(tmp_path / "model", finished / "final")
    assert export(finished, tmp_path / "masters", "--dtype", "float32")[1].startswith(str(finished / STEP))
    assert export(finished / STEP, tmp_path / "same", "--dtype", "float32")[0] == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "masters" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()

    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "final/model.safetensors").write_bytes(b"lost")
    code, said = export(run, tmp_path / "again")
    assert (code, said) == (0, f"{run / STEP} -> {tmp_path}/again\n")
    assert_same_model(tmp_path / "again", finished / "final")
    shutil.rmtree(run / "checkpoints")
    code, said = export(run, tmp_path / "to")
    assert code == 7 and "model.safetensors: is not what the run wrote" in said
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"state": "running"}))
    code, said = export(run, tmp_path / "to")
    assert code == 2 and "is not finished, and has no committed checkpoint" in said and not (tmp_path / "to").exists()


def test_an_adapter_is_merged_when_somebody_asks(run_file, all_workers, tmp_path):  # noqa: F811
    """By the run itself, of its checkpoint and of its final adapter: the same bytes."""
    lora = "model.lora={r: 4, lora_alpha: 8, init_lora_weights: false, merge_on_export: %s}"
    plain, merging = (
        trained(all_workers[1], run_file, tmp_path / merge, stage(2), *BF16, lora % merge) for merge in ("false", "true")
    )
    shutil.copytree(plain, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare/checkpoints")
    for k, source in enumerate((plain, plain / STEP, tmp_path / "bare", merging)):
        code, said = export(source, tmp_path / f"merged-{k}", "--merge")
        assert code == 0, said
        assert_same_model(tmp_path / f"merged-{k}", merging / "final")
        assert "library_name: transformers" in (tmp_path / f"merged-{k}/README.md").read_text()
    assert export(tmp_path / "bare", tmp_path / "wide", "--merge", "--dtype", "float32")[0] == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").dtype.itemsize == 4
    code, said = export(tmp_path / "bare", tmp_path / "to", "--dtype", "float32")
    assert code == 2 and "--dtype" in said and "leave --dtype out" in said
    assert not list(tmp_path.glob(".export-*")) and not (tmp_path / "to").exists()
    # The finished run would do nothing about it, and says what does.
    overrides = (stage(2), *BF16, "train.max_steps=2")
    code, said = refusal(all_workers[1], run_file, plain, *overrides, lora % "true")
    assert code == 2 and f"merge it by `dspref export {plain} --to FOLDER --merge`" in said
    code, said = refusal(all_workers[1], run_file, merging, *overrides, lora % "false")
    assert code == 2 and f"its adapter is in {merging / 'adapter'}" in said


def test_a_whole_model_has_no_adapter_to_merge(finished, tmp_path):
    for source in (finished, finished / STEP):
        code, said = export(source, tmp_path / "to", "--merge")
        assert (code, said.count("\n")) == (2, 1) and "no adapter" in said and not (tmp_path / "to").exists()
