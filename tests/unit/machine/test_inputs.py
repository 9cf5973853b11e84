"""`dspref check` and `dspref doctor` look at what they bless: files, folders, templates, weights, packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import save_tiny, save_tokenizer, tiny_config
from typer.testing import CliRunner

from dspref import config
from dspref.cli import app
from dspref.machine import doctor, inputs, machine
from dspref.machine.context import OK, CheckContext
from dspref.machine.machine import FAIL, WARN
from dspref.machine.preflight import CHECKS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`: a model with its tokenizer; `bare`: its config alone."""
    folder = tmp_path_factory.mktemp("models")
    size = save_tokenizer(folder / "whole")
    save_tiny(folder / "whole", tiny_config("qwen2", size), seed=0)
    tiny_config("qwen2", size).save_pretrained(folder / "bare")
    return folder


@pytest.fixture
def run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of which everything is there."""
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    Path("run.yaml").write_text(
        yaml.safe_dump(
            {"model": {"name_or_path": f"{models}/whole"}, "data": {"train": {"path": "p.jsonl"}}, "output_dir": "o"}
        )
    )
    return Path("run.yaml")


def check(run: Path, *overrides: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["check", str(run), *overrides])
    return result.exit_code, result.output


def test_a_run_of_which_all_is_there_is_good_and_writes_nothing(run: Path) -> None:
    code, said = check(run)
    assert code == 0 and "good" in said and "hub" not in said
    assert not Path("o").exists()


def prepare(models: Path) -> None:
    """What the cases below name."""
    Path("empty.jsonl").touch()
    Path("pairs.txt").write_text("x")
    Path("lfs.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    for folder in ("nothing", "foreign", "taken/final", "pickled", "cut", "adapter", "broken", "shards", "lfs"):
        Path(folder).mkdir(parents=True)
    Path("foreign/thesis.tex").write_text("x")
    Path("dangling").symlink_to("nowhere")
    Path("odd").mkdir()
    Path("odd/checkpoints").touch()
    weights = Path(models / "whole" / "model.safetensors").read_bytes()
    for folder in ("taken/final", "pickled", "cut", "shards", "lfs"):
        Path(folder, "config.json").write_bytes((models / "bare" / "config.json").read_bytes())
        Path(folder, "tokenizer.json").write_text("{}")
    Path("pickled/pytorch_model.bin").write_bytes(b"x")
    Path("cut/model.safetensors").write_bytes(weights[:-1])
    Path("lfs/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    Path("shards/model-1.safetensors").write_bytes(weights)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    Path("shards/model.safetensors.index.json").write_text(json.dumps(index))
    Path("adapter/adapter_config.json").write_text("{}")
    Path("broken/config.json").write_text("{")
    Path("good.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% continue %}{% endfor %}"
    )
    Path("bad.jinja").write_text("a\n{% for m in messages %}{{ m.content }")
    Path("latin.jinja").write_bytes(b"\xe9{{ x }}")


CASES = {
    "data.train.path=nope.jsonl": "data.train.path: nope.jsonl: no such file or folder",
    "data.train.path=q.jsonl": "did you mean p.jsonl?",
    "data.train.path=./nope": "no such file or folder",
    "data.train=/no/such/folder": "data.train.path: /no/such/folder: no such",
    "data.train.path=no*.jsonl": "no such file matches the pattern",
    "data.train.path=empty.jsonl": "is empty",
    "data.train.path=lfs.jsonl": "git lfs pull",
    "data.train.path=pairs.txt": "unknown kind of file; name it one of .jsonl",
    "data.train.path=nothing": "holds no data file",
    "data.train=[p.jsonl, r.json]": "data.train.1.path: r.json: no such",
    "data.eval=nope.csv": "data.eval.path: nope.csv: no such",
    "data.eval={held: {path: nope.parquet}}": "data.eval.held.path: nope.parquet: no such",
    "model.name_or_path=./nope": "model.name_or_path: ./nope: no such folder",
    "model.name_or_path=/no/such": "no such folder, and no hub id",
    "model.name_or_path=p.jsonl": "is a file; give the folder",
    "model.name_or_path=nothing": "holds no config.json",
    "model.name_or_path=taken": "did you mean taken/final?",
    "model.name_or_path=adapter": "is a LoRA adapter",
    "model.name_or_path=broken": "config.json is not a JSON object",
    "model.name_or_path=pickled": "holds no *.safetensors",
    "model.name_or_path=cut": "model.safetensors is not a whole safetensors file",
    "model.name_or_path=lfs": "git lfs pull",
    "model.name_or_path=shards": "model-2.safetensors is missing",
    "model.tokenizer_name_or_path=nothing": "model.tokenizer_name_or_path: nothing: holds no tokenizer",
    "model.tokenizer_name_or_path=./nope": "model.tokenizer_name_or_path: ./nope: no such folder",
    "log.samples_file=nope.txt": "log.samples_file: nope.txt: no such file; check the path",
    "log.samples_file=empty.jsonl": "the file is empty; write at least one prompt",
    "log.samples_file=.": "is a folder, not a file; name a file",
    "model.chat_template=nope.jinja": "model.chat_template: nope.jinja: no such file",
    "model.chat_template=nothing": "is a folder, not a file; give a Jinja file",
    "model.chat_template=bad.jinja": "line 2: not valid Jinja",
    "model.chat_template=latin.jinja": "not UTF-8 text (byte 0)",
    'model.chat_template="{{ x"': "not valid Jinja",
    "model.lora.path=nothing": "model.lora.path: nothing: holds no adapter_config.json",
    "model.lora.path=adapter": "holds no adapter_model.safetensors",
    "reference.name_or_path=./nope": "reference.name_or_path: ./nope: no such folder",
    "reference.name_or_path=pickled": "reference.name_or_path: pickled: holds no *.safetensors",
    "reference.name_or_path=adapter": "holds no adapter_model.safetensors",
    "reference.store=p.jsonl": "reference.store: p.jsonl: is a file",
    "output_dir=dangling": "output_dir: dangling: is a link that leads nowhere",
    "output_dir=dangling/x/y": "output_dir: dangling/x/y: dangling is a link that leads nowhere",
    "reference.store=dangling": "reference.store: dangling: is a link that leads nowhere",
    "output_dir=odd": "holds no dspref run",
    "output_dir=p.jsonl": "output_dir: p.jsonl: is a file",
    "output_dir=p.jsonl/x": "p.jsonl is a file",
    "output_dir=/proc/no/run": "output_dir: /proc/no/run: cannot be written",
    "output_dir=foreign": "holds no dspref run",
}


def test_what_is_not_there_is_a_line_with_its_place_and_exit_code_2(run: Path, models: Path) -> None:
    prepare(models)
    for override, reason in CASES.items():
        code, said = check(run, override)
        assert code == 2 and reason in said and said.count("\n") == 1, (override, said)
        assert said.startswith(f"override '{override}': "), said
    code, said = check(run, "data.train.path=nope.jsonl", "model.name_or_path=nothing", "output_dir=foreign")
    assert code == 2 and said.count("\n") == 3


def test_what_is_there_is_good(run: Path, models: Path) -> None:
    prepare(models)
    Path("folder/sub").mkdir(parents=True)
    Path("folder/sub/train.jsonl").write_text("{}\n")
    for override in (
        "data.train.path=p*.jsonl", "data.train.path=folder", "model.chat_template=good.jinja",
        'model.chat_template="{{ messages }}"', "output_dir=a/b/c", f"reference.name_or_path={models}/whole",
    ):  # fmt: skip
        code, said = check(run, override)
        assert code == 0, (override, said)
    bare = [f"model.name_or_path={models}/bare", f"model.tokenizer_name_or_path={models}/whole"]
    assert check(run, *bare)[0] == 2 and check(run, *bare, "model.init=random")[0] == 0


def test_what_is_on_the_hub_is_said_not_to_be_checked(run: Path) -> None:
    code, said = check(run, "model.name_or_path=some/model", "data.train=some/data", "model.tokenizer_name_or_path=gpt2")
    assert code == 0
    assert (
        "not checked (hub): model.name_or_path some/model, model.tokenizer_name_or_path gpt2, data.train.path some/data"
        in said
    )


def test_what_a_conversion_left_open_is_to_be_filled_in(run: Path) -> None:
    code, said = check(run, "model.name_or_path=FILL_IN/model")
    assert code == 2 and "model.name_or_path: FILL_IN/model: is still to be filled in" in said and said.count("\n") == 1


def test_the_doctor_names_every_tracker_that_is_not_installed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda package: None)
    said = CHECKS["packages"](CheckContext(config.load(run, ["log.trackers=[comet, mlflow]"]))).text
    assert "pip install -e '.[comet]'" in said and "pip install -e '.[mlflow]'" in said


def test_a_path_beside_the_config_is_proposed(run: Path) -> None:
    Path("sub").mkdir()
    Path("run.yaml").rename("sub/run.yaml")
    Path("p.jsonl").rename("sub/p.jsonl")
    code, said = check(Path("sub/run.yaml"))
    assert code == 2 and "did you mean sub/p.jsonl? paths are relative to the working directory" in said


def test_check_loads_no_torch(run: Path) -> None:
    script = (
        "import sys; from dspref.cli import app\n"
        "try: app(['check', 'run.yaml'])\n"
        "finally: assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_the_doctor_looks_too(run: Path) -> None:
    loaded = config.load(run, ["data.train.path=nope.jsonl"])
    verdict = CHECKS["inputs"](CheckContext(loaded))
    assert verdict.level == FAIL and "data.train.path: nope.jsonl: no such file" in verdict.text
    assert CHECKS["inputs"](CheckContext(config.load(run))).level == OK
    assert CHECKS["inputs"](CheckContext()).level == OK
    one = {"inputs": {"level": FAIL}, "disk": {"level": OK}}
    assert [doctor.exit_code({"checks": c}) for c in (one, one | {"disk": {"level": FAIL}}, {})] == [2, 4, 0]


@pytest.mark.parametrize(
    ("name", "overrides", "level", "words"),
    [
        ("peft", ["model.lora={}"], FAIL, "model.lora needs it; pip install -e '.[peft]'"),
        ("bitsandbytes", ["train.optim=adamw_8bit", "deepspeed=ds_configs/zero2.json"], FAIL, "adamw_8bit needs it"),
        (
            "bitsandbytes",
            ["model.load_in_4bit=true", "model.lora=true", "deepspeed=ds_configs/zero2.json"],
            FAIL,
            "load_in_4bit",
        ),
        ("tensorboard", ["log.trackers=tensorboard"], WARN, "will be switched off without it"),
        ("wandb", ["log.trackers=wandb"], WARN, "pip install wandb"),
    ],
)
def test_packages_that_only_some_runs_need(name, overrides, level, words, run: Path, monkeypatch) -> None:
    real = machine.find_spec
    monkeypatch.setattr(machine, "find_spec", lambda package: None if package == name else real(package))
    verdict = CHECKS["packages"](CheckContext(config.load(run, overrides)))
    assert verdict.level == level and verdict.text.startswith(f"{name} is not installed") and words in verdict.text
    assert CHECKS["packages"](CheckContext(config.load(run))).level == OK
    assert CHECKS["packages"](CheckContext()).level == OK


def test_syntax_of_templates() -> None:
    assert list(inputs.syntax_fault("{{ a }}{% break %}")) != []  # outside a loop
    assert list(inputs.syntax_fault("{% for a in b %}{% break %}{% endfor %}")) == []
    assert "nested" in next(inputs.syntax_fault("{{ " + "(" * 5000 + ")" * 5000 + " }}"))
