"""Malformed files through the real command line: one line, its exit code, no traceback, nothing in the output folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from test_bad_rows import CASES, GOOD
from test_config import BAD, NOT_YAML
from tiny import preference_rows, save_tokenizer, tiny_config, write_run

# These need the tokenizer of their own test.
NEEDS_ITS_TOKENIZER = {"identical in tokens", "template refuses"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_config("qwen2", save_tokenizer(folder / "tokenizer")).save_pretrained(folder)
    return folder


def config_of(model: Path, data: Path, output: Path) -> dict:
    return {
        "model": {
            "name_or_path": str(model),
            "tokenizer_name_or_path": f"{model}/tokenizer",
            "init": "random",
            "dtype": "float32",
        },
        "data": {"train": {"path": str(data)}},
        "train": {"pairs_per_step": 2, "max_steps": 1},
        "output_dir": str(output),
    }


def test_bad_data_is_one_line_and_exit_code_3(model, all_workers, tmp_path):
    names = [name for name in CASES if name not in NEEDS_ITS_TOKENIZER]
    lines = []
    for k, name in enumerate(names):
        folder = tmp_path / str(k)
        folder.mkdir()
        file, content, _, _ = CASES[name]
        if content is not None:
            (folder / file).write_bytes(content)
        (folder / "present.jsonl").write_bytes(GOOD)
        (folder / "run.yaml").write_text(yaml.safe_dump(config_of(model, folder / file, folder / "out")))
        lines.append(["--config", str(folder / "run.yaml")])
    results = all_workers[1].run("cases:command_line", arguments=lines)[0]
    assert len(results) >= 30
    for k, (name, (code, said)) in enumerate(zip(names, results, strict=True)):
        assert code == 3, (name, code, said)
        assert said.count("\n") == 1 and str(tmp_path / str(k)) in said, (name, said)
        assert "Traceback" not in said
        assert not (tmp_path / str(k) / "out").exists(), name


def test_bad_configs_are_one_line_and_exit_code_2(all_workers, tmp_path):
    cases = {name: case[0] for name, case in {**BAD, **NOT_YAML}.items()}
    lines = []
    for k, content in enumerate(cases.values()):
        (tmp_path / f"{k}.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        lines.append(["--config", str(tmp_path / f"{k}.yaml")])
    results = all_workers[1].run("cases:command_line", arguments=lines)[0]
    assert len(results) >= 20
    for k, (name, (code, said)) in enumerate(zip(cases, results, strict=True)):
        assert code == 2, (name, code, said)
        assert said.count("\n") == 1 and said.startswith((str(tmp_path / f"{k}.yaml"), "override")), (name, said)
    assert not Path("out").exists()  # which the cases name as their run folder


def test_mistakes_that_only_the_model_shows(model, all_workers, tmp_path):
    """(overrides, exit code, what the line says): found before the run folder exists."""
    (tmp_path / "pairs.jsonl").write_bytes(GOOD)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config_of(model, tmp_path / "pairs.jsonl", tmp_path / "out")))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("irreplaceable")
    tiny_config("qwen2", 16).save_pretrained(tmp_path / "small")
    tiny_config("qwen2", 300, max_position_embeddings=2).save_pretrained(tmp_path / "short")
    quantized = {"quantization_config": {"quant_method": "fp8"}}
    for name, changes in (("fp8", quantized), ("evil", {"_attn_implementation": "evil/kernel"})):
        tiny_config("qwen2", 300).save_pretrained(tmp_path / name)
        described = tmp_path / name / "config.json"
        described.write_text(json.dumps(json.loads(described.read_text()) | changes))
    cases = [
        (["model.name_or_path=/no/such/folder"], 2, "model.name_or_path: /no/such/folder: no such folder"),
        ([f"model.tokenizer_name_or_path={model}/tokeniser"], 2, f"no such folder; did you mean {model}/tokenizer?"),
        ([f"model.name_or_path={tmp_path}/fp8"], 2, "quantized (fp8), and only full precision is trained"),
        ([f"reference.name_or_path={tmp_path}/fp8"], 2, "reference.name_or_path: "),
        ([f"reference.name_or_path={tmp_path}/evil"], 2, "holds no model.safetensors"),
        (["model.chat_template='{% if %}'"], 2, "model.chat_template: the chat template is no valid Jinja"),
        ([f"model.name_or_path={tmp_path}"], 2, "model.name_or_path"),
        ([f"model.name_or_path={tmp_path}/small"], 2, "vocabulary of 16"),
        (["data.max_length=5000"], 2, "data.max_length"),
        ([f"model.name_or_path={tmp_path}/short", "data.max_length=null"], 2, "data.max_length: null"),
        (["data.train.split=test"], 3, "no split 'test'"),
        (["data.train.path=json"], 3, "'json' is a kind of file"),
        ([f"data.eval={{path: {tmp_path}/pairs.jsonl}}"], 3, "is trained on too"),
        (["model.attn_implementation=flash_attention_2"], 4, "not available here"),
        ([f"output_dir={tmp_path}/foreign"], 2, "holds no dspref run"),
        ([f"output_dir={tmp_path}/pairs.jsonl"], 2, "is a file"),
        (["checkpoint.resume=required"], 2, "required"),
        (["reference.name_or_path=/no/such/folder"], 2, "reference.name_or_path: /no/such/folder"),
        ([f"reference.name_or_path={tmp_path}/small", "reference.mode=engine"], 2, "reference.name_or_path"),
        (["output_dir=/proc/no/run"], 4, "folders: output_dir: /proc/no"),
        ([f"output_dir={tmp_path}/broken"], 2, "run.json"),
    ]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text('{"state": "runn')
    lines = [["--config", str(tmp_path / "run.yaml"), *overrides] for overrides, _, _ in cases]
    results = all_workers[1].run("cases:command_line", arguments=lines)[0]
    for (overrides, code, reason), (got, said) in zip(cases, results, strict=True):
        assert got == code and reason in said and said.count("\n") == 1, (overrides, got, said)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "foreign" / "thesis.tex").read_text() == "irreplaceable"


def test_numbers_that_go_wrong_end_the_run_with_exit_code_5(model, all_workers, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(8, seed=1)))
    values = config_of(model, tmp_path / "pairs.jsonl", tmp_path / "out")
    values["train"] |= {"max_steps": 9, "learning_rate": 1e30, "warmup_ratio": 0.0}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert all_workers[2].run("cases:run_training", config_path=f"{tmp_path}/run.yaml", overrides=[]) == [5, 5]
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert not any("NaN" in line for line in lines)
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[0] is not None and losses[1:] == [None] * 4, "three steps may be skipped, and the fourth ends the run"


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_that_are_no_numbers_end_the_run_before_its_first_step(stage, all_workers, tmp_path):
    """Whichever rank has the shard; once the file is mended the same command trains."""
    path = write_run(tmp_path, deepspeed={"zero_optimization": {"stage": stage}}, train={"max_steps": 1})
    file = tmp_path / "model" / "model.safetensors"
    sound, weights = file.read_bytes(), load_file(file)
    name = list(weights)[-1]
    weights[name].view(-1)[-1:] = float("nan")
    save_file(weights, file, {"format": "pt"})
    assert all_workers[2].run("cases:run_training", config_path=str(path), overrides=[]) == [5, 5]
    assert f"{name} holds NaN or infinity" in json.loads((tmp_path / "run" / "run.json").read_text())["error"]
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text()
    file.write_bytes(sound)
    assert all_workers[2].run("cases:run_training", config_path=str(path), overrides=[]) == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_launcher_passes_the_exit_code_on(ranks, model, tmp_path):
    """Every rank leaves with the verdict of rank 0, and only one speaks."""
    (tmp_path / "bad.jsonl").write_bytes(GOOD + b"[1]\n")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config_of(model, tmp_path / "bad.jsonl", tmp_path / "out")))
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "launch/train.py"]
    for overrides, code, reason in (([], 3, "bad.jsonl:2"), (["train.lerning_rate=1"], 2, "lerning_rate")):
        result = subprocess.run(
            [*command, "--config", str(tmp_path / "run.yaml"), *overrides], capture_output=True, text=True, timeout=120
        )
        assert result.returncode == code, result.stdout + result.stderr
        assert "Traceback" not in result.stdout + result.stderr
        assert (result.stdout + result.stderr).count(reason + ": ") == 1
    assert not (tmp_path / "out").exists()
